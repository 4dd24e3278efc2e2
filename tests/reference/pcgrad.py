"""Gradient Surgery for Multi-Task Learning (PCGrad).

Tianhe Yu, Saurabh Kumar, Abhishek Gupta, Sergey Levine, Karol Hausman, Chelsea Finn. NeurIPS 2020.
https://arxiv.org/abs/2001.06782, Algorithm 1. The direction is the sum of the projected gradients (sum scale).

As in Algorithm 1, task i visits the *other* tasks only, each once, and is projected against their original gradients.
Three facts about published code, which this oracle does not follow:
- the authors' TensorFlow code and the usual PyTorch ports also visit j = i. From T = 3 on that is not a no-op: a
  gradient that others have turned by more than 90 degrees is projected against itself too;
- the authors' TensorFlow code throws its shuffled losses away, so that every task visits the others in index order;
- LibMTL adds 1e-8 to the denominator. Here a zero row is simply never in conflict.

The random order is an argument: `orders[i]` lists the T-1 other tasks in the order in which task i visits them.
"""

import numpy as np


def index_orders(T: int) -> np.ndarray:
    """(T, T-1) ints: every task visits the others in increasing index."""
    return np.array([[j for j in range(T) if j != i] for i in range(T)], dtype=int).reshape(T, T - 1)


def projected(J: np.ndarray, orders: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The T projected gradients (T, d), and the coefficients C (T, T) that make them: projected = C @ J."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    orders = index_orders(T) if orders is None else np.asarray(orders)
    V, C = J.copy(), np.eye(T)
    for i in range(T):
        if sorted(orders[i]) != [j for j in range(T) if j != i]:
            raise ValueError(f"row {i} of orders must be a permutation of the tasks other than {i}: got {orders[i]}")
        for j in orders[i]:
            inner = V[i] @ J[j]
            if inner < 0:
                coefficient = inner / (J[j] @ J[j])
                V[i] = V[i] - coefficient * J[j]
                C[i, j] -= coefficient
    return V, C


def weights(J: np.ndarray, orders: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights of the rows of J (T, d) in the direction. orders (T, T-1) defaults to index order."""
    return projected(J, orders)[1].sum(axis=0)


def direction(J: np.ndarray, orders: np.ndarray | None = None) -> np.ndarray:
    """(d,) sum over tasks of the projected gradients."""
    return projected(J, orders)[0].sum(axis=0)
