"""Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance (MoDo).

Chen, Fernando, Ying, Chen. NeurIPS 2023. https://arxiv.org/abs/2305.20057, algorithm 1.

One projected step of the weights a training step, along an unbiased estimate from two independent batches; a third
moves the model with the new weights. A batch pair that shall also move the model is its mean: pass
``[(a + b) / 2 for a, b in zip(losses_a, losses_b)]`` of forwards of their own.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import check_nonnegative, check_positive
from gradsurgery.methods.simplex import project, renormalized
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def modo(C: Tensor, w: Tensor | None = None, *, lr: float = 1e-3, rho: float = 0.1) -> Tensor:
    """Weights on the simplex after one step towards the least norm.

    Args:
        C: (..., T, T) inner products of one batch's task gradients with those of an independent one.
        w: (..., T), where they were; equal if None.
        lr: size of the step, in inverse squared gradient units.
        rho: strength of an l2 regulariser, in squared gradient units.

    Returns:
        w (..., T).

    Source: Chen et al., NeurIPS 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import modo
        >>> modo(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), lr=0.1, rho=0.0)
        tensor([0.4250, 0.5750])
    """
    w = torch.full_like(C[..., 0], 1 / C.shape[-1]) if w is None else w
    return project(w - lr * ((C @ w.unsqueeze(-1)).squeeze(-1) + rho * w))


@register(
    "modo",
    paper="Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance, "
    "https://arxiv.org/abs/2305.20057",
    venue="NeurIPS 2023",
    heads="unweighted",
    guarantees=frozenset({"simplex", "nonnegative"}),
)
@dataclass(frozen=True)
class MoDo(Method):
    """Towards the least norm, learned from independent batches: `MTLOptimizer.backward` takes two.

    Args:
        lr: step size of the weights. Authors: 1e-3.
        rho: strength of their l2 regulariser, >= 0. Authors: 0.1.
    """

    needs: ClassVar[Needs] = Needs.CROSS
    lr: float = 1e-3
    rho: float = 0.1

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_nonnegative(rho=self.rho)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"w": torch.full((blocks, T), 1 / T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.cross is not None
        start, total = renormalized(state["w"])
        w = modo(stats.cross, start, lr=self.lr, rho=self.rho)
        return w, {**state, "w": w * total}, {}
