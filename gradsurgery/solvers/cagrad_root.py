"""CAGrad's problem on a root of the Gramian, for the rows that its inner products are too coarse for.

Where gradients nearly cancel, the multipliers l are large and l^T G l loses the digits of |J^T l|. On F with G = F^T F,
up to rounding of G, nothing is squared: l(s) (see `gradsurgery.solvers.cagrad`) are the multipliers of the least z with
F^T z >= s - gain. While its support stays, z is linear in s, and |z| = k is a quadratic: Newton's method on these
pieces, kept in a bracket, ends after a few.

Gradients within about 1e-4 of opposite, and a mean as short as what they leave, are beyond float64: a rounding of the
weights moves the gains by more than 1e-8 k^2. What is returned is then the best of the points that were tried, of the
mean g0, and of the safe direction g0 + k m / |m|, m the point of least norm: in the ball, and no task gains less by it
than <g_i, g0> + k |m|.
"""

from dataclasses import dataclass

import numpy as np

from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.nnqp import least_distance, root
from gradsurgery.solvers.scaling import unit_diagonal, unit_mean

ITERATIONS = 40
ROUNDING = 4 * np.finfo(float).eps
STATIONARY = 1e-8
SOLVED = 1e-11


@dataclass(frozen=True)
class _Ball:
    """Unit gradients F (r, T), their norms n and gains under the mean (T,), the radius k, and the point of least norm
    of the hull: its weights times n (T,), its length, and the bound on any level that it gives."""

    F: np.ndarray
    norm: np.ndarray
    gain: np.ndarray
    radius: float
    least: np.ndarray
    distance: float
    bound: float

    def judge(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """x (T,), shortened to the ball, and the gap between its worst gain and the least bound, relative to k^2."""
        length = np.linalg.norm(self.F @ x).item()
        if length > self.radius:
            x, length = x * (self.radius / length), self.radius
        total = (x / self.norm).sum()
        own = (x @ self.gain + self.radius * length) / total if total > 0 else np.inf
        worst = (self.norm * (self.gain + self.F.T @ (self.F @ x))).min()
        return x, max(min(own, self.bound) - worst, 0.0) / self.radius**2


def cagrad_rooted(gramian: np.ndarray, v: np.ndarray, c: float) -> tuple[np.ndarray, float]:
    """`cagrad_multipliers` of one finite Gramian (T, T)."""
    scaled = unit_mean(gramian[None])
    cosine, norm = unit_diagonal(scaled)
    F, n = root(cosine[0]), norm[0]
    mean = F @ (v * n)
    radius = c * np.linalg.norm(mean).item()
    if radius <= c * ROUNDING * (v * n).sum():
        return np.zeros(len(v)), 0.0
    least = min_norm_numpy(scaled)[0][0] * n
    gain, distance = F.T @ mean, np.linalg.norm(F @ least).item()
    ball = _Ball(F, n, gain, radius, least, distance, (least @ gain).item() + radius * distance)
    shortest = np.sqrt(scaled[0].diagonal().min())
    projection = least_distance(F, -gain)
    if distance <= STATIONARY * shortest and np.linalg.norm(F @ projection) <= radius:
        x, residual = ball.judge(projection)
        return x / n, residual
    x, residual = _newton(ball)
    if residual > SOLVED:
        safe = radius / distance * least if distance > ROUNDING * least.sum() else np.zeros(len(v))
        for candidate in (safe, np.zeros(len(v))):
            other, gap = ball.judge(candidate)
            if gap < residual:
                x, residual = other, gap
    return x / n, residual


def _newton(ball: _Ball) -> tuple[np.ndarray, float]:
    best, residual, since = np.zeros(len(ball.norm)), np.inf, 0
    low, high = (ball.norm * ball.gain).min(), min(ball.bound, (ball.norm * (ball.gain + ball.radius)).min())
    level = high
    for _ in range(ITERATIONS):
        x = least_distance(ball.F, level / ball.norm - ball.gain)
        crossing, polished = _crossing(ball, x > 0)
        since += 1
        for candidate in (x, polished):
            candidate, gap = ball.judge(candidate)
            if gap < residual:
                best, residual, since = candidate, gap, 0
        length = np.linalg.norm(ball.F @ x)
        if 0 < length <= ball.radius:
            low = max(low, level)
        else:
            high = min(high, level)
        # Near the optimum, only rounding keeps a level from improving.
        if residual <= SOLVED or (residual < 1e-4 and since > 2) or high - low <= 1e-15 * max(abs(low), abs(high)):
            break
        level = crossing if low < crossing < high else 0.5 * (low + high)
    return best, residual


def _crossing(ball: _Ball, support: np.ndarray) -> tuple[float, np.ndarray]:
    """The level at which |z| would meet the radius if l had this support throughout, and the multipliers there."""
    x = np.zeros(len(support))
    # F = Q R on the support.
    _, R = np.linalg.qr(ball.F[:, support])
    if not support.any() or len(R) < R.shape[1] or np.abs(R.diagonal()).min() <= ROUNDING:
        return np.nan, x
    # z = Q (s p - q).
    p, q = np.linalg.solve(R.T, np.stack([1 / ball.norm[support], ball.gain[support]], axis=-1)).T
    square, product = p @ p, p @ q
    across = q - product / square * p
    level = (product + np.sqrt(max(square * (ball.radius**2 - across @ across), 0.0))) / square
    x[support] = np.maximum(np.linalg.solve(R, level * p - q), 0.0)
    return level, x
