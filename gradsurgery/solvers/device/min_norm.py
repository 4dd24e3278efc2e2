"""`gradsurgery.solvers.min_norm` on the device."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.nnqp import nnqp
from gradsurgery.solvers.device.tile import load_matrix, load_norm, not_finite, times


@triton.jit
def hull_coordinates(norm, T, BLOCK: tl.constexpr):
    """q (BLOCK,) of `gradsurgery.solvers.min_norm`: 1 / n, relative to the shortest row."""
    inside = tl.arange(0, BLOCK) < T
    shortest = tl.min(tl.where(inside, norm, float("inf")), axis=0)
    return tl.where(inside, shortest / norm, 0.0)


@triton.jit
def hull_weights(x, norm, inverse, T, BLOCK: tl.constexpr):
    """Weights (BLOCK,) on the simplex from the program's x; zero rows, of which each is itself the point, share."""
    zero = (tl.arange(0, BLOCK) < T) & (inverse == 0)
    zeros = tl.sum(zero.to(tl.int32), axis=0)
    w = x / norm
    w = w / tl.where(zeros > 0, 1.0, tl.sum(w, axis=0))
    return tl.where(zeros > 0, zero.to(tl.float64) / tl.maximum(zeros, 1), w)


@triton.jit
def pair_weights(matrix, norm, inverse, T, BLOCK: tl.constexpr):
    """The closed form of two tasks, and of one."""
    i = tl.arange(0, BLOCK)
    a = tl.load(matrix)
    b = tl.load(matrix + 3, mask=T > 1, other=0.0)
    c = tl.load(matrix + 1, mask=T > 1, other=0.0)
    length = a + b - 2 * c
    inner = tl.where(length > 0, (b - c) / tl.where(length > 0, length, 1.0), 0.5)
    inner = tl.where(T > 1, tl.minimum(tl.maximum(inner, 0.0), 1.0), 1.0)
    x = tl.where(i == 0, inner, 1 - inner)
    return hull_weights(x * norm, norm, inverse, T, BLOCK)


@triton.jit
def least_norm(matrix, norm, inverse, T, BLOCK: tl.constexpr):
    """Weights (BLOCK,) of the point of least norm."""
    if BLOCK == 2:
        w = pair_weights(matrix, norm, inverse, T, BLOCK)
    else:
        q = hull_coordinates(norm, T, BLOCK)
        x, _, _ = nnqp(matrix, inverse, q, q, q > 0, T, BLOCK)
        w = hull_weights(x, norm, inverse, T, BLOCK)
    return w


@triton.jit(do_not_specialize=["T"])
def min_norm_kernel(gramian, solution, residual, T, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm, inverse = load_norm(matrix, T, BLOCK)
    w = least_norm(matrix, norm, inverse, T, BLOCK)
    slope = times(load_matrix(matrix, T, BLOCK), w)
    gap = tl.sum(w * slope, axis=0) - tl.min(tl.where(i < T, slope, float("inf")), axis=0)
    square = tl.load(matrix + i * (T + 1), mask=i < T, other=float("inf"))
    scale = tl.min(square, axis=0)
    bad = not_finite(matrix, T, BLOCK)
    tl.store(solution + n * T + i, w + bad, mask=i < T)
    tl.store(residual + n, tl.maximum(gap, 0.0) / tl.where(scale > 0, scale, 1.0) + bad)


def min_norm(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.min_norm.min_norm`."""
    solution, residual = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])
    launch(min_norm_kernel, gramian, solution, residual)
    return solution, residual
