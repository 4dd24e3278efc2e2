"""Towards Impartial Multi-task Learning (IMTL, the hybrid of IMTL-L and IMTL-G).

Liyang Liu, Yi Li, Zhanghui Kuang, Jing-Hao Xue, Yimin Chen, Wenming Yang, Qingmin Liao, Wayne Zhang. ICLR 2021.
https://openreview.net/forum?id=IMPnRXEWpvr, Algorithm 1: the losses are scaled, L'_i = exp(s_i) L_i - s_i with s
learned (IMTL-L, Equation 6); the gradients of the scaled losses are weighed by IMTL-G.

Conventions. s starts at 0, in double precision; a step's weights are those at the s before that step's update,
exp(s_i) a_i with a = IMTL-G of the rows exp(s_i) g_i. s descends the plain sum of the scaled losses,
dL'_i/ds_i = exp(s_i) L_i - 1, by Adam (betas .9, .999, eps 1e-8), as if in the model's optimiser (LibMTL).
"""

import numpy as np
import torch

from reference import imtl_g


class Imtl:
    """The method with its state, s (T,). `weights` uses s, then moves it."""

    def __init__(self, T: int, lr: float = 0.025):
        self.s = torch.zeros(T, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.s], lr=lr, betas=(0.9, 0.999), eps=1e-8)

    def weights(self, J: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """(T,) weights of the raw rows of J (T, d), for the losses (T,) of the same step."""
        factor = np.exp(self.s.detach().numpy())
        w = factor * imtl_g.weights(factor[:, None] * np.asarray(J, dtype=np.float64))
        L = torch.tensor(np.asarray(losses, dtype=np.float64))
        self.adam.zero_grad()
        (torch.exp(self.s) * L - self.s).sum().backward()
        self.adam.step()
        return w


def weights(J: np.ndarray, s: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the raw rows of J (T, d) at the log scales s (T,), 0 by default."""
    factor = np.exp(np.zeros(len(J)) if s is None else np.asarray(s, dtype=np.float64))
    return factor * imtl_g.weights(factor[:, None] * np.asarray(J, dtype=np.float64))


def direction(J: np.ndarray, s: np.ndarray | None = None) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, s) @ np.asarray(J, dtype=np.float64)
