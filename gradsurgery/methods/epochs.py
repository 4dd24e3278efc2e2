"""Epoch means of the losses, as state of the methods that go by epochs.

Everything is counted per task: an epoch is that of the steps in which a task was present, and it ends after ``window``
of them, or with `MTLOptimizer.epoch_end`; a task that was absent throughout has not had an epoch. A step counts where
weights are computed, which is each ``update_every``-th.
"""

import math

import torch
from torch import Tensor, device, dtype

from gradsurgery.registry import State


def epoch_state(T: int, *, dtype: dtype, device: device) -> State:
    """State (T,) before the first step: sum and number of losses in this epoch, number of epochs that have ended, mean
    loss of the last of them and of the one before."""
    names = ("total", "steps", "epochs", "mean", "previous")
    return {name: torch.zeros(T, dtype=dtype, device=device) for name in names}


def count_step(losses: Tensor, state: State, window: int | None, *, last: float = math.inf) -> State:
    """Adds this step's losses (T,) to the epoch, which ends with it where it is the ``window``-th of its task."""
    state = {**state, "total": state["total"] + losses, "steps": state["steps"] + 1}
    return state if window is None else _close(state, state["steps"] >= window, last)


def end_epoch(state: State, window: int | None, *, last: float = math.inf) -> State:
    """Ends the epoch of every task that had a step in it; with a ``window`` epochs end by that alone."""
    return state if window is not None else _close(state, state["steps"] > 0, last)


def _close(state: State, over: Tensor, last: float) -> State:
    """Starts a new epoch where ``over`` (T,); means and the count of epochs stay as they are after the ``last``."""
    kept = over & (state["epochs"] < last)
    return {
        **state,
        "previous": torch.where(kept, state["mean"], state["previous"]),
        "mean": torch.where(kept, state["total"] / state["steps"].clamp(min=1), state["mean"]),
        "epochs": state["epochs"] + kept,
        "total": torch.where(over, 0.0, state["total"]),
        "steps": torch.where(over, 0.0, state["steps"]),
    }
