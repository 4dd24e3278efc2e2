"""Improvable Gap Balancing for Multi-Task Learning (IGBv1).

Yanqi Dai, Nanyi Fei, Zhiwu Lu. UAI 2023. https://arxiv.org/abs/2307.15429: the model descends sum_i a_i log L_i with
a = T softmax(L / L_base) held fixed; the improvable gap is taken as the ratio of the loss to its own base. As in the
authors' code, a is ones until the base is known, and the base is the mean of the losses over epoch `base_epoch`,
counted from 0; their default 1 is the second epoch. Losses must be positive.

Convention: `weights` are those of the raw losses, a_i / L_i. `window` n ends an epoch by itself after every n steps.
"""

import numpy as np

from reference import scalarised


class Igb:
    """`weights` gives the weights of a step; `epoch_end` closes an epoch (unless a window does)."""

    def __init__(self, T: int, base_epoch: int = 1, window: int | None = None):
        self.T, self.base_epoch, self.window = T, base_epoch, window
        self.epoch, self.steps, self.base = 0, [], None

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) gradient in the losses (T,) > 0 of sum_i a_i log L_i, a held fixed."""
        L = np.array(losses, dtype=np.float64)
        self.steps.append(L)
        a = np.ones(self.T)
        if self.base is not None:
            ratio = L / self.base
            e = np.exp(ratio - ratio.max())  # the shift cancels
            a = self.T * e / e.sum()
        fixed = scalarised.tensor(a)
        w = scalarised.gradient(lambda x: (fixed * x.log()).sum(), L)
        if self.window is not None and len(self.steps) == self.window:
            self.epoch_end()
        return w

    def epoch_end(self) -> None:
        """Count the epoch; after the base epoch, set the base."""
        if self.epoch == self.base_epoch:
            self.base = np.mean(self.steps, axis=0)
        self.epoch += 1
        self.steps = []
