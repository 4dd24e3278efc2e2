"""`gradsurgery.solvers.fair.nash` on the device: the same damped Newton method, one program a Gramian."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.min_norm import least_norm
from gradsurgery.solvers.device.newton import relative_step
from gradsurgery.solvers.device.tile import flag, load_cosines, load_norm, not_finite, times

TOLERANCE = tl.constexpr(1e-8)
ITERATIONS = tl.constexpr(100)
RUNAWAY = tl.constexpr(1e8)
# 4 eps
ROUNDING = tl.constexpr(2.0**-50)


@triton.jit
def start(matrix, inverse, p, T, BLOCK: tl.constexpr):
    """Equal b (BLOCK,), of the length b^T C b = sum p that the solution has."""
    positive = p > 0
    C = load_cosines(matrix, inverse, T, BLOCK)
    spread = tl.sum(tl.sum(tl.where(positive[:, None] & positive[None, :], C, 0.0), axis=1), axis=0)
    size = tl.sqrt(tl.sum(p, axis=0) / tl.maximum(spread, T.to(tl.float64) * 1e-3))
    return tl.where(positive, size, 1.0)


@triton.jit
def line_search(p, y, slope, bend, t):
    """The step length near the minimum along b (1 + t y), from the safe t that self-concordance gives."""
    room = tl.min(tl.where(y < 0, -1 / tl.where(y < 0, y, -1.0), float("inf")), axis=0)
    for _ in range(tl.where(t > 0, 6, 0)):
        ratio = y / (1 + t * y)
        gain = slope + t * bend - tl.sum(p * ratio, axis=0)
        curvature = bend + tl.sum(p * ratio * ratio, axis=0)
        trial = t - gain / tl.where(curvature > 0, curvature, 1.0)
        t = tl.minimum(tl.maximum(trial, 0.5 * t), 0.5 * (t + tl.minimum(room, 1e6 * t)))
    return t


@triton.jit
def measure(matrix, inverse, b, p, T, BLOCK: tl.constexpr):
    """b (C b) - p (BLOCK,), 0 where p is, and its largest entry relative to p."""
    gradient = tl.where(p > 0, b * times(load_cosines(matrix, inverse, T, BLOCK), b) - p, 0.0)
    return gradient, tl.max(tl.abs(gradient / tl.where(p > 0, p, 1.0)), axis=0)


@triton.jit
def newton(matrix, inverse, p, T, BLOCK: tl.constexpr):
    """The minimiser b (BLOCK,) of 1/2 b^T C b - sum p log b, and its residual."""
    positive = p > 0
    least = tl.min(tl.where(positive, p, float("inf")), axis=0)
    b = start(matrix, inverse, p, T, BLOCK)
    solution = b
    gradient, residual = measure(matrix, inverse, b, p, T, BLOCK)
    alive = flag(residual > 1e-15)
    iteration = 1
    while alive:
        y = relative_step(matrix, inverse, b, tl.where(positive, p, 1.0), gradient, T, BLOCK)
        decrement = tl.sqrt(tl.maximum(-tl.sum(y * gradient, axis=0), 0.0) / least)
        step = times(load_cosines(matrix, inverse, T, BLOCK), b * y)
        slope, bend = tl.sum(b * step, axis=0), tl.sum(b * y * step, axis=0)
        length = tl.where(decrement > 0.25, line_search(p, y, slope, bend, 1 / (1 + decrement)), 1.0)
        b = b * (1 + tl.maximum(length * y, tl.full((), -0.99, tl.float64)))
        gradient, now = measure(matrix, inverse, b, p, T, BLOCK)
        better = flag(now < residual)
        solution = tl.where(better, b, solution)
        residual = tl.where(better, now, residual)
        # Close by, only rounding keeps a step from improving; a runaway b means that there is no solution to find.
        alive = flag(now > 1e-15) & (better | flag(decrement >= 1e-3))
        alive = alive & flag(tl.max(b, axis=0) < RUNAWAY) & (iteration < ITERATIONS)
        iteration += 1
    return solution, residual


@triton.jit(do_not_specialize=["T"])
def nash_kernel(gramian, preference, solution, residual, T, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm, inverse = load_norm(matrix, T, BLOCK)
    present = inverse > 0
    p = tl.where(present, tl.load(preference + i, mask=i < T, other=0.0), 0.0)
    b, reached = newton(matrix, inverse, p, T, BLOCK)
    a = tl.where(present, b / norm, 0.0)
    largest = tl.max(tl.where(i < T, b, 0.0), axis=0)
    floor = T.to(tl.float64) * ROUNDING * largest * largest
    if (reached <= tl.maximum(TOLERANCE, tl.minimum(floor, 1e-4))) == 0:
        a = least_norm(matrix, norm, inverse, T, BLOCK)
    bad = not_finite(matrix, T, BLOCK)
    tl.store(solution + n * T + i, a + bad, mask=i < T)
    tl.store(residual + n, reached + bad)


def nash(gramian: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.fair.nash`."""
    solution, residual = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])
    launch(nash_kernel, gramian, preference.contiguous(), solution, residual)
    return solution, residual
