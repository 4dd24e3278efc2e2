"""MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary Tasks.

Yun He, Xue Feng, Cheng Cheng, Geng Ji, Yunsong Guo, James Caverlee. WWW 2022. https://arxiv.org/abs/2203.06801,
Algorithm 1 and Equation 5: with m_i the moving average of ||g_i||, an auxiliary gradient becomes
relax (m_target / m_i) g_i + (1 - relax) g_i; all are then added to the target's own (sum scale).

Conventions, those of the authors' code: m starts at 0, m <- beta m + (1 - beta) ||g||, and already holds this step's
norm (their bias to 0 cancels in the ratio); defaults relax .7, beta .9. One instance is one tensor of parameters: use
one a block. Where m_i = 0 (only zero gradients so far; theirs gives nan) the ratio is taken as 0.
"""

import numpy as np


class MetaBalance:
    """The method with its state, the moving averages m (T,) of the gradient norms of one block."""

    def __init__(self, T: int, target: int = 0, relax: float = 0.7, beta: float = 0.9):
        self.target, self.relax, self.beta, self.m = target, relax, beta, np.zeros(T)

    def weights(self, J: np.ndarray, losses: np.ndarray | None = None) -> np.ndarray:
        """(T,) weights of the rows of J (T, d), one block's gradients. Losses are not used."""
        J = np.asarray(J, dtype=np.float64)
        w = np.ones(len(J))
        for i in range(len(J)):
            self.m[i] = self.beta * self.m[i] + (1 - self.beta) * np.linalg.norm(J[i])
        for i in range(len(J)):
            if i != self.target:
                ratio = self.m[self.target] / self.m[i] if self.m[i] > 0 else 0.0
                w[i] = self.relax * ratio + (1 - self.relax)
        return w
