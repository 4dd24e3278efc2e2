"""Jacobian Descent For Multi-Objective Optimization (UPGrad).

Pierre Quinton, Valerian Rey. 2024. https://arxiv.org/abs/2406.16232, Equation 3 (projection on the dual cone of the
rows) and the definition of UPGrad: the mean over the tasks of the projections of their gradients. Mean scale; a
preference p > 0 gives the mean with weights p / sum(p).

The projection argmin_{v: J v >= 0} ||v - u|| is found in R^d by trying every linearly independent set of active
constraints (at most 2^T) and taking the one that violates the KKT conditions least; rows and u are made unit first, and
neither the cone nor its projections change by that. No Gramian, and none of the authors' code's regularisation
(norm_eps = reg_eps = 1e-4 on the trace-normalised Gramian).

The projection is unique. Its multipliers, and so the weights, are not where rows are linearly dependent.
"""

from itertools import combinations

import numpy as np


def multipliers(J: np.ndarray, U: np.ndarray) -> np.ndarray:
    """(N, T) mu >= 0 such that U + mu @ J (N, d) are the projections of the rows of U (N, d) on {v: J v >= 0}."""
    T, d = J.shape
    norms = np.linalg.norm(J, axis=1)
    sizes = np.linalg.norm(U, axis=1)
    sizes = np.where(sizes > 0, sizes, 1.0)
    rows = [i for i in range(T) if norms[i] > 0]
    unit, Y = J / np.where(norms > 0, norms, 1.0)[:, None], U / sizes[:, None]
    best = np.full(len(U), np.inf)
    mu = np.zeros((len(U), T))
    for size in range(min(len(rows), d) + 1):
        for active in map(list, combinations(rows, size)):
            trial = np.zeros((len(U), T))
            if active:
                solution, _, rank, _ = np.linalg.lstsq(unit[active].T, -Y.T, rcond=1e-12)
                if rank < size:
                    continue
                trial[:, active] = solution.T
            V = Y + trial @ unit
            violation = np.maximum(-trial.min(axis=1), -(V @ unit.T).min(axis=1))
            better = violation < best
            best[better], mu[better] = violation[better], trial[better]
    return np.clip(mu, 0, None) * sizes[:, None] / np.where(norms > 0, norms, 1.0)


def project(J: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(d,) the projection of u (d,) on the dual cone {v: J v >= 0} of the rows of J (T, d)."""
    J, u = np.asarray(J, dtype=np.float64), np.asarray(u, dtype=np.float64)
    return u + multipliers(J, u[None])[0] @ J


def shares(T: int, preference: np.ndarray | None) -> np.ndarray:
    """(T,) the weight of each task's projection in the mean, summing to 1."""
    p = np.ones(T) if preference is None else np.asarray(preference, dtype=np.float64)
    return p / p.sum()


def weights(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the rows of J (T, d) in the direction, each at least its task's share."""
    J = np.asarray(J, dtype=np.float64)
    return shares(len(J), preference) @ (np.eye(len(J)) + multipliers(J, J))


def direction(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) (preference-weighted) mean of the projected rows; J @ direction >= 0."""
    J = np.asarray(J, dtype=np.float64)
    return shares(len(J), preference) @ (J + multipliers(J, J) @ J)
