"""Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach (MoCo).

Heshan Fernando, Han Shen, Miao Liu, Subhajit Chaudhury, Keerthiram Murugesan, Tianyi Chen. ICLR 2023.
https://arxiv.org/abs/2210.12624, Algorithm 1: the rows are tracked, Y <- Y - beta (Y - J); w <- Proj(w - gamma (Y Y^T +
rho I) w) on the simplex, from 1/T; the model moves along w @ Y. Mean scale.

Conventions. Y starts at 0, with no correction of that bias; each of Y, w, direction uses the new values of those before
it, as the authors' code does. beta and gamma are constant. Deviations from LibMTL's port: the Euclidean projection and
not a softmax, no rescaling of the rows to the norm L_i, no decay of beta and gamma with the step.
"""

import numpy as np

from reference import simplex


class Moco:
    """Keeps the tracked rows Y (T, d) and the weights w (T,). 0 < beta <= 1, gamma > 0, rho >= 0."""

    def __init__(self, T: int, d: int, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0):
        self.Y, self.w = np.zeros((T, d)), np.full(T, 1 / T)
        self.beta, self.gamma, self.rho = beta, gamma, rho

    def direction(self, J: np.ndarray, losses: np.ndarray | None = None) -> np.ndarray:
        """(d,) for the rows of J (T, d) of this step; losses are not used."""
        J, T = np.asarray(J, dtype=np.float64), len(self.w)
        for i in range(T):
            self.Y[i] = self.Y[i] - self.beta * (self.Y[i] - J[i])
        combined = sum(self.w[i] * self.Y[i] for i in range(T))
        slope = np.array([self.Y[i] @ combined + self.rho * self.w[i] for i in range(T)])
        self.w = simplex.project(self.w - self.gamma * slope)
        return sum(self.w[i] * self.Y[i] for i in range(T))
