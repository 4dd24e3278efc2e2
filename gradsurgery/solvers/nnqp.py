"""Many small non-negative quadratic programs at once: min 1/2 x^T H x - f^T x subject to x >= 0.

H is positive semidefinite with f in its range, as every Gramian problem of this package has it, and both are scaled
so that diag H is 1 (or 0). Block principal pivoting (Portugal, Judice, Vicente 1994; Kim, Park, SIAM J. Sci. Comput.
2011) solves all of them side by side in a few batched factorisations. It can cycle on a singular H; the programs it
leaves unsolved go to the active-set method of Lawson and Hanson (1974) in Gram form (Bro, de Jong, J. Chemometrics
1997), which cannot. `nnqp_one` and `nnqp_shared` are the same pivoting for a single Hessian, and optimistic: what they
give up goes to `nnqp`.
"""

from functools import lru_cache

import numpy as np

from gradsurgery.solvers.lapack import solve

TOLERANCE = 1e-11
# Keeps a factorisation finite where passive columns are dependent; far under TOLERANCE, so that no digit is lost.
RIDGE = 1e-15
TINY = np.finfo(float).tiny
# By how much a coordinate may be on the wrong side, relative to the largest.
BOUND = 0.1 * TOLERANCE
# From then on a single coordinate flips at a time (Murty's rule), which is what guarantees an end.
BLOCK_ROUNDS = 12


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
    for n, k in np.argwhere(~(residual <= TOLERANCE)):
        candidate = _active_set(hessian[n], linear[n, k])
        other = _residual(hessian[n], linear[n, k], candidate) / scale[n, k, 0]
        if not residual[n, k] <= other:
            x[n, k], residual[n, k] = candidate, other
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
    for round_ in range(BLOCK_ROUNDS + 3 * T):
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
        if round_ >= BLOCK_ROUNDS:
            wrong = wrong & (np.arange(T) == T - 1 - np.argmax(wrong[..., ::-1], axis=-1)[..., None])
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


def nnqp_shared(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray) -> tuple[np.ndarray, float] | None:
    """`nnqp_one` for K programs of one Hessian, tested together.

    Args:
        hessian: (T, T), as in `nnqp`.
        linear: (K, T), with max |f| 1 in every row.
        passive: (K, T) bool, the coordinates believed to be positive; written to.

    Returns:
        x (K, T) >= 0 and its worst residual, of at most `TOLERANCE`, as `nnqp` has it.
    """
    x, todo = np.zeros(linear.shape), range(len(linear))
    for _ in range(BLOCK_ROUNDS):
        for k in todo:
            minimiser = _minimiser(hessian, linear[k], passive[k].nonzero()[0])
            if minimiser is None:
                return None
            x[k] = minimiser
        wrong = np.minimum(x, x.dot(hessian) - linear) < -BOUND
        if not wrong.any():
            x = np.maximum(x, 0.0)
            residual = _residual(hessian, linear, x).max().item()
            return (x, residual) if residual <= TOLERANCE else None
        passive ^= wrong
        todo = wrong.any(1).nonzero()[0].tolist()
    return None


def _minimiser(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray | None) -> np.ndarray | None:
    if passive is None:
        return solve(hessian, linear)
    x = np.zeros(len(linear))
    if len(passive):
        inner = solve(hessian[passive[:, None], passive], linear[passive])
        if inner is None:
            return None
        x[passive] = inner
    return x


def _active_set(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    T = len(linear)
    ridged = hessian + RIDGE * np.eye(T)
    x = np.zeros(T)
    passive = np.zeros(T, dtype=bool)
    for _ in range(10 * T):
        slack = hessian @ x - linear
        scale = max(np.abs(linear).max(), np.abs(x).max(), TINY)
        slack[passive] = np.inf
        entering = int(np.argmin(slack))
        if slack[entering] >= -1e-14 * scale:
            break
        passive[entering] = True
        while True:
            trial = _solve_passive(ridged, linear, passive)
            blocking = passive & (trial <= 0)
            if not blocking.any():
                break
            ratio = np.full(T, np.inf)
            ratio[blocking] = x[blocking] / np.maximum(x[blocking] - trial[blocking], TINY)
            x = x + ratio.min() * (trial - x)
            passive &= ~(blocking & (ratio <= ratio.min()))
            x[~passive] = 0.0
        x = np.where(passive, trial, 0.0)
    return x
