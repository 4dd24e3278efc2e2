"""All tasks' gradients at once through the shared part of a graph, by `torch.vmap`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

# Whether vmap may loop over an operator is told to all of the process.
_LOCK = threading.RLock()

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
    if not inputs or not edges:
        return [None] * len(inputs)
    K = len(seeds[0])
    _load_decompositions()
    # What `torch.vmap` does, without its flattening of nested arguments, which takes a third of a small pass.
    with _LOCK, _fallback(allowed=fallback), _level(K) as level:
        entering = [_functorch._add_batch_dim(seed, 0, level) for seed in seeds]
        found = torch.autograd.grad(edges, inputs, entering, retain_graph=retain, allow_unused=True)  # pyright: ignore
        return [None if g is None else _functorch._remove_batch_dim(g, level, K, 0) for g in found]


@cache
def _load_decompositions() -> None:
    """`torch.vmap` loads its rules at its first call."""
    torch.vmap(torch.neg)(torch.zeros(1))


@contextlib.contextmanager
def _level(K: int) -> Iterator[int]:
    level = _functorch._vmap_increment_nesting(K, "error")
    try:
        yield level
    finally:
        _functorch._vmap_decrement_nesting()


@contextlib.contextmanager
def _fallback(*, allowed: bool) -> Iterator[None]:
    before = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(allowed)
    _functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)
        _functorch._set_vmap_fallback_warning_enabled(True)
