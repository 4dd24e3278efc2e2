"""`gradsurgery.solvers.dual_cone` on the device.

One program a Gramian and task for the sum of projections: a Gramian's T programs run side by side, and their terms are
added up afterwards, in the same order every time.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.nnqp import nnqp
from gradsurgery.solvers.device.tile import at, load_cosines, load_norm, not_finite, times


@triton.jit(do_not_specialize=["T"])
def dual_cone_kernel(gramian, preference, added, residual, T, BLOCK: tl.constexpr):
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm, inverse = load_norm(matrix, T, BLOCK)
    own = at(norm, k, BLOCK)
    linear = -tl.load(matrix + k * T + i, mask=i < T, other=0.0) * inverse * at(inverse, k, BLOCK)
    x, worst, _ = nnqp(matrix, inverse, linear * 0.0, linear, linear > 0, T, BLOCK)
    bad = not_finite(matrix, T, BLOCK)
    p = tl.load(preference + k)
    tl.store(added + (n * T + k) * T + i, p * own * x / norm + bad, mask=i < T)
    tl.store(residual + n * T + k, worst + bad)


@triton.jit(do_not_specialize=["T"])
def dual_projection_kernel(gramian, preference, solution, residual, T, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm, inverse = load_norm(matrix, T, BLOCK)
    p = tl.load(preference + i, mask=i < T, other=0.0)
    wanted = p * norm
    size = tl.max(wanted, axis=0)
    linear = -times(load_cosines(matrix, inverse, T, BLOCK), wanted / size)
    x, worst, _ = nnqp(matrix, inverse, linear * 0.0, linear, linear > 0, T, BLOCK)
    bad = not_finite(matrix, T, BLOCK)
    tl.store(solution + n * T + i, p + x * size / norm + bad, mask=i < T)
    tl.store(residual + n, worst + bad)


def dual_cone(gramian: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.dual_cone.dual_cone`."""
    added, residual = gramian.new_empty(gramian.shape), gramian.new_empty(gramian.shape[:-1])
    launch(dual_cone_kernel, gramian, preference.contiguous(), added, residual, programs=gramian.shape[-1])
    return preference + added.sum(dim=-2), residual.amax(dim=-1)


def dual_projection(gramian: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.dual_cone.dual_projection`."""
    solution, residual = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])
    launch(dual_projection_kernel, gramian, preference.contiguous(), solution, residual)
    return solution, residual
