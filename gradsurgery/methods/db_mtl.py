"""Dual-Balancing for Multi-Task Learning (DB-MTL).

Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok. Neural Networks, accepted 2025. https://arxiv.org/abs/2308.12029, alg. 1.

Running means h, from 0, of the gradients of log-losses, brought to the longest one's length and summed. As the authors'
code has it, the mean's decay is beta / k^decay at step k, and heads take the gradients of the log-losses. Pass the
losses themselves, not their logarithms. Deviation: none of the code's 1e-8; losses under 1e-8 count as 1e-8.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_nonnegative, positive
from gradsurgery.methods.spectral import inverse_norms
from gradsurgery.registry import State, TrackedMethod, register
from gradsurgery.stats import Needs, Stats


def db_mtl(G: Tensor) -> Tensor:
    """Weights that bring every row to the length of the longest.

    Args:
        G: (..., T, T) Gramians of the running means.

    Returns:
        w (..., T) = max norm / norm, 0 for a zero row.

    Source: Lin et al., algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import db_mtl
        >>> db_mtl(torch.tensor([[9.0, 0.0], [0.0, 1.0]]))
        tensor([1., 3.])
    """
    return G.diagonal(dim1=-2, dim2=-1).sqrt().amax(dim=-1, keepdim=True) * inverse_norms(G)


@register(
    "db_mtl",
    paper="Dual-Balancing for Multi-Task Learning, https://arxiv.org/abs/2308.12029",
    venue="Neural Networks 2025",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "scale_invariant"}),
)
@dataclass(frozen=True)
class DBMTL(TrackedMethod):
    """Running means of the log-losses' gradients, all at one length.

    Args:
        beta: share of the past in the running means, in [0, 1). Authors: 0.1, 0.5 or 0.9 by data set.
        decay: beta is divided by k^decay at step k, >= 0. Authors: 0 or 0.5.
    """

    needs: ClassVar[Needs] = Needs.LOSSES | Needs.TRACKED
    beta: float = 0.9
    decay: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1); got {self.beta}.")
        check_nonnegative(decay=self.decay)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"steps": torch.zeros(T, dtype=dtype, device=device)}

    def track(self, rows: Tensor, tracked: Tensor, losses: Tensor, state: State) -> tuple[Tensor, Tensor]:
        beta = (self.beta / (state["steps"] + 1) ** self.decay).unsqueeze(-1)
        fresh = (1 - beta) / positive(losses).unsqueeze(-1)
        mean = beta.to(rows.dtype) * tracked + fresh.to(rows.dtype) * rows
        return mean, mean

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        own = {"head_weights": 1 / positive(stats.losses)}
        return db_mtl(stats.gramian), {**state, "steps": state["steps"] + 1}, own
