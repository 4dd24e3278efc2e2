"""Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms (SDMGrad).

Peiyao Xiao, Hao Ban, Kaiyi Ji. NeurIPS 2023. https://arxiv.org/abs/2305.18409, Algorithm 1: w on the simplex descends
||g_w + lam g0||^2 / 2, g_w = w @ J and g0 the mean row, by stochastic gradients J1 (J2^T w + lam g0') of two
independent batches; the model then moves along (g_w + lam g0) / (1 + lam) on a third. Mean scale.

As in the authors' code: the cross-Gramian C = J1 J2^T is divided by the square of the mean of sqrt(C_ii); w takes
`steps` steps of SGD, lr 10 and momentum .5, each followed by the projection on the simplex, which the momentum does not
see; w is kept from one training step to the next (from 1/T), the momentum is not. With one and the same batch for both,
the objective is MGDA's regularised towards the mean.

Deviations and choices. C_ii of independent batches can be negative, and the square root then is not a number in the
authors' code: such an entry counts as 0 here, as in LibMTL (which also takes lr 5); if all do, C is not divided.
`epsilon` is added to every C_ii first (authors: 1e-4; 0 here). The authors multiply the direction by T on NYUv2 and
Cityscapes ("to match the sum loss"): scale "sum".
"""

import numpy as np

from reference import simplex


def normalised(C: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    """(T, T) C over the square of the mean of sqrt(C_ii)."""
    C = np.asarray(C, dtype=np.float64)
    size = np.mean([np.sqrt(max(C[i, i] + epsilon, 0.0)) for i in range(len(C))])
    return C / size**2 if size > 0 else C


def solve(
    C: np.ndarray, start: np.ndarray, lam: float = 0.3, steps: int = 20, lr: float = 10.0, momentum: float = 0.5
) -> np.ndarray:
    """(T,) w on the simplex after the steps from start (T,), with the slope C (w + lam / T); C (T, T) as it is."""
    C, w = np.asarray(C, dtype=np.float64), np.array(start, dtype=np.float64)
    velocity = np.zeros(len(w))
    for _ in range(steps):
        slope = C @ w + lam * C.mean(axis=1)
        velocity = momentum * velocity + slope
        w = simplex.project(w - lr * velocity)
    return w


class Sdmgrad:
    """Keeps w (T,) from step to step, starting at 1/T."""

    def __init__(
        self,
        T: int,
        lam: float = 0.3,
        steps: int = 20,
        lr: float = 10.0,
        momentum: float = 0.5,
        epsilon: float = 0.0,
        scale: str = "mean",
    ):
        self.w = np.full(T, 1 / T)
        self.lam, self.steps, self.lr, self.momentum = lam, steps, lr, momentum
        self.epsilon, self.factor = epsilon, {"mean": 1, "sum": T}[scale]

    def weights(self, J1: np.ndarray, J2: np.ndarray) -> np.ndarray:
        """(T,) the weights of the third batch's rows, (w + lam / T) / (1 + lam), after the update of w."""
        C = np.array([[np.dot(a, b) for b in np.asarray(J2, np.float64)] for a in np.asarray(J1, np.float64)])
        self.w = solve(normalised(C, self.epsilon), self.w, self.lam, self.steps, self.lr, self.momentum)
        return self.factor * (self.w + self.lam / len(self.w)) / (1 + self.lam)

    def direction(self, J1: np.ndarray, J2: np.ndarray, J3: np.ndarray) -> np.ndarray:
        """(d,) those weights on the rows of J3 (T, d)."""
        return self.weights(J1, J2) @ np.asarray(J3, dtype=np.float64)
