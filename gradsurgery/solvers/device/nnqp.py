"""`gradsurgery.solvers.nnqp` for one program on the device: min 1/2 x^T H x - f^T x subject to x >= 0.

Here H = C + q q^T, with C the cosines of a Gramian. The same block principal pivoting with Murty's rule and, where that
does not end well, the same active-set method of Lawson and Hanson, in one loop around one factorisation. In place of
the CPU's ridge, dependent columns are left out of the factorisation.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from gradsurgery.solvers.device.tile import factor, first, flag, load_cosines, some, times

TOLERANCE = tl.constexpr(1e-11)
# A tenth of it: the sign of a coordinate, relative to the largest.
WRONG = tl.constexpr(-1e-12)
BLOCK_ROUNDS = tl.constexpr(12)


@triton.jit
def load_hessian(matrix, inverse, q, T, BLOCK: tl.constexpr):
    """H, the cosines and a matrix of rank one."""
    return load_cosines(matrix, inverse, T, BLOCK) + q[:, None] * q[None, :]


@triton.jit
def solve_passive(matrix, inverse, q, linear, passive, T, BLOCK: tl.constexpr):
    """The minimiser x over the passive coordinates, its slack H x - f, which coordinates were used, and the gradient
    H x - f at the positive part of x; each (BLOCK,)."""
    i = tl.arange(0, BLOCK)
    diagonal = tl.load(matrix + i * (T + 1), mask=i < T, other=0.0) * inverse * inverse + q * q
    M, basis = factor(load_hessian(matrix, inverse, q, T, BLOCK), diagonal, passive, BLOCK)
    x = tl.where(basis, times(M, tl.where(basis, linear, 0.0)), 0.0)
    slack = linear
    gradient = linear
    # Four refinements, since an inverse loses digits where H is nearly singular, and the two products wanted: in one
    # loop, whose length the compiler cannot know, so that it stays one.
    for turn in range(tl.where(T > 0, 6, 0)):
        v = tl.where(turn < 5, x, tl.maximum(x, 0.0))
        gradient = times(load_hessian(matrix, inverse, q, T, BLOCK), v) - linear
        slack = tl.where(turn < 5, gradient, slack)
        x -= tl.where(basis & (turn < 4), times(M, tl.where(basis, gradient, 0.0)), 0.0)
    return x, slack, basis, gradient


@triton.jit
def nnqp(matrix, inverse, q, linear, passive, T, BLOCK: tl.constexpr):
    """Solves one program.

    Args:
        matrix: pointer to a Gramian, T x T.
        inverse: (BLOCK,), of its row norms, 0 for a zero row.
        q: (BLOCK,), 0 in a padded row.
        linear: f (BLOCK,), in the range of H, not positive in a zero row.
        passive: (BLOCK,) bits, the coordinates believed to be positive.

    Returns:
        x (BLOCK,) >= 0, the residual max_j |min(x_j, (H x - f)_j)| relative to max |f|, and the coordinates used.
    """
    i = tl.arange(0, BLOCK)
    size = tl.max(tl.abs(linear), axis=0)
    unit = tl.where(size > 0, size, 1.0)
    limit = BLOCK_ROUNDS + 3 * T
    best = linear * 0.0
    support = i < 0
    residual = tl.full((), float("inf"), tl.float64)
    x = linear * 0.0
    barred = i < 0
    active = T < 0
    going = T > 0
    rounds = 0
    while going:
        trial, slack, basis, gradient = solve_passive(matrix, inverse, q, linear, passive, T, BLOCK)
        positive = tl.maximum(trial, 0.0)
        scale = tl.maximum(tl.max(tl.abs(trial), axis=0), size)
        now = tl.max(tl.abs(tl.minimum(positive, gradient)), axis=0) / unit
        better = flag(now < residual)
        best = tl.where(better, positive, best)
        support = (support & (better == 0)) | (basis & better)
        residual = tl.where(better, now, residual)

        # Principal pivoting: every coordinate of the wrong sign flips, later on the last of them alone.
        wrong = tl.where(basis, trial, slack) < scale * WRONG
        last = tl.max(tl.where(wrong, i, -1), axis=0)
        pivoted = basis ^ (wrong & ((rounds < BLOCK_ROUNDS) | (i == last)))
        stopped = (last < 0) | (rounds >= limit)

        # Active set: back to the boundary if the trial crosses it, else the steepest coordinate enters.
        crossing = active & basis & (trial <= 0)
        crossed = some(crossing)
        ratio = tl.where(crossing, x / tl.maximum(x - trial, 1e-300), float("inf"))
        length = tl.where(crossed, tl.min(ratio, axis=0), 0.0)
        leaving = crossing & (ratio <= length)
        barred = (barred & (crossed == 0)) | (passive & (basis == 0))
        open_slack = tl.where(basis | barred, float("inf"), slack)
        least = tl.min(open_slack, axis=0)
        entering = first(open_slack == least, BLOCK)
        moved = tl.where(crossed, tl.where(basis & (leaving == 0), x + length * (trial - x), 0.0), trial)
        stepped = (basis & (leaving == 0)) | ((crossed == 0) & (i == entering))
        optimal = (crossed == 0) & flag((least >= scale * -1e-14) | (least == float("inf")))

        unsolved = flag(residual > TOLERANCE)
        going = tl.where(active, (optimal == 0) & (rounds < limit + 10 * T), (stopped == 0) | unsolved)
        turns = (active == 0) & stopped
        x = tl.where(active, moved, 0.0)
        passive = (active & stepped) | ((active == 0) & (turns == 0) & pivoted)
        barred = barred & active
        active = active | turns
        rounds += 1
    return best, residual, support
