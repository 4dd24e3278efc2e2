"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (coordinate-wise trimmed mean).

Dong Yin, Yudong Chen, Kannan Ramchandran, Peter Bartlett. ICML 2018. https://arxiv.org/abs/1803.01498, Definition 2: in
every coordinate, the mean of the values left without the largest and the smallest ones.

Conventions. `trim` counts what goes at *each* end (the paper's beta T); mean scale, over the T - 2 trim values left.
"""

import numpy as np


def direction(J: np.ndarray, trim: int = 1) -> np.ndarray:
    """(d,) for the rows of J (T, d); 0 <= 2 trim < T."""
    J = np.asarray(J, dtype=np.float64)
    T, d = J.shape
    if not 0 <= 2 * trim < T:
        raise ValueError(f"trim must leave a task: got {trim} of {T}")
    u = np.empty(d)
    for k in range(d):
        left = sorted(J[:, k])
        for _ in range(trim):
            left.remove(min(left))
            left.remove(max(left))
        u[k] = sum(left) / len(left)
    return u
