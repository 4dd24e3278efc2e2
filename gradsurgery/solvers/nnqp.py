"""Many small non-negative quadratic programs at once: min 1/2 x^T H x - f^T x subject to x >= 0.

H is positive semidefinite with f in its range, as every Gramian problem of this package has it, and both are scaled
so that diag H is 1 (or 0). Block principal pivoting (Portugal, Judice, Vicente 1994; Kim, Park, SIAM J. Sci. Comput.
2011) solves all of them side by side in a few batched factorisations. It cycles on many a singular H; the programs it
leaves unsolved go to the active-set method of Lawson and Hanson (1974), which does not, as least squares on a root F of
H = F^T F: only as many rows as H has rank, and twice the digits. `nnqp_one` and `nnqp_shared` are the same pivoting for
a single Hessian.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from gradsurgery.solvers.lapack import solve

TOLERANCE = 1e-11
# Keeps a factorisation finite where passive columns are dependent; far under TOLERANCE, so that no digit is lost.
RIDGE = 1e-15
TINY = np.finfo(float).tiny
# By how much a coordinate may be on the wrong side, relative to the largest.
BOUND = 0.1 * TOLERANCE
# More are a cycle, most often.
BLOCK_ROUNDS = 8
# A solution as large as this comes of passive columns that are dependent.
DEPENDENT = 1e6
# Eigenvalues below this part of the largest are rounding.
RANK = 4 * np.finfo(float).eps
# How often the unit of `least_distance` is chosen anew, and what is left of it where no point is as wanted.
RESCALED = 4
UNBOUNDED = 1e-14


def nnqp(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Solves K programs for each of N Hessians.

    Args:
        hessian: (N, T, T), symmetric positive semidefinite, diagonal 0 or about 1.
        linear: (N, K, T), in the range of the Hessian.
        passive: (N, K, T) bool, the coordinates believed to be positive; those of a positive linear term if None.

    Returns:
        x (N, K, T) >= 0, and the residual (N, K): max_j |min(x_j, (H x - f)_j)| relative to max |f|.
    """
    scale = np.maximum(np.abs(linear).max(-1, keepdims=True), TINY)
    x = _pivot(hessian, linear, scale, linear > 0 if passive is None else passive)
    residual = _residual(hessian, linear, x) / scale[..., 0]
    if residual.max() <= TOLERANCE:
        return x, residual
    for n in np.flatnonzero(~(residual <= TOLERANCE).all(-1)):
        todo = np.flatnonzero(~(residual[n] <= TOLERANCE))
        candidate = _active_set(hessian[n], linear[n, todo])
        other = _residual(hessian[n], linear[n, todo], candidate) / scale[n, todo, 0]
        better = ~(residual[n, todo] <= other)
        x[n, todo[better]], residual[n, todo[better]] = candidate[better], other[better]
    return x, residual


