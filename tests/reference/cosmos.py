"""Scalable Pareto Front Approximation for Deep Multi-Objective Learning (COSMOS), its objective.

Michael Ruchte, Josif Grabocka. ICDM 2021. https://arxiv.org/abs/2103.13392: r.L - lam cos(r, L) for a preference r of
the simplex. The paper draws r ~ Dirichlet(alpha) every step and feeds it to the network as well; not here.

Convention: a preference is scaled to sum to 1, as the paper's are; none is uniform, 1/T each. Its length matters in the
first term only. lam has no common default: 0.01 to 8 in the paper, by data set.
"""

import numpy as np
import torch

from reference import scalarised


def objective(L: torch.Tensor, lam: float, r: torch.Tensor) -> torch.Tensor:
    """r.L - lam cos(r, L)."""
    return r @ L - lam * (r @ L) / (r.norm() * L.norm())


def weights(losses: np.ndarray, lam: float, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) gradient of the objective in the losses (T,), not all zero; lam >= 0; preference (T,) >= 0."""
    p = np.ones(len(losses)) if preference is None else np.asarray(preference, dtype=np.float64)
    r = scalarised.tensor(p / p.sum())
    return scalarised.gradient(lambda L: objective(L, lam, r), losses)
