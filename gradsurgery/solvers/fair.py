"""The alpha-fair weights: G w = (s / w)^(1/alpha) elementwise, w > 0. Nash bargaining is alpha = 1.

In unit-diagonal form C b = q b^(-1/alpha), b = n w, q = s^(1/alpha) n^(1/alpha - 1): the stationarity of a strictly
convex function of b > 0, which Newton's method minimises, with an exact line search far from the solution. No solution
exists at a Pareto-stationary point (some convex combination of the gradients is 0), where b runs away.
"""

import numpy as np

from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal

TOLERANCE = 1e-8
ITERATIONS = 200
RUNAWAY = 1e8


def fair_numpy(gramian: np.ndarray, s: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and residual (N,) for Gramians (N, T, T) and shares s (T,); see `fair`."""
    cosine, norm = unit_diagonal(gramian)
    present = np.diagonal(gramian, axis1=-2, axis2=-1) > 0
    count = np.maximum(present.sum(-1, keepdims=True), 1)
    log_q = np.where(present, np.log(s) / alpha + (1 / alpha - 1) * np.log(norm), 0.0)
    # b is in units of size, so that the program that is solved has no scale.
    level = log_q.sum(-1, keepdims=True) / count
    size = np.exp(level * alpha / (alpha + 1))
    q = np.where(present, np.exp(log_q - level), 0.0)
    b, residual = _newton(cosine, q, 1 / alpha)
    w = np.where(present, b * size / norm, 0.0)
    # What rounding in C alone leaves of the residual when b is large, near a point without a solution.
    share = b ** (1 / alpha) / np.where(present, q, np.inf)
    floor = 4 * np.finfo(float).eps * gramian.shape[-1] * (b.max(-1, keepdims=True) * share).max(-1)
    for n in np.flatnonzero(~(residual <= np.maximum(TOLERANCE, np.minimum(floor, 1e-4)))):
        w[n] = min_norm_numpy(gramian[n : n + 1])[0]
    return w, residual


def _newton(cosine: np.ndarray, q: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Solutions b (N, T) of C b = q b^-power and their residual (N,); b = 1 in a zero row (q = 0).

    As in `gradsurgery.solvers.nash`, the Newton system is solved for the relative step y = step / b.
    """
    N, T = q.shape
    positive = q > 0
    b = _start(cosine, q, power)
    limit = RUNAWAY * b.max(-1)
    solution, residual = b.copy(), np.full(N, np.inf)
    diagonal = np.arange(T)
    alive, settled = np.ones(N, dtype=bool), np.zeros(N, dtype=bool)
    for _ in range(ITERATIONS):
        pull = q * b ** (1 - power)
        gradient = np.where(positive, b * (cosine @ b[..., None])[..., 0] - pull, 0.0)
        now = np.abs(gradient / np.where(positive, pull, 1.0)).max(-1)
        better = now < residual
        solution[better], residual[better] = b[better], now[better]
        # Close by, only rounding keeps a step from improving; a runaway b means that there is no solution to find.
        alive &= (now > 1e-15) & (better | ~settled) & (b.max(-1) < limit)
        if not alive.any():
            break
        hessian = b[:, :, None] * cosine * b[:, None, :]
        hessian[:, diagonal, diagonal] += np.where(positive, power * pull, 1.0)
        y = np.linalg.solve(hessian, -gradient[..., None])[..., 0]
        settled = np.abs(y).max(-1) < 1e-3
        length = np.where(np.abs(y).max(-1) > 0.1, _line_search(cosine, q, power, b, y), 1.0) * alive
        b = b * (1 + np.maximum(length[:, None] * y, -0.99))
    return solution, residual


def _line_search(cosine: np.ndarray, q: np.ndarray, power: float, b: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Step lengths (N,) at the minimum along b (1 + t y), by Newton's method kept inside a shrinking bracket."""
    step = (b * y)[..., None]
    bend = (step * (cosine @ step)).sum((-2, -1))
    slope = (b[..., None] * (cosine @ step)).sum((-2, -1))
    pull = q * b ** (1 - power)
    low = np.zeros(len(b))
    high = np.minimum(0.99 / np.maximum(-y.min(-1), 1e-300), 1e6)
    t = np.minimum(1.0, high)
    for _ in range(30):
        moved = 1 + t[:, None] * y
        first = slope + t * bend - (pull * y * moved**-power).sum(-1)
        second = bend + power * (pull * y**2 * moved ** (-power - 1)).sum(-1)
        low, high = np.where(first < 0, t, low), np.where(first < 0, high, t)
        trial = t - first / np.where(second > 0, second, 1.0)
        # Geometric bisection: lengths may differ by orders of magnitude.
        middle = np.where(low > 0, np.sqrt(low * high), 0.1 * high)
        t = np.where((low < trial) & (trial < high), trial, middle)
    return t


def _start(cosine: np.ndarray, q: np.ndarray, power: float) -> np.ndarray:
    """The solution b (N, T) for orthogonal rows, brought to the length at which its sum of equations holds."""
    positive = q > 0
    b = np.where(positive, q, 1.0) ** (1 / (1 + power))
    inside = np.where(positive, b, 0.0)
    square = (inside[:, None] @ cosine @ inside[..., None])[:, 0, 0]
    total = (q * b ** (1 - power)).sum(-1)
    ratio = total / np.maximum(square, 1e-3 * (inside**2).sum(-1) + 1e-300)
    return np.where(positive, b * ratio[:, None] ** (1 / (1 + power)), 1.0)


@solver("fair", "(Tensor gramian, Tensor shares, float alpha)")
def fair(gramian: np.ndarray, shares: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the alpha-fair solution.

    Args:
        gramian: (..., T, T) float64.
        shares: (T,) float64, positive.
        alpha: fairness, > 0.

    Returns:
        w (..., T) with G w = (shares / w)^(1/alpha) on the rows that are not zero (0 on those that are), and the
        relative residual (...,), the largest |(G w)_i (w_i / shares_i)^(1/alpha) - 1|. It stays under 1e-8, or near a
        Pareto-stationary point under what rounding of G leaves of it (1e-4 at most). Where it exceeds that, there is no
        solution: the weights are then those of the point of least norm, a direction that never conflicts.
    """
    return fair_numpy(gramian, shares, alpha)
