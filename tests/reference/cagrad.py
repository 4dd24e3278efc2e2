"""Conflict-Averse Gradient Descent for Multi-task Learning (CAGrad).

Bo Liu, Xingchao Liu, Xiaojie Jin, Peter Stone, Qiang Liu. NeurIPS 2021. https://arxiv.org/abs/2110.14048, the primal
max_d min_i g_i.d s.t. ||d - g0|| <= k with k = c ||g0||, its dual min_w g_w.g0 + k ||g_w|| over the simplex, and
Algorithm 1: u = g0 + k g_w / ||g_w||, with g0 the mean of the rows.

The dual is solved exactly: on the affine hull of some rows, with least-norm point p and b the projection of g0 on the
hull's directions, the minimiser is p - b ||p|| / sqrt(k^2 - ||b||^2) if ||b|| < k (none otherwise). All subsets of
affinely independent rows are tried; the one of least duality gap (dual value at w - primal value at u) is taken.

When g_w = 0 is optimal the formula for u says nothing. That happens exactly if 0 is in the convex hull (Pareto
stationary) and some d in the ball has g_i.d >= 0 for all i; the primal's value is then 0, and *every* such d solves
it. Taken here is the one nearest to g0, its projection on the dual cone {d: J d >= 0}: it is also the limit for
eps -> 0 of the smoothed dual, sqrt(||g_w||^2 + eps^2) for ||g_w||, which the authors' code solves with eps^2 = 1e-8.
A zero row is such a case: it puts 0 in the hull. If k = 0 (c = 0 or g0 = 0), u = g0.

Conventions. `rescale` (authors' code, not the paper): 0 none, 1 divides by 1 + c^2, 2 divides by 1 + c. `scale` "sum"
multiplies by T, as the authors do on NYUv2 and Cityscapes "to match the sum loss"; "mean" is the paper's. Deviation
from the authors' code: none of its additive epsilons (1e-8, 1e-4), and no SLSQP.
"""

from itertools import combinations

import cvxpy as cp
import numpy as np


def primal_value(J: np.ndarray, d: np.ndarray) -> float:
    """min_i g_i.d, the worst task's first-order gain along d, which the primal maximises over the ball."""
    return float((np.asarray(J, dtype=np.float64) @ d).min())


def dual_value(J: np.ndarray, w: np.ndarray, c: float) -> float:
    """g_w.g0 + c ||g0|| ||g_w||, minimised by the dual over the simplex; the primal value at the optimum."""
    J = np.asarray(J, dtype=np.float64)
    g0, gw = J.mean(axis=0), w @ J
    return float(gw @ g0 + c * np.linalg.norm(g0) * np.linalg.norm(gw))


def primal_direction(J: np.ndarray, c: float) -> np.ndarray:
    """(d,) a solution of the primal by cvxpy (mean scale, not rescaled); not unique where g_w = 0."""
    J = np.asarray(J, dtype=np.float64)
    size = np.linalg.norm(J, axis=1).max() or 1.0
    X = J / size
    g0 = X.mean(axis=0)
    d, worst = cp.Variable(J.shape[1]), cp.Variable()
    ball = cp.norm(d - g0) <= c * np.linalg.norm(g0)
    problem = cp.Problem(cp.Maximize(worst), [X @ d >= worst, ball])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return d.value * size


def cone_multipliers(A: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,) mu >= 0 that minimises ||y + mu @ A||, by trying every independent set of the rows of A (n, m)."""
    n, m = A.shape
    best, best_mu = np.inf, None
    for size in range(min(n, m) + 1):
        for active in map(list, combinations(range(n), size)):
            mu = np.zeros(n)
            if active:
                solution, _, rank, _ = np.linalg.lstsq(A[active].T, -y, rcond=1e-12)
                if rank < size:
                    continue
                mu[active] = solution
            violation = max(-mu.min(), -(A @ (y + mu @ A)).min())  # of the KKT conditions
            if violation < best:
                best, best_mu = violation, mu
    return np.clip(best_mu, 0, None)


def stationary_multipliers(X: np.ndarray, g0: np.ndarray, k: float) -> np.ndarray | None:
    """(T,) mu >= 0 with g0 + mu @ X the projection of g0 on the dual cone, if that is the solution; else None."""
    norms = np.linalg.norm(X, axis=1)
    unit = X / np.where(norms > 0, norms, 1.0)[:, None]
    lifted, apex = np.column_stack([unit, np.ones(len(X))]), np.append(np.zeros(X.shape[1]), -1.0)
    if np.linalg.norm(apex + cone_multipliers(lifted, apex) @ lifted) > 1e-10:  # 0 is outside of the hull
        return None
    mu = cone_multipliers(unit, g0)
    if np.linalg.norm(mu @ unit) > k * (1 + 1e-12):
        return None
    return mu / np.where(norms > 0, norms, 1.0)


def dual_weights(X: np.ndarray, g0: np.ndarray, k: float) -> np.ndarray:
    """(T,) w on the simplex that minimises g_w.g0 + k ||g_w||, where the optimum has g_w != 0."""
    T, d = X.shape
    best_gap, best_w = np.inf, None
    for size in range(1, min(T, d + 1) + 1):
        for support in combinations(range(T), size):
            P = X[list(support)]
            moves = np.zeros(0)
            if size > 1:
                edges = (P[1:] - P[0]).T
                both, _, rank, _ = np.linalg.lstsq(edges, np.stack([-P[0], g0], axis=1), rcond=1e-12)
                p, b = P[0] + edges @ both[:, 0], edges @ both[:, 1]
                if rank < size - 1 or b @ b >= k * k:
                    continue
                moves = both[:, 0] - both[:, 1] * np.linalg.norm(p) / np.sqrt(k * k - b @ b)
            barycentric = np.concatenate([[1 - moves.sum()], moves])
            if barycentric.min() < -1e-9:
                continue
            w = np.zeros(T)
            w[list(support)] = np.clip(barycentric, 0, None)
            w /= w.sum()
            gw = w @ X
            if not gw.any():
                continue
            u = g0 + k * gw / np.linalg.norm(gw)
            gap = gw @ u - (X @ u).min()
            if gap < best_gap:
                best_gap, best_w = gap, w
    return best_w


def weights(J: np.ndarray, c: float = 0.4, rescale: int = 1, scale: str = "sum") -> np.ndarray:
    """(T,) weights of the rows of J (T, d) in the direction. c >= 0; rescale 0, 1, 2; scale "sum" or "mean"."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    X = J / (np.linalg.norm(J, axis=1).max() or 1.0)
    g0 = X.mean(axis=0)
    k = c * np.linalg.norm(g0)
    w = np.full(T, 1 / T)
    if k > 0:
        mu = stationary_multipliers(X, g0, k)
        if mu is None:
            dual = dual_weights(X, g0, k)
            mu = k * dual / np.linalg.norm(dual @ X)
        w = w + mu
    return w * {"sum": T, "mean": 1}[scale] / {0: 1, 1: 1 + c**2, 2: 1 + c}[rescale]


def direction(J: np.ndarray, c: float = 0.4, rescale: int = 1, scale: str = "sum") -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, c, rescale, scale) @ np.asarray(J, dtype=np.float64)
