"""Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (Krum, multi-Krum).

Blanchard, El Mhamdi, Guerraoui, Stainer. NeurIPS 2017.
https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html, section 4.

Deviations: scores sum distances, not their squares, as in TorchJD. Tasks that tie for the last place share it, so that
no answer depends on the order of the tasks: with 2 or 3 tasks, the two of the closest pair always tie.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats

# Scores tie where they differ by less than this part of their value.
TIE = 1e-9


def krum(G: Tensor, *, byzantine: int = 0, selected: int = 1) -> Tensor:
    """Weights of the mean of the task gradients that lie nearest to their neighbours.

    Args:
        G: (..., T, T) Gramians.
        byzantine: f, how many gradients may be wild; a score is over the T - f - 2 (at least 1) nearest others.
        selected: how many gradients are averaged; all where there are fewer.

    Returns:
        w (..., T) on the simplex: 1 / selected each for those selected.

    Source: Blanchard et al., NeurIPS 2017, section 4.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import krum
        >>> J = torch.tensor([[0.0, 1.0], [0.1, 1.0], [0.0, 1.2], [9.0, 0.0]])
        >>> krum(J @ J.T)
        tensor([1., 0., 0., 0.])
    """
    T = G.shape[-1]
    if T == 1:
        return torch.ones_like(G[..., 0])
    rounding = 64 * torch.finfo(G.dtype).eps
    w = _krum(G.double(), min(max(T - byzantine - 2, 1), T - 1), min(selected, T), rounding)
    return w.to(G.dtype)


def _krum(G: Tensor, neighbours: int, count: int, rounding: float) -> Tensor:
    square = G.diagonal(dim1=-2, dim2=-1)
    total = square.unsqueeze(-1) + square.unsqueeze(-2)
    squared = total - 2 * G
    distance = torch.where(squared > rounding * total, squared, 0.0).clamp(min=0).sqrt()
    # A row's own distance, 0, is the first of the sorted ones.
    score = distance.sort(dim=-1).values[..., 1 : neighbours + 1].sum(dim=-1)
    last = score.sort(dim=-1).values[..., count - 1 : count]
    sure = score < last * (1 - TIE)
    tied = ~sure & (score <= last * (1 + TIE))
    share = (count - sure.sum(dim=-1, keepdim=True)).to(G.dtype) / tied.sum(dim=-1, keepdim=True)
    return torch.where(sure, 1.0, torch.where(tied, share, 0.0)) / count


@register(
    "krum",
    paper="Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, "
    "https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html",
    venue="NeurIPS 2017",
    heads="unweighted",
    guarantees=frozenset({"simplex", "nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class Krum(Method):
    """Mean of the task gradients that lie nearest to their neighbours; a robust rule, not a balancing one.

    Args:
        byzantine: how many gradients may be wild, >= 0.
        selected: how many gradients are averaged, >= 1; 1 is Krum, more is multi-Krum.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    byzantine: int = 0
    selected: int = 1

    def __post_init__(self) -> None:
        if self.byzantine < 0:
            raise ValueError(f"byzantine is a number of tasks: it must be >= 0; got {self.byzantine}.")
        if self.selected < 1:
            raise ValueError(f"selected is a number of tasks: it must be >= 1; got {self.selected}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        return krum(stats.gramian, byzantine=self.byzantine, selected=self.selected), state, {}
