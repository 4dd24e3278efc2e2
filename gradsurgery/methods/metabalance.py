"""MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary Tasks.

He, Feng, Cheng, Ji, Guo, Caverlee. WWW 2022. https://arxiv.org/abs/2203.06801, algorithm 1.

The authors balance every parameter tensor apart, which is ``blocks="tensor"`` of the optimizer. Their moving averages
start at 0 and are not corrected for it, which cancels in the ratio of two. Deviation: where the target task is absent
from a batch, the others keep their gradients.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def metabalance(magnitudes: Tensor, target: Tensor, *, relax: float = 0.7) -> Tensor:
    """Weights that bring auxiliary gradients near the magnitude of the target task's.

    Args:
        magnitudes: (..., T) >= 0, moving averages of gradient norms.
        target: (T,), 1 for the target task and 0 for the others.
        relax: how near, in [0, 1]; 1 is all the way.

    Returns:
        w (..., T): relax m_target / m_i + 1 - relax, and 1 for the target, a task whose magnitude is 0, or all if no
        task is the target.

    Source: He et al., WWW 2022, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import metabalance
        >>> metabalance(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 0.0]), relax=0.5)
        tensor([1.0000, 0.6250])
    """
    wanted = (magnitudes * target).sum(dim=-1, keepdim=True)
    known = (magnitudes > 0) & (target.sum() > 0)
    return torch.where(known, relax * wanted / torch.where(known, magnitudes, 1.0) + (1 - relax), 1.0)


@register(
    "metabalance",
    paper="MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary Tasks, "
    "https://arxiv.org/abs/2203.06801",
    venue="WWW 2022",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class MetaBalance(Method):
    """Auxiliary gradients brought near the magnitude of one target task's, block by block.

    Args:
        target: position of the target task.
        relax: how near the magnitudes are brought, in [0, 1]. Authors: 0.7.
        beta: decay of the moving averages of the norms, in [0, 1). Authors: 0.9.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    target: int = 0
    relax: float = 0.7
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"target is the position of a task: it must be >= 0; got {self.target}.")
        if not 0 <= self.relax <= 1:
            raise ValueError(f"relax must be in [0, 1]; got {self.relax}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1); got {self.beta}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        if self.target >= T:
            raise ValueError(f"target is {self.target}, and there are {T} tasks, counted from 0.")
        # A constant, kept as state so that it follows absent tasks.
        target = (torch.arange(T, device=device) == self.target).to(dtype)
        return {"magnitudes": torch.zeros(blocks, T, dtype=dtype, device=device), "target": target}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        norm = stats.gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        magnitudes = self.beta * state["magnitudes"] + (1 - self.beta) * norm
        w = metabalance(magnitudes, state["target"], relax=self.relax)
        return w, {**state, "magnitudes": magnitudes}, {}
