"""The two passes over flat gradients: J -> Gramian, and J, w -> direction."""

from gradsurgery.kernels.flat import accumulable, block_gramian, combine, combine_block, gramian

__all__ = ["accumulable", "block_gramian", "combine", "combine_block", "gramian"]
