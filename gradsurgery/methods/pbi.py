"""Penalty-based boundary intersection (PBI), of MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition.

Zhang, Li. IEEE Transactions on Evolutionary Computation 2007. https://doi.org/10.1109/TEVC.2007.892759, section II.C:
with F = L - z and the unit preference r, minimise d1 + theta d2, where d1 = F . r is the distance along the ray and
d2 = |F - d1 r| the one from it. As a loss: w = r + theta (F - d1 r) / d2.

The preference is the ray that the losses are led to: a task with a larger entry ends with a larger loss. Deviations:
d1 has no absolute value, as in LibMOON's code, so that below z too it falls; on the ray, where d2 has no gradient
(within rounding), w = r.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_nonnegative, per_task
from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def pbi(losses: Tensor, *, theta: float = 5.0, preference: Tensor | None = None, ideal: Tensor | float = 0.0) -> Tensor:
    """Weights of the gradient of the penalty-based boundary intersection.

    Args:
        losses: (..., T).
        theta: >= 0, penalty on the distance from the ray; 0 is linear scalarisation.
        preference: (T,) positive, the ray's direction, of any length; equal if None.
        ideal: (T,) or number, the losses z from which the ray starts.

    Returns:
        w (..., T). Negative for a task whose loss is too small for the ray, if theta is large enough.

    Source: Zhang and Li, TEVC 2007, section II.C.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import pbi
        >>> pbi(torch.tensor([2.0, 1.0]), theta=0.5)
        tensor([1.0607, 0.3536])
    """
    p = torch.ones_like(losses) if preference is None else preference
    ray = p / p.norm(dim=-1, keepdim=True)
    F = losses - ideal
    off = F - (F * ray).sum(dim=-1, keepdim=True) * ray
    d2 = off.norm(dim=-1, keepdim=True)
    rounding = 16 * torch.finfo(losses.dtype).eps * F.norm(dim=-1, keepdim=True)
    return ray + theta * torch.where(d2 > rounding, off / d2, 0.0)


@register(
    "pbi",
    paper="MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, "
    "https://doi.org/10.1109/TEVC.2007.892759",
    venue="TEVC 2007",
    heads="weighted",
    guarantees=frozenset({"linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class PBI(Method):
    """Descends along a ray of losses, and towards it.

    Args:
        theta: penalty on the distance from the ray, >= 0.
        preference: T positive numbers, the direction of the ray: proportions in which losses may remain.
        ideal: T finite losses from which the ray starts; 0 if None.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    theta: float = 5.0
    preference: Preference = None
    ideal: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_nonnegative(theta=self.theta)
        check_preference(self.preference)
        if not all(map(math.isfinite, self.ideal or ())):
            raise ValueError(f"ideal must hold finite losses, one a task; got {self.ideal}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        ideal = per_task("ideal", self.ideal, 0.0, T, dtype=dtype, device=device)
        return {**preference_state(self.preference, T, dtype=dtype, device=device), "ideal": ideal}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        w = pbi(stats.losses, theta=self.theta, preference=state["preference"], ideal=state["ideal"])
        return w.unsqueeze(0), state, {}
