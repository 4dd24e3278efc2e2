"""Projections onto the dual cone of the task gradients, {v : J v >= 0}.

The projection of J^T u is J^T v with v = argmin_{v >= u} v^T G v (Quinton, Rey, arXiv 2406.16232, prop. 1; Lopez-Paz,
Ranzato, NeurIPS 2017, eq. 11). With v = u + x it is a non-negative program in x >= 0, solved in unit-diagonal form.
"""

import numpy as np

from gradsurgery.solvers.nnqp import TOLERANCE, kkt_residual_small, nnqp, nnqp_small
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal, unit_diagonal_small


def dual_cone_numpy(gramian: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projected weights (N, K, T) of K combinations ``weights (N, K, T)`` each, and the worst residual (N,)."""
    N, K, T = weights.shape
    cosine, norm = unit_diagonal(gramian)
    scaled = weights * norm[:, None, :]
    size = np.abs(scaled).max(-1, keepdims=True)
    size = np.where(size > 0, size, 1.0)
    linear = -(scaled / size) @ cosine
    hessian = np.broadcast_to(cosine[:, None], (N, K, T, T)).reshape(-1, T, T)
    x, residual = nnqp(hessian, linear.reshape(-1, T))
    return weights + x.reshape(N, K, T) * size / norm[:, None, :], residual.reshape(N, K).max(-1)


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


@solver("dual_cone", "(Tensor gramian, Tensor preference)", dual_cone_small)
def dual_cone(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Preference-weighted sum of every task gradient's own projection onto the dual cone (UPGrad's sum).

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, non-negative.

    Returns:
        w (..., T), such that w^T J is the sum, and the worst relative optimality residual of its T programs (...,).
    """
    N, T = gramian.shape[:2]
    projected, residual = dual_cone_numpy(gramian, np.broadcast_to(np.eye(T), (N, T, T)))
    return preference @ projected, residual
