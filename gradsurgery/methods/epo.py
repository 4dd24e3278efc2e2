"""Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent (EPO Search).

Mahapatra, Rajan. ICML 2020. https://proceedings.mlr.press/v119/mahapatra20a.html, algorithm 1 in the form of the
authors' code, https://github.com/dbmptr/EPOSearch. It seeks the Pareto optimum at which all r_i L_i are equal. With
l = r L / sum(r L), the non-uniformity mu = sum l log(T l), and its gradient in L up to a factor, a = r (log(T l) - mu):

- balance, mu > 1e-4: alpha on the simplex maximises alpha.G a where the tasks of largest r L may not ascend, the others
  not faster than under a; if G a > 0 for no task, none may ascend;
- dominance: alpha maximises sum(G alpha), where no task may ascend, and mu not rise if that can be had.

The weights are T alpha, as in the authors' loops. Both are linear programs in G alone, solved exactly, with a vertex as
the answer where several are optimal; the authors call GLPK. Where a program is infeasible, alpha = r / sum(r), again as
in their loops, and the residual is infinite.

Deviations: r is scaled to sum to T; a loss under 1e-8 counts as 1e-8; entries of a and G a that are rounding errors
count as 0. The relaxed dominance that the authors' code has as an option is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import positive
from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers import linear_program
from gradsurgery.stats import Needs, Stats

UNIFORM = 1e-4
ROUNDING = 1e-14


def epo(G: Tensor, losses: Tensor, *, preference: Tensor | None = None) -> Tensor:
    """Weights that bring the losses into the preferred proportion, then lower them in it.

    Args:
        G: (..., T, T) Gramians.
        losses: (..., T); one under 1e-8 counts as 1e-8.
        preference: (T,) positive, r: losses end in proportion to 1 / r; equal if None.

    Returns:
        w (..., T), non-negative, summing to T.

    Source: Mahapatra, Rajan, ICML 2020, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import epo
        >>> epo(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([1.0, 1.0]))
        tensor([1., 1.])
    """
    p = torch.ones_like(losses) if preference is None else preference
    return _epo(G.double(), losses.double(), p.double())[0].to(G.dtype)


def _epo(G: Tensor, losses: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    T = G.shape[-1]
    r = T * p / p.sum(dim=-1, keepdim=True)
    weighted = r * positive(losses)
    a, mu = _adjustment(weighted, r)
    gains = (G @ a.unsqueeze(-1)).squeeze(-1)
    gains = torch.where(gains.abs() > ROUNDING * (G.abs() @ a.abs().unsqueeze(-1)).squeeze(-1), gains, 0.0)
    worst = weighted == weighted.amax(dim=-1, keepdim=True)
    lower = torch.where(worst, 0.0, torch.where(gains > 0, -torch.inf, gains))
    lower = torch.where((gains > 0).any(dim=-1, keepdim=True), lower, 0.0)
    balance = mu > UNIFORM
    alpha, residual = linear_program(
        G,
        torch.where(balance, gains, G.sum(dim=-1)),
        torch.where(balance, lower, 0.0),
        gains,
        torch.where(balance, -torch.inf, gains.amax(dim=-1, keepdim=True).clamp(max=0.0)).squeeze(-1),
    )
    return torch.where(residual.isinf().unsqueeze(-1), r, T * alpha), residual


def _adjustment(weighted: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """a (..., T) and mu (..., 1) of r L."""
    share = weighted / weighted.sum(dim=-1, keepdim=True)
    logs = (share.shape[-1] * share).log()
    mu = (share * logs).sum(dim=-1, keepdim=True)
    return r * torch.where((logs - mu).abs() > ROUNDING, logs - mu, 0.0), mu


@register(
    "epo",
    paper="Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent, "
    "https://proceedings.mlr.press/v119/mahapatra20a.html",
    venue="ICML 2020",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "homogeneous"}),
)
@dataclass(frozen=True)
class EPO(Method):
    """Seeks the Pareto optimum whose losses are in the preferred proportion.

    Args:
        preference: T positive numbers r; losses end in proportion to 1 / r. Equal if None.
    """

    needs: ClassVar[Needs] = Needs.LOSSES | Needs.GRAMIAN
    preference: Preference = None

    def __post_init__(self) -> None:
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w, residual = _epo(stats.gramian, stats.losses, state["preference"])
        return w, state, {"residual": residual}
