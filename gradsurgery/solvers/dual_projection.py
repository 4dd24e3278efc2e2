"""Projection of one combination of the task gradients onto their dual cone (see `gradsurgery.solvers.dual_cone`)."""

import numpy as np

from gradsurgery.solvers.dual_cone import dual_cone_numpy
from gradsurgery.solvers.operator import solver


@solver("dual_projection", "(Tensor gramian, Tensor preference)")
def dual_projection(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projection of ``preference^T J`` onto the dual cone of the rows of J.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, non-negative.

    Returns:
        w (..., T) >= preference, such that w^T J is the projection, and its relative optimality residual (...,).
    """
    N, T = gramian.shape[:2]
    projected, residual = dual_cone_numpy(gramian, np.broadcast_to(preference, (N, 1, T)))
    return projected[:, 0], residual
