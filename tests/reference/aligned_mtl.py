"""Independent Component Alignment for Multi-Task Learning (Aligned-MTL).

Dmitry Senushkin, Nikolay Patakin, Arseny Kuznetsov, Anton Konushin. CVPR 2023. https://arxiv.org/abs/2305.19000,
Equation 11 and Algorithm 1: the gradient matrix is replaced by the nearest one, up to a common scale, with all singular
values equal. With J = P S Q^T that is sigma P Q^T, whose rows are combined by the preference p:
u = sigma (P Q^T)^T p = J^T w, w = sigma P S^-1 P^T p. Null singular values are left out.

sigma is the least singular value ("min", the paper's), the root of the median of the squared ones ("median": of an even
number the lower middle one, as torch.median) or the root of their mean ("rmse"), over those kept, as in the authors'
code. A squared singular value is kept if above T eps times the largest, with float64's eps; theirs is float32's (1.2e-7
by torch.finfo()) whatever the dtype. p is ones; a given one is scaled to sum to T. (Sum scale; TorchJD takes 1/T.)

Deviations: an SVD of J, where theirs is an eigendecomposition of J J^T. An all-zero J has weights 0.
"""

import numpy as np


def weights(J: np.ndarray, scale: str = "min", preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the rows of J (T, d). scale "min", "median" or "rmse"."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    p = np.ones(T) if preference is None else T * np.asarray(preference, dtype=np.float64) / np.sum(preference)
    P, S, _ = np.linalg.svd(J, full_matrices=False)
    kept = S.max() ** 2 * T * np.finfo(np.float64).eps < S**2
    if not kept.any():
        return np.zeros(T)
    P, S = P[:, kept], S[kept]
    sigma = {"min": S.min(), "median": np.sort(S)[(len(S) - 1) // 2], "rmse": np.sqrt((S**2).mean())}[scale]
    return sigma * P @ ((P.T @ p) / S)


def direction(J: np.ndarray, scale: str = "min", preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, scale, preference) @ np.asarray(J, dtype=np.float64)
