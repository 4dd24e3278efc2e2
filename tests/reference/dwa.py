"""End-to-End Multi-Task Learning with Attention (DWA, dynamic weight averaging).

Shikun Liu, Edward Johns, Andrew J. Davison. CVPR 2019. https://arxiv.org/abs/1803.10704, Equation 7:
w_i = T exp(r_i / tau) / sum_j exp(r_j / tau), with r_i the mean loss of the last epoch over that of the one before it.
In the first two epochs w_i = 1.

Conventions. Epoch means are over steps, each counted once. `window` n ends an epoch by itself after every n steps, and
`epoch_end` must then not be called; Nash-MTL's code instead *slides* windows of 25 steps. Losses must be positive.
"""

import numpy as np


class Dwa:
    """`weights` gives the weights of a step; `epoch_end` closes an epoch (unless a window does)."""

    def __init__(self, T: int, temperature: float = 2.0, window: int | None = None):
        self.T, self.temperature, self.window = T, temperature, window
        self.means, self.steps = [], []

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) weights of this step, from earlier epochs alone; the losses (T,) count for later ones."""
        w = np.ones(self.T)
        if len(self.means) >= 2:
            e = np.exp(self.means[-1] / self.means[-2] / self.temperature)
            w = self.T * e / e.sum()
        self.steps.append(np.array(losses, dtype=np.float64))
        if self.window is not None and len(self.steps) == self.window:
            self.epoch_end()
        return w

    def epoch_end(self) -> None:
        """Keep the mean of this epoch's losses."""
        self.means.append(np.mean(self.steps, axis=0))
        self.steps = []
