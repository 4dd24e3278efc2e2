"""GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks.

Zhao Chen, Vijay Badrinarayanan, Chen-Yu Lee, Andrew Rabinovich. ICML 2018. https://arxiv.org/abs/1711.02257, Equations
1 and 2 and Algorithm 1: W_i = ||w_i g_i||; w descends sum_i |W_i - mean(W) r_i^alpha| with the target held fixed, where
r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)); then w is scaled to sum to T.

Conventions. w starts at ones; L(0) are the losses of the first call; a step is weighed by w before its own update, as
in Algorithm 1; w moves by Adam (betas .9, .999, eps 1e-8), whose moments the rescaling leaves alone. w is not kept
positive. The derivative of |W_i - target| at 0 is 0. The rows are those of all parameters given (the paper: the last
shared layer's). Defaults: alpha 1.5 (LibMTL, and the paper's for NYUv2), lr .025 (the paper's).
"""

import numpy as np
import torch


class GradNorm:
    """The method with its state, w (T,). `weights` gives w, then moves it."""

    def __init__(self, T: int, alpha: float = 1.5, lr: float = 0.025):
        self.alpha, self.first = alpha, None
        self.w = torch.ones(T, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=lr, betas=(0.9, 0.999), eps=1e-8)

    def weights(self, J: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """(T,) weights of the rows of J (T, d), for the losses (T,) > 0 of the same step."""
        J, L = (torch.tensor(np.asarray(values, dtype=np.float64)) for values in (J, losses))
        used = self.w.detach().numpy().copy()
        self.first = L if self.first is None else self.first
        rates = L / self.first
        norms = torch.linalg.vector_norm(self.w[:, None] * J, dim=1)
        target = (norms.mean() * (rates / rates.mean()) ** self.alpha).detach()
        self.adam.zero_grad()
        (norms - target).abs().sum().backward()
        self.adam.step()
        with torch.no_grad():
            self.w *= len(L) / self.w.sum()
        return used
