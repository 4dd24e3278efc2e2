"""Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics (UW).

Alex Kendall, Yarin Gal, Roberto Cipolla. CVPR 2018. https://arxiv.org/abs/1705.07115, Equation 10 in the logarithm
s_i = log sigma_i^2 that the authors' code learns: sum_i (exp(-s_i) L_i + s_i) / 2, for every task alike (the paper's
1 / sigma^2 without the 1/2 for classification is left out, as in Nash-MTL's code).

Conventions. A step weighs the losses with the s before the step's own update; s then takes one Adam step (betas .9,
.999, eps 1e-8, no decay) on the same losses. s starts at `init`: 0 in Nash-MTL's code, -0.5 in LibMTL.
"""

import numpy as np
import torch

from reference import scalarised


class Uw:
    """`weights` gives the weights of a step and then updates s (T,). lr > 0 is Adam's."""

    def __init__(self, T: int, lr: float = 0.025, init: float = 0.0):
        self.s = torch.full((T,), init, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.s], lr=lr, betas=(0.9, 0.999), eps=1e-8)

    @staticmethod
    def objective(L: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Sum_i (exp(-s_i) L_i + s_i) / 2."""
        return ((torch.exp(-s) * L + s) / 2).sum()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) gradient of the objective in the losses (T,) at the current s; then one step of s."""
        w = scalarised.gradient(lambda L: self.objective(L, self.s.detach()), losses)
        self.adam.zero_grad()
        self.objective(scalarised.tensor(losses), self.s).backward()
        self.adam.step()
        return w
