"""Point of least norm in the convex hull of the task gradients.

min_w w^T G w over the simplex (Wolfe, Math. Programming 11, 1976; the sub-problem of MGDA). With n the row norms and
C = diag(n)^-1 G diag(n)^-1, the minimiser is x / sum(x) in the coordinates x = n w of the non-negative program
min 1/2 x^T (C + q q^T) x - q^T x, q proportional to 1/n: for fixed direction of x the optimal length is in closed form,
and the value grows with w^T G w. At T = 2 it reduces to the well-known closed form.
"""

from math import inf, sqrt

import numpy as np

from gradsurgery.solvers.lapack import solve
from gradsurgery.solvers.nnqp import TOLERANCE, nnqp, nnqp_one, ones
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal


def min_norm_numpy(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) on the simplex and the residual (N,) for Gramians (N, T, T); see `min_norm`."""
    cosine, norm = unit_diagonal(gramian)
    q = norm.min(-1, keepdims=True) / norm
    x, _ = nnqp(cosine + q[:, :, None] * q[:, None, :], q[:, None])
    w = x[:, 0] / norm
    square = gramian.diagonal(0, -2, -1)
    least = square.min(-1)
    if not least.min() > 0:
        # A zero row is itself the point of least norm; several of them share.
        w = np.where(least[:, None] <= 0, square <= 0, w)
        least = np.where(least > 0, least, 1.0)
    w = w / w.sum(-1, keepdims=True)
    slope = (gramian @ w[..., None])[..., 0]
    # The duality gap, relative to the least squared norm of a row: the value it could have.
    gap = (w * slope).sum(-1) - slope.min(-1)
    return w, np.maximum(gap, 0.0) / least


def min_norm_one(gramian: np.ndarray) -> tuple[np.ndarray, float] | None:
    """`min_norm` of one Gramian (T, T) without a zero row."""
    square = gramian.diagonal().tolist()
    least = min(square)
    if not (least > 0 and sum(square) < inf):
        return None
    # Most often every task has weight.
    w = solve(gramian, ones(len(square)))
    if w is None or (total := _total(w)) is None:
        norm = np.sqrt(gramian.diagonal())
        # C + q q^T at once.
        solved = nnqp_one((gramian + least) / (norm[:, None] * norm), sqrt(least) / norm)
        if solved is None:
            return None
        w = solved[0] / norm
        total = w.sum()
    w = w / total
    slope = gramian.dot(w)
    residual = max(w.dot(slope).item() - min(slope.tolist()), 0.0) / least
    return (w, residual) if residual <= TOLERANCE else None


def _total(w: np.ndarray) -> float | None:
    """The sum of w (T,), if all of it is positive and finite."""
    values = w.tolist()
    total = sum(values)
    return total if min(values) > 0 and total < inf else None


def min_norm_pair(a: float, b: float, c: float) -> tuple[tuple[float, float], float] | None:
    """`min_norm` of [[a, c], [c, b]] in closed form."""
    first, second = max(b - c, 0.0), max(a - c, 0.0)
    total = first + second
    # Each by its own difference: from 1 less the other, a small weight would have few digits.
    first, second = (first / total, second / total) if total > 0 else (0.5, 0.5)
    u, v = a * first + c * second, c * first + b * second
    residual = max(first * u + second * v - min(u, v), 0.0) / min(a, b)
    return ((first, second), residual) if residual <= TOLERANCE else None


@solver("min_norm", "(Tensor gramian)", min_norm_one, min_norm_pair)
def min_norm(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the point of least norm in the convex hull of the rows.

    Args:
        gramian: (..., T, T) float64.

    Returns:
        w (..., T) on the simplex, and its relative duality gap (...,). Zero rows share all the weight among them.
    """
    return min_norm_numpy(gramian)
