"""Gradient Episodic Memory for Continual Learning (GEM), as an aggregation of tasks (DualProj).

David Lopez-Paz, Marc'Aurelio Ranzato. NeurIPS 2017. https://arxiv.org/abs/1706.08840, Equations 8 to 11: the gradient
nearest to the wanted one that conflicts with none. As in TorchJD's DualProj the wanted one is the mean of the rows, or
their mean with weights p / sum(p): u is its projection on the dual cone {v: J v >= 0}. Mean scale.

The weights are p / sum(p) + mu with the multipliers mu >= 0 of the projection, that is the v >= p / sum(p) that
minimises ||v @ J||. Found by exhaustive active sets in R^d (`upgrad.multipliers`). The direction is unique; with
dependent rows mu is not.
"""

import numpy as np

from reference import upgrad


def weights(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the rows of J (T, d), each at least its task's share."""
    J = np.asarray(J, dtype=np.float64)
    shares = upgrad.shares(len(J), preference)
    return shares + upgrad.multipliers(J, (shares @ J)[None])[0]


def direction(J: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) the projected mean; J @ direction >= 0."""
    return weights(J, preference) @ np.asarray(J, dtype=np.float64)
