"""The alpha-fair weights: G w = (s / w)^(1/alpha) elementwise, w > 0. Nash bargaining is alpha = 1.

In unit-diagonal form C b = q b^-power, b = n w, power = 1/alpha, q = s^power n^(power - 1): the stationarity of a
strictly convex function of b > 0. Newton's method in log b, undamped, nearly always finds it in a few steps. What it
leaves is followed from power 1 to the power wanted, each time by Newton steps in log b and log y on the equations
power log b + log y = log q and y = C b, which hold y > 0 as well as b > 0. No solution exists at a Pareto-stationary
point (some convex combination of the gradients is 0), where b runs away.
"""

from math import ceil, exp, log, sqrt

import numpy as np

from gradsurgery.solvers.lapack import solve
from gradsurgery.solvers.min_norm import min_norm_numpy
from gradsurgery.solvers.operator import solver
from gradsurgery.solvers.scaling import unit_diagonal, unit_diagonal_one

TOLERANCE = 1e-8
SOLVED = 1e-12
UNDAMPED = 16
# On the way to a power: steps of log power, Newton steps at each, and the residual that is near enough before the last.
STRIDE = 0.5
FOLLOWED = 40
PASSING = 1e-2
# Of the squared least norm in the hull of the unit gradients.
STATIONARY = 1e-12
RIDGE = 1e-15


def fair_numpy(gramian: np.ndarray, s: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, T) and residual (N,) for Gramians (N, T, T) and shares s (T,); see `fair`."""
    cosine, norm = unit_diagonal(gramian)
    present = gramian.diagonal(0, -2, -1) > 0
    whole = present.all()
    if not whole:
        # A zero row becomes a task orthogonal to all others, whose b is 1.
        cosine = cosine + (~present)[..., None] * np.eye(len(s))
    q, size = _shares(norm, s, alpha, present)
    b, residual = _undamped(cosine, q, 1 / alpha)
    if not _solved(residual, b, q, 1 / alpha).all():
        left = _unsolved(cosine, q, 1 / alpha, b, residual)
        found = [_follow(cosine[n], norm[n], s, alpha, present[n]) for n in left]
        for n, (candidate, reached) in zip(left, found, strict=True):
            if reached < residual[n]:
                b[n], residual[n] = candidate, reached
    w = b * size / norm if whole else np.where(present, b * size / norm, 0.0)
    if not residual.max() <= TOLERANCE:
        for n in np.flatnonzero(~_solved(residual, b, q, 1 / alpha, TOLERANCE)):
            w[n] = min_norm_numpy(gramian[n : n + 1])[0]
            met = (gramian[n] @ w[n]) * (w[n] / s) ** (1 / alpha)
            residual[n] = np.abs(met - 1)[present[n]].max(initial=0.0)
    return w, residual


def _shares(
    norm: np.ndarray, s: np.ndarray, alpha: float, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray | float]:
    """q (N, T), 1 in a zero row, and the unit (N, 1) in which b is then, so that the program has no scale."""
    if alpha == 1:
        return np.where(present, s, 1.0), 1.0
    log_q = np.log(s) / alpha + (1 / alpha - 1) * np.log(norm)
    level = (log_q * present).sum(-1, keepdims=True) / np.maximum(present.sum(-1, keepdims=True), 1)
    return np.exp((log_q - level) * present), np.exp(level * alpha / (alpha + 1))


def _evaluate(
    cosine: np.ndarray, q: np.ndarray, power: float, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-hand side and gradient (N, T), both times b, and the residual (N,) at b (N, T)."""
    pull = q if power == 1 else q * b ** (1 - power)
    gradient = b * (cosine @ b[..., None])[..., 0] - pull
    return pull, gradient, np.abs(gradient / pull).max(-1)


def _solved(residual: np.ndarray, b: np.ndarray, q: np.ndarray, power: float, bound: float = SOLVED) -> np.ndarray:
    """Whether (N,) the residual is within the bound, or what rounding in C alone leaves when b is large, near a point
    without a solution."""
    floor = 4 * np.finfo(float).eps * b.shape[-1] * b.max(-1) * (b**power / q).max(-1)
    return residual <= np.maximum(bound, np.minimum(floor, 1e-4))


