"""`gradsurgery.solvers.fair` on the device: the same Newton method, one program a Gramian."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.min_norm import least_norm
from gradsurgery.solvers.device.newton import relative_step
from gradsurgery.solvers.device.tile import flag, load_cosines, load_matrix, load_norm, not_finite, times

TOLERANCE = tl.constexpr(1e-8)
ITERATIONS = tl.constexpr(200)
RUNAWAY = tl.constexpr(1e8)
# 4 eps
ROUNDING = tl.constexpr(2.0**-50)


@triton.jit
def power_of(x, exponent):
    """x ** exponent, for x > 0."""
    return tl.exp(exponent * tl.log(x))


@triton.jit
def start(matrix, inverse, q, T, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """The solution for orthogonal rows, brought to the length at which its sum of equations holds."""
    positive = q > 0
    b = power_of(tl.where(positive, q, 1.0), 1 / (1 + POWER))
    inside = tl.where(positive, b, 0.0)
    square = tl.sum(inside * times(load_cosines(matrix, inverse, T, BLOCK), inside), axis=0)
    total = tl.sum(q * power_of(b, 1 - POWER), axis=0)
    ratio = total / tl.maximum(square, tl.sum(inside * inside, axis=0) * 1e-3 + 1e-300)
    stretch = power_of(tl.where(ratio > 0, ratio, 1.0), 1 / (1 + POWER))
    return tl.where(positive, b * stretch, 1.0)


@triton.jit
def line_search(pull, y, slope, bend, POWER: tl.constexpr):
    """The step length at the minimum along b (1 + t y), by Newton's method kept inside a shrinking bracket."""
    high = tl.minimum(0.99 / tl.maximum(-tl.min(y, axis=0), 1e-300), 1e6)
    low = high * 0.0
    t = tl.minimum(high, 1.0)
    for _ in range(tl.where(t > 0, 30, 0)):
        moved = 1 + t * y
        # 1 + t y is rounding away from 0.01 at the least.
        down = pull * y * power_of(moved, -POWER)
        gain = slope + t * bend - tl.sum(down, axis=0)
        curvature = bend + POWER * tl.sum(down * y / moved, axis=0)
        low = tl.where(gain < 0, t, low)
        high = tl.where(gain < 0, high, t)
        trial = t - gain / tl.where(curvature > 0, curvature, 1.0)
        # Geometric bisection: lengths may differ by orders of magnitude.
        middle = tl.where(low > 0, tl.sqrt(low * high), 0.1 * high)
        t = tl.where((low < trial) & (trial < high), trial, middle)
    return t


@triton.jit
def measure(matrix, inverse, b, p, T, BLOCK: tl.constexpr):
    """b (C b) - p (BLOCK,), 0 where p is, and its largest entry relative to p."""
    gradient = tl.where(p > 0, b * times(load_cosines(matrix, inverse, T, BLOCK), b) - p, 0.0)
    return gradient, tl.max(tl.abs(gradient / tl.where(p > 0, p, 1.0)), axis=0)


@triton.jit
def newton(matrix, inverse, q, T, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """The solution b (BLOCK,) of C b = q b^-power, and its residual."""
    positive = q > 0
    b = start(matrix, inverse, q, T, POWER, BLOCK)
    limit = tl.max(tl.where(tl.arange(0, BLOCK) < T, b, 0.0), axis=0) * RUNAWAY
    solution = b
    pull = q * power_of(b, 1 - POWER)
    gradient, residual = measure(matrix, inverse, b, pull, T, BLOCK)
    alive = flag(residual > 1e-15)
    iteration = 1
    while alive:
        y = relative_step(matrix, inverse, b, tl.where(positive, POWER * pull, 1.0), gradient, T, BLOCK)
        largest = tl.max(tl.abs(y), axis=0)
        step = times(load_cosines(matrix, inverse, T, BLOCK), b * y)
        slope, bend = tl.sum(b * step, axis=0), tl.sum(b * y * step, axis=0)
        length = tl.where(largest > 0.1, line_search(pull, y, slope, bend, POWER), 1.0)
        b = b * (1 + tl.maximum(length * y, tl.full((), -0.99, tl.float64)))
        pull = q * power_of(b, 1 - POWER)
        gradient, now = measure(matrix, inverse, b, pull, T, BLOCK)
        better = flag(now < residual)
        solution = tl.where(better, b, solution)
        residual = tl.where(better, now, residual)
        # Close by, only rounding keeps a step from improving; a runaway b means that there is no solution to find.
        alive = flag(now > 1e-15) & (better | flag(largest >= 1e-3))
        alive = alive & flag(tl.max(b, axis=0) < limit) & (iteration < ITERATIONS)
        iteration += 1
    return solution, residual


@triton.jit(do_not_specialize=["T"])
def fair_kernel(gramian, shares, solution, residual, T, BLOCK: tl.constexpr, POWER: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm, inverse = load_norm(matrix, T, BLOCK)
    present = inverse > 0
    count = tl.maximum(tl.sum(present.to(tl.int32), axis=0), 1)
    s = tl.load(shares + i, mask=i < T, other=1.0)
    log_q = tl.where(present, POWER * tl.log(s) + (POWER - 1) * tl.log(norm), 0.0)
    # b is in units of size, so that the program that is solved has no scale.
    level = tl.sum(log_q, axis=0) / count
    size = tl.exp(level / (1 + POWER))
    q = tl.where(present, tl.exp(log_q - level), 0.0)
    b, reached = newton(matrix, inverse, q, T, POWER, BLOCK)
    w = tl.where(present, b * size / norm, 0.0)
    # What rounding in C alone leaves of the residual when b is large, near a point without a solution.
    share = tl.where(present, power_of(b, POWER) / tl.where(present, q, 1.0), 0.0)
    largest = tl.max(tl.where(i < T, b, 0.0), axis=0)
    floor = T.to(tl.float64) * ROUNDING * tl.max(largest * share, axis=0)
    if (reached <= tl.maximum(TOLERANCE, tl.minimum(floor, 1e-4))) == 0:
        w = least_norm(matrix, norm, inverse, T, BLOCK)
        weighted = present & (w > 0)
        met = times(load_matrix(matrix, T, BLOCK), w) * power_of(tl.where(weighted, w / s, 1.0), POWER)
        met = tl.where(weighted, met, 0.0)
        reached = tl.max(tl.where(present, tl.abs(met - 1), 0.0), axis=0)
    bad = not_finite(matrix, T, BLOCK)
    tl.store(solution + n * T + i, w + bad, mask=i < T)
    tl.store(residual + n, reached + bad)


def fair(gramian: Tensor, shares: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.fair.fair`."""
    solution, residual = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])
    launch(fair_kernel, gramian, shares.contiguous(), solution, residual, POWER=1 / alpha)
    return solution, residual


def nash(gramian: Tensor, preference: Tensor) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.fair.nash`."""
    return fair(gramian, preference, 1.0)
