"""Multi-Task Learning as Multi-Objective Optimization (MGDA).

Sener, Koltun. NeurIPS 2018. https://arxiv.org/abs/1810.04650, problem (4); Desideri, C. R. Acad. Sci. Paris 2012.

Deviation: the authors stop Frank-Wolfe after 250 iterations or a step of 1e-5; here the minimum is exact. As in their
code, normalised gradients decide the weights and raw gradients are combined; ``heads`` are weighted likewise.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import positive
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import min_norm
from gradsurgery.stats import Needs, Stats

Normalization = Literal["none", "l2", "loss", "loss+"]
NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda(G: Tensor, *, normalization: Normalization = "none", losses: Tensor | None = None) -> Tensor:
    """Weights of the point of least norm in the convex hull of the task gradients.

    Args:
        G: (..., T, T) Gramians.
        normalization: what each gradient is divided by while the weights are sought: nothing, its norm, its loss, or
            both.
        losses: (T,), for ``"loss"`` and ``"loss+"``; one under 1e-8 counts as 1e-8.

    Returns:
        w (..., T) on the simplex.

    Raises:
        ValueError: losses are wanted and not given.

    Source: Sener, Koltun, NeurIPS 2018, problem (4).

    Example:
        >>> import torch
        >>> from gradsurgery.functional import mgda
        >>> mgda(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500])
    """
    return _mgda(G.double(), normalization, losses)[0].to(G.dtype)


def _mgda(G: Tensor, normalization: Normalization, losses: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = torch.ones_like(G[..., 0])
    if normalization in ("l2", "loss+"):
        norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = torch.where(norm > 0, norm, 1.0)
    if normalization in ("loss", "loss+"):
        if losses is None:
            raise ValueError(f"normalization={normalization!r} divides by the losses; pass losses= (T,).")
        scale = scale * positive(losses).to(G.dtype)
    w, residual = min_norm(G / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    return w, residual


@register(
    "mgda",
    paper="Multi-Task Learning as Multi-Objective Optimization, https://arxiv.org/abs/1810.04650",
    venue="NeurIPS 2018",
    heads="weighted",
    guarantees=frozenset({"non_conflicting", "simplex", "nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class MGDA(Method):
    """Least-norm convex combination of the task gradients.

    Args:
        normalization: ``"none"``, ``"l2"``, ``"loss"`` or ``"loss+"`` (norm times loss). Only ``"none"`` keeps the
            guarantee that no task conflicts.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}; got {self.normalization!r}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w, residual = _mgda(stats.gramian, self.normalization, stats.losses)
        return w, state, {"residual": residual}
