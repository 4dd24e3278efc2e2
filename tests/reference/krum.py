"""Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Krum, Multi-Krum).

Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui, Julien Stainer. NeurIPS 2017.
https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html, Section 4: a row's score adds its
distances to its T - f - 2 nearest other rows; the `selected` rows of least score are averaged. Mean scale.

Conventions. Distances are not squared, as in TorchJD; the paper squares them (`squared`), which can choose other rows.
At least one neighbour counts where T - f - 2 < 1 (and all there are, T - 1, where that is more). Ties go to the lower
index. With T = 1 the only row is chosen.
"""

import numpy as np


def scores(J: np.ndarray, byzantine: int = 0, squared: bool = False) -> np.ndarray:
    """(T,) each row's summed distance to its nearest other rows."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    nearest = min(max(T - byzantine - 2, 1), T - 1)
    sums = []
    for i in range(T):
        distances = sorted(float(np.linalg.norm(J[i] - J[j])) for j in range(T) if j != i)
        sums.append(sum(distance ** (2 if squared else 1) for distance in distances[:nearest]))
    return np.array(sums, dtype=np.float64)


def weights(J: np.ndarray, byzantine: int = 0, selected: int = 1, squared: bool = False) -> np.ndarray:
    """(T,) 1 / selected for the chosen rows of J (T, d), else 0."""
    chosen = np.argsort(scores(J, byzantine, squared), kind="stable")[:selected]
    w = np.zeros(len(J))
    w[chosen] = 1 / selected
    return w


def direction(J: np.ndarray, byzantine: int = 0, selected: int = 1, squared: bool = False) -> np.ndarray:
    """(d,) mean of the chosen rows."""
    return weights(J, byzantine, selected, squared) @ np.asarray(J, dtype=np.float64)
