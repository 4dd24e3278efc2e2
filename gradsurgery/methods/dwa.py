"""End-to-End Multi-Task Learning with Attention, its Dynamic Weight Average (DWA).

Liu, Johns, Davison. CVPR 2019. https://arxiv.org/abs/1803.10704, eq. 7: in epoch e, w = T softmax(r / temperature) with
r = L(e - 1) / L(e - 2), ratios of mean losses; r = 1 in the first two epochs.

An epoch is the user's, as in the authors' code, or ``window`` steps, as in Nash-MTL's port, which slides its window of
25 where here epochs follow one another. Deviations: epochs are means and not sums, which differ only where epochs have
unequal numbers of steps; a mean under 1e-8 counts as 1e-8; a task's r stays 1 until it has had two epochs itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.epochs import count_step, end_epoch, epoch_state
from gradsurgery.methods.hparams import check_positive, positive
from gradsurgery.registry import EpochMethod, State, register
from gradsurgery.stats import Needs, Stats


def dwa(ratios: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Weights that favour the tasks whose losses fall slowly.

    Args:
        ratios: (..., T), mean loss of the last epoch over that of the one before.
        temperature: > 0; the larger, the more equal the weights.

    Returns:
        w (..., T), positive, summing to T.

    Source: Liu et al., CVPR 2019, eq. 7.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import dwa
        >>> dwa(torch.tensor([1.0, 0.5]))
        tensor([1.1244, 0.8756])
    """
    return ratios.shape[-1] * (ratios / temperature).softmax(dim=-1)


@register(
    "dwa",
    paper="End-to-End Multi-Task Learning with Attention, https://arxiv.org/abs/1803.10704",
    venue="CVPR 2019",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class DWA(EpochMethod):
    """Weights from how far each loss fell between the last two epochs.

    Args:
        window: steps that make an epoch; None waits for `MTLOptimizer.epoch_end`.
        temperature: positive; the larger, the more equal the weights.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(temperature=self.temperature)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return epoch_state(T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        ratios = torch.where(state["epochs"] >= 2, positive(state["mean"]) / positive(state["previous"]), 1.0)
        w = dwa(ratios, temperature=self.temperature)
        return w.unsqueeze(0), count_step(stats.losses, state, self.window), {}

    def epoch_end(self, state: State) -> State:
        return end_epoch(state, self.window)
