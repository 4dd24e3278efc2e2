"""Independent Component Alignment for Multi-Task Learning (Aligned-MTL).

Senushkin, Patakin, Kuznetsov, Konushin. CVPR 2023. https://arxiv.org/abs/2305.19000, eq. 8 and algorithm 1.

Deviation: the authors take an eigenvalue under T eps of the largest for zero; the rounding of a Gramian exceeds that,
and the bound here is 1e-12.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.methods.spectral import eigen
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats

Scale = Literal["min", "median", "rmse"]


def aligned_mtl(G: Tensor, *, scale: Scale = "min", preference: Tensor | None = None) -> Tensor:
    """Weights that bring all principal components of the task gradients to one length.

    Args:
        G: (..., T, T) Gramians.
        scale: that length squared is the smallest, the (lower) median or the mean of the eigenvalues that are not zero.
        preference: (T,) positive, the weights of the sum of the aligned gradients, up to scale; equal if None.

    Returns:
        w (..., T), of either sign: sqrt(l) V L^(-1/2) V^T p with G = V L V^T, where p sums to T; p where G is zero.

    Source: Senushkin et al., CVPR 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import aligned_mtl
        >>> aligned_mtl(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """
    p = G.new_ones(G.shape[-1]) if preference is None else preference
    return _aligned_mtl(G.double(), p.double(), scale).to(G.dtype)


def _aligned_mtl(G: Tensor, p: Tensor, scale: Scale) -> Tensor:
    p = len(p) * p / p.sum()
    values, vectors, kept = eigen(G)
    rank = kept.sum(dim=-1, keepdim=True)
    if scale == "rmse":
        level = torch.where(kept, values, 0.0).sum(dim=-1, keepdim=True) / rank.clamp(min=1)
    else:
        # The eigenvalues that are kept are the last ones.
        place = len(p) - rank + ((rank - 1) // 2 if scale == "median" else 0)
        level = values.gather(-1, place.clamp(0, len(p) - 1))
    factor = torch.where(kept, level / torch.where(kept, values, 1.0), 0.0).sqrt()
    w = (vectors @ (factor * (vectors.mT @ p)).unsqueeze(-1)).squeeze(-1)
    return torch.where(rank > 0, w, p)


@register(
    "aligned_mtl",
    paper="Independent Component Alignment for Multi-Task Learning, https://arxiv.org/abs/2305.19000",
    venue="CVPR 2023",
    heads="weighted",
    guarantees=frozenset({"homogeneous"}),
)
@dataclass(frozen=True)
class AlignedMTL(Method):
    """Task gradients made orthogonal and equally long, changed as little as possible, and summed.

    Args:
        scale: ``"min"``, ``"median"`` or ``"rmse"``: which eigenvalue of the Gramian sets the length.
        preference: T positive weights of the sum; their ratios matter.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    scale: Scale = "min"
    preference: Preference = None

    def __post_init__(self) -> None:
        if self.scale not in ("min", "median", "rmse"):
            raise ValueError(f"scale must be 'min', 'median' or 'rmse'; got {self.scale!r}.")
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        return _aligned_mtl(stats.gramian, state["preference"], self.scale), state, {}
