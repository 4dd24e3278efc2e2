"""The two passes over flat gradients: J -> Gramian, and J, w -> direction."""

from gradsurgery.kernels.flat import combine, gramian

__all__ = ["combine", "gramian"]
