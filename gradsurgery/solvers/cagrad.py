"""The direction of CAGrad: max_d min_i <g_i, d> subject to |d - g0| <= k, g0 the preferred mean gradient.

Written as d = g0 + J^T l with multipliers l >= 0: for a level s, l(s) minimises 1/2 l^T G l - (s 1 - G v)^T l, a
non-negative program, and is the nearest point to g0 at which every task gains s. |J^T l(s)| is convex and increasing
in s, and Newton's method finds where it meets k. In the paper's dual (Liu et al., NeurIPS 2021, eq. 3) l = k w / |g_w|.
Where that is 0/0 (g_w = 0: Pareto stationary), s = 0 is the best level and l(0), the projection of g0 onto the dual
cone, still solves the problem above.
"""

import numpy as np

from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.nnqp import nnqp
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal

ITERATIONS = 100


def cagrad_numpy(gramian: np.ndarray, v: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers (N, T) and residual (N,) for Gramians (N, T, T) and a mean v (T,); see `cagrad_multipliers`."""
    solved = [_solve(G, v, c) for G in gramian]
    return np.stack([s[0] for s in solved]), np.array([s[1] for s in solved])


class _Levels:
    """l(s) and what follows from it, for one Gramian G = diag(n) C diag(n)."""

    def __init__(self, gramian: np.ndarray, v: np.ndarray, c: float):
        cosine, norm = unit_diagonal(gramian[None])
        self.gramian, self.cosine, self.norm = gramian, cosine, norm[0]
        self.gain = gramian @ v
        self.radius = c * np.sqrt(max(v @ self.gain, 0.0))

    def multipliers(self, level: float) -> np.ndarray:
        x, _ = nnqp(self.cosine, ((level - self.gain) / self.norm)[None])
        return x[0] / self.norm

    def length(self, multipliers: np.ndarray) -> float:
        return float(np.sqrt(max(multipliers @ self.gramian @ multipliers, 0.0)))

    def feasible(self, level: float, multipliers: np.ndarray) -> bool:
        missing = (level - self.gain - self.gramian @ multipliers) / self.norm
        return missing.max() <= 1e-10 * self.radius

    def bound(self, w: np.ndarray) -> float:
        """The paper's dual objective at w: no level exceeds it."""
        return float(w @ self.gain + self.radius * self.length(w))


def _solve(gramian: np.ndarray, v: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """One problem, brought to unit mean norm (multipliers do not depend on the scale)."""
    scale = np.diagonal(gramian).mean()
    zero = np.zeros_like(v)
    if scale == 0 or c == 0:
        return zero, 0.0
    levels = _Levels(gramian / scale, v, c)
    if levels.radius == 0:
        return zero, 0.0
    least = min_norm_numpy(levels.gramian[None])[0][0]
    at_zero = levels.multipliers(0.0)
    stationary = levels.length(least) <= 1e-8 * np.sqrt(np.diagonal(levels.gramian).min())
    if stationary and levels.length(at_zero) <= levels.radius:
        best, level = at_zero, 0.0
    else:
        best, level = _newton(levels, levels.bound(least))
    return best, _residual(levels, best, level, least)


def _newton(levels: _Levels, high: float) -> tuple[np.ndarray, float]:
    """The level in [min gain, high] at which |J^T l| meets the radius, and the multipliers there."""
    low = float(levels.gain.min())
    level, best = high, np.zeros_like(levels.gain)
    for _ in range(ITERATIONS):
        multipliers = levels.multipliers(level)
        length = levels.length(multipliers)
        feasible = levels.feasible(level, multipliers)
        if feasible and abs(length - levels.radius) <= 1e-13 * levels.radius:
            return multipliers, level
        if feasible and length <= levels.radius:
            low, best = level, multipliers
        else:
            high = level
        total = multipliers.sum()
        # Slope of the length: total / length. The root of the length squared on the same active set is as cheap.
        step = level + (levels.radius - length) * length / total if feasible and total > 0 else low
        level = step if low < step < high else 0.5 * (low + high)
        if high - low <= 1e-15 * max(abs(low), abs(high)):
            break
    return best, low


def _residual(levels: _Levels, multipliers: np.ndarray, level: float, least: np.ndarray) -> float:
    """Gap between the worst task's gain and the dual bound, relative to |g0|^2 + k |g0|, which bounds both."""
    total = multipliers.sum()
    bound = levels.bound(least)
    if total > 0:
        bound = min(bound, levels.bound(multipliers / total))
    worst = (levels.gain + levels.gramian @ multipliers).min()
    size = levels.radius * (levels.radius + 1e-300)
    excess = max(levels.length(multipliers) / levels.radius - 1, 0.0)
    return float(max((bound - worst) / size, 0.0) + excess) if size > 0 else 0.0


@solver("cagrad", "(Tensor gramian, Tensor preference, float c)")
def cagrad_multipliers(gramian: np.ndarray, preference: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers of CAGrad's correction, on top of the mean.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, on the simplex: g0 = preference^T J.
        c: radius of the search relative to |g0|, >= 0.

    Returns:
        l (..., T) >= 0 with d = (preference + l)^T J, and the relative primal-dual gap (...,).
    """
    return cagrad_numpy(gramian, preference, c)
