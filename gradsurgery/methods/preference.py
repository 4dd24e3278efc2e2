"""How a method that can take one holds a preference: as constant per-task state, so that it follows absent tasks."""

import math

import torch
from torch import Tensor, device, dtype

Preference = tuple[float, ...] | None


def check_preference(preference: Preference) -> None:
    """Raises ValueError unless every entry is positive and finite."""
    if preference is not None and not all(math.isfinite(p) and p > 0 for p in preference):
        raise ValueError(f"preference must hold positive finite numbers, one a task; got {preference}.")


def preference_state(preference: Preference, T: int, *, dtype: dtype, device: device) -> dict[str, Tensor]:
    """The preference (T,) as state; all ones where none is given.

    Raises:
        ValueError: its length is not T.
    """
    if preference is None:
        return {"preference": torch.ones(T, dtype=dtype, device=device)}
    if len(preference) != T:
        raise ValueError(f"preference has {len(preference)} entries for {T} tasks; give one positive number a task.")
    return {"preference": torch.tensor(preference, dtype=dtype, device=device)}
