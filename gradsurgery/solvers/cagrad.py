"""The direction of CAGrad: max_d min_i <g_i, d> subject to |d - g0| <= k, g0 the preferred mean gradient.

Written as d = g0 + J^T l with multipliers l >= 0: for a level s, l(s) minimises 1/2 l^T G l - (s 1 - G v)^T l, a
non-negative program, and is the nearest point to g0 at which every task gains s. |J^T l(s)| is convex and increasing
in s, and Newton's method finds where it meets k. In the paper's dual (Liu et al., NeurIPS 2021, eq. 3) l = k w / |g_w|.
Where that is 0/0 (g_w = 0: Pareto stationary), s = 0 is the best level and l(0), the projection of g0 onto the dual
cone, still solves the problem above. What this leaves with a residual goes to `gradsurgery.solvers.cagrad_root`.
"""

from math import sqrt

import numpy as np

from gradsurgery.solvers.cagrad_root import cagrad_rooted
from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.nnqp import nnqp, nnqp_one
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import take, unit_diagonal, unit_diagonal_one, unit_mean

DESCENT = 16
ITERATIONS = 100
# The residual up to which the plain descent of Newton's method is believed.
ACCEPTED = 1e-10


def cagrad_numpy(gramian: np.ndarray, v: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers (N, T) and residual (N,) for Gramians (N, T, T) and a mean v (T,); see `cagrad_multipliers`."""
    multipliers, residual = np.zeros(gramian.shape[:2]), np.zeros(len(gramian))
    levels = _Levels(gramian, v, c)
    # Without a radius there is nothing to search: c = 0, or the mean gradient is zero.
    todo = np.flatnonzero(levels.radius > 0)
    if len(todo):
        multipliers[todo], residual[todo] = _solve(take(levels, todo))
    for n in np.flatnonzero(~(residual <= ACCEPTED)):
        if np.isfinite(gramian[n]).all():
            candidate, gap = cagrad_rooted(gramian[n], v, c)
            if not residual[n] <= gap:
                multipliers[n], residual[n] = candidate, gap
    return multipliers, residual


class _Levels:
    """l(s) and what follows from it, for N Gramians, each brought to unit mean norm (which leaves l as it is)."""

    def __init__(self, gramian: np.ndarray, v: np.ndarray, c: float):
        self.gramian = unit_mean(gramian)
        self.cosine, self.norm = unit_diagonal(self.gramian)
        self.gain = self.gramian @ v
        self.radius = c * np.sqrt(np.maximum(self.gain @ v, 0.0))

    def products(self, multipliers: np.ndarray) -> np.ndarray:
        return (self.gramian @ multipliers[..., None])[..., 0]

    def length(self, multipliers: np.ndarray) -> np.ndarray:
        """|J^T l| (N,)."""
        return np.sqrt(np.maximum((multipliers * self.products(multipliers)).sum(-1), 0.0))

    def multipliers(self, level: np.ndarray) -> np.ndarray:
        """l(s) (N, T) at the levels s (N,)."""
        x, _ = nnqp(self.cosine, ((level[:, None] - self.gain) / self.norm)[:, None])
        return x[:, 0] / self.norm

    def feasible(self, level: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """Whether (N,) every task gains its level, which near a stationary point no direction may."""
        missing = (level[:, None] - self.gain - self.products(multipliers)) / self.norm
        return missing.max(-1) <= 1e-10 * self.radius

    def bound(self, w: np.ndarray) -> np.ndarray:
        """The paper's dual objective (N,) at w (N, T): no level exceeds it."""
        return (w * self.gain).sum(-1) + self.radius * self.length(w)


def _solve(levels: _Levels) -> tuple[np.ndarray, np.ndarray]:
    least = min_norm_numpy(levels.gramian)[0]
    at_zero = levels.multipliers(np.zeros(len(least)))
    smallest = np.sqrt(np.diagonal(levels.gramian, axis1=-2, axis2=-1).min(-1))
    stationary = (levels.length(least) <= 1e-8 * smallest) & (levels.length(at_zero) <= levels.radius)
    best = at_zero
    todo = np.flatnonzero(~stationary)
    if len(todo):
        best[todo] = _newton(take(levels, todo), levels.bound(least)[todo])
    return best, _residual(levels, best, least)


def _newton(levels: _Levels, high: np.ndarray) -> np.ndarray:
    """Multipliers (N, T) at the levels in [min gain, high] where |J^T l| meets the radius."""
    low, level = levels.gain.min(-1), high.copy()
    best = np.zeros_like(levels.gain)
    todo = np.arange(len(high))
    for _ in range(ITERATIONS):
        part = take(levels, todo)
        s, radius = level[todo], part.radius
        now = part.multipliers(s)
        length, total, feasible = part.length(now), now.sum(-1), part.feasible(s, now)
        inside = feasible & (length <= radius * (1 + 1e-13))
        best[todo[inside]], low[todo[inside]], high[todo[~inside]] = now[inside], s[inside], s[~inside]
        # The slope of the length is total / length.
        known = feasible & (total > 0)
        step = np.where(known, s + (radius - length) * length / np.where(known, total, 1.0), -np.inf)
        lo, hi = low[todo], high[todo]
        level[todo] = np.where((lo < step) & (step < hi), step, 0.5 * (lo + hi))
        met = feasible & (np.abs(length - radius) <= 1e-13 * radius)
        closed = hi - lo <= 1e-15 * np.maximum(np.abs(lo), np.abs(hi))
        todo = todo[~(met | closed)]
        if not len(todo):
            break
    return best


def _residual(levels: _Levels, multipliers: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Gap between the worst task's gain and the dual bound, relative to k^2, and what exceeds the radius."""
    total = multipliers.sum(-1, keepdims=True)
    bound = levels.bound(least)
    own = levels.bound(multipliers / np.where(total > 0, total, 1.0))
    bound = np.where(total[:, 0] > 0, np.minimum(bound, own), bound)
    worst = (levels.gain + levels.products(multipliers)).min(-1)
    excess = np.maximum(levels.length(multipliers) / levels.radius - 1, 0.0)
    return np.maximum((bound - worst) / levels.radius**2, 0.0) + excess


def cagrad_one(gramian: np.ndarray, v: np.ndarray, c: float) -> tuple[np.ndarray, float] | None:
    """`cagrad_multipliers` of one Gramian (T, T) without a zero row, away from a stationary point.

    Newton's method descends from the least of the dual bounds of single tasks, above which no level lies, as
    |J^T l(s)| is convex, and believes each time the passive tasks of the last.
    """
    scaled = unit_diagonal_one(gramian)
    if scaled is None:
        return None
    cosine, norm = scaled
    mean = gramian.trace().item() / len(v)
    norm, gain = norm / sqrt(mean), gramian.dot(v) / mean
    radius = c * sqrt(max(v.dot(gain).item(), 0.0))
    if not radius > 0:
        return None
    level, passive = min((gain + radius * norm).tolist()), None
    for _ in range(DESCENT):
        linear = (level - gain) / norm
        size = max(linear.tolist())
        if not size > 0:
            return None
        linear = linear / size
        solved = nnqp_one(cosine, linear, (linear > 0).nonzero()[0] if passive is None else passive)
        if solved is None:
            return None
        x, passive = solved[0] * size, solved[1]
        products = cosine.dot(x)
        length = sqrt(max(x.dot(products).item(), 0.0))
        multipliers = x / norm
        total = multipliers.sum().item()
        if abs(length - radius) <= 1e-13 * radius:
            bound = (multipliers.dot(gain).item() + radius * length) / total
            worst = min((gain + products * norm).tolist())
            residual = max((bound - worst) / radius**2, 0.0) + max(length / radius - 1, 0.0)
            return (multipliers, residual) if residual <= ACCEPTED else None
        # The slope of the length is total / length.
        level += (radius - length) * length / total
    return None


def cagrad_pair(
    a: float, b: float, c: float, v: list[float], radius: float
) -> tuple[tuple[float, float], float] | None:
    """`cagrad_multipliers` of [[a, c], [c, b]] in closed form: the worse task alone is helped, or both gain alike.

    Then d is on the line of the point of least norm m, as far from 0 as the radius lets it.
    """
    p, q = v
    first, second = a * p + c * q, c * p + b * q
    square = p * first + q * second
    if not square > 0 or radius == 0:
        return None
    reach = radius * sqrt(square)
    m, n = sqrt(a), sqrt(b)
    if first + reach * m <= second + reach * c / m:
        x, y = reach / m, 0.0
    elif second + reach * n <= first + reach * c / n:
        x, y = 0.0, reach / n
    else:
        length, least = a + b - 2 * c, a * b - c * c
        if length <= 0 or least <= 0:
            return None
        share = (b - c) / length
        # The mean is at m + aside * (g_1 - g_2), at right angles to m.
        aside = p - share * (p + q)
        stretch = p + q + sqrt(max(reach * reach - aside * aside * length, 0.0) * length / least)
        x, y = share * stretch - p, (1 - share) * stretch - q
    if min(x, y) < 0 or x + y == 0:
        return None
    u, w = a * x + c * y, c * x + b * y
    gap = (x * first + y * second + reach * sqrt(max(x * u + y * w, 0.0))) / (x + y) - min(first + u, second + w)
    residual = max(gap / reach**2, 0.0) + max(sqrt(max(x * u + y * w, 0.0)) / reach - 1, 0.0)
    return ((x, y), residual) if residual <= ACCEPTED else None


@solver("cagrad", "(Tensor gramian, Tensor preference, float c)", cagrad_one, cagrad_pair)
def cagrad_multipliers(gramian: np.ndarray, preference: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers of CAGrad's correction, on top of the mean.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, on the simplex: g0 = preference^T J.
        c: radius of the search relative to |g0|, >= 0.

    Returns:
        l (..., T) >= 0 with d = (preference + l)^T J, and the primal-dual gap (...,), relative to the squared radius.
        It stays under 1e-8, but where gradients cancel so far that one rounding of w = preference + l moves a gain by
        more: at about eps max |g| sum(w |g|) > 1e-8 k^2, k the radius. Then d is the best direction that was found, in
        the ball, and no worse for the worst-off task than g0 or the safe direction, g0 and k along the point of least
        norm, which helps every task; the residual says by how much it may miss the best.
    """
    return cagrad_numpy(gramian, preference, c)
