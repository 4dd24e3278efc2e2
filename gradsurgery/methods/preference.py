"""How a method that can take one holds a preference: as constant per-task state, so that it follows absent tasks."""

import math

from torch import Tensor, device, dtype

from gradsurgery.methods.hparams import per_task

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
    return {"preference": per_task("preference", preference, 1.0, T, dtype=dtype, device=device)}
