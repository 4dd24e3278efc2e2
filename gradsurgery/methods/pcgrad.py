"""Gradient Surgery for Multi-Task Learning (PCGrad).

Yu, Kumar, Gupta, Levine, Hausman, Finn. NeurIPS 2020. https://arxiv.org/abs/2001.06782, algorithm 1.

Every projection is a change of coefficients, v_i = sum_k C[i, k] g_k, and every inner product is (C G)[i, j], so the
Gramian is all it needs. The sum of the projected gradients is returned, as in the paper. All blocks share one draw of
orders.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.registry import Method, State, register
from gradsurgery.solvers.accelerator import has_kernel, pcgrad_visits
from gradsurgery.solvers.operator import plain
from gradsurgery.stats import Needs, Stats


def pcgrad(G: Tensor, orders: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
    """Weights whose direction is the sum of the task gradients, each freed of its conflicts with the others.

    Args:
        G: (..., T, T) Gramians.
        orders: (T, T - 1) int64, row i the order in which task i visits the other tasks; drawn uniformly if None.
        generator: source of the draw.

    Returns:
        w (..., T). Not on the simplex: they sum to T where nothing conflicts.

    Source: Yu et al., NeurIPS 2020, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import pcgrad
        >>> pcgrad(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.5000, 1.5000])
    """
    if orders is None:
        orders = draw_orders(G.shape[-1], generator, G.device)
    if has_kernel(G) and not G.requires_grad:
        return pcgrad_visits(G, orders)
    if plain(G, orders) and G.dtype in (torch.float32, torch.float64):
        return _pcgrad_pair(G) if G.shape == (2, 2) else torch.from_numpy(_pcgrad_numpy(G.numpy(), orders.numpy()))
    square = G.diagonal(dim1=-2, dim2=-1)
    # Column j is divided by |g_j|^2, so that the inner products are the steps; nothing is projected off a zero row.
    relative = G / square.where(square > 0, torch.inf).unsqueeze(-2)
    inner, steps = relative, []
    for visited in orders.unbind(dim=-1):
        own = visited.unsqueeze(-1)
        step = inner.gather(-1, own.expand((*G.shape[:-1], 1))).clamp(max=0)
        inner = torch.addcmul(inner, step, relative.index_select(-2, visited), value=-1)
        steps.append(step)
    if not steps:
        return G.new_ones(G.shape[:-1])
    taken = torch.cat(steps, dim=-1).flatten(-2)
    return G.new_ones(G.shape[:-1]).index_add(-1, orders.flatten(), taken, alpha=-1)


def _pcgrad_pair(G: Tensor) -> Tensor:
    """`pcgrad` of one G (2, 2) in plain floats."""
    (a, c), (d, b) = G.tolist()
    # A NaN has to stay one.
    w = tuple(1 - dot / square if dot < 0 < square else 1 + 0 * (dot + square) for dot, square in ((c, b), (d, a)))
    # Through NumPy: torch.tensor takes as long as all of the rest.
    return torch.from_numpy(np.array(w[::-1], np.float32 if G.dtype == torch.float32 else np.float64))


def _pcgrad_numpy(G: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """`pcgrad` where nothing but numbers is wanted: the same steps, without the price of a torch call each."""
    *lead, T, _ = G.shape
    square = G.diagonal(0, -2, -1)
    visits = orders.T
    with np.errstate(all="ignore"):
        relative = (G / np.where(square > 0, square, np.inf)[..., None, :]).reshape(-1, T, T)
        inner = relative.copy()
        flat = inner.reshape(len(inner), T * T)
        place = visits + np.arange(0, T * T, T)
        steps = np.empty((len(inner), T - 1, T), G.dtype)
        for visited, index, step in zip(visits, place, steps.swapaxes(0, 1), strict=True):
            np.minimum(flat.take(index, 1), 0, out=step)
            inner -= step[:, :, None] * relative.take(visited, 1)
    task = visits + np.arange(0, T * len(inner), T)[:, None, None]
    taken = np.bincount(task.ravel(), steps.ravel(), T * len(inner))
    return (1 - taken).astype(G.dtype, copy=False).reshape(*lead, T)


def draw_orders(T: int, generator: Generator | None, device: device) -> Tensor:
    """(T, T - 1) int64: for every task an independent, uniformly random order of the others."""
    keys = torch.rand(T, T, generator=generator, device=device)
    # A key above all others sorts the task itself last, where it is cut off.
    keys = keys + 2 * torch.eye(T, device=device)
    return keys.argsort(dim=-1)[:, : T - 1]


@register(
    "pcgrad",
    paper="Gradient Surgery for Multi-Task Learning, https://arxiv.org/abs/2001.06782",
    venue="NeurIPS 2020",
    heads="unweighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
    randomized=True,
)
@dataclass(frozen=True)
class PCGrad(Method):
    """Projects each task's gradient off those it conflicts with, in random order, and sums."""

    needs: ClassVar[Needs] = Needs.GRAMIAN

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        return pcgrad(stats.gramian, generator=generator), state, {}
