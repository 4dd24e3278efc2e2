"""Point of least norm in the convex hull of the task gradients.

min_w w^T G w over the simplex (Wolfe, Math. Programming 11, 1976; the sub-problem of MGDA). With n the row norms and
C = diag(n)^-1 G diag(n)^-1, the minimiser is x / sum(x) in the coordinates x = n w of the non-negative program
min 1/2 x^T (C + q q^T) x - q^T x, q proportional to 1/n: for fixed direction of x the optimal length is in closed form,
and the value grows with w^T G w. At T = 2 it reduces to the well-known closed form.
"""

from operator import mul

import numpy as np

from gradsurgery.solvers.nnqp import TOLERANCE, nnqp, nnqp_small
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal, unit_diagonal_small


def min_norm_numpy(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) on the simplex and the residual (N,) for Gramians (N, T, T); see `min_norm`."""
    cosine, norm = unit_diagonal(gramian)
    zero = np.diagonal(gramian, axis1=-2, axis2=-1) <= 0
    any_zero: np.ndarray = np.any(zero, axis=-1, keepdims=True)
    if gramian.shape[-1] == 2:
        w = _closed_form(gramian, any_zero)
    else:
        q = norm.min(-1, keepdims=True) / norm
        x, _ = nnqp(cosine + q[:, :, None] * q[:, None, :], q)
        w = x / norm
        w = w / np.where(any_zero, 1.0, w.sum(-1, keepdims=True))
    # A zero row is itself the point of least norm; several of them share.
    w = np.where(any_zero, zero / np.maximum(zero.sum(-1, keepdims=True), 1), w)
    return w, _residual(gramian, w)


def _closed_form(gramian: np.ndarray, any_zero: np.ndarray) -> np.ndarray:
    a, b, c = gramian[:, 0, 0], gramian[:, 1, 1], gramian[:, 0, 1]
    length = a + b - 2 * c
    inner = np.clip((b - c) / np.where(length > 0, length, 1.0), 0.0, 1.0)
    first = np.where(length > 0, inner, 0.5)
    return np.where(any_zero, 0.5, np.stack([first, 1 - first], axis=-1))


def _residual(gramian: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Duality gap w^T G w - min_i (G w)_i, relative to the least squared norm of a row: the value it could have."""
    slope = (gramian @ w[..., None])[..., 0]
    gap = (w * slope).sum(-1) - slope.min(-1)
    scale = np.diagonal(gramian, axis1=-2, axis2=-1).min(-1)
    return np.maximum(gap, 0.0) / np.where(scale > 0, scale, 1.0)


def min_norm_small(gramian: list[list[float]]) -> tuple[list[float], float] | None:
    """`min_norm` of one Gramian without a zero row."""
    least = min(row[i] for i, row in enumerate(gramian))
    if least <= 0:
        return None
    cosine, norm = unit_diagonal_small(gramian)
    shortest = min(norm)
    q = [shortest / n for n in norm]
    solved = nnqp_small([[c + a * b for c, b in zip(row, q, strict=True)] for row, a in zip(cosine, q, strict=True)], q)
    if solved is None:
        return None
    w = [max(x, 0.0) / n for x, n in zip(solved[0], norm, strict=True)]
    total = sum(w)
    w = [v / total for v in w]
    slope = [sum(map(mul, row, w)) for row in gramian]
    residual = max(sum(map(mul, w, slope)) - min(slope), 0.0) / least
    return (w, residual) if residual <= TOLERANCE else None


@solver("min_norm", "(Tensor gramian)", min_norm_small, tasks=6)
def min_norm(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the point of least norm in the convex hull of the rows.

    Args:
        gramian: (..., T, T) float64.

    Returns:
        w (..., T) on the simplex, and its relative duality gap (...,). Zero rows share all the weight among them.
    """
    return min_norm_numpy(gramian)
