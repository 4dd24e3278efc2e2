"""The two passes over flat gradients: J -> Gramian, and J, w -> direction."""

from gradsurgery.kernels.flat import combine, combine_block, gramian

__all__ = ["combine", "combine_block", "gramian"]
