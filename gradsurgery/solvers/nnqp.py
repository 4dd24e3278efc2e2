"""Many small non-negative quadratic programs at once: min 1/2 x^T H x - f^T x subject to x >= 0.

H is positive semidefinite with f in its range, as every Gramian problem of this package has it, and both are scaled
so that diag H is 1 (or 0). Block principal pivoting (Portugal, Judice, Vicente 1994; Kim, Park, SIAM J. Sci. Comput.
2011) solves all N problems side by side in a few batched factorisations. It can cycle on a singular H; the problems it
leaves unsolved go to the active-set method of Lawson and Hanson (1974) in Gram form (Bro, de Jong, J. Chemometrics
1997), which cannot.

`nnqp_small` is the same pivoting on one problem in plain floats: for a handful of tasks it is done before NumPy has
made its first few calls.
"""

from math import sqrt
from operator import mul

import numpy as np

TOLERANCE = 1e-11
# Keeps a factorisation finite where passive columns are dependent; far under TOLERANCE, so that no digit is lost.
RIDGE = 1e-15
# From then on a single coordinate flips at a time (Murty's rule), which is what guarantees an end.
BLOCK_ROUNDS = 12


def nnqp(hessian: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solves N programs.

    Args:
        hessian: (N, T, T), symmetric positive semidefinite, diagonal 0 or about 1.
        linear: (N, T), in the range of the Hessian.

    Returns:
        x (N, T) >= 0, and the residual (N,): max_j |min(x_j, (H x - f)_j)| relative to max |f|.
    """
    if (linear <= 0).all():
        return np.zeros_like(linear), np.zeros(len(linear))
    x = _pivot(hessian, linear)
    residual = kkt_residual(hessian, linear, x)
    for n in np.flatnonzero(~(residual <= TOLERANCE)):
        candidate = _active_set(hessian[n], linear[n])[None]
        other = kkt_residual(hessian[n : n + 1], linear[n : n + 1], candidate)[0]
        if not residual[n] <= other:
            x[n], residual[n] = candidate[0], other
    return x, residual


def kkt_residual(hessian: np.ndarray, linear: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Natural residual (N,) of the optimality conditions x >= 0, y = H x - f >= 0, x y = 0, relative to max |f|."""
    slack = (hessian @ x[..., None])[..., 0] - linear
    scale = np.abs(linear).max(-1)
    return np.abs(np.minimum(x, slack)).max(-1) / np.where(scale > 0, scale, 1.0)


def _solve_passive(hessian: np.ndarray, linear: np.ndarray, passive: np.ndarray) -> np.ndarray:
    """Minimisers (N, T) over the passive coordinates, 0 elsewhere, for Hessians that carry their ridge already."""
    system = np.where(passive[:, :, None], hessian, np.eye(linear.shape[-1]))
    return np.linalg.solve(system, (linear * passive)[..., None])[..., 0] * passive


def _pivot(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    T = linear.shape[-1]
    solution = np.zeros_like(linear)
    todo: np.ndarray | slice = slice(None)
    H, f, passive = hessian + RIDGE * np.eye(T), linear, linear > 0
    for round_ in range(BLOCK_ROUNDS + 3 * T):
        x = _solve_passive(H, f, passive)
        value = np.where(passive, x, (H @ x[..., None])[..., 0] - f)
        scale = np.maximum(np.abs(x).max(-1, keepdims=True), np.abs(f).max(-1, keepdims=True))
        wrong = value < -0.1 * TOLERANCE * scale
        solution[todo] = np.maximum(x, 0.0)
        unsolved = wrong.any(-1)
        if not unsolved.any():
            break
        if round_ >= BLOCK_ROUNDS:
            wrong = wrong & (np.arange(T) == T - 1 - np.argmax(wrong[:, ::-1], axis=-1)[:, None])
        passive = passive ^ wrong
        if not unsolved.all():
            H, f, passive, todo = H[unsolved], f[unsolved], passive[unsolved], np.arange(len(solution))[todo][unsolved]
    return solution


def _active_set(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    T = len(linear)
    ridged = hessian + RIDGE * np.eye(T)
    x = np.zeros(T)
    passive = np.zeros(T, dtype=bool)
    for _ in range(10 * T):
        slack = hessian @ x - linear
        scale = max(np.abs(linear).max(), np.abs(x).max(), np.finfo(float).tiny)
        slack[passive] = np.inf
        entering = int(np.argmin(slack))
        if slack[entering] >= -1e-14 * scale:
            break
        passive[entering] = True
        while True:
            trial = _solve_passive(ridged[None], linear[None], passive[None])[0]
            blocking = passive & (trial <= 0)
            if not blocking.any():
                break
            ratio = np.full(T, np.inf)
            ratio[blocking] = x[blocking] / np.maximum(x[blocking] - trial[blocking], np.finfo(float).tiny)
            x = x + ratio.min() * (trial - x)
            passive &= ~(blocking & (ratio <= ratio.min()))
            x[~passive] = 0.0
        x = np.where(passive, trial, 0.0)
    return x


def nnqp_small(
    hessian: list[list[float]], linear: list[float], passive: list[int] | None = None
) -> tuple[list[float], list[int]] | None:
    """Solves one program, to a residual of `TOLERANCE`.

    Args:
        hessian, linear: as in `nnqp`.
        passive: the coordinates believed to be positive, ascending; those of a positive linear term if None.

    Returns:
        x and its passive coordinates, or None where pivoting does not end (a singular Hessian may make it cycle).
    """
    coordinates = range(len(linear))
    if passive is None:
        passive = [i for i in coordinates if linear[i] > 0]
    for round_ in range(BLOCK_ROUNDS + 3 * len(linear)):
        x = _solve_passive_small(hessian, linear, passive)
        slack = [sum(map(mul, row, x)) - f for row, f in zip(hessian, linear, strict=True)]
        bound = -0.1 * TOLERANCE * max(max(linear), -min(linear), max(x), -min(x))
        wrong = [i for i in coordinates if x[i] < bound or slack[i] < bound]
        if not wrong:
            return x, passive
        passive = sorted({*passive}.symmetric_difference(wrong if round_ < BLOCK_ROUNDS else wrong[-1:]))
    return None


def kkt_residual_small(hessian: list[list[float]], linear: list[float], x: list[float]) -> float:
    """`kkt_residual` of one program whose linear term is not zero."""
    pairs = zip(hessian, linear, x, strict=True)
    return max(abs(min(v, sum(map(mul, row, x)) - f)) for row, f, v in pairs) / max(max(linear), -min(linear))


def _solve_passive_small(hessian: list[list[float]], linear: list[float], passive: list[int]) -> list[float]:
    """`_solve_passive` of one program, by Cholesky's factorisation."""
    lower: list[list[float]] = []
    inverse: list[float] = []
    z: list[float] = []
    for i in passive:
        h, row = hessian[i], []
        for j, other, scale in zip(passive, lower, inverse, strict=False):
            row.append((h[j] - sum(map(mul, row, other))) * scale)
        scale = 1 / sqrt(max(h[i] + RIDGE - sum(map(mul, row, row)), RIDGE))
        z.append((linear[i] - sum(map(mul, row, z))) * scale)
        lower.append(row)
        inverse.append(scale)
    x = [0.0] * len(linear)
    for k in range(len(passive) - 1, -1, -1):
        x[passive[k]] = value = z[k] * inverse[k]
        for j, entry in enumerate(lower[k]):
            z[j] -= entry * value
    return x
