"""GO4Align: Group Optimization for Multi-Task Alignment.

Jiayi Shen, Qi Wang, Zehao Xiao, Nanne van Noord, Marcel Worring. NeurIPS 2024. https://arxiv.org/abs/2404.06486, in the
form of the authors' code: p (from 1/T) is multiplied by exp(-eta L) and renormalised; the risk-guided indicator of task
i is p_i sum_j L_j / L_i; the indicators are clustered into K groups by k-means, and every task is weighed by the mean
indicator of its group. Losses must be positive.

Deviation: the clustering is the exact optimum of k-means, where the authors run Lloyd's iteration from random centres.
Optimal clusters of numbers are runs of their sorted order, so every way to cut it into K runs is tried and the first of
least within-group sum of squares is taken. More groups than tasks are as many as tasks. K is tuned in the paper.
"""

from itertools import combinations

import numpy as np


def group_means(values: np.ndarray, groups: int) -> np.ndarray:
    """(T,) every value (T,) replaced by the mean of its group, in the best clustering into `groups` groups."""
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    best, best_means = np.inf, None
    for cuts in combinations(range(1, len(values)), min(groups, len(values)) - 1):
        means, within = np.empty(len(values)), 0.0
        for run in np.split(order, cuts):
            means[run] = values[run].mean()
            within += ((values[run] - means[run]) ** 2).sum()
        if within < best:
            best, best_means = within, means
    return best_means


class Go4Align:
    """`weights` updates p (T,) with the step's losses and gives the step's weights."""

    def __init__(self, T: int, groups: int = 1, eta: float = 1e-4):
        self.groups, self.eta, self.p = groups, eta, np.full(T, 1 / T)

    def indicators(self, losses: np.ndarray) -> np.ndarray:
        """(T,) p_i sum_j L_j / L_i at the current p."""
        L = np.asarray(losses, dtype=np.float64)
        return self.p * L.sum() / L

    def weights(self, losses: np.ndarray) -> np.ndarray:
        """(T,) weights for losses (T,) > 0."""
        p = self.p * np.exp(-self.eta * np.asarray(losses, dtype=np.float64))
        self.p = p / p.sum()
        return group_means(self.indicators(losses), self.groups)
