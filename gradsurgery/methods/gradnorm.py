"""GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks.

Chen, Badrinarayanan, Lee, Rabinovich. ICML 2018. https://arxiv.org/abs/1711.02257, eq. 1-2 and algorithm 1.

There is no official code. Deviations: norms are those of all shared gradients (of all blocks together), where the paper
looks at the last shared layer; weights do not fall below 0, where the paper's objective has no meaning. A step uses the
weights that earlier ones left.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.adam import adam, adam_state
from gradsurgery.methods.hparams import check_nonnegative, check_positive
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


def gradnorm(G: Tensor, w: Tensor, ratio: Tensor, *, alpha: float = 1.5) -> Tensor:
    """Gradient, in the weights, of how far weighted norms are from what the training rates ask.

    Args:
        G: (..., T, T) Gramians.
        w: (..., T) weights.
        ratio: (..., T) >= 0, losses relative to the first ones.
        alpha: how strongly the tasks that lag behind are favoured.

    Returns:
        (..., T), of sum |w_i n_i - mean(w n) r_i^alpha| with the target held constant; r = ratio / mean(ratio).

    Source: Chen et al., ICML 2018, eq. 2.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import gradnorm
        >>> gradnorm(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.ones(2), torch.ones(2))
        tensor([ 3., -1.])
    """
    norm = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    mean = ratio.mean(dim=-1, keepdim=True)
    rate = torch.where(mean > 0, ratio / mean, 1.0)
    target = (w * norm).mean(dim=-1, keepdim=True) * rate**alpha
    return (w * norm - target).sign() * norm


@register(
    "gradnorm",
    paper="GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks, "
    "https://arxiv.org/abs/1711.02257",
    venue="ICML 2018",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class GradNorm(Method):
    """Weights learned so that weighted gradient norms follow the tasks' relative training rates; they sum to T.

    Args:
        alpha: strength of the pull, >= 0. Paper: 1.5 on NYUv2, 0.12 where tasks are symmetric.
        lr: step size of the weights' Adam.
    """

    needs: ClassVar[Needs] = Needs.LOSSES | Needs.GRAMIAN
    alpha: float = 1.5
    lr: float = 0.025

    def __post_init__(self) -> None:
        check_nonnegative(alpha=self.alpha)
        check_positive(lr=self.lr)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        zeros = torch.zeros(T, dtype=dtype, device=device)
        ones = {"weights": torch.ones_like(zeros)}
        return {**ones, "first": zeros, "seen": zeros.clone(), **adam_state(T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w = state["weights"]
        first = torch.where(state["seen"] > 0, state["first"], stats.losses)
        ratio = torch.where(first > 0, stats.losses / torch.where(first > 0, first, 1.0), 1.0).clamp(min=0)
        gradient = gradnorm(stats.gramian.sum(dim=0), w, ratio, alpha=self.alpha)
        moved, moments = adam(w, gradient, state, lr=self.lr)
        moved = moved.clamp(min=0)
        total = moved.sum()
        # Absent tasks keep their weights, so the present ones keep their sum.
        moved = torch.where(total > 0, moved * w.sum() / torch.where(total > 0, total, 1.0), w)
        new = {"weights": moved, "first": first, "seen": torch.ones_like(first)}
        return w.expand(len(stats.gramian), -1), {**state, **moments, **new}, {}
