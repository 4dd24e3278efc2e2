"""Towards Impartial Multi-task Learning (IMTL-G, the part for gradients).

Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao, Wayne Zhang. ICLR 2021.
https://openreview.net/forum?id=IMPnRXEWpvr, Equation 4: weights that sum to 1, may be negative, and make the
projections of u on all unit gradients equal. That is J J^T w = s n with n_i = ||g_i|| and 1^T w = 1, so that
w = (J J^T)^+ n / (1^T (J J^T)^+ n), here as pinv(J)^T pinv(J) n.

Where the rows are independent the common projection is s = 1 / (1^T (J J^T)^-1 n). If that denominator is negative, u
ascends on *every* task; near 0 it is unbounded. `weights` returns the formula's value even where it is negative
(`denominator` tells), and raises ValueError where the denominator is 0 within rounding. With dependent rows, equal
projections need not exist (n not in the range of J); the pseudoinverse is then a convention. A zero row gets weight 0.
"""

import numpy as np


def unscaled(J: np.ndarray) -> np.ndarray:
    """(T,) (J J^T)^+ n: the weights before they are made to sum to 1, whose direction descends on every task."""
    J = np.asarray(J, dtype=np.float64)
    size = np.linalg.norm(J, axis=1).max() or 1.0
    X = J / size
    inverse = np.linalg.pinv(X, rcond=1e-12)
    return inverse.T @ (inverse @ np.linalg.norm(X, axis=1)) / size


def denominator(J: np.ndarray) -> float:
    """1^T (J J^T)^+ n as a fraction of the largest it could be, the sum of its terms' sizes: within [-1, 1]."""
    w = unscaled(J)
    return float(w.sum() / (np.abs(w).sum() or 1.0))


def weights(J: np.ndarray) -> np.ndarray:
    """(T,) weights, summing to 1, of the rows of J (T, d). ValueError where no finite ones exist."""
    if abs(denominator(J)) < 1e-12:
        raise ValueError("no impartial weights: the denominator is zero")
    w = unscaled(J)
    return w / w.sum()


def direction(J: np.ndarray) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J) @ np.asarray(J, dtype=np.float64)
