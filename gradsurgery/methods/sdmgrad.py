"""Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms (SDMGrad).

Xiao, Ban, Ji. NeurIPS 2023. https://arxiv.org/abs/2305.18409, algorithm 1.

w descends 1/2 ||J^T (w + lam p)||^2 on the simplex by unbiased stochastic gradients C (w + lam p), C the inner products
of one batch's gradients with another's; a third batch moves the model. The authors' code fills all three from one
buffer, so that its samples are one; here they are three. As in that code C is divided by the square of the mean of
sqrt(C_ii), a negative C_ii (which independent samples may have) counting as 0, and momentum starts anew every step.
Deviations: where no C_ii is positive, C is divided by its largest entry; no 1e-4 is added to C_ii. The authors multiply
the direction by T on NYUv2 and Cityscapes: scale "sum".
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_count, check_nonnegative, check_positive
from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.methods.simplex import project, renormalized
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def sdmgrad(
    C: Tensor,
    w: Tensor | None = None,
    *,
    lam: float = 0.3,
    steps: int = 20,
    lr: float = 10.0,
    momentum: float = 0.5,
    preference: Tensor | None = None,
) -> Tensor:
    """Weights on the simplex after some steps towards the least norm, regularised towards the mean gradient.

    Args:
        C: (..., T, T) inner products of one batch's task gradients with those of an independent one.
        w: (..., T), where they start; equal if None.
        lam: strength of the regulariser, >= 0.
        steps: how many.
        lr: their size, for C normalised.
        momentum: in [0, 1).
        preference: (T,) positive weights of the mean; equal if None.

    Returns:
        w (..., T); the direction is w^T J + lam p^T J over 1 + lam.

    Source: Xiao et al., NeurIPS 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import sdmgrad
        >>> sdmgrad(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), lam=0.0, lr=0.5, momentum=0.0)
        tensor([0.2000, 0.8000])
    """
    T = C.shape[-1]
    w = torch.full_like(C[..., 0], 1 / T) if w is None else w
    p = C.new_ones(T) if preference is None else preference
    size = C.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().mean(dim=-1)[..., None, None] ** 2
    size = torch.where(size > 0, size, C.abs().amax(dim=(-2, -1), keepdim=True))
    C = C / torch.where(size > 0, size, 1.0)
    velocity, pull = torch.zeros_like(w), lam * p / p.sum()
    for _ in range(steps):
        velocity = momentum * velocity + (C @ (w + pull).unsqueeze(-1)).squeeze(-1)
        w = project(w - lr * velocity)
    return w


@register(
    "sdmgrad",
    paper="Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms, "
    "https://arxiv.org/abs/2305.18409",
    venue="NeurIPS 2023",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class SDMGrad(Method):
    """Near the least norm and the mean gradient, learned from independent batches: `MTLOptimizer.backward` takes two.

    Args:
        lam: strength of the pull to the mean, >= 0. Authors: 0.3 on NYUv2 and Cityscapes.
        steps: steps of the weights a training step. Authors: 20.
        lr: their size. Authors: 10.
        momentum: in [0, 1). Authors: 0.5.
        scale: ``"sum"``: times T, as the authors run it; or ``"mean"``, as in the paper.
        preference: T positive weights of the mean gradient.
    """

    needs: ClassVar[Needs] = Needs.CROSS
    lam: float = 0.3
    steps: int = 20
    lr: float = 10.0
    momentum: float = 0.5
    scale: Literal["sum", "mean"] = "sum"
    preference: Preference = None

    def __post_init__(self) -> None:
        check_nonnegative(lam=self.lam)
        check_count(1, steps=self.steps)
        check_positive(lr=self.lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")
        if self.scale not in ("sum", "mean"):
            raise ValueError(f"scale must be 'sum' or 'mean'; got {self.scale!r}.")
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        w = torch.full((blocks, T), 1 / T, dtype=dtype, device=device)
        return {"w": w, **preference_state(self.preference, T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.cross is not None
        start, total = renormalized(state["w"])
        p, options = state["preference"], {"lam": self.lam, "steps": self.steps, "lr": self.lr}
        w = sdmgrad(stats.cross, start, momentum=self.momentum, preference=p, **options)
        factor = (len(p) if self.scale == "sum" else 1) / (1 + self.lam)
        return factor * (w + self.lam * p / p.sum()), {**state, "w": w * total}, {}
