"""The Newton step that the fair rules share."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from gradsurgery.solvers.device.tile import factor, load_cosines, times


@triton.jit
def relative_step(matrix, inverse, b, extra, gradient, T, BLOCK: tl.constexpr):
    """The y (BLOCK,) of (B C B + diag(extra)) y = -gradient, B = diag(b), in unit-diagonal form.

    Args:
        matrix, inverse: pointer to the Gramian of the cosines C, and its inverse norms, 0 for a zero row.
        b, extra: (BLOCK,), positive.
        gradient: (BLOCK,), 0 in a padded row.
    """
    i = tl.arange(0, BLOCK)
    scale = 1 / tl.sqrt(tl.where(inverse > 0, b * b, 0.0) + extra)
    C = load_cosines(matrix, inverse, T, BLOCK)
    M = C * (b * scale)[:, None] * (b * scale)[None, :]
    M += tl.where(i[:, None] == i[None, :], (extra * scale * scale)[:, None], 0.0)
    M, basis = factor(M, tl.where(i < T, 1.0, gradient * 0.0), i < T, BLOCK)
    y = scale * tl.where(basis, times(M, -gradient * scale), 0.0)
    missing = -gradient - b * times(load_cosines(matrix, inverse, T, BLOCK), b * y) - extra * y
    return y + scale * tl.where(basis, times(M, tl.where(basis, missing * scale, 0.0)), 0.0)
