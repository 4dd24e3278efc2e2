"""FAMO: Fast Adaptive Multitask Optimization.

Liu, Feng, Stone, Liu. NeurIPS 2023. https://arxiv.org/abs/2306.03792, algorithm 1 and eq. 7-9.

Deviation: the rule compares the losses before and after a step on the same batch, which costs a forward.
`MTLOptimizer.observe` gives it those; without it the next batch's losses stand in, at no cost. The epsilon of the
authors' code (1e-8, inside the logarithm) is kept.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.adam import adam, adam_state
from gradsurgery.methods.hparams import EPS, check_positive, per_task
from gradsurgery.registry import ObservingMethod, State, register
from gradsurgery.stats import Needs, Stats


def famo(losses: Tensor, logits: Tensor, *, min_losses: Tensor | float = 0.0) -> Tensor:
    """Weights that balance the rates at which the log-losses fall.

    Args:
        losses: (..., T); one at or under its bound counts as 1e-8 above it.
        logits: (..., T), the learned logits; zeros at the start.
        min_losses: (T,) or number, lower bounds b of the losses.

    Returns:
        w (..., T), on the simplex: proportional to softmax(logits) / (losses - b).

    Source: Liu et al., NeurIPS 2023, eq. 9.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import famo
        >>> famo(torch.tensor([1.0, 3.0]), torch.zeros(2))
        tensor([0.7500, 0.2500])
    """
    rate = logits.softmax(dim=-1) / _excess(losses, min_losses)
    return rate / rate.sum(dim=-1, keepdim=True)


def _excess(losses: Tensor, min_losses: Tensor | float) -> Tensor:
    """What is left above the bounds. The authors' logarithm would be NaN, and the model with it, below them."""
    return (losses - min_losses).clamp(min=0) + EPS


@register(
    "famo",
    paper="FAMO: Fast Adaptive Multitask Optimization, https://arxiv.org/abs/2306.03792",
    venue="NeurIPS 2023",
    heads="weighted",
    guarantees=frozenset({"simplex", "nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class FAMO(ObservingMethod):
    """Weights from losses alone, learned so that all log-losses fall alike.

    Args:
        lr: step size of the logits' Adam.
        weight_decay: its L2 decay (gamma). Authors: 1e-3; 0.01 on Cityscapes.
        min_losses: T finite lower bounds of the losses; 0 if None. Losses that can be negative need them.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    lr: float = 0.025
    weight_decay: float = 1e-3
    min_losses: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0; got {self.weight_decay}.")
        if not all(map(math.isfinite, self.min_losses or ())):
            raise ValueError(f"min_losses must be finite; got {self.min_losses}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        zeros = {name: torch.zeros(T, dtype=dtype, device=device) for name in ("logits", "log_before", "pending")}
        bounds = per_task("min_losses", self.min_losses, 0.0, T, dtype=dtype, device=device)
        return {**zeros, **adam_state(T, dtype=dtype, device=device), "min_losses": bounds}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        state = self.observe(stats.losses, state)
        w = famo(stats.losses, state["logits"], min_losses=state["min_losses"])
        before = _excess(stats.losses, state["min_losses"]).log()
        return w.unsqueeze(0), {**state, "log_before": before, "pending": torch.ones_like(before)}, {}

    def observe(self, losses: Tensor, state: State) -> State:
        """One Adam step of the logits along the softmax's Jacobian, for the tasks whose outcome is still pending."""
        pending = state["pending"] > 0
        fall = torch.where(pending, state["log_before"] - _excess(losses, state["min_losses"]).log(), 0.0)
        z = state["logits"].softmax(dim=-1)
        gradient = z * (fall - (z * fall).sum()) + self.weight_decay * state["logits"]
        logits, moments = adam(state["logits"], gradient, state, lr=self.lr)
        new = {"logits": logits, **moments}
        kept = {name: torch.where(pending, value, state[name]) for name, value in new.items()}
        return {**state, **kept, "pending": torch.zeros_like(state["pending"])}
