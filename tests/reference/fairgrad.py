"""Fair Resource Allocation in Multi-Task Learning (FairGrad).

Hao Ban, Kaiyi Ji. ICML 2024. https://arxiv.org/abs/2402.15638, Equation 8: w > 0 with J J^T w = w^(-1/alpha)
elementwise, alpha > 0. alpha = 1 is the Nash bargain.

Solved as the convex problem min_w ||J^T w||^2 / 2 - sum_i w_i^(1 - 1/alpha) / (1 - 1/alpha) (the sum of log w_i for
alpha = 1), whose stationarity is that equation, by Newton with line search. For unit rows, w_i = x_i / ||g_i||, it
reads (U U^T x)_i = q_i x_i^(-1/alpha) with q_i = ||g_i||^(1/alpha - 1). A step is a least-squares problem in U^T. A
solution exists if and only if 0 is not in the convex hull of the rows; otherwise ValueError. (So no zero row.)

Deviations from the authors' code: no least_squares from 1/T (its residual is not the method's), no clipping of ||u|| to
1, and no multiplication of u by T "to match the sum loss".
"""

import numpy as np

from reference import mgda


def solve(J: np.ndarray, alpha: float, scores: np.ndarray) -> np.ndarray:
    """(T,) w > 0 with J J^T w = (scores / w)^(1/alpha), scores (T,) > 0. ValueError if 0 is in the rows' hull.

    ArithmeticError where rounding keeps Newton from a relative error of 1e-6.
    """
    J = np.asarray(J, dtype=np.float64)
    norms = np.linalg.norm(J, axis=1)
    if (norms == 0).any():
        raise ValueError("no fair weights: a row is zero")
    unit = J / norms[:, None]
    if np.linalg.norm(mgda.direction(unit)) < 1e-9:
        raise ValueError("no fair weights: a convex combination of the rows is zero")
    log_q = (1 / alpha - 1) * np.log(norms) + np.log(scores) / alpha
    level = log_q.mean()  # x = exp(shift) y takes the common factor of q out
    q, shift = np.exp(log_q - level), level / (1 + 1 / alpha)

    def potential(y):
        utility = np.log(y) if alpha == 1 else y ** (1 - 1 / alpha) / (1 - 1 / alpha)
        return np.sum((y @ unit) ** 2) / 2 - q @ utility

    y = np.ones(len(J))
    for _ in range(10_000):
        # (unit unit^T + diag(h)) step = q y^(-1/alpha) - unit unit^T y, with h = q y^(-1/alpha - 1) / alpha
        h = q * y ** (-1 / alpha - 1) / alpha
        # as least squares in step / y, which keeps the columns of comparable size
        system = np.vstack([unit.T * y, np.diag(np.sqrt(h) * y)])
        target = np.concatenate([-(y @ unit), q * y ** (-1 / alpha) / np.sqrt(h)])
        relative = np.linalg.lstsq(system, target, rcond=1e-18)[0]
        decrement = np.sum((system @ relative) ** 2)
        size = min(1.0, 0.9 / max(-relative.min(), 1e-300))
        # once rounding hides the decrease, full steps
        while decrement > 1e-10 * abs(potential(y)):
            if potential(y * (1 + size * relative)) <= potential(y) - 0.1 * size * decrement or size < 1e-10:
                break
            size /= 2
        y = y * (1 + size * relative)
        if np.abs(relative).max() < 1e-13:
            break
    error = np.abs((unit @ (y @ unit)) * y ** (1 / alpha) / q - 1).max()
    if not error < 1e-6:  # seen at alpha = 20 with norms 1e2 and more apart
        raise ArithmeticError(f"the equation is solved to {error:.1e} only")
    return np.exp(shift) * y / norms


def residual(J: np.ndarray, w: np.ndarray, alpha: float = 2.0) -> float:
    """max_i |w_i^(1/alpha) g_i.u - 1| at u = w @ J: the relative error of the equation."""
    J = np.asarray(J, dtype=np.float64)
    return float(np.abs(w ** (1 / alpha) * (J @ (w @ J)) - 1).max())


def weights(J: np.ndarray, alpha: float = 2.0, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) w > 0 with J J^T w = (p / w)^(1/alpha), p ones unless given. ValueError if 0 is in the rows' convex hull."""
    return solve(J, alpha, np.ones(len(J)) if preference is None else np.asarray(preference))


def direction(J: np.ndarray, alpha: float = 2.0, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, alpha, preference) @ np.asarray(J, dtype=np.float64)
