"""Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction (PIVRG).

Xiaohan Qin, Xiaoxing Wang, Junchi Yan. CVPR 2025; code: jianke0604/MTLlib. w > 0 with J J^T w = (s / w)^(1/2), where
s = T softmax(D / tau) and tau = max((max D - min D) / log(bound), min_temperature): the weaker a task, the larger its
s, and no s is more than `bound` times another. D_i is how much worse task i is than alone, in percent.

D is an argument here; `drops` makes it from losses and single-task baselines, 100 (L_i - B_i) / B_i, as the authors do
on QM9 (elsewhere they average it over a task's metrics; theirs are of the last epoch, 0 before). Without D, s = 1,
which is FairGrad with alpha = 2. Solved as `fairgrad.solve`; ValueError where 0 is in the convex hull of the rows.

Deviations from the authors' code: no least_squares from 1/T, no clipping of ||u|| to 1, no multiplication of u by T.
"""

import numpy as np

from reference import fairgrad


def drops(losses: np.ndarray, baselines: np.ndarray) -> np.ndarray:
    """(T,) by how many percent the losses (T,) are above the baselines (T,) > 0."""
    losses, baselines = np.asarray(losses, dtype=np.float64), np.asarray(baselines, dtype=np.float64)
    return 100 * (losses - baselines) / baselines


def shares(D: np.ndarray, bound: float = 2.0, min_temperature: float = 10.0) -> np.ndarray:
    """(T,) s = T softmax(D / tau)."""
    D = np.asarray(D, dtype=np.float64)
    tau = max((D.max() - D.min()) / np.log(bound), min_temperature)
    exponentials = np.exp((D - D.max()) / tau)
    return len(D) * exponentials / exponentials.sum()


def weights(
    J: np.ndarray, D: np.ndarray | None = None, bound: float = 2.0, min_temperature: float = 10.0
) -> np.ndarray:
    """(T,) weights of the rows of J (T, d), for drops D (T,) in percent, 0 by default."""
    D = np.zeros(len(J)) if D is None else D
    return fairgrad.solve(J, 2.0, shares(D, bound, min_temperature))


def direction(
    J: np.ndarray, D: np.ndarray | None = None, bound: float = 2.0, min_temperature: float = 10.0
) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, D, bound, min_temperature) @ np.asarray(J, dtype=np.float64)
