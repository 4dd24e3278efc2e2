"""Multi-Task Learning as a Bargaining Game (Nash-MTL).

Aviv Navon, Aviv Shamsian, Idan Achituve, Haggai Maron, Kenji Kawaguchi, Gal Chechik, Ethan Fetaya. ICML 2022.
https://arxiv.org/abs/2202.01017: u = sum_i a_i g_i with a > 0 and J J^T a = 1 / a elementwise. With a preference p
(the asymmetric bargain, max sum_i p_i log g_i.u) it is J J^T a = p / a; p is scaled to sum to T. Then ||u||^2 = T.

Solved as the convex problem min_a ||J^T a||^2 / 2 - sum_i p_i log a_i, whose stationarity is that equation, on unit
rows (a_i = a'_i / ||g_i|| maps back exactly), by damped Newton, each step a least-squares problem in J^T itself.
A solution exists if and only if 0 is not in the convex hull of the rows; otherwise ValueError. (So no zero row.)

Deviations from the authors' code: no CCCP, no ECOS, no clipping of ||u|| to 1, and no normalisation: theirs solves for
J J^T / ||J J^T||_F and does not scale a back, which makes its update sqrt(||J J^T||_F) times this one.
"""

import numpy as np


def weights(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) a > 0 with a_i g_i.(a @ J) = p_i for the rows g_i of J (T, d). ValueError if 0 is in their convex hull."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    p = np.ones(T) if preference is None else T * np.asarray(preference, dtype=np.float64) / np.sum(preference)
    norms = np.linalg.norm(J, axis=1)
    if (norms == 0).any():
        raise ValueError("no bargain: a row is zero")
    unit = J / norms[:, None]
    a = np.ones(T)
    for _ in range(10_000):
        # (unit unit^T + diag(p / a^2)) step = p / a - unit unit^T a, as least squares
        system = np.vstack([unit.T, np.diag(np.sqrt(p) / a)])
        residual = np.concatenate([-(a @ unit), np.sqrt(p)])
        step = np.linalg.lstsq(system, residual, rcond=None)[0]
        decrement = np.linalg.norm(system @ step) / np.sqrt(p.min())
        a = a + step / (1 + decrement if decrement > 0.1 else 1)
        if decrement < 1e-9:  # quadratic: the step just taken leaves 1e-18
            break
        if a.max() > 1e12:  # the problem is unbounded
            raise ValueError("no bargain: a convex combination of the rows is zero")
    return a / norms


def residual(J: np.ndarray, a: np.ndarray, preference: np.ndarray | None = None) -> float:
    """max_i |a_i g_i.u / p_i - 1| at u = a @ J: the relative error of J J^T a = p / a."""
    J = np.asarray(J, dtype=np.float64)
    p = np.ones(len(J)) if preference is None else len(J) * np.asarray(preference) / np.sum(preference)
    return float(np.abs(a * (J @ (a @ J)) / p - 1).max())


def direction(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) a @ J, of norm sqrt(T)."""
    return weights(J, preference) @ np.asarray(J, dtype=np.float64)