def _step(cosine: np.ndarray, b: np.ndarray, weighted: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Newton's relative step y (N, T) = step / b.

    Its matrix B C B + diag(weighted), B = diag(b), stays positive definite however small C's eigenvalues are, and
    the ridge does that where b runs away and rounding takes the second term.
    """
    hessian = cosine * (b[:, :, None] * b[:, None, :])
    hessian.reshape(len(b), -1)[:, :: b.shape[-1] + 1] += weighted + RIDGE * b * b
    return np.linalg.solve(hessian, -gradient[..., None])[..., 0]


def _undamped(cosine: np.ndarray, q: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Solutions b (N, T) of C b = q b^-power and their residual (N,), where plain steps in log b find them."""
    b = _start(cosine, q, power)
    pull, gradient, residual = _evaluate(cosine, q, power, b)
    for _ in range(UNDAMPED):
        if residual.max() <= SOLVED or _solved(residual, b, q, power).all():
            break
        y = _step(cosine, b, pull if power == 1 else power * pull, gradient)
        b = b * np.exp(np.minimum(np.maximum(y, -2.0), 2.0))
        pull, gradient, residual = _evaluate(cosine, q, power, b)
    return b, residual


def _unsolved(cosine: np.ndarray, q: np.ndarray, power: float, b: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The problems that are not solved and have a solution within float64's reach, away from Pareto stationarity."""
    todo = np.flatnonzero(~_solved(residual, b, q, power))
    todo = todo[np.isfinite(cosine[todo]).all((-2, -1))]
    weight = min_norm_numpy(cosine[todo])[0] if len(todo) else b[todo]
    return todo[(weight * (cosine[todo] @ weight[..., None])[..., 0]).sum(-1) > STATIONARY]


def _follow(
    cosine: np.ndarray, norm: np.ndarray, s: np.ndarray, alpha: float, present: np.ndarray
) -> tuple[np.ndarray, float]:
    """b (T,) and its residual for one C (T, T), through the solutions for powers on the way from 1."""
    b, residual = _start(cosine, s, 1.0), np.inf
    strides = ceil(abs(log(alpha)) / STRIDE)
    for stride in range(strides + 1):
        fairness = alpha ** (stride / strides) if strides else alpha
        q, _ = _shares(norm[None], s, fairness, present[None])
        b, residual = _newton(cosine, q[0], 1 / fairness, b, 0.0 if stride == strides else PASSING)
    return b, residual


def _newton(cosine: np.ndarray, q: np.ndarray, power: float, b: np.ndarray, enough: float) -> tuple[np.ndarray, float]:
    """The best of the iterates from b (T,) for one C (T, T), and its residual."""
    best, residual, since = b, np.inf, 0
    y = cosine @ b
    if y.min() <= 0:
        y = q * b**-power
    for _ in range(FOLLOWED):
        products = cosine @ b
        now = np.abs(products * b**power / q - 1).max().item()
        best, residual, since = (b, now, 0) if now < residual else (best, residual, since + 1)
        # Close by, only rounding keeps a step from improving.
        if residual <= enough or (residual < 1e-6 and since > 2):
            break
        missing = np.log(q) - power * np.log(b) - np.log(y)
        # In these coordinates the matrix has a diagonal of order 1, however far apart the entries of b are.
        unit = np.sqrt(b / y)
        matrix = cosine * (unit[:, None] * unit)
        matrix.reshape(-1)[:: len(b) + 1] += power + RIDGE * unit * unit
        try:
            step = np.linalg.solve(matrix, unit * (y * missing + y - products)) * unit / b
        except np.linalg.LinAlgError:
            break
        b = b * np.exp(np.clip(step, -2.0, 2.0))
        y = y * np.exp(np.clip(missing - power * step, -2.0, 2.0))
    return best, residual


def _start(cosine: np.ndarray, q: np.ndarray, power: float) -> np.ndarray:
    """The solution b (N, T) for orthogonal rows, brought to the length at which its sum of equations holds."""
    b = np.sqrt(q) if power == 1 else q ** (1 / (1 + power))
    # At this b, q b^(1 - power) is b^2.
    total = (b * b).sum(-1, keepdims=True)
    length = (b * (b[..., None, :] @ cosine)[..., 0, :]).sum(-1, keepdims=True)
    return b * (total / np.maximum(length, 1e-3 * total)) ** (1 / (1 + power))


def fair_one(gramian: np.ndarray, s: np.ndarray, alpha: float = 1.0) -> tuple[np.ndarray, float] | None:
    """`fair` of one Gramian (T, T) without a zero row, where undamped steps in log b solve it."""
    scaled = unit_diagonal_one(gramian)
    if scaled is None:
        return None
    cosine, norm = scaled
    power = 1 / alpha
    q, size = (s, 1.0) if alpha == 1 else _shares(norm, s, alpha, norm > 0)
    b = _start(cosine, q, power)
    for _ in range(UNDAMPED):
        pull = q if alpha == 1 else q * b ** (1 - power)
        products = b * cosine.dot(b)
        ratios = (products / pull).tolist()
        residual = max(max(ratios) - 1, 1 - min(ratios))
        if residual <= SOLVED:
            return b * size / norm, residual
        hessian = cosine * (b[:, None] * b)
        hessian.reshape(-1)[:: len(b) + 1] += pull if alpha == 1 else power * pull
        y = solve(hessian, products - pull)
        if y is None:
            return None
        b = b / np.exp(np.minimum(np.maximum(y, -2.0), 2.0))
    return None


def nash_pair(a: float, b: float, c: float, preference: list[float]) -> tuple[tuple[float, float], float] | None:
    """`nash` of [[a, c], [c, b]] in closed form: with t = b_1 b_2, b_i^2 = p_i - cosine t, whose product is t^2."""
    p, q = preference
    m, n = sqrt(a), sqrt(b)
    cosine = c / m / n
    half, bend = cosine * (p + q), (1 - cosine) * (1 + cosine)
    if not bend > 0:
        return None
    root = sqrt(half * half + 4 * bend * p * q)
    t = 2 * p * q / (half + root) if cosine > 0 else (root - half) / (2 * bend)
    u, v = sqrt(max(p - cosine * t, 0.0)) / m, sqrt(max(q - cosine * t, 0.0)) / n
    residual = max(abs(u * (a * u + c * v) / p - 1), abs(v * (c * u + b * v) / q - 1))
    return ((u, v), residual) if residual <= SOLVED else None


def fair_pair(
    a: float, b: float, c: float, shares: list[float], alpha: float
) -> tuple[tuple[float, float], float] | None:
    """`fair` of [[a, c], [c, b]] in plain floats: Newton's method in log b, as of `fair_one`."""
    if alpha == 1:
        return nash_pair(a, b, c, shares)
    m, n = sqrt(a), sqrt(b)
    cosine, power = c / m / n, 1 / alpha
    first, second = (power * log(s) + (power - 1) * log(norm) for s, norm in zip(shares, (m, n), strict=True))
    # Beyond that, Python's floats might overflow, which they do with an exception.
    if power > 10 or abs(first - second) > 200:
        return None
    p, level = exp((first - second) / 2), (first + second) / 2
    q = 1 / p
    # In units in which p q = 1.
    size = exp(level / (1 + power))
    x, y = p ** (1 / (1 + power)), q ** (1 / (1 + power))
    total = x * x + y * y
    stretch = (total / max(total + 2 * cosine * x * y, 1e-3 * total)) ** (1 / (1 + power))
    x, y = x * stretch, y * stretch
    for _ in range(UNDAMPED):
        u, v = p * x ** (1 - power), q * y ** (1 - power)
        cross = cosine * x * y
        f, g = x * x + cross - u, y * y + cross - v
        residual = max(abs(f / u), abs(g / v))
        if residual <= SOLVED:
            return (x * size / m, y * size / n), residual
        h, k = x * x + power * u, y * y + power * v
        determinant = h * k - cross * cross
        if not determinant > 0:
            return None
        x *= exp(min(max((cross * g - k * f) / determinant, -2.0), 2.0))
        y *= exp(min(max((cross * f - h * g) / determinant, -2.0), 2.0))
    return None


@solver("nash", "(Tensor gramian, Tensor preference)", fair_one, nash_pair)
def nash(gramian: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the (asymmetric) Nash bargaining solution, which is `fair` at alpha = 1.

    Args:
        gramian: (..., T, T) float64.
        preference: (T,) float64, positive.

    Returns:
        a (..., T) with G a = p / a on the rows that are not zero (0 on those that are), and the relative residual
        max |a_i (G a)_i / p_i - 1| (...,), as of `fair`.
    """
    return fair_numpy(gramian, preference, 1.0)


@solver("fair", "(Tensor gramian, Tensor shares, float alpha)", fair_one, fair_pair)
def fair(gramian: np.ndarray, shares: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the alpha-fair solution.

    Args:
        gramian: (..., T, T) float64.
        shares: (T,) float64, positive.
        alpha: fairness, > 0.

    Returns:
        w (..., T) with G w = (shares / w)^(1/alpha) on the rows that are not zero (0 on those that are), and the
        relative residual (...,), the largest |(G w)_i (w_i / shares_i)^(1/alpha) - 1|. It stays under 1e-8, or near a
        Pareto-stationary point under what rounding of G leaves of it (1e-4 at most). Where there is no solution, it is
        far above: the weights are then those of the point of least norm, a direction that never conflicts.
    """
    return fair_numpy(gramian, shares, alpha)
