"""MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning (GLS).

Chennupati, Sistu, Yogamani, Rawashdeh. CVPR Workshops 2019. https://arxiv.org/abs/1904.08492: the loss is the geometric
mean (prod_i L_i)^(1/T), whose gradient has w_i = (prod_j L_j)^(1/T) / (T L_i).

Deviations: the mean is taken of logarithms, since a product of many losses over- or underflows, and a loss under 1e-8
counts as 1e-8. The focused variant (a second product over chosen tasks) is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def gls(losses: Tensor) -> Tensor:
    """Weights of the gradient of the losses' geometric mean.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.

    Returns:
        w (..., T), positive, proportional to 1 / losses.

    Source: Chennupati et al., CVPR Workshops 2019.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import gls
        >>> gls(torch.tensor([0.5, 2.0]))
        tensor([1.0000, 0.2500])
    """
    losses = positive(losses)
    return losses.log().mean(dim=-1, keepdim=True).exp() / (losses.shape[-1] * losses)


@register(
    "gls",
    paper="MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning, "
    "https://arxiv.org/abs/1904.08492",
    venue="CVPR Workshops 2019",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class GLS(Method):
    """Descends the geometric mean of the losses."""

    needs: ClassVar[Needs] = Needs.LOSSES

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return gls(stats.losses).unsqueeze(0), state, {}
