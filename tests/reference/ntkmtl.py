"""NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective.

Xiaohan Qin, Xiaoxing Wang, Ning Liao, Junchi Yan. NeurIPS 2025; code: jianke0604/NTKMTL. With one batch a task its
kernel is the number ||g_i||^2, and the authors' code weighs w_i = (sum_j ||g_j||^2 / ||g_i||^2)^exponent, exponent 1/2.

Conventions. A zero row, which theirs divides by, has weight 0 (any weight gives the same direction). Deviations from
the authors' code: no multiplication of u by T "to match the sum loss", and no clipping of ||u|| to 1.
"""

import numpy as np


def weights(J: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    """(T,) weights of the rows of J (T, d)."""
    norms = np.linalg.norm(np.asarray(J, dtype=np.float64), axis=1)
    total = np.linalg.norm(norms)
    return np.array([(total / n) ** (2 * exponent) if n > 0 else 0.0 for n in norms])


def direction(J: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, exponent) @ np.asarray(J, dtype=np.float64)
