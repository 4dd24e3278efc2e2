"""ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks.

Qiang Liu, Mengyu Chu, Nils Thuerey. ICLR 2025. https://arxiv.org/abs/2408.11104, Equations 2 to 4: with the unit rows
U, u is along pinv(U) 1, so that it makes the same angle with every gradient, and its length is sum_i g_i.u/||u||.

Conventions. As in the authors' code a zero row stays zero among the unit rows; it gets weight 0. With dependent rows
equal angles need not exist; pinv(U) 1 is then the least-squares direction, and the length is still the signed sum (it
turns u around where that is negative). Where pinv(U) 1 = 0 (opposite gradients), u = 0 and so are the weights; theirs
divides by zero. A preference p takes the place of 1 (of the size of ones: its scale does not matter). The weights are
those in the span: pinv(U)^T pinv(U) p / ||g_i||, scaled.
"""

import numpy as np


def equiangular(J: np.ndarray, preference: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """pinv(U) p (d,) of the unit rows U of J (T, d), and weights (T,) of the rows of J that make it."""
    norms = np.linalg.norm(J, axis=1)
    sizes = np.where(norms > 0, norms, 1.0)
    inverse = np.linalg.pinv(J / sizes[:, None], rcond=1e-12)
    x = inverse @ (np.ones(len(J)) if preference is None else preference / np.mean(preference))
    return x, (inverse.T @ x) * (norms > 0) / sizes


def weights(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the rows of J (T, d)."""
    J = np.asarray(J, dtype=np.float64)
    x, w = equiangular(J, preference)
    size = np.linalg.norm(x)
    if size < 1e-9:
        return np.zeros(len(J))
    return w / size * (J @ (x / size)).sum()


def direction(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) the equiangular direction, as long as the projections on it of all rows together."""
    J = np.asarray(J, dtype=np.float64)
    x, _ = equiangular(J, preference)
    size = np.linalg.norm(x)
    if size < 1e-9:
        return np.zeros(J.shape[1])
    return x / size * (J @ (x / size)).sum()
