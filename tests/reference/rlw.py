"""Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning (RLW).

Baijiong Lin, Feiyang Ye, Yu Zhang, Ivor W. Tsang. TMLR 2022. https://arxiv.org/abs/2111.10603: every step draws new
weights, the softmax of independent standard normals, or a flat Dirichlet. Weights sum to 1.

Only the law is here: the random draws are arguments. A Dirichlet(1, ..., 1) is T independent Gamma(1) = Exp(1) draws
over their sum, which is how it is given here; a library's Dirichlet sampler may spend its generator otherwise.
"""

import numpy as np


def weights_normal(draws: np.ndarray) -> np.ndarray:
    """(T,) softmax of standard normal draws (T,)."""
    e = np.exp(np.asarray(draws, dtype=np.float64))
    return e / e.sum()


def weights_dirichlet(draws: np.ndarray) -> np.ndarray:
    """(T,) weights from Exp(1) draws (T,)."""
    draws = np.asarray(draws, dtype=np.float64)
    return draws / draws.sum()
