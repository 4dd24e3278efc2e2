"""Scale-invariant baseline: the sum of the log-losses.

Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya. ICML 2022. https://arxiv.org/abs/2202.01017, the
baseline "SI" of its experiments: the gradient of sum_i log L_i has w_i = 1 / L_i.

Deviation: the logarithm has no gradient at or below 0; here a loss under 1e-8 counts as 1e-8, so that weights stay
finite.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def si(losses: Tensor) -> Tensor:
    """Weights of the gradient of the summed log-losses.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.

    Returns:
        w (..., T) = 1 / losses, positive.

    Source: Navon et al., ICML 2022, experiments.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import si
        >>> si(torch.tensor([0.5, 2.0]))
        tensor([2.0000, 0.5000])
    """
    return positive(losses).reciprocal()


@register(
    "si",
    paper="Scale-invariant baseline (sum of log-losses), in Nash-MTL, https://arxiv.org/abs/2202.01017",
    venue="ICML 2022",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class SI(Method):
    """Descends the sum of the log-losses, so that the units of a loss do not matter."""

    needs: ClassVar[Needs] = Needs.LOSSES

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return si(stats.losses).unsqueeze(0), state, {}
