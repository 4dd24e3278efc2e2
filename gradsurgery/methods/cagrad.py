"""Conflict-Averse Gradient Descent for Multi-task Learning (CAGrad).

Liu, Liu, Jin, Stone, Liu. NeurIPS 2021. https://arxiv.org/abs/2110.14048, problem (2), eq. 3 and algorithm 1.

Deviations: the authors run SLSQP on finite differences of eq. 3; here the primal problem is solved exactly, also where
eq. 3 is 0/0 (see `gradsurgery.solvers.cagrad`, which also says what is returned where gradients nearly cancel and
float64 does not reach the optimum). Their code divides by 1 + c^2 and multiplies by T, so that shared and
task-specific parameters keep the scale of the summed losses; both are defaults here and options.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import cagrad_multipliers
from gradsurgery.stats import Needs, Stats

Scale = Literal["sum", "mean"]


def cagrad(
    G: Tensor, *, c: float = 0.4, rescale: int = 1, scale: Scale = "sum", preference: Tensor | None = None
) -> Tensor:
    """Weights of the direction near the mean gradient that most helps the worst-off task.

    Args:
        G: (..., T, T) Gramians.
        c: radius of the search around the mean gradient, relative to its norm; 0 is the mean itself.
        rescale: divide by 1 (``0``), by 1 + c^2 (``1``) or by 1 + c (``2``).
        scale: ``"mean"`` as in the paper, ``"sum"`` times T as in the authors' code.
        preference: (T,) positive, the weights of the mean; equal if None.

    Returns:
        w (..., T), non-negative.

    Source: Liu et al., NeurIPS 2021, problem (2).

    Example:
        >>> import torch
        >>> from gradsurgery.functional import cagrad
        >>> cagrad(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), rescale=0, scale="mean")
        tensor([0.7000, 0.7000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return _cagrad(G.double(), p.double(), c, rescale, scale)[0].to(G.dtype)


def _cagrad(G: Tensor, p: Tensor, c: float, rescale: int, scale: Scale) -> tuple[Tensor, Tensor]:
    mean = p / p.sum()
    multipliers, residual = cagrad_multipliers(G, mean, c)
    factor = (len(p) if scale == "sum" else 1) / (1.0, 1 + c**2, 1 + c)[rescale]
    return factor * (mean + multipliers), residual


@register(
    "cagrad",
    paper="Conflict-Averse Gradient Descent for Multi-task Learning, https://arxiv.org/abs/2110.14048",
    venue="NeurIPS 2021",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class CAGrad(Method):
    """Best worst-case improvement within ``c |g0|`` of the mean gradient g0.

    Args:
        c: radius, >= 0. Authors: 0.4 on NYUv2 and Cityscapes, 0.9 on MT10, 0.5 on MT50.
        rescale: 0, 1 or 2: divide by 1, 1 + c^2 or 1 + c.
        scale: ``"sum"`` or ``"mean"``.
        preference: T positive weights of the mean gradient.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    c: float = 0.4
    rescale: int = 1
    scale: Scale = "sum"
    preference: Preference = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and self.c >= 0):
            raise ValueError(f"c is a radius: it must be finite and >= 0; got {self.c}.")
        if self.rescale not in (0, 1, 2):
            raise ValueError(f"rescale must be 0, 1 or 2; got {self.rescale}.")
        if self.scale not in ("sum", "mean"):
            raise ValueError(f"scale must be 'sum' or 'mean'; got {self.scale!r}.")
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w, residual = _cagrad(stats.gramian, state["preference"], self.c, self.rescale, self.scale)
        return w, state, {"residual": residual}
