"""Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone (ConicGrad).

Hassanpour, Janjua, Zhang, Lavasani, Zhang, Zhou, Gao. 2025. https://arxiv.org/abs/2502.00217: the direction that most
helps the worst-off task, among those within an angle of the mean gradient g0: max_d min_i g_i.d subject to
cos(d, g0) >= c, scaled to |d| = |g0|.

Deviations: the authors keep weights w of the tasks from step to step, move them by one regularised gradient step on the
dual problem, and take d from them in closed form; here w is the exact optimum of each step, without state, regulariser
or learning rate (see `gradsurgery.solvers.conic`). Where nothing in the cone helps every task, d = g0. No code of the
authors was found, so that the default of c and the heads' gradients, as for CAGrad, are ours.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import conic
from gradsurgery.stats import Needs, Stats


def conicgrad(G: Tensor, *, c: float = 0.5) -> Tensor:
    """Weights of the direction in a cone around the mean gradient that most helps the worst-off task.

    Args:
        G: (..., T, T) Gramians.
        c: in [0, 1], least cosine with the mean gradient; 1 is the mean itself.

    Returns:
        w (..., T), non-negative, of a direction as long as the mean gradient; 1/T each where no direction in the cone
        helps every task.

    Source: Hassanpour et al., arXiv 2502.00217.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import conicgrad
        >>> conicgrad(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 1.0000])
    """
    return conic(G.double(), c)[0].to(G.dtype)


@register(
    "conicgrad",
    paper="Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone, https://arxiv.org/abs/2502.00217",
    venue="arXiv 2025",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class ConicGrad(Method):
    """Best worst-case improvement within an angle of the mean gradient.

    Args:
        c: least cosine with the mean gradient, in [0, 1].
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    c: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and 0 <= self.c <= 1):
            raise ValueError(f"c is a cosine: it must be in [0, 1]; got {self.c}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w, residual = conic(stats.gramian, self.c)
        return w, state, {"residual": residual}
