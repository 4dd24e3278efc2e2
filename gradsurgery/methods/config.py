"""ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks.

Liu, Chu, Thuerey. ICLR 2025. https://arxiv.org/abs/2408.11104, eq. 2-3.

The direction pinv(U) 1 of the unit gradients U is U^T C^+ 1 with their cosines C = U U^T, so the Gramian is all it
needs. The authors' code solves for it with the whole Jacobian. Where the unit gradients are dependent and do not agree,
neither theirs nor this one is free of conflicts: it is the least-squares fit of equal projections.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.methods.spectral import equalizer, inverse_norms
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def config(G: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Weights of the direction with equal projections on all unit gradients, as long as the gradients project on it.

    Args:
        G: (..., T, T) Gramians.
        preference: (T,) positive, the projections on the unit gradients, up to scale; equal if None.

    Returns:
        w (..., T), of either sign. 0 for a zero row, and for all tasks where the unit gradients cancel out.

    Source: Liu et al., ICLR 2025, eq. 2 and 3.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import config
        >>> config(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        tensor([0.6667, 2.0000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    x, projection = equalizer(G.double(), (p / p.mean()).double())
    norm = G.double().diagonal(dim1=-2, dim2=-1).sqrt()
    square = (x * projection).sum(dim=-1, keepdim=True)
    length = (norm * projection).sum(dim=-1, keepdim=True)
    return (torch.where(square > 0, length / square, 0.0) * x * inverse_norms(G.double())).to(G.dtype)


@register(
    "config",
    paper="ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, "
    "https://arxiv.org/abs/2408.11104",
    venue="ICLR 2025",
    heads="unweighted",
    guarantees=frozenset({"homogeneous"}),
)
@dataclass(frozen=True)
class ConFIG(Method):
    """Equal projections on all unit gradients, with the length that the raw gradients project on that direction.

    Args:
        preference: T positive projections instead, up to scale.
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
        return config(stats.gramian, preference=state["preference"]), state, {}
