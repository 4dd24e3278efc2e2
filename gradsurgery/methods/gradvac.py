"""Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models (GradVac).

Wang, Tsvetkov, Firat, Cao. ICLR 2021. https://arxiv.org/abs/2010.05874, algorithm 1 and eq. 2-3.

As in `gradsurgery.methods.pcgrad` every change of a gradient is a change of coefficients. The authors published no
code, and ports disagree whether the target cosines move at every visit or only where they are missed: here at every
visit, as in algorithm 1, with the cosine of the gradient as changed so far. Deviation: targets stay 1e-6 away from 1,
where the paper's coefficient is infinite. All blocks share one draw of orders and each has its own targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.pcgrad import draw_orders
from gradsurgery.registry import Method, State, register
from gradsurgery.solvers.accelerator import gradvac_visits, has_kernel
from gradsurgery.stats import Needs, Stats

MAX_TARGET = 1 - 1e-6


def gradvac(
    G: Tensor, target: Tensor | None = None, orders: Tensor | None = None, *, generator: Generator | None = None
) -> Tensor:
    """Weights whose direction is the sum of the task gradients, each turned towards the others up to target cosines.

    Args:
        G: (..., T, T) Gramians.
        target: (..., T, T) cosines, row i those that task i keeps with the others; 0 if None, which is PCGrad.
        orders: (T, T - 1) int64, row i the order in which task i visits the other tasks; drawn uniformly if None.
        generator: source of the draw.

    Returns:
        w (..., T), non-negative. Zero rows are left alone.

    Source: Wang et al., ICLR 2021, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import gradvac
        >>> gradvac(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.5000, 1.5000])
    """
    if orders is None:
        orders = draw_orders(G.shape[-1], generator, G.device)
    return _gradvac(G, torch.zeros_like(G) if target is None else target, orders, 0.0)[0]


def _gradvac(G: Tensor, target: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    if has_kernel(G) and not (G.requires_grad or target.requires_grad):
        return gradvac_visits(G, target, orders, beta)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    coefficients = identity.expand(G.shape)
    norm = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    for visited in orders.unbind(dim=-1):
        chosen = identity[visited]
        inner = (coefficients * G[..., visited].mT).sum(dim=-1)
        length = (coefficients * (coefficients @ G)).sum(dim=-1).clamp(min=0).sqrt()
        against = norm[..., visited]
        there = (length > 0) & (against > 0)
        phi = torch.where(there, inner / length / against, 0.0).clamp(-1, 1)
        rho = (target * chosen).sum(dim=-1).clamp(-MAX_TARGET, MAX_TARGET)
        sine = (1 - rho**2).sqrt()
        turn = (rho * (1 - phi**2).clamp(min=0).sqrt() - phi * sine) / sine
        step = torch.where(there & (phi < rho), turn * length / against, 0.0)
        coefficients = coefficients + step.unsqueeze(-1) * chosen
        target = target + beta * (phi - rho).unsqueeze(-1) * chosen
    return coefficients.sum(dim=-2), target


@register(
    "gradvac",
    paper="Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models, "
    "https://arxiv.org/abs/2010.05874",
    venue="ICLR 2021",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
    randomized=True,
)
@dataclass(frozen=True)
class GradVac(Method):
    """PCGrad with target cosines, which follow the cosines that are met.

    Args:
        beta: step of the targets' moving average, in [0, 1]. Paper: 0.01.
    """

    needs: ClassVar[Needs] = Needs.GRAMIAN
    task_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"target": (-2, -1)}
    beta: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1]; got {self.beta}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"target": torch.zeros(blocks, T, T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        orders = draw_orders(stats.gramian.shape[-1], generator, stats.gramian.device)
        w, target = _gradvac(stats.gramian, state["target"], orders, self.beta)
        return w, {**state, "target": target}, {}
