"""NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective.

Qin, Wang, Liao, Yan. NeurIPS 2025. https://arxiv.org/abs/2510.18258

The form with one kernel entry a task (n = 1): the largest eigenvalue of a task's kernel is then its squared gradient
norm M_ii. The variant with per-micro-batch kernels needs more gradients than one a task and is not here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_nonnegative
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def ntkmtl(G: Tensor, *, exponent: float = 0.5) -> Tensor:
    """Weights that even out how fast the tasks are learned.

    Args:
        G: (..., T, T) Gramians.
        exponent: of the ratio of eigenvalues, >= 0; 1/2 makes all weighted gradients equally long.

    Returns:
        w (..., T): (tr G / G_ii)^exponent, 0 for a zero row (which has no length to even out).

    Source: Qin et al., NeurIPS 2025.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import ntkmtl
        >>> ntkmtl(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor([1.6667, 1.2500])
    """
    square = G.diagonal(dim1=-2, dim2=-1)
    ratio = square.sum(dim=-1, keepdim=True) / torch.where(square > 0, square, 1.0)
    return torch.where(square > 0, ratio**exponent, 0.0)


@register(
    "ntkmtl",
    paper="NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective, "
    "https://arxiv.org/abs/2510.18258",
    venue="NeurIPS 2025",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "scale_invariant", "homogeneous"}),
)
@dataclass(frozen=True)
class NTKMTL(Method):
    """Each gradient by the inverse of its norm.

    Args:
        exponent: of the ratio of squared norms, >= 0. Only 1/2 keeps the direction free of the gradients' scales.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    exponent: float = 0.5

    def __post_init__(self) -> None:
        check_nonnegative(exponent=self.exponent)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        return ntkmtl(stats.gramian, exponent=self.exponent), state, {}
