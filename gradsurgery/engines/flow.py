"""All tasks' gradients at once through the shared part of a graph, by `torch.vmap`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

# What is to be done with the gradients (K, *shape) that pass a point.
See = Callable[[Tensor], None]


class _Tap(torch.autograd.Function):
    """Shows the gradients of all tasks, where a hook sees but one of them, and sends zeros in their place."""

    @staticmethod
    def forward(g: Tensor, see: See, K: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        see(g.expand(K, *g.shape))
        return g.new_zeros(()).expand(g.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, see: See, K: int) -> tuple[Tensor, int]:  # pyright: ignore
        g = g.movedim(in_dims[0], 0)
        see(g)
        return g.new_zeros(()).expand(g.shape), 0


def tap(g: Tensor, see: See, K: int) -> Tensor:
    """Inside `flow`: hands ``see`` the gradients (K, *shape) of which ``g`` is one task's; zeros, of no memory."""
    return _Tap.apply(g, see, K)  # pyright: ignore[reportReturnType]


def flow(
    edges: Sequence[GradientEdge],
    seeds: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    *,
    retain: bool,
    fallback: bool,
) -> list[Tensor | None]:
    """Gradients of K tasks at ``inputs``.

    Args:
        edges: where gradients enter.
        seeds: those, (K, *shape) at each edge.
        inputs: leaves or edges.
        retain: whether the graph is wanted once more.
        fallback: whether an operator that vmap has no rule for is looped over, or an error.

    Returns:
        (K, *shape) at each input; None where none arrives.
    """
    arrived: list[int] = []

    def differentiate(*seed: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(edges, inputs, seed, retain_graph=retain, allow_unused=True)  # pyright: ignore
        arrived.extend(n for n, g in enumerate(found) if g is not None)
        return tuple(g for g in found if g is not None)

    gradients: list[Tensor | None] = [None] * len(inputs)
    if not inputs or not edges:
        return gradients
    with _fallback(allowed=fallback):
        found = torch.vmap(differentiate)(*seeds)
    for n, g in zip(arrived, found, strict=True):
        gradients[n] = g
    return gradients


@contextlib.contextmanager
def _fallback(*, allowed: bool) -> Iterator[None]:
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(allowed)
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
        functorch._set_vmap_fallback_warning_enabled(True)
