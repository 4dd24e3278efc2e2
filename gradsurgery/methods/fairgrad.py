"""Fair Resource Allocation in Multi-Task Learning (FairGrad).

Ban, Ji. ICML 2024. https://arxiv.org/abs/2402.15638, eq. 5-6.

Deviations: the authors minimise the residual of G w = w^(-1/alpha) by SciPy's least squares; here Newton's method
solves it to rounding, and a point without a solution is reported (see `gradsurgery.solvers.fair`). Their code
multiplies the direction by T and clips it to norm 1; the equation has neither factor, nor is it here.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_positive
from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import fair
from gradsurgery.stats import Needs, Stats


def fairgrad(G: Tensor, *, alpha: float = 2.0, preference: Tensor | None = None) -> Tensor:
    """Weights of the alpha-fair direction, G w = (p / w)^(1/alpha) elementwise.

    Args:
        G: (..., T, T) Gramians.
        alpha: > 0; 1 is Nash bargaining, large values help the worst-off task.
        preference: (T,) positive, the shares p; ones if None.

    Returns:
        w (..., T), positive (0 for a zero row); where no solution exists, those of the point of least norm.

    Source: Ban, Ji, ICML 2024, eq. 6.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import fairgrad
        >>> fairgrad(torch.tensor([[8.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 1.0000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return fair(G.double(), p.double(), alpha)[0].to(G.dtype)


@register(
    "fairgrad",
    paper="Fair Resource Allocation in Multi-Task Learning, https://arxiv.org/abs/2402.15638",
    venue="ICML 2024",
    heads="unweighted",
    guarantees=frozenset({"non_conflicting", "nonnegative"}),
)
@dataclass(frozen=True)
class FairGrad(Method):
    """The direction that shares the tasks' gains alpha-fairly.

    Args:
        alpha: fairness, > 0. Authors: 2 in all runs. 1 is Nash-MTL.
        preference: T positive shares, which weigh the tasks' utilities; ones in the paper.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    alpha: float = 2.0
    preference: Preference = None

    def __post_init__(self) -> None:
        check_positive(alpha=self.alpha)
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w, residual = fair(stats.gramian, state["preference"], self.alpha)
        return w, state, {"residual": residual}
