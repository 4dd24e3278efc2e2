"""Linear programs over the simplex: max c^T x such that G x >= b and d^T x >= e, x >= 0, sum x = 1.

The dual simplex method (Lemke, Naval Research Logistics 1, 1954) on a condensed tableau, from the vertex at which c is
largest: there it is dual feasible, so that no first phase is needed, and a row that cannot be mended proves that the
program is infeasible. After many pivots the least index decides (Bland, Math. Oper. Res. 2, 1977), which cannot cycle.
The solution is computed afresh from the final basis, and its residual from the data alone.

Rows are scaled to angles: row i of G by the i-th norm and the largest, d and c by their largest entries.
"""

import numpy as np

from gradsurgery.solvers.operator import solver

# Below this a scaled constraint counts as met, a coefficient as zero.
TOLERANCE = 1e-11
BLAND_AFTER = 10


def linear_program_numpy(
    gramian: np.ndarray, objective: np.ndarray, lower: np.ndarray, row: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solutions (N, T) and residuals (N,) for N programs; see `linear_program`."""
    N, T = gramian.shape[:2]
    solution, residual = np.full((N, T), 1 / T), np.full(N, np.inf)
    objective, lower, row = (vector.reshape(N, T) for vector in (objective, lower, row))
    for n, bottom in enumerate(floor.reshape(N)):
        matrix, bounds = _constraints(gramian[n], lower[n], row[n], bottom)
        c = objective[n] / (np.abs(objective[n]).max() or 1.0)
        if not np.isfinite(matrix.sum() + bounds.sum() + c.sum()):
            solution[n], residual[n] = np.nan, np.nan
            continue
        basis = _pivot(matrix, bounds, c)
        if basis is not None:
            solution[n], residual[n] = _vertex(matrix, bounds, c, basis)
    return solution, residual


def _constraints(gramian: np.ndarray, lower: np.ndarray, row: np.ndarray, floor: float) -> tuple[np.ndarray, ...]:
    """The constraints A x >= b that bind at all, scaled: A (M, T) and b (M,)."""
    norm = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    scale = np.append(np.where(norm > 0, norm, 1.0) * (norm.max() or 1.0), np.abs(row).max() or 1.0)
    bounds = np.append(lower, floor) / scale
    present = bounds > -np.inf
    # A NaN bound must not drop its row in silence.
    present |= np.isnan(bounds)
    return (np.vstack([gramian, row]) / scale[:, None])[present], bounds[present]


def _pivot(matrix: np.ndarray, bounds: np.ndarray, c: np.ndarray) -> np.ndarray | None:
    """Indices of the variables that are zero at an optimal vertex (x first, then slacks), or None: infeasible.

    A row of the tableau reads: its variable = row[-1] - row[:-1] @ (variables that are zero); the last one is c^T x.
    """
    T = len(c)
    first = int(c.argmax())
    rest = np.array([i for i in range(T) if i != first], dtype=int)
    entries = np.vstack([np.ones(T), matrix[:, [first]] - matrix, c[first] - c])
    right = np.concatenate([[1.0], matrix[:, first] - bounds, [c[first]]])
    tableau = np.column_stack([entries[:, rest], right])
    basic, zero = np.concatenate([[first], T + np.arange(len(bounds))]), rest
    for step in range(100 * (T + len(bounds))):
        bland = step > BLAND_AFTER * T
        broken = np.flatnonzero(tableau[:-1, -1] < -TOLERANCE)
        if not len(broken):
            break
        p = broken[basic[broken].argmin() if bland else tableau[broken, -1].argmin()]
        able = np.flatnonzero(tableau[p, :-1] < -TOLERANCE)
        if not len(able):
            return None
        ratio = np.maximum(tableau[-1, able], 0.0) / -tableau[p, able]
        tied = able[ratio <= ratio.min() + TOLERANCE]
        q = tied[zero[tied].argmin() if bland else tableau[p, tied].argmin()]
        _exchange(tableau, int(p), int(q))
        basic[p], zero[q] = zero[q], basic[p]
    return zero


def _exchange(tableau: np.ndarray, p: int, q: int) -> None:
    """Row p's variable becomes zero, and column q's takes its place."""
    pivot = tableau[p, q]
    column, row = tableau[:, q].copy(), tableau[p] / pivot
    row[q] = 1 / pivot
    tableau -= np.outer(column, row)
    tableau[:, q] = -column / pivot
    tableau[p] = row


def _vertex(matrix: np.ndarray, bounds: np.ndarray, c: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, float]:
    """x (T,) of a basis, and its residual."""
    T = len(c)
    tight = zero[zero >= T] - T
    inside = np.ones(T, dtype=bool)
    inside[zero[zero < T]] = False
    free = np.flatnonzero(inside)
    x, y = np.zeros(T), np.zeros(len(bounds))
    x[free] = 1.0
    if len(tight):
        square = np.vstack([matrix[tight][:, free], np.ones(len(free))])
        x[free] = np.maximum(_solve(square, np.append(bounds[tight], 1.0)), 0.0)
        x /= x.sum()
        # c = level - A^T y on the free coordinates; no y >= 0 gives a bound below c^T x.
        y[tight] = np.maximum(-_solve(square.T, c[free])[:-1], 0.0)
    gap = (c + y @ matrix).max() - y @ bounds - c @ x
    return x, float(max(gap, (bounds - matrix @ x).max(initial=0.0), 0.0))


def _solve(square: np.ndarray, right: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(square, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(square, right, rcond=None)[0]


@solver("linear_program", "(Tensor gramian, Tensor objective, Tensor lower, Tensor row, Tensor floor)")
def linear_program(
    gramian: np.ndarray, objective: np.ndarray, lower: np.ndarray, row: np.ndarray, floor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A point of the simplex that maximises ``objective`` under ``gramian x >= lower`` and ``row x >= floor``.

    Args:
        gramian: (..., T, T) float64.
        objective: (..., T) float64.
        lower: (..., T) float64; -inf for no constraint.
        row: (..., T) float64.
        floor: (...,) float64; -inf for no constraint.

    Returns:
        x (..., T), a vertex of what the constraints leave of the simplex (which one, where several are optimal, depends
        on the order of the tasks), and the residual (...,): the larger of the duality gap, relative to the largest
        entry of the objective, and the largest violation of a scaled constraint. Where nothing satisfies the
        constraints, x is 1/T each and the residual infinite.
    """
    return linear_program_numpy(gramian, objective, lower, row, floor)
