"""Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics (UW).

Kendall, Gal, Cipolla. CVPR 2018. https://arxiv.org/abs/1705.07115, eq. 7 with s_i = log sigma_i^2: model and s together
descend sum_i (exp(-s_i) L_i + s_i) / 2, hence w_i = exp(-s_i) / 2 and ds_i = (1 - exp(-s_i) L_i) / 2.

Deviations: s is state of the method and takes its own Adam step, with Nash-MTL's rate of 0.025, after the weights of
this step were taken from it. Regression and classification losses are treated alike, as in every port. With the loss
fixed, w settles at 1 / (2 L); a loss under 1e-8 counts as 1e-8 in the step of s, which would have no end otherwise.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.adam import adam, adam_state
from gradsurgery.methods.hparams import check_positive, positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def uw(s: Tensor) -> Tensor:
    """Weights of losses whose noise has log-variance ``s``.

    Args:
        s: (..., T), the learned log-variances.

    Returns:
        w (..., T) = exp(-s) / 2, positive.

    Source: Kendall et al., CVPR 2018, eq. 7.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import uw
        >>> uw(torch.tensor([0.0, 2.0]).log1p())
        tensor([0.5000, 0.1667])
    """
    return (-s).exp() / 2


@register(
    "uw",
    paper="Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics, "
    "https://arxiv.org/abs/1705.07115",
    venue="CVPR 2018",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class UW(Method):
    """Weights from a learned noise level of every task.

    Args:
        lr: step size of Adam on the log-variances.
        initial: their initial value. Nash-MTL 0, LibMTL -0.5.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    lr: float = 0.025
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        if not math.isfinite(self.initial):
            raise ValueError(f"initial must be finite; got {self.initial}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        s = torch.full((T,), self.initial, dtype=dtype, device=device)
        return {"s": s, **adam_state(T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        s = state["s"]
        gradient = (1 - (-s).exp() * positive(stats.losses)) / 2
        after, moments = adam(s, gradient, state, lr=self.lr)
        return uw(s).unsqueeze(0), {**state, "s": after, **moments}, {}
