"""Projections onto the dual cone of the task gradients, {v : J v >= 0}.

The projection of J^T u is J^T v with v = argmin_{v >= u} v^T G v (Quinton, Rey, arXiv 2406.16232, prop. 1; Lopez-Paz,
Ranzato, NeurIPS 2017, eq. 11). With v = u + x it is a non-negative program in x >= 0, solved in unit-diagonal form.
"""

from math import sqrt

import numpy as np

from gradsurgery.solvers.nnqp import TOLERANCE, identity, nnqp, nnqp_one, nnqp_shared
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal, unit_diagonal_one

GUESS_RIDGE = 1e-12
ROUNDING = 4 * np.finfo(float).eps
NEVER = 1e300
# From then on a solve at a time, of the passive tasks alone, takes less than solves of all tasks side by side.
MANY = 24


def dual_cone_numpy(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and the worst residual (N,) for Gramians (N, T, T) and a preference (T,); see `dual_cone`."""
    if gramian.min() >= 0 and gramian.max() < np.inf:
        return np.broadcast_to(preference, gramian.shape[:2]).copy(), np.zeros(len(gramian))
    cosine, norm = unit_diagonal(gramian)
    # Row k of -C is task k's linear term: its gradient at unit length, against every other.
    if cosine.shape[-1] > MANY and np.isfinite(cosine).all():
        solved = [nnqp_shared(C, -C, passive) for C, passive in zip(cosine, _guess(cosine), strict=True)]
        x, residual = np.stack([x for x, _ in solved]), np.array([[worst] for _, worst in solved])
    else:
        x, residual = nnqp(cosine, -cosine, _guess(cosine))
    added = ((preference * norm)[:, None] @ x)[:, 0] / norm
    return preference + added, residual.max(-1)


def _guess(cosine: np.ndarray) -> np.ndarray:
    """Which multipliers x (..., T, T) are positive: were they free, they would have the signs of the inverse."""
    one = identity(cosine.shape[-1])
    return np.linalg.inv(cosine + GUESS_RIDGE * one) > one * NEVER


def dual_cone_one(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, float] | None:
    """`dual_cone` of one Gramian (T, T) without a zero row."""
    scaled = unit_diagonal_one(gramian)
    if scaled is None:
        return None
    cosine, norm = scaled
    if cosine.min() >= 0:
        return preference.copy(), 0.0
    x, residual = nnqp_shared(cosine, -cosine, _guess(cosine))
    return preference + (preference * norm).dot(x) / norm, residual


def dual_cone_pair(a: float, b: float, c: float, preference: list[float]) -> tuple[tuple[float, float], float] | None:
    """`dual_cone` of [[a, c], [c, b]] in closed form: each gradient is freed of its part along the other."""
    p, q = preference
    if c >= 0:
        return (p, q), 0.0
    cosine = c / sqrt(a) / sqrt(b)
    # Exact but for a cosine that rounding left beyond -1.
    residual = max(cosine * cosine - 1, 0.0)
    return ((p - q * c / a, q - p * c / b), residual) if residual <= TOLERANCE else None


@solver("dual_cone", "(Tensor gramian, Tensor preference)", dual_cone_one, dual_cone_pair)
def dual_cone(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Preference-weighted sum of every task gradient's own projection onto the dual cone (UPGrad's sum).

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, non-negative.

    Returns:
        w (..., T), such that w^T J is the sum, and the worst relative optimality residual of its T programs (...,).
    """
    return dual_cone_numpy(gramian, preference)


def dual_projection_numpy(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and residual (N,) for Gramians (N, T, T) and a preference (T,); see `dual_projection`."""
    cosine, norm = unit_diagonal(gramian)
    wanted = preference * norm
    size = wanted.max(-1, keepdims=True)
    linear = -((wanted / size)[:, None] @ cosine)
    # A mean gradient that is rounding has no direction to project.
    rounding = ROUNDING * (wanted / size).sum(-1)
    linear = np.where((np.abs(linear).max(-1) <= rounding[:, None])[..., None], 0.0, linear)
    x, residual = nnqp(cosine, linear)
    return preference + x[:, 0] * size / norm, residual[:, 0]


def dual_projection_pair(
    a: float, b: float, c: float, preference: list[float]
) -> tuple[tuple[float, float], float] | None:
    """`dual_projection` of [[a, c], [c, b]] in closed form: at most one of the two gains weight."""
    p, q = preference
    m, n = sqrt(a), sqrt(b)
    cosine = c / m / n
    # How far the mean goes along each at unit length.
    first, second = p * m + cosine * q * n, cosine * p * m + q * n
    if first >= 0 and second >= 0:
        return (p, q), 0.0
    if first < 0:
        w, other = (p - first / m, q), second - cosine * first
    else:
        w, other = (p, q - second / n), first - cosine * second
    residual = max(-other, 0.0) / max(abs(first), abs(second))
    return (w, residual) if residual <= TOLERANCE else None


def dual_projection_one(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, float] | None:
    """`dual_projection` of one Gramian (T, T) without a zero row."""
    scaled = unit_diagonal_one(gramian)
    if scaled is None:
        return None
    cosine, norm = scaled
    wanted = preference * norm
    size = max(wanted.tolist())
    linear = cosine.dot(wanted) / -size
    if np.abs(linear).max() <= ROUNDING * wanted.sum() / size:
        return None
    passive = (linear > 0).nonzero()[0]
    if not len(passive) and linear.max() <= 0:
        return preference.copy(), 0.0
    solved = nnqp_one(cosine, linear, passive)
    if solved is None:
        return None
    x = solved[0]
    values = np.minimum(x, cosine.dot(x) - linear).tolist()
    residual = max(max(values), -min(values)) / np.abs(linear).max().item()
    return (preference + x * size / norm, residual) if residual <= TOLERANCE else None


@solver("dual_projection", "(Tensor gramian, Tensor preference)", dual_projection_one, dual_projection_pair)
def dual_projection(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projection of ``preference^T J`` onto the dual cone of the rows of J.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, positive.

    Returns:
        w (..., T) >= preference, such that w^T J is the projection, and its relative optimality residual (...,).
    """
    return dual_projection_numpy(gramian, preference)