def _residual(hessian: np.ndarray, linear: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Natural residual (...,) of the optimality conditions x >= 0, y = H x - f >= 0, x y = 0."""
    return np.abs(np.minimum(x, x @ hessian - linear)).max(-1)


@lru_cache(maxsize=128)
def ones(T: int) -> np.ndarray:
    """(T,), not to be written to."""
    return np.ones(T)


@lru_cache(maxsize=128)
def identity(T: int) -> np.ndarray:
    """(T, T), not to be written to."""
    return np.eye(T)


def _solve_passive(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray) -> np.ndarray:
    """Minimisers (..., T) over the passive coordinates, 0 elsewhere, for Hessians that carry their ridge already."""
    system, right = np.where(passive[..., None], hessian, identity(linear.shape[-1])), (linear * passive)[..., None]
    try:
        x = np.linalg.solve(system, right)
    except np.linalg.LinAlgError:
        # The ridge can drown in rounding. The right side is in the range of its columns: any solution serves.
        x = np.linalg.pinv(system * passive[..., None, :], rcond=10 * RIDGE) @ right
    return x[..., 0] * passive


def _pivot(hessian: np.ndarray, linear: np.ndarray, scale: np.ndarray, passive: np.ndarray) -> np.ndarray:
    """x (N, K, T) at the end of pivoting, solved or not, for linear terms of size scale (N, K, 1)."""
    T = linear.shape[-1]
    H, f, solution = hessian, linear, np.empty((0, T))
    ridged, bound = H[:, None] + RIDGE * identity(T), -BOUND * scale
    todo = np.arange(linear.size // T)
    for round_ in range(BLOCK_ROUNDS):
        x = _solve_passive(ridged, f, passive)
        value = np.where(passive, x, x @ H - f)
        wrong = value < bound
        if round_ == 0:
            solution = np.maximum(x, 0.0).reshape(-1, T)
        else:
            solution[todo] = np.maximum(x, 0.0).reshape(-1, T)
        if not wrong.any():
            break
        # Where x is large, so is what rounding leaves.
        wrong &= value < -BOUND * np.abs(x).max(-1, keepdims=True)
        unsolved = wrong.any(-1)
        if not unsolved.any():
            break
        passive = passive ^ wrong
        if not unsolved.all():
            n, k = unsolved.nonzero()
            # From here on every program has a Hessian of its own.
            H, f, bound, passive = H[n], f[n, k][:, None], bound[n, k][:, None], passive[n, k][:, None]
            ridged, todo = ridged[n], todo[unsolved.ravel()]
    return solution.reshape(linear.shape)


def nnqp_one(
    hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Solves one program in as few calls as it takes, or gives up and leaves it to `nnqp`.

    Args:
        hessian: (T, T), as in `nnqp`.
        linear: (T,), with max |f| about 1.
        passive: the coordinates believed to be positive, ascending; all if None.

    Returns:
        x (T,) >= 0 of a residual of at most `TOLERANCE`, as `nnqp` has it, and its passive coordinates.
    """
    for _ in range(BLOCK_ROUNDS):
        x = _minimiser(hessian, linear, passive)
        if x is None:
            return None
        value = np.minimum(x, hessian.dot(x) - linear)
        values = value.tolist()
        if min(values) >= -BOUND:
            # False for a NaN, too.
            return (np.maximum(x, 0.0), passive) if sum(map(abs, values)) <= TOLERANCE else None
        wrong = value < -BOUND * max(1.0, np.abs(x).max())
        if not wrong.any():
            return None
        wrong[slice(None) if passive is None else passive] ^= True
        passive = wrong.nonzero()[0]
    return None


def nnqp_shared(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray) -> tuple[np.ndarray, float]:
    """`nnqp` for K programs of one Hessian, tested together.

    Args:
        hessian: (T, T), as in `nnqp`.
        linear: (K, T), with max |f| 1 in every row.
        passive: (K, T) bool, the coordinates believed to be positive; written to.

    Returns:
        x (K, T) >= 0 and its worst residual, as `nnqp` has it.
    """
    x, todo, given_up = np.zeros(linear.shape), range(len(linear)), []
    for _ in range(BLOCK_ROUNDS):
        for k in todo:
            minimiser = _minimiser(hessian, linear[k], passive[k].nonzero()[0])
            if minimiser is None:
                given_up.append(k)
            else:
                x[k] = minimiser
        wrong = np.minimum(x, x.dot(hessian) - linear) < -BOUND
        wrong[given_up] = False
        if not wrong.any():
            todo = []
            break
        passive ^= wrong
        todo = wrong.any(1).nonzero()[0].tolist()
    x = np.maximum(x, 0.0)
    residual = _residual(hessian, linear, x)
    left = sorted({*given_up, *todo, *(~(residual <= TOLERANCE)).nonzero()[0].tolist()})
    if left:
        x[left] = _active_set(hessian, linear[left])
        residual = _residual(hessian, linear, x)
    return x, residual.max().item()


def _minimiser(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray | None) -> np.ndarray | None:
    if passive is None:
        return solve(hessian, linear)
    x = np.zeros(len(linear))
    if len(passive):
        inner = solve(hessian[passive[:, None], passive], linear[passive])
        if inner is None or np.abs(inner).max() > DEPENDENT:
            return None
        x[passive] = inner
    return x


def root(hessian: np.ndarray) -> np.ndarray:
    """F (rank, T) with H = F^T F (T, T) to rounding, whose products keep the digits that squares lose."""
    values, vectors = np.linalg.eigh(hessian)
    kept = values > RANK * len(values) * values[-1]
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _active_set(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """x (K, T) for one Hessian (T, T) and K linear terms (K, T)."""
    if not (np.isfinite(hessian).all() and np.isfinite(linear).all()):
        return np.full(linear.shape, np.nan)
    F = root(hessian)
    # F^T y = f, which is near f where f is not in the range of H.
    targets = linear @ F.T / np.square(F).sum(-1)
    x = np.stack([_least_squares(F, y) for y in targets])
    residual = _residual(hessian, linear, x)
    for k in np.flatnonzero(residual > TOLERANCE * np.abs(linear).max(-1)):
        candidate = least_distance(F, linear[k])
        if _residual(hessian, linear[k], candidate) < residual[k]:
            x[k] = candidate
    return x


def least_distance(root: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """x (T,) >= 0 that minimises 1/2 |F x|^2 - f^T x for any f, so that F x is the least z with F^T z >= f.

    Lawson and Hanson's reduction (Solving Least Squares Problems, 1974, ch. 23): F and f under each other, times x,
    shall come near a unit vector. 0 where no z is as wanted.
    """
    size = np.abs(linear).max()
    x = np.zeros(len(linear))
    if not size > 0:
        return x
    unit = np.append(np.zeros(len(root)), 1.0)
    for _ in range(RESCALED):
        y = _least_squares(np.vstack([root, linear / size]), unit)
        rest = 1 - y @ linear / size
        if not rest > UNBOUNDED:
            return np.zeros(len(linear))
        x = y * size / rest
        length = np.linalg.norm(root @ x)
        # With |z| as unit, the rest is a half.
        if 0.1 * size <= length <= 10 * size or not length > 0:
            break
        size = length
    return x


def _least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x (T,) >= 0 that minimises |matrix x - target|; 0 where Lawson and Hanson's method does not end."""
    try:
        return _nnls()(matrix, target)[0]
    except RuntimeError:
        return np.zeros(matrix.shape[1])


@cache
def _nnls() -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]:
    # SciPy takes a fifth of a second to import, which only a singular Hessian has to pay.
    from scipy.optimize import nnls

    return nnls
