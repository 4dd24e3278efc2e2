"""Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models (GradVac).

Zirui Wang, Yulia Tsvetkov, Orhan Firat, Yuan Cao. ICLR 2021. https://arxiv.org/abs/2010.05874, Algorithm 1 and
Equation 3: task i visits the other tasks j; where the cosine phi of its current gradient v and g_j is below the target
rho_ij, v += a g_j with a = ||v|| (rho sqrt(1 - phi^2) - phi sqrt(1 - rho^2)) / (||g_j|| sqrt(1 - rho^2)), which makes
the cosine exactly rho. The targets are moving averages from 0, rho_ij <- (1 - beta) rho_ij + beta phi (Equation 4).
The direction is the sum over the tasks (sum scale).

Conventions. The target of a pair moves at every visit, after the test (Algorithm 1, LibMTL; SamsungLabs' port only
where the test fires); phi is that of the already altered v, before this visit alters it. All parameters are one block:
call it once a block for the layer-wise form. A zero row, or a zero v, has no cosine: such a visit does nothing and
moves no target. Nor is anything added where |rho| = 1, which no finite multiple of g_j reaches. Roots are clamped at 0.

The random order is an argument, as in `pcgrad`: `orders[i]` lists the others in the order in which task i visits them.
"""

import numpy as np

from reference import pcgrad


def vaccinated(
    J: np.ndarray, rho: np.ndarray, beta: float, orders: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The T altered gradients (T, d), the coefficients C (T, T) with altered = C @ J, and the next targets (T, T)."""
    J = np.asarray(J, dtype=np.float64)
    T = len(J)
    orders = pcgrad.index_orders(T) if orders is None else np.asarray(orders)
    V, C, rho = J.copy(), np.eye(T), np.array(rho, dtype=np.float64)
    for i in range(T):
        if sorted(orders[i]) != [j for j in range(T) if j != i]:
            raise ValueError(f"row {i} of orders must be a permutation of the tasks other than {i}: got {orders[i]}")
        for j in orders[i]:
            size, other = np.linalg.norm(V[i]), np.linalg.norm(J[j])
            if size == 0 or other == 0:
                continue
            phi, target = (V[i] / size) @ (J[j] / other), rho[i, j]
            sine, sine_target = np.sqrt(max(1 - phi**2, 0)), np.sqrt(max(1 - target**2, 0))
            if phi < target and sine_target > 0:
                a = size * (target * sine - phi * sine_target) / (other * sine_target)
                V[i] = V[i] + a * J[j]
                C[i, j] += a
            rho[i, j] = (1 - beta) * target + beta * phi
    return V, C, rho


class GradVac:
    """The method with its state: the targets rho (T, T), which start at 0."""

    def __init__(self, T: int, beta: float = 0.01):
        self.beta, self.rho = beta, np.zeros((T, T))

    def weights(self, J: np.ndarray, losses: np.ndarray | None = None, orders: np.ndarray | None = None) -> np.ndarray:
        """(T,) weights of the rows of J (T, d) in this step's direction; moves the targets. Losses are not used."""
        _, C, self.rho = vaccinated(J, self.rho, self.beta, orders)
        return C.sum(axis=0)


def weights(
    J: np.ndarray, orders: np.ndarray | None = None, rho: np.ndarray | None = None, beta: float = 0.01
) -> np.ndarray:
    """(T,) weights of the rows of J (T, d) at the targets rho (T, T), 0 by default."""
    rho = np.zeros((len(J), len(J))) if rho is None else rho
    return vaccinated(J, rho, beta, orders)[1].sum(axis=0)


def direction(
    J: np.ndarray, orders: np.ndarray | None = None, rho: np.ndarray | None = None, beta: float = 0.01
) -> np.ndarray:
    """(d,) sum over tasks of the altered gradients."""
    rho = np.zeros((len(J), len(J))) if rho is None else rho
    return vaccinated(J, rho, beta, orders)[0].sum(axis=0)
