"""The Adam step of methods that learn parameters of their own, as a pure function on method state.

Kingma, Ba. ICLR 2015. https://arxiv.org/abs/1412.6980, algorithm 1, with torch.optim.Adam's defaults. Steps are counted
per entry, so that an absent task's bias correction waits with its moments.
"""

import torch
from torch import Tensor, device, dtype

BETAS = (0.9, 0.999)
EPS = 1e-8


def adam_state(T: int, *, dtype: dtype, device: device) -> dict[str, Tensor]:
    """Moments and step counts (T,) before the first step."""
    return {name: torch.zeros(T, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq", "steps")}


def adam(value: Tensor, gradient: Tensor, state: dict[str, Tensor], *, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of ``value`` (T,) down ``gradient`` (T,): the new value, and the moments and counts that follow."""
    steps = state["steps"] + 1
    exp_avg = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * gradient
    exp_avg_sq = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * gradient**2
    denominator = (exp_avg_sq / (1 - BETAS[1] ** steps)).sqrt() + EPS
    value = value - lr * exp_avg / (1 - BETAS[0] ** steps) / denominator
    return value, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps}
