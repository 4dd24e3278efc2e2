"""Dual-Balancing for Multi-Task Learning (DB-MTL).

Baijiong Lin, Weisen Jiang, Feiyang Ye, Yu Zhang, Pengguang Chen, Ying-Cong Chen, Shu Liu, James T. Kwok.
https://arxiv.org/abs/2308.12029, Algorithm 1: h_i <- beta_k h_i + (1 - beta_k) grad log L_i, and the direction is
max_j ||h_j|| sum_i h_i / ||h_i||. As in LibMTL, the authors', beta_k = beta / k^decay at step k = 1, 2, ..., and h
starts at 0. Losses must be positive.

Deviations: none of LibMTL's epsilons (1e-8 in the logarithm and the division); a task with h_i = 0 adds nothing.
"""

import numpy as np


class DbMtl:
    """Keeps the averaged rows h (T, d) of the logarithms of the losses. 0 <= beta < 1, decay >= 0."""

    def __init__(self, T: int, d: int, beta: float = 0.9, decay: float = 0.5):
        self.h, self.step = np.zeros((T, d)), 0
        self.beta, self.decay = beta, decay

    def direction(self, J: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """(d,) for the rows of J (T, d), gradients of the raw losses (T,) > 0, of this step."""
        J, losses = np.asarray(J, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        self.step += 1
        beta = self.beta / self.step**self.decay
        u, largest = np.zeros(J.shape[1]), 0.0
        for i in range(len(J)):
            self.h[i] = beta * self.h[i] + (1 - beta) * J[i] / losses[i]
            norm = np.linalg.norm(self.h[i])
            largest = max(largest, norm)
            if norm > 0:
                u = u + self.h[i] / norm
        return largest * u
