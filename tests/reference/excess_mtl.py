"""Robust Multi-Task Learning with Excess Risks (ExcessMTL).

Yifei He, Shiji Zhou, Guojun Zhang, Hyokun Yun, Yi Xu, Belinda Zeng, Trishul Chilimbi, Han Zhao. ICML 2024.
https://arxiv.org/abs/2402.02009, Algorithm 1: S_i accumulates g_i^2 per coordinate, and e_i = sum_k g_ik^2 / sqrt(S_ik)
estimates the excess risk; the weights are multiplied by exp(lr e_i / e_i of the first step) and renormalised.

As in the authors' code: the first step only records e (weights 1 each); an update precedes its use in the same step;
the weights sum to T, where the paper's sum to 1. Deviations: none of their 1e-7 under the root (`epsilon`), so that a
coordinate that has always been zero adds nothing; a first gradient of exactly zero leaves no reference: ValueError.
"""

import numpy as np


class ExcessMtl:
    """Keeps S (T, d), the first step's e (T,) and the weights w (T,). lr > 0."""

    def __init__(self, T: int, d: int, lr: float = 0.01, epsilon: float = 0.0):
        self.S, self.first, self.w = np.zeros((T, d)), None, np.ones(T)
        self.lr, self.epsilon = lr, epsilon

    def weights(self, J: np.ndarray) -> np.ndarray:
        """(T,) the weights of this step, for its rows J (T, d)."""
        J = np.asarray(J, dtype=np.float64)
        self.S = self.S + J**2
        e = np.zeros(len(J))
        for i, k in np.argwhere(J != 0):
            e[i] += J[i, k] ** 2 / np.sqrt(self.S[i, k] + self.epsilon)
        if self.first is None:
            if not (e > 0).all():
                raise ValueError("the first gradient of a task is zero: no excess risk to refer to")
            self.first = e
            return self.w
        w = self.w * np.exp(self.lr * e / self.first)
        self.w = len(w) * w / w.sum()
        return self.w

    def direction(self, J: np.ndarray, losses: np.ndarray | None = None) -> np.ndarray:
        """(d,) the weights of this step on its rows J (T, d); losses are not used."""
        return self.weights(J) @ np.asarray(J, dtype=np.float64)
