"""Towards Impartial Multi-Task Learning (IMTL-L, the loss balance).

Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao, Wayne Zhang. ICLR 2021.
https://openreview.net/forum?id=IMPnRXEWpvr: learn s to minimise sum_i (exp(s_i) L_i - s_i), in base e. At the optimum
exp(s_i) L_i = 1, all scaled losses equal.

Conventions. s starts at 0; a step weighs with the s before its own update; s then takes one Adam step (betas .9, .999,
eps 1e-8, no decay) on the same losses. The paper updates s jointly with the network, by the network's optimiser.
"""

import numpy as np
import torch

from reference import scalarised


class ImtlL:
    """`weights` gives the weights of a step and then updates s (T,). lr > 0 is Adam's."""

    def __init__(self, T: int, lr: float = 0.025):
        self.s = torch.zeros(T, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.s], lr=lr, betas=(0.9, 0.999), eps=1e-8)

    @staticmethod
    def objective(L: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Sum_i (exp(s_i) L_i - s_i)."""
        return (torch.exp(s) * L - s).sum()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) gradient of the objective in the losses (T,) at the current s; then one step of s."""
        w = scalarised.gradient(lambda L: self.objective(L, self.s.detach()), losses)
        self.adam.zero_grad()
        self.objective(scalarised.tensor(losses), self.s).backward()
        self.adam.step()
        return w
