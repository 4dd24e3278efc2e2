"""MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition (PBI, penalty boundary intersection).

Qingfu Zhang, Hui Li. IEEE Transactions on Evolutionary Computation 2007. https://ieeexplore.ieee.org/document/4358754:
minimise d1 + theta d2, with d1 the length of the projection of L - z on the preference ray and d2 the distance from the
ray; z is the ideal point (0 if none), and theta = 5 in the paper's experiments.

Conventions. The preference (ones if none) is made unit, so that only its ray matters, and d1 = (L - z).p / ||p|| has no
absolute value (losses are above the ideal point). Where d2 = 0 it has no gradient; 0 is taken, a subgradient.
Weights can be negative: a task far below the ray is made worse. LibMOON's code leaves z out.
"""

import numpy as np
import torch

from reference import scalarised


def objective(L: torch.Tensor, theta: float, preference: torch.Tensor, ideal: torch.Tensor) -> torch.Tensor:
    """d1 + theta d2."""
    ray = preference / preference.norm()
    d1 = (L - ideal) @ ray
    return d1 + theta * torch.linalg.vector_norm(L - ideal - d1 * ray)


def weights(
    losses: np.ndarray, theta: float = 5.0, preference: np.ndarray | None = None, ideal: np.ndarray | None = None
) -> np.ndarray:
    """(T,) gradient of the objective in the losses (T,); preference (T,) >= 0, not zero; ideal (T,)."""
    T = len(losses)
    p = scalarised.tensor(np.ones(T) if preference is None else preference)
    z = scalarised.tensor(np.zeros(T) if ideal is None else ideal)
    return scalarised.gradient(lambda L: objective(L, theta, p, z), losses)
