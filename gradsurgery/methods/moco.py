"""Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach (MoCo).

Fernando, Shen, Liu, Chaudhury, Murugesan, Chen. ICLR 2023. https://arxiv.org/abs/2210.12624, algorithm 1.

Running means Y of the task gradients, from 0 and without correction of that; weights take one projected step a training
step on Y's Gramian, and the model moves along w^T Y; as in the authors' code each takes what the one before it has just
become. Its LibMTL port puts a softmax for the projection, scales every gradient to the length of its loss, and lets the
step sizes decay; none of it is in the paper's algorithm, nor here.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_nonnegative, check_positive
from gradsurgery.methods.modo import modo
from gradsurgery.methods.simplex import renormalized
from gradsurgery.registry import State, TrackedMethod, register
from gradsurgery.stats import Stats


def moco(G: Tensor, w: Tensor | None = None, *, gamma: float = 0.1, rho: float = 0.0) -> Tensor:
    """Weights on the simplex after one step towards the least norm.

    Args:
        G: (..., T, T) Gramians of the tracked gradients.
        w: (..., T), where they were; equal if None.
        gamma: size of the step, in inverse squared gradient units.
        rho: strength of an l2 regulariser, in squared gradient units.

    Returns:
        w (..., T).

    Source: Fernando et al., ICLR 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import moco
        >>> moco(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.4250, 0.5750])
    """
    return modo(G, w, lr=gamma, rho=rho)


@register(
    "moco",
    paper="Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach, "
    "https://arxiv.org/abs/2210.12624",
    venue="ICLR 2023",
    heads="unweighted",
    guarantees=frozenset({"simplex", "nonnegative"}),
)
@dataclass(frozen=True)
class MoCo(TrackedMethod):
    """Running means of the task gradients, weighted towards their least norm.

    Args:
        beta: share of the new gradient in the running mean, in (0, 1].
        gamma: step size of the weights.
        rho: strength of their l2 regulariser, >= 0.
    """

    beta: float = 0.5
    gamma: float = 0.1
    rho: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1]; got {self.beta}.")
        check_positive(gamma=self.gamma)
        check_nonnegative(rho=self.rho)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"w": torch.full((blocks, T), 1 / T, dtype=dtype, device=device)}

    def track(self, rows: Tensor, tracked: Tensor, losses: Tensor, state: State) -> tuple[Tensor, Tensor]:
        mean = tracked + self.beta * (rows - tracked)
        return mean, mean

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        start, total = renormalized(state["w"])
        w = moco(stats.gramian, start, gamma=self.gamma, rho=self.rho)
        return w, {**state, "w": w * total}, {}
