"""Gradient Episodic Memory for Continual Learning, as a rule for tasks (DualProj).

Lopez-Paz, Ranzato. NeurIPS 2017. https://arxiv.org/abs/1706.08840, eq. 8-12; Quinton, Rey, arXiv 2406.16232, app. B.

Deviation: TorchJD, which has the rule under this name, regularises by 1e-4 and zeroes small Gramians, which breaks the
guarantee at unequal gradient norms; here the projection is exact at any scale.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import dual_projection
from gradsurgery.stats import Needs, Stats


def dualproj(G: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Weights of the mean gradient, projected onto the directions that conflict with no task.

    Args:
        G: (..., T, T) Gramians.
        preference: (T,) positive weights of that mean; equal if None.

    Returns:
        w (..., T), each at least its share of the mean; 1/T each where the mean conflicts with none.

    Source: Lopez-Paz, Ranzato, NeurIPS 2017, eq. 11.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import dualproj
        >>> dualproj(torch.tensor([[4.0, -1.0], [-1.0, 0.5]]))
        tensor([0.5000, 1.0000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return dual_projection(G.double(), (p / p.sum()).double())[0].to(G.dtype)


@register(
    "dualproj",
    paper="Gradient Episodic Memory for Continual Learning, https://arxiv.org/abs/1706.08840",
    venue="NeurIPS 2017",
    heads="unweighted",
    guarantees=frozenset({"non_conflicting", "nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class DualProj(Method):
    """Mean of the task gradients, projected onto the cone of directions that conflict with none.

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
        w, residual = dual_projection(stats.gramian, p / p.sum())
        return w, state, {"residual": residual}
