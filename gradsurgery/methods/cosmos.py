"""Scalable Pareto Front Approximation for Deep Multi-Objective Learning (COSMOS), its scalarisation.

Ruchte, Grabocka. ICDM 2021. https://arxiv.org/abs/2103.13392, eq. 5: minimise r . L - lam cos(L, r), with the
preference r on the simplex, hence w = r - lam (r / |r| - cos(L, r) L / |L|) / |L|.

The preference has two faces, as in the paper: losses count in proportion to r, and are led to be in proportion to it.
Deviations: the paper draws r from a Dirichlet distribution in every step and feeds it to the model, which is a model's
affair; here r is fixed. Where the losses have a norm under 1e-8 the cosine has no use, and w = r.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import EPS, check_nonnegative
from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def cosmos(losses: Tensor, *, lam: float = 2.0, preference: Tensor | None = None) -> Tensor:
    """Weights of the gradient of the preferred mean loss less ``lam`` times its cosine with the preference.

    Args:
        losses: (..., T).
        lam: >= 0, weight of the cosine, in units of losses; 0 is linear scalarisation.
        preference: (T,) positive, scaled to sum to 1; equal if None.

    Returns:
        w (..., T). Negative for a task whose loss is too small for the preference, if lam is large enough.

    Source: Ruchte and Grabocka, ICDM 2021, eq. 5.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import cosmos
        >>> cosmos(torch.tensor([3.0, 4.0]), preference=torch.tensor([1.0, 1.0]))
        tensor([0.4547, 0.5339])
    """
    p = torch.ones_like(losses) if preference is None else preference
    r = p / p.sum(dim=-1, keepdim=True)
    length = losses.norm(dim=-1, keepdim=True)
    unit, ray = losses / length.clamp(min=EPS), r / r.norm(dim=-1, keepdim=True)
    turn = (ray - (unit * ray).sum(dim=-1, keepdim=True) * unit) / length.clamp(min=EPS)
    return r - lam * torch.where(length > EPS, turn, 0.0)


@register(
    "cosmos",
    paper="Scalable Pareto Front Approximation for Deep Multi-Objective Learning, https://arxiv.org/abs/2103.13392",
    venue="ICDM 2021",
    heads="weighted",
    guarantees=frozenset({"linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class COSMOS(Method):
    """Descends the preferred mean loss, and turns the losses towards the preference.

    Args:
        lam: weight of the cosine, >= 0. Authors: 2 on Multi-MNIST, 8 on Fashion and MNIST, 3 on CelebA, 0.01 on Adult.
        preference: T positive numbers; equal if None.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    lam: float = 2.0
    preference: Preference = None

    def __post_init__(self) -> None:
        check_nonnegative(lam=self.lam)
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return cosmos(stats.losses, lam=self.lam, preference=state["preference"]).unsqueeze(0), state, {}
