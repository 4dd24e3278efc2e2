"""`gradsurgery.solvers.cagrad` on the device: the same Newton method on levels, one program a Gramian.

Its programs (the point of least norm, the level 0, then level after level) go through one loop around one `nnqp`.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.min_norm import hull_coordinates, hull_weights
from gradsurgery.solvers.device.nnqp import nnqp
from gradsurgery.solvers.device.tile import flag, load_matrix, load_norm, not_finite, times

ITERATIONS = tl.constexpr(100)


@triton.jit
def length_of(x, products):
    """|J^T x|, from the products G x."""
    return tl.sqrt(tl.maximum(tl.sum(x * products, axis=0), 0.0))


@triton.jit(do_not_specialize=["T"])
def cagrad_kernel(gramian, preference, solution, residual, T, BLOCK: tl.constexpr, RADIUS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < T
    matrix = gramian + n * T * T
    own, inverse = load_norm(matrix, T, BLOCK)
    v = tl.load(preference + i, mask=inside, other=0.0)
    # Everything below is in units of the root mean square norm, which leave the multipliers as they are.
    mean = tl.sum(tl.where(inverse > 0, own * own, 0.0), axis=0) / T
    unit = tl.where(mean > 0, tl.sqrt(mean), 1.0)
    norm = tl.where(inverse > 0, own / unit, 1.0)
    gain = times(load_matrix(matrix, T, BLOCK), v) / unit / unit
    radius = RADIUS * tl.sqrt(tl.maximum(tl.sum(gain * v, axis=0), 0.0))

    shortest = tl.sqrt(tl.min(tl.load(matrix + i * (T + 1), mask=inside, other=float("inf")), axis=0)) / unit
    best = gain * 0.0
    shortfall = radius * 0.0
    dual = radius * 0.0
    low = tl.min(tl.where(inside, gain, float("inf")), axis=0)
    high = radius * 0.0
    level = radius * 0.0
    support = i < 0
    stage = 0
    # Without a radius there is nothing to search: c = 0, or the mean gradient is zero.
    going = flag(radius > 0)
    while going:
        # Stage 0 is the point of least norm, 1 the level 0, and from 2 on Newton's method looks for the level.
        hull, searching = flag(stage == 0), flag(stage > 1)
        q = tl.where(hull, hull_coordinates(norm, T, BLOCK), 0.0)
        linear = tl.where(inside, tl.where(hull, q, (level - gain) / norm), 0.0)
        passive = tl.where(stage > 2, support, linear > 0)
        x, _, support = nnqp(matrix, inverse, q, linear, passive, T, BLOCK)
        now = tl.where(hull, hull_weights(x, norm, inverse, T, BLOCK), x / norm)
        products = times(load_matrix(matrix, T, BLOCK), now) / unit / unit
        length, total = length_of(now, products), tl.sum(now, axis=0)
        dual = tl.where(hull, tl.sum(now * gain, axis=0) + radius * length, dual)
        # Near a stationary point no direction may gain the level.
        missing = tl.max(tl.where(inside, (level - gain - products) / norm, -float("inf")), axis=0)
        feasible = flag(missing <= 1e-10 * radius)
        within = feasible & flag(length <= radius * (1 + 1e-13))
        stationary = flag((shortfall <= 1e-8 * shortest) & (length <= radius))
        taken = (searching & within) | ((searching == 0) & (hull == 0) & stationary)
        best = tl.where(taken, now, best)
        low = tl.where(searching & within, level, low)
        high = tl.where(searching & (within == 0), level, tl.where(searching, high, dual))
        # The slope of the length is total / length.
        step = level + (radius - length) * length / tl.where(total > 0, total, 1.0)
        known = feasible & flag(total > 0) & flag((low < step) & (step < high))
        ended = feasible & flag(tl.abs(length - radius) <= 1e-13 * radius)
        ended = ended | flag(high - low <= 1e-15 * tl.maximum(tl.abs(low), tl.abs(high)))
        level = tl.where(searching, tl.where(known, step, 0.5 * (low + high)), tl.where(hull, 0.0, high))
        going = tl.where(searching, (ended == 0) & (stage < ITERATIONS + 1), hull | (stationary == 0))
        shortfall = tl.where(hull, length, shortfall)
        stage += 1

    products = times(load_matrix(matrix, T, BLOCK), best) / unit / unit
    length, total = length_of(best, products), tl.sum(best, axis=0)
    own_bound = (tl.sum(best * gain, axis=0) + radius * length) / tl.where(total > 0, total, 1.0)
    dual = tl.where(total > 0, tl.minimum(dual, own_bound), dual)
    worst = tl.min(tl.where(inside, gain + products, float("inf")), axis=0)
    one = tl.where(radius > 0, radius, 1.0)
    gap = tl.maximum((dual - worst) / one / one, 0.0) + tl.maximum(length / one - 1, 0.0)
    bad = not_finite(matrix, T, BLOCK)
    tl.store(solution + n * T + i, best + bad, mask=inside)
    tl.store(residual + n, tl.where(radius > 0, gap, 0.0) + bad)


def cagrad_multipliers(gramian: Tensor, preference: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """See `gradsurgery.solvers.cagrad.cagrad_multipliers`."""
    solution, residual = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])
    launch(cagrad_kernel, gramian, preference.contiguous(), solution, residual, RADIUS=c)
    return solution, residual
