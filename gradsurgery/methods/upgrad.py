"""Jacobian Descent for Multi-Objective Optimization (UPGrad).

Quinton, Rey. 2024. https://arxiv.org/abs/2406.16232, section 3 and proposition 1.

Deviation: the authors' library adds 1e-4 to the normalised Gramian and zeroes it below a threshold, which breaks the
guarantee at unequal gradient norms; here the projections are exact at any scale.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import dual_cone
from gradsurgery.stats import Needs, Stats


def upgrad(G: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Weights of the mean of the task gradients, each projected onto the dual cone.

    Args:
        G: (..., T, T) Gramians.
        preference: (T,) positive weights of that mean; equal if None.

    Returns:
        w (..., T), non-negative; 1/T each where nothing conflicts.

    Source: Quinton, Rey, arXiv 2406.16232, eq. 5.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import upgrad
        >>> upgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([0.7500, 0.7500])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return dual_cone(G.double(), (p / p.sum()).double())[0].to(G.dtype)


@register(
    "upgrad",
    paper="Jacobian Descent for Multi-Objective Optimization, https://arxiv.org/abs/2406.16232",
    venue="arXiv 2024",
    heads="unweighted",
    guarantees=frozenset({"non_conflicting", "nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class UPGrad(Method):
    """Mean of the task gradients' projections onto the cone of directions that conflict with none.

    Args:
        preference: T positive weights of the mean.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    preference: Preference = None

    def __post_init__(self) -> None:
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        p = state["preference"]
        w, residual = dual_cone(stats.gramian, p / p.sum())
        return w, state, {"residual": residual}
