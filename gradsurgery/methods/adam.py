"""Adam on per-task numbers, for the methods that learn their weights with it: pure, and its state follows the tasks."""

import torch
from torch import Tensor, device, dtype

BETAS = (0.9, 0.999)
EPS = 1e-8


def adam_state(T: int, *, dtype: dtype, device: device) -> dict[str, Tensor]:
    """Moments and step counts, each (T,): a task that is absent from a step does not take it."""
    return {name: torch.zeros(T, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq", "steps")}


def adam_step(gradient: Tensor, state: dict[str, Tensor], lr: float) -> tuple[Tensor, dict[str, Tensor]]:
    """What to add to the numbers (T,), and the next moments (Kingma, Ba, ICLR 2015, algorithm 1)."""
    steps = state["steps"] + 1
    exp_avg = BETAS[0] * state["exp_avg"] + (1 - BETAS[0]) * gradient
    exp_avg_sq = BETAS[1] * state["exp_avg_sq"] + (1 - BETAS[1]) * gradient**2
    denominator = (exp_avg_sq / (1 - BETAS[1] ** steps)).sqrt() + EPS
    change = -lr * exp_avg / (1 - BETAS[0] ** steps) / denominator
    return change, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps}
