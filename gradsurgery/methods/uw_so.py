"""Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning (UW-SO).

Kirchdorfer, Elich, Kutsche, Stuckenschmidt, Schott, Köhler. arXiv 2024. https://arxiv.org/abs/2408.07985: the optimum
of uncertainty weighting, w_i = 1 / L_i, through a softmax with a temperature: w = softmax(1 / (temperature L)).

Deviation: a loss under 1e-8 counts as 1e-8. The authors tune the temperature to each benchmark; 1 is only a start.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_positive, positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def uw_so(losses: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax of the inverse losses.

    Args:
        losses: (..., T); one under 1e-8 counts as 1e-8.
        temperature: > 0, in units of inverse losses; the larger, the more equal the weights.

    Returns:
        w (..., T), on the simplex.

    Source: Kirchdorfer et al., arXiv 2024.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import uw_so
        >>> uw_so(torch.tensor([1.0, 2.0]))
        tensor([0.6225, 0.3775])
    """
    return (1 / (temperature * positive(losses))).softmax(dim=-1)


@register(
    "uw_so",
    paper="Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning, https://arxiv.org/abs/2408.07985",
    venue="arXiv 2024",
    heads="weighted",
    guarantees=frozenset({"simplex", "nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class UWSO(Method):
    """Uncertainty weighting's optimum, normalised by a softmax.

    Args:
        temperature: positive; the larger, the more equal the weights.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return uw_so(stats.losses, temperature=self.temperature).unsqueeze(0), state, {}
