"""The passes over flat gradients: J -> Gramian; J, w -> direction; and the rules that work column by column."""

from gradsurgery.kernels.accelerator import graddrop_columns, has_kernel, trimmed_mean_columns
from gradsurgery.kernels.flat import accumulable, block_gramian, combine, combine_block, gramian

__all__ = [
    "accumulable",
    "block_gramian",
    "combine",
    "combine_block",
    "graddrop_columns",
    "gramian",
    "has_kernel",
    "trimmed_mean_columns",
]
