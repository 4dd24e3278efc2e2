"""Robust Multi-Task Learning with Excess Risks (ExcessMTL).

He, Zhou, Zhang, Yun, Xu, Zeng, Chilimbi, Zhao. ICML 2024. https://arxiv.org/abs/2402.02009, algorithm 1.

A task's excess risk is estimated by g^T diag(S)^(-1/2) g, S the sum of squared gradients so far, relative to its first
estimate; weights grow by its exponential. As in the authors' code the weights sum to T (the paper's to 1), an update
precedes its use, and a task's first step only records its estimate. Deviations: none of the code's 1e-7 under the root,
so that a coordinate that has always been 0 adds nothing; estimates are taken block by block where there are blocks.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_positive
from gradsurgery.registry import State, TrackedMethod, register
from gradsurgery.stats import Stats


def excess_mtl(w: Tensor, risk: Tensor, *, lr: float = 0.01) -> Tensor:
    """The next weights.

    Args:
        w: (..., T) >= 0.
        risk: (..., T), excess risks relative to the first ones.
        lr: how fast weights follow.

    Returns:
        w (..., T) exp(lr risk), brought to the sum that w had.

    Source: He et al., ICML 2024, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import excess_mtl
        >>> excess_mtl(torch.ones(2), torch.tensor([0.0, 3.0]).log1p(), lr=1.0)
        tensor([0.4000, 1.6000])
    """
    moved = w * (lr * (risk - risk.amax(dim=-1, keepdim=True))).exp()
    total = moved.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, moved * w.sum(dim=-1, keepdim=True) / torch.where(total > 0, total, 1.0), w)


@register(
    "excess_mtl",
    paper="Robust Multi-Task Learning with Excess Risks, https://arxiv.org/abs/2402.02009",
    venue="ICML 2024",
    heads="weighted",
    guarantees=frozenset({"nonnegative"}),
)
@dataclass(frozen=True)
class ExcessMTL(TrackedMethod):
    """More weight to the tasks that are further from where they could be.

    Args:
        lr: how fast weights follow the excess risks. Authors: 0.01.
    """

    acts_on: ClassVar[Literal["gradients", "measured"]] = "gradients"
    lr: float = 0.01

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        first = torch.zeros(blocks, T, dtype=dtype, device=device)
        return {"first": first, "w": torch.ones_like(first)}

    def track(self, rows: Tensor, tracked: Tensor, losses: Tensor, state: State) -> tuple[Tensor, Tensor]:
        squares = tracked + rows**2
        return squares, torch.where(squares > 0, rows / squares**0.25, 0.0)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        estimate, first = stats.gramian.diagonal(dim1=-2, dim2=-1), state["first"]
        known = first > 0
        risk = torch.where(known, estimate / torch.where(known, first, 1.0), 0.0)
        # A task without a first estimate keeps its weight, and the others theirs in sum.
        w, waiting = torch.where(known, state["w"], 0.0), torch.where(known, 0.0, state["w"])
        w = excess_mtl(w, risk, lr=self.lr) + waiting
        return w, {**state, "w": w, "first": torch.where(known, first, estimate)}, {}
