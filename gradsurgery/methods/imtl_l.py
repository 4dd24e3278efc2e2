"""Towards Impartial Multi-task Learning, its loss balance alone (IMTL-L).

Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang. ICLR 2021. https://openreview.net/forum?id=IMPnRXEWpvr: model and s
together descend sum_i exp(s_i) L_i - s_i, hence w_i = exp(s_i) and ds_i = exp(s_i) L_i - 1.

Deviations: s is state of the method and takes its own Adam step, with a rate of 0.025, after the weights of this step
were taken from it. With the loss fixed, w settles at 1 / L; a loss under 1e-8 counts as 1e-8 in the step of s, which
would have no end otherwise.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.adam import adam, adam_state
from gradsurgery.methods.hparams import check_positive, positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def imtl_l(s: Tensor) -> Tensor:
    """Weights that bring the losses to one scale.

    Args:
        s: (..., T), the learned log-scales.

    Returns:
        w (..., T) = exp(s), positive.

    Source: Liu et al., ICLR 2021.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import imtl_l
        >>> imtl_l(torch.tensor([0.0, 2.0]).log1p())
        tensor([1., 3.])
    """
    return s.exp()


@register(
    "imtl_l",
    paper="Towards Impartial Multi-task Learning (loss balance), https://openreview.net/forum?id=IMPnRXEWpvr",
    venue="ICLR 2021",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class IMTLL(Method):
    """Weights learned so that every weighted loss tends to 1.

    Args:
        lr: step size of Adam on the log-scales.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    lr: float = 0.025

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"s": torch.zeros(T, dtype=dtype, device=device), **adam_state(T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        s = state["s"]
        after, moments = adam(s, s.exp() * positive(stats.losses) - 1, state, lr=self.lr)
        return imtl_l(s).unsqueeze(0), {**state, "s": after, **moments}, {}
