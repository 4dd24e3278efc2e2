"""The passes over flat gradients as Triton kernels: each reads J once, in the width in which it is stored.

Half-precision rows are widened in registers; sums are taken in float32 (float64 for float64 rows) within a program and
in float64 across programs, in the same order every time. This package needs Triton, and nothing else imports it before
it is asked for.
"""

from gradsurgery.kernels.device.columns import graddrop, trimmed_mean
from gradsurgery.kernels.device.combine import combine
from gradsurgery.kernels.device.gramian import gramian

__all__ = ["combine", "graddrop", "gramian", "trimmed_mean"]
