"""The gradient of a scalarised objective with respect to the task losses, by automatic differentiation in float64.

Minimising f(L_1(x), ..., L_T(x)) moves x along sum_i df/dL_i grad L_i, so the gradient of f in L is the task weights.
"""

from collections.abc import Callable

import numpy as np
import torch


def gradient(objective: Callable[[torch.Tensor], torch.Tensor], losses: np.ndarray) -> np.ndarray:
    """(T,) gradient of a scalar objective at losses (T,)."""
    L = torch.tensor(np.asarray(losses, dtype=np.float64), requires_grad=True)
    return torch.autograd.grad(objective(L), L)[0].numpy()


def tensor(values: np.ndarray) -> torch.Tensor:
    """A float64 tensor that shares no memory with the values."""
    return torch.tensor(np.asarray(values, dtype=np.float64))
