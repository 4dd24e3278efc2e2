"""The Nash bargaining weights: G a = p / a elementwise, a > 0.

In unit-diagonal form C b = p / b, b = n a: the stationarity of the convex 1/2 b^T C b - sum p log b, whose Newton
method converges from anywhere under the damping of self-concordant functions (Nesterov, Nemirovskii 1994).
No solution exists at a Pareto-stationary point (some convex combination of the gradients is 0), where b runs away.
"""

from math import sqrt

import numpy as np

from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal

TOLERANCE = 1e-8
ITERATIONS = 100
RUNAWAY = 1e8


def nash_numpy(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and residual (N,) for Gramians (N, T, T) and a preference (T,); see `nash`."""
    cosine, norm = unit_diagonal(gramian)
    present = np.diagonal(gramian, axis1=-2, axis2=-1) > 0
    p = np.where(present, preference, 0.0)
    b, residual = (_newton_one(cosine[0], p[0]) if len(p) == 1 else None) or _newton(cosine, p)
    a = np.where(present, b / norm, 0.0)
    # What rounding in C alone leaves of the residual when b is large, near a point without a solution.
    floor = 4 * np.finfo(float).eps * gramian.shape[-1] * (b**2).max(-1)
    for n in np.flatnonzero(~(residual <= np.maximum(TOLERANCE, np.minimum(floor, 1e-4)))):
        a[n] = min_norm_numpy(gramian[n : n + 1])[0]
    return a, residual


def _newton_one(cosine: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """`_newton` for a single C (T, T), undamped and in log b, which is shorter and nearly always gets there."""
    T = len(p)
    if p.min() <= 0:
        return None
    b = _start(cosine[None], p[None])[0]
    for _ in range(12):
        gradient = b * cosine.dot(b) - p
        residual = np.abs(gradient / p).max()
        if residual <= 1e-12:
            return b[None], residual[None]
        hessian = cosine * b * b[:, None]
        hessian.flat[:: T + 1] += p
        b = b * np.exp(np.clip(np.linalg.solve(hessian, -gradient), -2, 2))
    return None


def _newton(cosine: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimisers b (N, T) of 1/2 b^T C b - sum p log b, and their residual (N,).

    The Newton system is solved for the relative step y = step / b: B C B + diag(p), with B = diag(b), stays positive
    definite however small C's eigenvalues are. A zero row (p = 0) couples to nothing and keeps b = 1.
    """
    N, T = p.shape
    positive = p > 0
    b = _start(cosine, p)
    solution, residual = b.copy(), np.full(N, np.inf)
    diagonal = np.arange(T)
    alive, settled = np.ones(N, dtype=bool), np.zeros(N, dtype=bool)
    for _ in range(ITERATIONS):
        products = b * (cosine @ b[..., None])[..., 0]
        gradient = np.where(positive, products - p, 0.0)
        now = np.abs(gradient / np.where(positive, p, 1.0)).max(-1)
        better = now < residual
        solution[better], residual[better] = b[better], now[better]
        # Close by, only rounding keeps a step from improving; a runaway b means that there is no solution to find.
        alive &= (now > 1e-15) & (better | ~settled) & (b.max(-1) < RUNAWAY)
        if not alive.any():
            break
        hessian = b[:, :, None] * cosine * b[:, None, :]
        hessian[:, diagonal, diagonal] += np.where(positive, p, 1.0)
        y = np.linalg.solve(hessian, -gradient[..., None])[..., 0]
        decrement = np.sqrt(np.maximum(-(y * gradient).sum(-1), 0.0) / np.where(positive, p, np.inf).min(-1))
        settled = decrement < 1e-3
        length = np.where(decrement > 0.25, _line_search(cosine, p, b, y, 1 / (1 + decrement)), 1.0) * alive
        b = b * (1 + np.maximum(length[:, None] * y, -0.99))
    return solution, residual


def _line_search(cosine: np.ndarray, p: np.ndarray, b: np.ndarray, y: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Step lengths (N,) near the minimum along b (1 + t y), from the safe t that self-concordance gives.

    Far from the solution the safe step covers little of the way; Newton's method in the one variable covers the rest.
    """
    step = (b * y)[..., None]
    bend = (step * (cosine @ step)).sum((-2, -1))
    slope = (b[..., None] * (cosine @ step)).sum((-2, -1))
    for _ in range(6):
        ratio = y / (1 + t[:, None] * y)
        first = slope + t * bend - (p * ratio).sum(-1)
        second = bend + (p * ratio**2).sum(-1)
        room = np.where(y < 0, -1 / np.where(y < 0, y, -1.0), np.inf).min(-1)
        t = np.clip(t - first / np.where(second > 0, second, 1.0), t / 2, (t + np.minimum(room, 1e6 * t)) / 2)
    return t


def _start(cosine: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Equal b (N, T), of the length b^T C b = sum p that the solution has."""
    positive = p > 0
    spread = (cosine * (positive[:, :, None] & positive[:, None, :])).sum((-2, -1))
    size = np.sqrt(p.sum(-1) / np.maximum(spread, 1e-3 * p.shape[-1]))
    return np.where(positive, size[:, None], 1.0)


def nash_small(gramian: list[list[float]], preference: list[float]) -> tuple[list[float], float] | None:
    """`nash` of two tasks: with t = b_1 b_2 and cosine c, b_i^2 = p_i - c t, whose product is t^2."""
    if len(gramian) != 2 or gramian[0][0] <= 0 or gramian[1][1] <= 0:
        return None
    (first, inner), (_, second), (p, q) = *gramian, preference
    m, n = sqrt(first), sqrt(second)
    c = inner / m / n
    half, bend = c * (p + q), (1 - c) * (1 + c)
    if bend <= 0:
        return None
    root = sqrt(half * half + 4 * bend * p * q)
    t = 2 * p * q / (half + root) if c > 0 else (root - half) / (2 * bend)
    a, b = sqrt(max(p - c * t, 0.0)) / m, sqrt(max(q - c * t, 0.0)) / n
    residual = max(abs(a * (first * a + inner * b) / p - 1), abs(b * (inner * a + second * b) / q - 1))
    return ([a, b], residual) if residual <= 1e-12 else None


@solver("nash", "(Tensor gramian, Tensor preference)", nash_small, tasks=2)
def nash(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the (asymmetric) Nash bargaining solution.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, positive.

    Returns:
        a (..., T) with G a = p / a on the rows that are not zero (0 on those that are), and the relative residual
        max |a_i (G a)_i / p_i - 1| (...,). It stays under 1e-8, or near a Pareto-stationary point under what rounding
        of G leaves of it (1e-4 at most). Where it exceeds that, there is no solution: the weights are then those of
        the point of least norm, a direction that never conflicts.
    """
    return nash_numpy(gramian, preference)
