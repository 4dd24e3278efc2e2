"""What methods check of their hyperparameters, and what keeps logarithms and reciprocals of losses finite."""

import math

import torch
from torch import Tensor, device, dtype

EPS = 1e-8


def positive(losses: Tensor) -> Tensor:
    """The losses, one under 1e-8 (zero and negative ones too) counted as 1e-8."""
    return losses.clamp(min=EPS)


def check_positive(**hparams: float) -> None:
    """Raises ValueError unless every hyperparameter is positive and finite."""
    for name, value in hparams.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite; got {value}.")


def check_nonnegative(**hparams: float) -> None:
    """Raises ValueError unless every hyperparameter is finite and >= 0."""
    for name, value in hparams.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and >= 0; got {value}.")


def check_count(least: int, **hparams: int) -> None:
    """Raises ValueError unless every hyperparameter is a whole number, ``least`` or more."""
    for name, value in hparams.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}.")


def per_task(
    name: str, values: tuple[float, ...] | None, default: float, T: int, *, dtype: dtype, device: device
) -> Tensor:
    """Hyperparameter ``name`` as state (T,); ``default`` for every task where ``values`` is None.

    Raises:
        ValueError: there are not T values.
    """
    if values is None:
        return torch.full((T,), default, dtype=dtype, device=device)
    if len(values) != T:
        raise ValueError(f"{name} has {len(values)} entries for {T} tasks; give one number a task.")
    return torch.tensor(values, dtype=dtype, device=device)
