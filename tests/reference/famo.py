"""FAMO: Fast Adaptive Multitask Optimization.

Bo Liu, Yihao Feng, Peter Stone, Qiang Liu. NeurIPS 2023. https://arxiv.org/abs/2306.03792, Algorithm 1: with
z = softmax(xi), the model descends sum_i c z_i log(L_i - b_i) with c = 1 / sum_i z_i / (L_i - b_i), which weighs loss i
by w_i = c z_i / (L_i - b_i) (summing to 1); then xi descends J_softmax(xi)^T (log L before - log L after).

As in the authors' code, eps = 1e-8 is added to every L_i - b_i; xi, which starts at 0, is updated by Adam
(betas .9, .999, eps 1e-8) where the paper writes a plain gradient step; and the decay gamma xi is added to the gradient
before Adam. The defaults are those of the authors' run scripts (1e-3; Cityscapes and MT10 1e-2); their classes default
gamma to 1e-2 and 1e-5. Deviations: float64, no gradient clipping. It sees losses only, so there is no `direction`.
"""

import numpy as np
import torch


class Famo:
    """Task weights from losses: call `weights`, step the model, then `update` with the losses of the same batch.

    lr > 0 and gamma >= 0 are Adam's learning rate and weight decay of the logits xi (T,); min_losses (T,) is b.
    """

    EPS = 1e-8

    def __init__(self, T: int, lr: float = 0.025, gamma: float = 1e-3, min_losses: np.ndarray | None = None):
        self.b = torch.zeros(T, dtype=torch.float64) if min_losses is None else self._tensor(min_losses)
        self.xi = torch.zeros(T, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.xi], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=gamma)

    @staticmethod
    def _tensor(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) dS/dL_i of the surrogate S = sum_i c z_i log(L_i - b_i + eps), c held fixed, for losses (T,) > b."""
        L = self._tensor(losses).requires_grad_()
        z = torch.softmax(self.xi.detach(), dim=0)
        c = 1 / (z / (L - self.b + self.EPS)).sum().detach()
        surrogate = (c * z * torch.log(L - self.b + self.EPS)).sum()
        return torch.autograd.grad(surrogate, L)[0].numpy()

    def update(self, losses_before: np.ndarray, losses_after: np.ndarray) -> None:
        """One step of xi, from the losses (T,) before and after the model's step, on the same batch."""
        before = torch.log(self._tensor(losses_before) - self.b + self.EPS)
        after = torch.log(self._tensor(losses_after) - self.b + self.EPS)
        self.adam.zero_grad()
        torch.softmax(self.xi, dim=0).backward(before - after)
        self.adam.step()
