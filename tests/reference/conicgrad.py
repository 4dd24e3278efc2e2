"""Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone (ConicGrad).

Negar Hassanpour, Muhammad Kamran Janjua, Kunlin Zhang, Sepehr Lavasani, Xiaowen Zhang, Chunhua Zhou, Chao Gao. 2025.
https://arxiv.org/abs/2502.00217: max_d min_i g_i.d such that g0.d >= c ||g0|| ||d||, g0 the mean of the rows; the
direction found is scaled to ||d|| = ||g0|| (mean scale).

Conventions. As it stands the problem is unbounded, so it is solved in the ball ||d|| <= ||g0||, where it is convex and,
its value positive, has one solution, on the sphere. By duality that is d = ||g0|| v / ||v|| with v = P(w @ J), P the
projection on the cone {v: g0.v >= c ||g0|| ||v||} and w the point of the simplex that minimises ||P(w @ J)||; that
minimum, times ||g0||, is the value. v is in the span of w @ J and g0, hence of the rows. Where the value is 0 nothing
in the cone gains for every task: d = 0 is then optimal, but would stop training, and d = g0, the cone's axis, is taken.
0 <= c <= 1; c = 1 leaves g0 alone. g0 = 0 gives 0.

Deviation. The authors do not solve for w: they keep it from step to step, move it by one regularised gradient step
(their gamma), and take d by a closed form. This is the problem that w is meant to approach, with gamma = 0: the worst
gain of this direction is the upper bound for theirs wherever theirs is in the cone.
"""

import warnings

import cvxpy as cp
import numpy as np


def projected(g: np.ndarray, g0: np.ndarray, c: float) -> tuple[np.ndarray, float, float]:
    """The projection (d,) of g on the cone {v: g0.v >= c ||g0|| ||v||}, and a, b >= 0 with projection = a g + b g0."""
    axis = g0 / np.linalg.norm(g0)
    along = g @ axis
    across = np.linalg.norm(g - along * axis)
    sine = np.sqrt(max(1 - c**2, 0.0))
    if along >= 0 and along * sine >= c * across:  # in the cone
        return g, 1.0, 0.0
    reach = c * along + sine * across  # onto the nearest ray of the boundary
    if reach <= 0 or across == 0:  # in the polar cone
        return np.zeros_like(g), 0.0, 0.0
    a = reach * sine / across
    b = (reach * c - a * along) / np.linalg.norm(g0)
    return a * g + b * g0, a, b


def duality_gap(X: np.ndarray, w: np.ndarray, g0: np.ndarray, c: float) -> float:
    """||v||^2 - min_i g_i.v at v = P(w @ X), for w on the simplex: zero only at the optimum."""
    v = projected(w @ X, g0, c)[0]
    return float(v @ v - (X @ v).min())


def newton_step(X: np.ndarray, w: np.ndarray, support: np.ndarray, g0: np.ndarray, c: float) -> np.ndarray:
    """w (T,) after a step towards g_i.P(w @ X) equal over the support, sum(w) = 1, w = 0 outside."""
    S, g, axis = X[support], w[support] @ X[support], g0 / np.linalg.norm(g0)
    v, a, b = projected(g, g0, c)
    if b == 0:  # in the cone (or in the polar cone), where P is linear
        DS = a * S.T
    else:  # v = (e.g) e, on the ray e that turns with g about the axis
        e, across = v / np.linalg.norm(v), g - (g @ axis) * axis
        normal = across / np.linalg.norm(across)
        DS = np.outer(e, e @ S.T) + a * (S.T - np.outer(axis, axis @ S.T) - np.outer(normal, normal @ S.T))
    n = len(S)
    system = np.block([[S @ DS, -np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    gains = S @ v
    step = np.linalg.lstsq(system, np.append(gains.mean() - gains, 0.0), rcond=1e-14)[0][:n]
    moved = np.zeros(len(w))
    moved[support] = np.clip(w[support] + step, 0, None)
    return moved / moved.sum() if moved.any() else w


def dual_weights(X: np.ndarray, g0: np.ndarray, c: float) -> np.ndarray:
    """(T,) w on the simplex that minimises ||P(w @ X)||.

    The multipliers of the primal's task constraints by cvxpy, then Newton on the supports they suggest; the w of least
    duality gap is taken.
    """
    basis = np.linalg.qr(X.T)[0]  # (d, min(T, d)): the solution is in the span of the rows
    rows, axis = X @ basis, basis.T @ g0 / np.linalg.norm(g0)
    d, worst = cp.Variable(basis.shape[1]), cp.Variable()
    gains = rows @ d >= worst
    problem = cp.Problem(cp.Maximize(worst), [gains, axis @ d >= c * cp.norm(d), cp.norm(d) <= 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "may be inaccurate": the duality gap tells
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    start = np.clip(np.asarray(gains.dual_value, dtype=np.float64).reshape(-1), 0, None)
    start /= start.sum()
    best_gap, best_w = duality_gap(X, start, g0, c), start
    for threshold in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        support = start > threshold
        w = np.where(support, start, 0) / start[support].sum()
        for _ in range(10):
            w = newton_step(X, w, support, g0, c)
            gap = duality_gap(X, w, g0, c)
            if gap < best_gap:
                best_gap, best_w = gap, w
    return best_w


def primal_value(J: np.ndarray, d: np.ndarray) -> float:
    """min_i g_i.d."""
    return float((np.asarray(J, dtype=np.float64) @ d).min())


def weights(J: np.ndarray, c: float = 0.5) -> np.ndarray:
    """(T,) weights of the rows of J (T, d)."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    size = np.linalg.norm(J, axis=1).max() or 1.0
    X = J / size
    g0 = X.mean(axis=0)
    length = np.linalg.norm(g0)
    if length < 1e-14:
        return np.zeros(T)
    w = dual_weights(X, g0, c)
    v, a, b = projected(w @ X, g0, c)
    if np.linalg.norm(v) < 1e-7:
        return np.full(T, 1 / T)
    return (a * w + b / T) * length / np.linalg.norm(v)


def direction(J: np.ndarray, c: float = 0.5) -> np.ndarray:
    """(d,) weights @ J, as long as the mean of the rows."""
    return weights(J, c) @ np.asarray(J, dtype=np.float64)
