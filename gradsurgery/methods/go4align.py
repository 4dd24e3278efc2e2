"""GO4Align: Group Optimization for Multi-Task Alignment.

Shen, Wang, Xiao, van Noord, Worring. NeurIPS 2024. https://arxiv.org/abs/2404.06486, and the authors' code: indicators
p (uniform at first) follow p <- p exp(-step_size L), normalised; the tasks are clustered by p_i sum(L) / L_i, and every
task gets the mean of its group. p is updated before it is used.

Deviations: one-dimensional k-means is solved exactly, where the authors start Lloyd's algorithm at random; a loss under
1e-8 counts as 1e-8 in sum(L) / L; the indicators are kept as centred logarithms, so that they cannot underflow, and an
absent task's neither gains nor falls.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_count, check_positive, positive
from gradsurgery.methods.kmeans import group_means
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def go4align(losses: Tensor, p: Tensor, *, groups: int = 1) -> Tensor:
    """Weights shared by groups of tasks that are alike in scale and history.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.
        p: (..., T), on the simplex, the tasks' risk-guided indicators.
        groups: number of groups, at least 1; T or more leave every task alone.

    Returns:
        w (..., T), non-negative: group means of p sum(losses) / losses.

    Source: Shen et al., NeurIPS 2024, and the authors' code.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import go4align
        >>> go4align(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.25, 0.5, 0.25]), groups=2)
        tensor([0.7500, 2.0000, 0.7500])
    """
    losses = positive(losses)
    return group_means(p * losses.sum(dim=-1, keepdim=True) / losses, groups)


@register(
    "go4align",
    paper="GO4Align: Group Optimization for Multi-Task Alignment, https://arxiv.org/abs/2404.06486",
    venue="NeurIPS 2024",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class GO4Align(Method):
    """Group-wise weights that bring the losses to one scale.

    Args:
        groups: number of groups of tasks. Authors: 1 by default, chosen for each benchmark.
        step_size: of the indicators, positive.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    groups: int = 1
    step_size: float = 1e-4

    def __post_init__(self) -> None:
        check_count(1, groups=self.groups)
        check_positive(step_size=self.step_size)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"log_p": torch.zeros(T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        log_p = state["log_p"] - self.step_size * (stats.losses - stats.losses.mean())
        w = go4align(stats.losses, log_p.softmax(dim=-1), groups=self.groups)
        return w.unsqueeze(0), {"log_p": log_p}, {}
