"""Towards Impartial Multi-task Learning (IMTL, the hybrid of IMTL-L and IMTL-G).

Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang. ICLR 2021. https://openreview.net/forum?id=IMPnRXEWpvr, algorithm 1.

Losses scaled by e^s, with s learned so that e^s L tends to 1, are balanced by their gradients as in
`gradsurgery.methods.imtl_g`, whose deviations it shares. The paper takes one optimizer for the model and s; here s has
an Adam of its own, and a step uses the s that earlier ones left.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.adam import adam, adam_state
from gradsurgery.methods.hparams import check_positive
from gradsurgery.methods.imtl_g import imtl_g
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def imtl(G: Tensor, log_scale: Tensor) -> Tensor:
    """Weights of the direction with equal projections on all unit gradients, as long as scaled losses make it.

    Args:
        G: (..., T, T) Gramians.
        log_scale: (T,), the learned s; zeros at the start.

    Returns:
        w (..., T): e^s times those of `imtl_g` on the gradients of e^s L.

    Source: Liu et al., ICLR 2021, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import imtl
        >>> imtl(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.zeros(2))
        tensor([0.2500, 0.7500])
    """
    scale = log_scale.to(G.dtype).exp()
    return scale * imtl_g(G * scale.unsqueeze(-1) * scale)


@register(
    "imtl",
    paper="Towards Impartial Multi-task Learning, https://openreview.net/forum?id=IMPnRXEWpvr",
    venue="ICLR 2021",
    heads="weighted",
    guarantees=frozenset({"scale_invariant", "homogeneous"}),
)
@dataclass(frozen=True)
class IMTL(Method):
    """Losses scaled to 1, and the direction with equal projections on all unit gradients.

    Args:
        lr: step size of the log-scales' Adam.
    """

    needs: ClassVar[Needs] = Needs.LOSSES | Needs.GRAMIAN
    lr: float = 0.025

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"log_scale": torch.zeros(T, dtype=dtype, device=device), **adam_state(T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        log_scale = state["log_scale"]
        after, moments = adam(log_scale, log_scale.exp() * stats.losses - 1, state, lr=self.lr)
        return imtl(stats.gramian, log_scale), {**state, **moments, "log_scale": after}, {}
