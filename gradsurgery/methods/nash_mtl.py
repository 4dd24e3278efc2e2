"""Multi-Task Learning as a Bargaining Game (Nash-MTL).

Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya. ICML 2022. https://arxiv.org/abs/2202.01017, eq. 4-6.

Deviations: the authors approximate G a = 1/a by up to 20 convex programs and, where their solver fails, keep the last
weights or all ones; here Newton's method solves it to rounding, and a point without a solution is reported (see
`gradsurgery.solvers.fair`). ``update_weights_every`` is ``update_every`` of the optimizer; their clipping of the
shared gradient to norm 1 is `torch.nn.utils.clip_grad_norm_` between ``backward`` and ``step``.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import nash
from gradsurgery.stats import Needs, Stats


def nash_mtl(G: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Weights of the Nash bargaining solution, G w = p / w elementwise.

    Args:
        G: (..., T, T) Gramians.
        preference: (T,) positive bargaining powers; only their proportions count, and equal ones give p = 1.

    Returns:
        w (..., T), positive (0 for a zero row). The direction has norm sqrt(T), whatever the scale of the gradients.

    Source: Navon et al., ICML 2022, eq. 6; the asymmetric form is Kalai's (1977).

    Example:
        >>> import torch
        >>> from gradsurgery.functional import nash_mtl
        >>> nash_mtl(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return nash(G.double(), (len(p) * p / p.sum()).double())[0].to(G.dtype)


@register(
    "nash_mtl",
    paper="Multi-Task Learning as a Bargaining Game, https://arxiv.org/abs/2202.01017",
    venue="ICML 2022",
    heads="weighted",
    guarantees=frozenset({"non_conflicting", "nonnegative", "scale_invariant"}),
)
@dataclass(frozen=True)
class NashMTL(Method):
    """The direction that maximises the product (with a preference: the weighted product) of the tasks' gains.

    Args:
        preference: T positive bargaining powers.
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
        w, residual = nash(stats.gramian, len(p) * p / p.sum())
        return w, state, {"residual": residual}
