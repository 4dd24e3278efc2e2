"""The direction of ConicGrad: max_d min_i <g_i, d> subject to cos(d, g0) >= c, at |d| = |g0|, g0 the mean gradient.

Where the point of least norm in the hull of the gradients (the best direction without a cone) lies in the cone, it is
the solution. Otherwise the solution lies on the cone's boundary, and by its optimality conditions it is a sum of g0 and
non-negative multiples of gradients that gain equally: one of CAGrad's points (see `gradsurgery.solvers.cagrad`),

    d(t) = (1 - t) g0 + J^T l(t),  l(t) >= 0 minimising 1/2 l^T G l - (t s 1 - (1 - t) G v)^T l,

the nearest to (1 - t) g0 at which every task gains t s, where g0 = J^T v and s is a unit of length. Its angle to g0
grows with t, from that of the projection on the dual cone (t = 0) to that of the point of least norm (t = 1). While the
support of l stays, l is linear in t, and the cone's boundary is met at a root of a quadratic: Newton's method on these
pieces, kept in a bracket, ends after a few. The angle at t = 0 is the least that a direction without conflict can have;
where it is too large already, nothing in the cone helps every task.
"""

import numpy as np

from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.nnqp import RIDGE, nnqp
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import take, unit_diagonal, unit_mean

ITERATIONS = 100
ON_BOUNDARY = 1e-14


