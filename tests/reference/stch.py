"""Smooth Tchebycheff Scalarization for Multi-Objective Optimization (STCH).

Xi Lin, Xiaoyuan Zhang, Zhiyuan Yang, Fei Liu, Zhenkun Wang, Qingfu Zhang. ICML 2024. https://arxiv.org/abs/2402.19078:
mu log sum_i exp(y_i / mu), a smooth maximum, in the authors' multi-task form: y_i = log(L_i / z_i), times T, after a
warm-up on sum_i log L_i; z is the mean of the losses over the last epoch of the warm-up. Losses must be positive.

Conventions. `warmup_epochs` epochs (at least 1) are warm-up. The authors' loop with STCH_warmup_epoch = n warms up for
epochs 0 to n, which is n + 1 of them, and averages epoch n: their n is n + 1 here. `window` n ends an epoch by itself
after every n steps. Deviation: none of the authors' 1e-20 inside the logarithms.
"""

import numpy as np
import torch

from reference import scalarised


class Stch:
    """`weights` gives the weights of a step; `epoch_end` closes an epoch (unless a window does)."""

    def __init__(self, T: int, mu: float = 1.0, warmup_epochs: int = 4, window: int | None = None):
        self.T, self.mu, self.warmup_epochs, self.window = T, mu, warmup_epochs, window
        self.epochs, self.steps, self.z = 0, [], None

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) gradient in the losses (T,) of the objective of this epoch."""
        self.steps.append(np.array(losses, dtype=np.float64))
        if self.z is None:
            w = scalarised.gradient(lambda L: L.log().sum(), losses)
        else:
            w = scalarised.gradient(self.smooth_maximum, losses)
        if self.window is not None and len(self.steps) == self.window:
            self.epoch_end()
        return w

    def smooth_maximum(self, L: torch.Tensor) -> torch.Tensor:
        """T mu log sum_i exp(log(L_i / z_i) / mu)."""
        return self.T * self.mu * torch.logsumexp(torch.log(L / scalarised.tensor(self.z)) / self.mu, dim=0)

    def epoch_end(self) -> None:
        """Count the epoch; after the last one of the warm-up, set z."""
        self.epochs += 1
        if self.epochs == self.warmup_epochs:
            self.z = np.mean(self.steps, axis=0)
        self.steps = []
