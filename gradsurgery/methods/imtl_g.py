"""Towards Impartial Multi-task Learning (IMTL-G).

Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang. ICLR 2021. https://openreview.net/forum?id=IMPnRXEWpvr, section 3.1.

The weights w = M^+ d / (1^T M^+ d), d the norms, give the direction equal projections on all unit gradients. There is
no official code. Deviations: M^+ d is taken as D^-1 C^+ 1 with the cosines C, D = diag(d), which is the same where the
gradients are independent, and where they are not keeps the direction free of their norms. Where the sum 1^T M^+ d is
negative the paper's direction ascends on every task, and near 0 it blows up: below 1e-3 of the sum of magnitudes the
weights are divided by the latter, which keeps the direction of ConFIG at a bounded length.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.spectral import equalizer, inverse_norms
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats

GUARD = 1e-3


def imtl_g(G: Tensor) -> Tensor:
    """Weights of the direction whose projections on all unit gradients are equal.

    Args:
        G: (..., T, T) Gramians.

    Returns:
        w (..., T), of either sign, which sum to 1; their magnitudes do where that would ascend or blow up. 0 for a zero
        row (whose gradient says nothing), and for all tasks where the unit gradients cancel out.

    Source: Liu et al., ICLR 2021, eq. 6, extended to dependent gradients.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import imtl_g
        >>> imtl_g(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """
    x, _ = equalizer(G.double(), G.new_ones(G.shape[-1]).double())
    v = x * inverse_norms(G.double())
    total, size = v.sum(dim=-1, keepdim=True), v.abs().sum(dim=-1, keepdim=True)
    total = torch.where(total > GUARD * size, total, size)
    return (v / torch.where(size > 0, total, 1.0)).to(G.dtype)


@register(
    "imtl_g",
    paper="Towards Impartial Multi-task Learning, https://openreview.net/forum?id=IMPnRXEWpvr",
    venue="ICLR 2021",
    heads="weighted",
    guarantees=frozenset({"scale_invariant", "homogeneous"}),
)
@dataclass(frozen=True)
class IMTLG(Method):
    """The direction with equal projections on all unit gradients."""

    needs: ClassVar[Needs] = Needs.GRAMIAN

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        return imtl_g(stats.gramian), state, {}
