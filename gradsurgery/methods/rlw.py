"""Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning (RLW).

Lin, Ye, Zhang, Tsang. TMLR 2022. https://arxiv.org/abs/2111.10603: new weights every step, softmax of a standard normal
draw, or uniform on the simplex (Dirichlet with all parameters 1).

The weights sum to 1, as in the paper; ports that multiply by T (IGB's) differ in the learning rate only.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats

Distribution = Literal["normal", "dirichlet"]


def rlw(losses: Tensor, *, distribution: Distribution = "normal", generator: Generator | None = None) -> Tensor:
    """Random weights for ``losses``, whose values do not matter.

    Args:
        losses: (..., T); every leading index gets a draw of its own.
        distribution: ``"normal"``, whose softmax is taken, or ``"dirichlet"``, uniform on the simplex.
        generator: source of the draw.

    Returns:
        w (..., T), on the simplex.

    Source: Lin et al., TMLR 2022.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import rlw
        >>> rlw(torch.ones(3), generator=torch.Generator().manual_seed(0)).sum()
        tensor(1.)
    """
    if distribution == "normal":
        return torch.randn(losses.shape, generator=generator, dtype=losses.dtype, device=losses.device).softmax(dim=-1)
    # Independent exponentials over their sum are uniform on the simplex; the softmax of their logarithms is that too.
    uniform = torch.rand(losses.shape, generator=generator, dtype=losses.dtype, device=losses.device)
    return (-(-uniform).log1p()).clamp(min=torch.finfo(losses.dtype).tiny).log().softmax(dim=-1)


@register(
    "rlw",
    paper="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning, "
    "https://arxiv.org/abs/2111.10603",
    venue="TMLR 2022",
    heads="weighted",
    guarantees=frozenset({"simplex", "nonnegative", "linear_under_scaling", "homogeneous"}),
    randomized=True,
)
@dataclass(frozen=True)
class RLW(Method):
    """Weights drawn anew every step.

    Args:
        distribution: ``"normal"`` or ``"dirichlet"``.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    distribution: Distribution = "normal"

    def __post_init__(self) -> None:
        if self.distribution not in ("normal", "dirichlet"):
            raise ValueError(f"distribution must be 'normal' or 'dirichlet'; got {self.distribution!r}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return rlw(stats.losses, distribution=self.distribution, generator=generator).unsqueeze(0), state, {}
