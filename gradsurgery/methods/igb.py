"""Improvable Gap Balancing for Multi-Task Learning, its first version (IGBv1).

Dai, Fei, Lu. UAI 2023. https://arxiv.org/abs/2307.15429: the log-losses are weighted by T softmax(L / L_base), which
makes w = T softmax(L / L_base) / L on the losses; L_base is the mean loss of one early epoch, the second in the
authors' code, and until it is known the log-losses are weighted alike.

Deviation: a loss under 1e-8 counts as 1e-8. While a task has no base, its own L stands in, so that one which was absent
counts as average. The second version, weighted by a reinforcement learner, is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.epochs import count_step, end_epoch, epoch_state
from gradsurgery.methods.hparams import check_count, positive
from gradsurgery.registry import EpochMethod, State, register
from gradsurgery.stats import Needs, Stats


def igb(losses: Tensor, base: Tensor) -> Tensor:
    """Weights of log-losses that are balanced by how far they still may fall.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.
        base: (..., T), losses of an early epoch, in the same way.

    Returns:
        w (..., T), non-negative, with weighted losses that sum to T.

    Source: Dai et al., UAI 2023, and the authors' code.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import igb
        >>> igb(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor([1.2449, 0.3775])
    """
    losses = positive(losses)
    return losses.shape[-1] * (losses / positive(base)).softmax(dim=-1) / losses


@register(
    "igb",
    paper="Improvable Gap Balancing for Multi-Task Learning, https://arxiv.org/abs/2307.15429",
    venue="UAI 2023",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class IGB(EpochMethod):
    """Descends log-losses, those first that are still near their early level.

    Args:
        window: steps that make an epoch; None waits for `MTLOptimizer.epoch_end`.
        base_epoch: the epoch whose mean losses are that level, counted from 0.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    base_epoch: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(0, base_epoch=self.base_epoch)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return epoch_state(T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        base = torch.where(state["epochs"] > self.base_epoch, state["mean"], stats.losses)
        w = igb(stats.losses, base)
        return w.unsqueeze(0), count_step(stats.losses, state, self.window, last=self.base_epoch + 1), {}

    def epoch_end(self, state: State) -> State:
        return end_epoch(state, self.window, last=self.base_epoch + 1)
