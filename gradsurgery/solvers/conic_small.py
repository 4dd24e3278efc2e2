"""`gradsurgery.solvers.conic` for one Gramian of a few tasks, in plain floats: done before NumPy has begun.

The quadratic whose root is the next t goes through two known points: the last two where their supports agree, on which
the root is exact, and otherwise the two ends of the bracket, between which there always is one.
"""

from math import copysign, hypot, sqrt
from operator import mul, sub
from typing import NamedTuple

from gradsurgery.solvers.min_norm import min_norm_small
from gradsurgery.solvers.nnqp import nnqp_small
from gradsurgery.solvers.scaling import unit_diagonal_small

ITERATIONS = 20
ON_BOUNDARY = 1e-13


class _Point(NamedTuple):
    """d(t) = (1 - t) g0 + J^T added: what is across g0 of it (as products with the rows), and along g0."""

    t: float
    added: list[float]
    across: list[float]
    along: float

    def lengths(self) -> tuple[float, float]:
        return self.along, sqrt(max(sum(map(mul, self.added, self.across)), 0.0))


class _Cone:
    """A Gramian (T, T), and the cone around its mean gradient g0."""

    def __init__(self, gramian: list[list[float]], c: float):
        self.gramian = gramian
        self.cosine, self.norm = unit_diagonal_small(gramian)
        self.gain = [sum(row) / len(gramian) for row in gramian]
        self.size = sqrt(max(sum(self.gain) / len(gramian), 0.0))
        self.axis = [g / self.size if self.size else 0.0 for g in self.gain]
        self.c, self.s = c, sqrt((1 - c) * (1 + c))
        self.level = self.size * min(self.norm)

    def point(self, t: float, added: list[float]) -> _Point:
        along = sum(map(mul, added, self.axis))
        across = [sum(map(mul, row, added)) - a * along for row, a in zip(self.gramian, self.axis, strict=True)]
        return _Point(t, added, across, (1 - t) * self.size + along)

    def margin(self, point: _Point) -> float:
        along, across = point.lengths()
        return self.s * along - self.c * across

    def crossing(self, a: _Point, b: _Point, low: float, high: float) -> float | None:
        """The t nearest to b's in (low, high) at which the line through a and b meets the boundary."""
        then, first = b.along - a.along, a.along
        slope, turning = list(map(sub, b.added, a.added)), list(map(sub, b.across, a.across))
        p = self.c**2 * sum(map(mul, slope, turning)) - self.s**2 * then * then
        q = self.c**2 * sum(map(mul, a.added, turning)) - self.s**2 * first * then
        r = self.c**2 * sum(map(mul, a.added, a.across)) - self.s**2 * first * first
        half = -(q + copysign(sqrt(max(q * q - p * r, 0.0)), q))
        roots = [n / d for n, d in ((half, p), (r, half)) if d != 0]
        inside = [t for t in (a.t + u * (b.t - a.t) for u in roots) if low < t < high]
        return min(inside, key=lambda t: abs(t - b.t), default=None)

    def finish(self, point: _Point, bound: float) -> tuple[list[float], float] | None:
        """Weights and residual of d(t), given a bound on the worst gain at unit length; None if that is not met."""
        length = hypot(*point.lengths())
        v = [(1 - point.t) / len(self.gain) + x for x in point.added]
        worst = min(sum(map(mul, row, v)) for row in self.gramian) / length
        residual = max(bound - worst, 0.0) / min(self.norm) + max(-self.margin(point), 0.0) / length
        return ([x * self.size / length for x in v], residual) if residual <= 1e-10 else None


def conic_small(gramian: list[list[float]], c: float) -> tuple[list[float], float] | None:
    """`conic` of one Gramian without a zero row, where some direction in the cone helps every task."""
    if min(row[i] for i, row in enumerate(gramian)) <= 0:
        return None
    cone, solved = _Cone(gramian, c), min_norm_small(gramian)
    if solved is None:
        return None
    least = cone.point(1.0, solved[0])
    length = hypot(*least.lengths())
    if length <= 1e-6 * min(cone.norm):
        return None
    if cone.margin(least) >= 0:
        return cone.finish(least, length)
    return _search(cone, cone.point(1.0, [w * cone.level / length**2 for w in solved[0]]))


def _search(cone: _Cone, high: _Point) -> tuple[list[float], float] | None:
    """The solution on the boundary, below the point ``high`` outside the cone."""
    low, last, t = None, high, 0.0
    support, passive = [i for i, x in enumerate(high.added) if x > 0], None
    for _ in range(ITERATIONS):
        linear = [(t * cone.level - (1 - t) * g) / n for g, n in zip(cone.gain, cone.norm, strict=True)]
        solved = nnqp_small(cone.cosine, linear, passive)
        if solved is None:
            return None
        passive = solved[1]
        now = cone.point(t, [max(x, 0.0) / n for x, n in zip(solved[0], cone.norm, strict=True)])
        margin, length, total = cone.margin(now), hypot(*now.lengths()), sum(now.added)
        if abs(margin) <= ON_BOUNDARY * length and total > 0:
            along, across = now.along - (1 - t) * cone.size, now.lengths()[1]
            return cone.finish(now, max(cone.c * along + cone.s * across, 0.0) / total)
        low, high = (now, high) if margin > 0 else (low, now)
        if low is None:
            return None
        known = cone.crossing(last, now, low.t, high.t) if passive == support else None
        following = known or cone.crossing(low, high, low.t, high.t)
        if following is None:
            return None
        t, last, support = following, now, passive
    return None
