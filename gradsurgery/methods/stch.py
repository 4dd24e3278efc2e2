"""Smooth Tchebycheff Scalarization for Multi-Objective Optimization (STCH).

Lin, Zhang, Yang, Liu, Wang, Zhang. ICML 2024. https://arxiv.org/abs/2402.19078, in the form of the authors' code for
multi-task learning: the gradient of sum_i log L_i while warming up, then that of T mu logsumexp(log(L / z) / mu), which
has w = T softmax(log(L / z) / mu) / L; z is the mean loss of the last warm-up epoch.

While a task has no z, its own L stands in, which for all of them together is the warm-up's 1 / L exactly; so a task
that was absent warms up by itself. With mu = 1 the rule is the sum of the normalised losses, over their mean.
Deviations: a loss under 1e-8 counts as 1e-8; ``warmup_epochs`` epochs warm up and the last gives z, where their code
counts from 0 and warms up for one more.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.epochs import count_step, end_epoch, epoch_state
from gradsurgery.methods.hparams import check_count, check_positive, positive
from gradsurgery.registry import EpochMethod, State, register
from gradsurgery.stats import Needs, Stats


def stch(losses: Tensor, z: Tensor, *, mu: float = 1.0) -> Tensor:
    """Weights of the gradient of the smoothed largest log-ratio of losses to ``z``.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.
        z: (..., T), reference losses, in the same way.
        mu: > 0, smoothing; 0 would be the largest ratio alone.

    Returns:
        w (..., T), non-negative, with weighted losses that sum to T.

    Source: Lin et al., ICML 2024, and the authors' code.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import stch
        >>> stch(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
        tensor([1.5000, 0.5000])
    """
    losses = positive(losses)
    excess = losses.log() - positive(z).log()
    return losses.shape[-1] * (excess / mu).softmax(dim=-1) / losses


@register(
    "stch",
    paper="Smooth Tchebycheff Scalarization for Multi-Objective Optimization, https://arxiv.org/abs/2402.19078",
    venue="ICML 2024",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class STCH(EpochMethod):
    """Descends the smoothed maximum of log-losses, relative to where the warm-up ended.

    Args:
        window: steps that make an epoch; None waits for `MTLOptimizer.epoch_end`.
        mu: smoothing, positive.
        warmup_epochs: epochs of plain log-losses, 1 or more.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    mu: float = 1.0
    warmup_epochs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(mu=self.mu)
        check_count(1, warmup_epochs=self.warmup_epochs)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return epoch_state(T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        z = torch.where(state["epochs"] >= self.warmup_epochs, state["mean"], stats.losses)
        w = stch(stats.losses, z, mu=self.mu)
        return w.unsqueeze(0), count_step(stats.losses, state, self.window, last=self.warmup_epochs), {}

    def epoch_end(self, state: State) -> State:
        return end_epoch(state, self.window, last=self.warmup_epochs)
