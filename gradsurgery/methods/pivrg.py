"""Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction (PIVRG).

Qin, Wang, Yan. CVPR 2025. In the form of the authors' code, https://github.com/jianke0604/MTLlib: FairGrad's equation
with shares, G w = (s / w)^(1/2), s = T softmax(D / tau), tau = max(range of D / log(bound), min_temperature), where D
is by how many percent each task did worse in the last epoch than when it was trained alone; D = 0 in the first.

Deviations: the authors take D from metrics on held-out data, on QM9 100 (L - B) / B; here L are the mean training
losses of the last epoch, which is all that an optimizer sees, and B are the user's. Without B there is no D: s = 1,
which is FairGrad with alpha = 2. D is 0, too, for a task that has not had an epoch yet, because it was absent. What
`gradsurgery.methods.fairgrad` says of solver, clipping and factor T holds here.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.epochs import count_step, end_epoch, epoch_state
from gradsurgery.methods.hparams import check_positive, per_task
from gradsurgery.registry import EpochMethod, State, register
from gradsurgery.solvers import fair
from gradsurgery.stats import Needs, Stats


def pivrg(G: Tensor, D: Tensor | None = None, *, bound: float = 2.0, min_temperature: float = 10.0) -> Tensor:
    """Weights of the fair direction, in which tasks that do badly have larger shares.

    Args:
        G: (..., T, T) Gramians.
        D: (T,), by how many percent a task is worse than it should be; 0 if None.
        bound: > 1, how many times larger the largest share may be than the smallest.
        min_temperature: > 0, in percent; a range of D under log(bound) times this makes less of a difference.

    Returns:
        w (..., T), positive (0 for a zero row); where no solution exists, those of the point of least norm.

    Source: Qin et al., CVPR 2025, in the authors' code.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import pivrg
        >>> pivrg(torch.eye(2), torch.tensor([50.0, 0.0]))
        tensor([1.1006, 0.8736])
    """
    D = G.new_zeros(G.shape[-1]) if D is None else D
    return fair(G.double(), shares(D.double(), bound, min_temperature), 2.0)[0].to(G.dtype)


def shares(D: Tensor, bound: float, min_temperature: float) -> Tensor:
    """s (T,), which sums to T."""
    temperature = ((D.max() - D.min()) / math.log(bound)).clamp(min=min_temperature)
    return len(D) * (D / temperature).softmax(dim=-1)


@register(
    "pivrg",
    paper="Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction, "
    "https://github.com/jianke0604/MTLlib",
    venue="CVPR 2025",
    heads="unweighted",
    guarantees=frozenset({"non_conflicting", "nonnegative"}),
)
@dataclass(frozen=True)
class PIVRG(EpochMethod):
    """Shares the tasks' gains fairly, with more for those that lag behind their single-task baselines.

    Args:
        window: steps that make an epoch; None waits for `MTLOptimizer.epoch_end`.
        baselines: T positive losses that single-task training reaches; None makes it FairGrad with alpha = 2.
        bound: > 1, how many times larger the largest share may be than the smallest.
        min_temperature: positive, in percent.
    """

    needs: ClassVar[Needs] = Needs.LOSSES | Needs.GRAMIAN
    baselines: tuple[float, ...] | None = None
    bound: float = 2.0
    min_temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(math.isfinite(b) and b > 0 for b in self.baselines or ()):
            raise ValueError(f"baselines must hold positive finite losses, one a task; got {self.baselines}.")
        if not (math.isfinite(self.bound) and self.bound > 1):
            raise ValueError(f"bound must be finite and > 1; got {self.bound}.")
        check_positive(min_temperature=self.min_temperature)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        baselines = per_task("baselines", self.baselines, 1.0, T, dtype=dtype, device=device)
        return {**epoch_state(T, dtype=dtype, device=device), "baselines": baselines}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        B = state["baselines"]
        known = (state["epochs"] > 0) & (self.baselines is not None)
        D = torch.where(known, 100 * (state["mean"] - B) / B, 0.0)
        w, residual = fair(stats.gramian, shares(D, self.bound, self.min_temperature), 2.0)
        return w, count_step(stats.losses, state, self.window), {"residual": residual}

    def epoch_end(self, state: State) -> State:
        return end_epoch(state, self.window)
