"""Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance (MoDo).

Lisha Chen, Heshan Fernando, Yiming Ying, Tianyi Chen. NeurIPS 2023. https://arxiv.org/abs/2305.20057, Algorithm 1: with
the rows J1, J2, J3 of three independent batches, w <- Proj(w - lr (J1 J2^T + rho I) w) on the simplex, from 1/T, and
the model moves along w @ J3 with the new w. Mean scale.

Conventions. lr is the paper's gamma. With two batches the authors' code takes the mean of J1 and J2 for J3.
"""

import numpy as np

from reference import simplex


def step(w: np.ndarray, J1: np.ndarray, J2: np.ndarray, lr: float = 1e-3, rho: float = 0.1) -> np.ndarray:
    """(T,) the weights w (T,) after one update, given the rows (T, d) of two independent batches."""
    w = np.asarray(w, dtype=np.float64)
    combined = sum(w[i] * J2[i] for i in range(len(w)))
    slope = np.array([J1[i] @ combined + rho * w[i] for i in range(len(w))])
    return simplex.project(w - lr * slope)


class Modo:
    """Keeps w (T,) from step to step, starting at 1/T."""

    def __init__(self, T: int, lr: float = 1e-3, rho: float = 0.1):
        self.w, self.lr, self.rho = np.full(T, 1 / T), lr, rho

    def weights(self, J1: np.ndarray, J2: np.ndarray) -> np.ndarray:
        """(T,) the weights of this step, after its update."""
        self.w = step(self.w, np.asarray(J1, np.float64), np.asarray(J2, np.float64), self.lr, self.rho)
        return self.w

    def direction(self, J1: np.ndarray, J2: np.ndarray, J3: np.ndarray | None = None) -> np.ndarray:
        """(d,) the new weights on the rows of a third batch, or on the mean of the two."""
        w = self.weights(J1, J2)
        return w @ ((np.asarray(J1, np.float64) + J2) / 2 if J3 is None else np.asarray(J3, np.float64))
