"""Projections onto the dual cone of the task gradients, {v : J v >= 0}.

The projection of J^T u is J^T v with v = argmin_{v >= u} v^T G v (Quinton, Rey, arXiv 2406.16232, prop. 1; Lopez-Paz,
Ranzato, NeurIPS 2017, eq. 11). With v = u + x it is a non-negative program in x >= 0, solved in unit-diagonal form.
"""

from operator import mul

import numpy as np

from gradsurgery.solvers.nnqp import TOLERANCE, kkt_residual_small, nnqp, nnqp_small
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal, unit_diagonal_small


def dual_cone_numpy(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and the worst residual (N,) for Gramians (N, T, T) and a preference (T,); see `dual_cone`."""
    N, T = gramian.shape[:2]
    cosine, norm = unit_diagonal(gramian)
    # Row k of -C is task k's linear term: its gradient at unit length, against every other.
    hessian = np.broadcast_to(cosine[:, None], (N, T, T, T)).reshape(-1, T, T)
    x, residual = nnqp(hessian, -cosine.reshape(-1, T))
    added = ((preference * norm)[:, None] @ x.reshape(N, T, T))[:, 0] / norm
    return preference + added, residual.reshape(N, T).max(-1)


def dual_cone_small(gramian: list[list[float]], preference: list[float]) -> tuple[list[float], float] | None:
    """`dual_cone` of one Gramian."""
    w, worst = preference[:], 0.0
    if min(map(min, gramian)) >= 0:
        return w, worst
    cosine, norm = unit_diagonal_small(gramian)
    for row, p, n in zip(cosine, preference, norm, strict=True):
        if min(row) >= 0:
            continue
        linear = [-c for c in row]
        solved = nnqp_small(cosine, linear)
        if solved is None:
            return None
        x = [max(v, 0.0) for v in solved[0]]
        worst = max(worst, kkt_residual_small(cosine, linear, x))
        w = [a + p * n * v / m for a, v, m in zip(w, x, norm, strict=True)]
    return (w, worst) if worst <= TOLERANCE else None


@solver("dual_cone", "(Tensor gramian, Tensor preference)", dual_cone_small, tasks=4)
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
    x, residual = nnqp(cosine, -(cosine @ (wanted / size)[..., None])[..., 0])
    return preference + x * size / norm, residual


def dual_projection_small(gramian: list[list[float]], preference: list[float]) -> tuple[list[float], float] | None:
    """`dual_projection` of one Gramian."""
    if min(map(min, gramian)) >= 0:
        return preference, 0.0
    cosine, norm = unit_diagonal_small(gramian)
    wanted = [p * n for p, n in zip(preference, norm, strict=True)]
    size = max(wanted)
    linear = [-sum(map(mul, row, wanted)) / size for row in cosine]
    if max(linear) <= 0:
        return preference, 0.0
    solved = nnqp_small(cosine, linear)
    if solved is None:
        return None
    x = [max(v, 0.0) for v in solved[0]]
    residual = kkt_residual_small(cosine, linear, x)
    w = [p + v * size / n for p, v, n in zip(preference, x, norm, strict=True)]
    return (w, residual) if residual <= TOLERANCE else None


@solver("dual_projection", "(Tensor gramian, Tensor preference)", dual_projection_small, tasks=6)
def dual_projection(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projection of ``preference^T J`` onto the dual cone of the rows of J.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, positive.

    Returns:
        w (..., T) >= preference, such that w^T J is the projection, and its relative optimality residual (...,).
    """
    return dual_projection_numpy(gramian, preference)
