"""Equal weighting (linear scalarisation): the sum of the task losses, or a fixed preference over them.

No paper; the baseline "LS" of Nash-MTL (Navon et al., ICML 2022, https://arxiv.org/abs/2202.01017) and "EW" of LibMTL.

Convention: sum scale. Without a preference every weight is 1; a preference p > 0 is scaled to sum to T, so that
uniform p is the same as none.
"""

import numpy as np


def weights(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights, summing to T, for the rows of J (T, d)."""
    T = len(J)
    if preference is None:
        return np.ones(T)
    p = np.asarray(preference, dtype=np.float64)
    return T * p / p.sum()


def direction(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) weighted sum of the rows of J (T, d)."""
    J = np.asarray(J, dtype=np.float64)
    w = weights(J, preference)
    return sum(w[i] * J[i] for i in range(len(J)))