class _Cones:
    """N Gramians of unit mean norm, their mean gradients g0, and lengths of J^T w along and across g0."""

    def __init__(self, gramian: np.ndarray, c: float):
        self.gramian = unit_mean(gramian)
        self.cosine, self.norm = unit_diagonal(self.gramian)
        self.least_norm = np.sqrt(np.maximum(np.diagonal(self.gramian, axis1=-2, axis2=-1).min(-1), 0.0))
        self.gain = self.gramian.mean(-1)
        self.size = np.sqrt(np.maximum(self.gain.mean(-1), 0.0))
        self.axis = self.gain / np.where(self.size > 0, self.size, 1.0)[:, None]
        self.across = self.gramian - self.axis[:, :, None] * self.axis[:, None, :]
        self.c, self.s = np.full(len(gramian), c), np.full(len(gramian), np.sqrt((1 - c) * (1 + c)))

    def lengths(self, w: np.ndarray, share: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Of share g0 + J^T w along g0 and across it (N,)."""
        across = np.sqrt(np.maximum((w * _times(self.across, w)).sum(-1), 0.0))
        return share * self.size + (w * self.axis).sum(-1), across

    def bound(self, w: np.ndarray) -> np.ndarray:
        """|P(J^T w)| (N,), P the projection on the cone: times |g0|, no direction's worst gain exceeds it."""
        along, across = self.lengths(w)
        inside = self.s * along >= self.c * across
        return np.where(inside, np.hypot(along, across), np.maximum(self.c * along + self.s * across, 0.0))


def _times(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (matrices @ vectors[..., None])[..., 0]


def conic_numpy(gramian: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and residual (N,) for Gramians (N, T, T); see `conic`."""
    cones = _Cones(gramian, c)
    N, T = gramian.shape[:2]
    share, added = np.zeros(N), min_norm_numpy(cones.gramian)[0]
    along, across = cones.lengths(added)
    # What rounding of G leaves of the length of a sum of gradients that cancel is not a direction.
    rounding = 4 * T * np.finfo(float).eps * (added * cones.norm).sum(-1) ** 2
    useful = (along**2 + across**2 > rounding) & (cones.least_norm > 0)
    search = np.flatnonzero(useful & (cones.s * along < cones.c * across))
    if len(search):
        share[search], added[search], useful[search] = _search(take(cones, search))
    residual = _residual(cones, share, added, useful)
    w = share[:, None] / T + added
    length = np.hypot(*cones.lengths(added, share))
    w = w * (cones.size / np.where(useful, length, 1.0))[:, None]
    return np.where(useful[:, None], w, 1 / T), residual


def _search(cones: _Cones) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 - t (N,) and l(t) (N, T) where d(t) is on the boundary, and whether (N,) any d(t) is in the cone."""
    N = len(cones.size)
    low, high, t = np.zeros(N), np.ones(N), np.zeros(N)
    share, best, found = np.ones(N), np.zeros_like(cones.norm), np.zeros(N, dtype=bool)
    todo = np.arange(N)
    for _ in range(ITERATIONS):
        part, now = take(cones, todo), t[todo]
        level = (part.size * part.least_norm)[:, None]
        linear = (now[:, None] * level - (1 - now[:, None]) * part.gain) / part.norm
        x = nnqp(part.cosine, linear[:, None])[0][:, 0]
        along, across = part.lengths(x / part.norm, 1 - now)
        margin = part.s * along - part.c * across
        length = np.hypot(along, across)
        met = np.abs(margin) <= ON_BOUNDARY * length
        inside = (met | (margin > 0)) & (length > 0)
        first = todo[(now == 0) | inside]
        best[first], share[first] = (x / part.norm)[(now == 0) | inside], (1 - now)[(now == 0) | inside]
        found[todo[inside]], low[todo[inside]], high[todo[~inside]] = True, now[inside], now[~inside]
        t[todo] = _crossing(part, x > 0, level, now, low[todo], high[todo])
        closed = high[todo] - low[todo] <= 1e-14 * high[todo]
        todo = todo[~(met | closed | (~inside & (now == 0)))]
        if not len(todo):
            break
    return share, best, found


def _crossing(
    cones: _Cones, passive: np.ndarray, level: np.ndarray, now: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """t (N,) at which d would meet the boundary if l had this support throughout; the bracket's middle if nowhere."""
    T = passive.shape[-1]
    system = np.where(passive[:, :, None] & passive[:, None, :], cones.cosine + RIDGE * np.eye(T), np.eye(T))
    right = np.stack([np.broadcast_to(level, passive.shape), cones.gain], axis=-1) / cones.norm[..., None]
    try:
        solved = np.linalg.solve(system, right * passive[..., None]) / cones.norm[..., None]
    except np.linalg.LinAlgError:
        return 0.5 * (low + high)
    # l(t) = start + t slope, and what lies along g0 in the same way; across^2 c^2 - along^2 s^2 = a t^2 + 2 b t + e.
    start, slope = -solved[..., 1], solved[..., 0] + solved[..., 1]
    first, then = cones.size + (start * cones.axis).sum(-1), (slope * cones.axis).sum(-1) - cones.size
    turning = _times(cones.across, slope)
    a = cones.c**2 * (slope * turning).sum(-1) - cones.s**2 * then * then
    b = cones.c**2 * (start * turning).sum(-1) - cones.s**2 * first * then
    e = cones.c**2 * (start * _times(cones.across, start)).sum(-1) - cones.s**2 * first * first
    half = -(b + np.copysign(np.sqrt(np.maximum(b * b - a * e, 0.0)), b))
    roots = np.stack([half / np.where(a != 0, a, np.inf), e / np.where(half != 0, half, np.inf)])
    off = np.where((low < roots) & (roots < high), np.abs(roots - now), np.inf)
    nearest = np.take_along_axis(roots, off.argmin(0)[None], axis=0)[0]
    return np.where(np.isfinite(off.min(0)), nearest, 0.5 * (low + high))


def _residual(cones: _Cones, share: np.ndarray, added: np.ndarray, useful: np.ndarray) -> np.ndarray:
    """Gap between the worst task's gain (0 where nothing helps every task) and the least bound at hand, and what the
    direction is out of the cone, both at unit length."""
    total = added.sum(-1, keepdims=True)
    v = share[:, None] / added.shape[-1] + added
    along, across = cones.lengths(added, share)
    length = np.hypot(along, across)
    length = np.where(length > 0, length, 1.0)
    worst = np.where(useful, _times(cones.gramian, v).min(-1) / length, 0.0)
    single = np.eye(added.shape[-1])[cones.gain.argmin(-1)]
    own = np.where(total > 0, added / np.where(total > 0, total, 1.0), single)
    bound = np.minimum(cones.bound(own), cones.bound(single))
    outside = np.where(useful, np.maximum(cones.c * across - cones.s * along, 0.0) / length, 0.0)
    return np.maximum(bound - worst, 0.0) / np.where(cones.least_norm > 0, cones.least_norm, 1.0) + outside


@solver("conic", "(Tensor gramian, float c)")
def conic(gramian: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the direction in a cone around the mean gradient that most helps the worst-off task.

    Args:
        gramian: (..., T, T) float64.
        c: least cosine with the mean gradient, in [0, 1].

    Returns:
        w (..., T) >= 0, such that w^T J is as long as the mean gradient; 1/T each where nothing in the cone helps every
        task. And the duality gap (...,), relative to the product of the lengths of the mean and of the shortest
        gradient, which no gain exceeds, plus the sine by which the direction leaves the cone; up to 1e-6 at a Pareto
        stationary point, where it is the rounding of G.
    """
    return conic_numpy(gramian, c)
