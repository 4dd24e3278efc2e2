"""Gradients of several tasks at the same places, side by side."""

from __future__ import annotations

import math
from weakref import finalize

import torch
from torch import Tensor

from gradsurgery.graph import Edge


class Stacks:
    """Gradients (K, *shape) at edges of a graph, each copied to its place as it comes: out of the cache, and one alive
    at a time.

    Args:
        K: tasks.
        spare: flat tensors on the CPU, which are used where they fit. What the stacks are made of is put there when
            they are gone: a large block that malloc gives anew costs as much again as what is written to it.
    """

    def __init__(self, K: int, spare: list[Tensor]):
        self._K, self._spare = K, spare
        self._used: list[Tensor] = []
        self._at: dict[Edge, Tensor] = {}
        self._there: dict[Edge, set[int]] = {}
        finalize(self, spare.extend, self._used)

    def add(self, k: int, edge: Edge, gradient: Tensor) -> None:
        """The k-th task's gradient at an edge, or what comes to it."""
        gradient = gradient.to_dense()
        if edge not in self._at:
            self._at[edge], self._there[edge] = self._take(gradient), set()
        if k in self._there[edge]:
            self._at[edge][k].add_(gradient)
        else:
            self._at[edge][k].copy_(gradient)
            self._there[edge].add(k)

    def there(self, edge: Edge) -> set[int]:
        """The tasks that have a gradient at it."""
        return self._there[edge]

    def whole(self) -> dict[Edge, Tensor]:
        """(K, *shape) at each edge, 0 where there is none; nothing must be added any more. They live as long as this
        object does."""
        for edge, stack in self._at.items():
            for k in set(range(self._K)) - self._there[edge]:
                stack[k].zero_()
        return self._at

    def _take(self, like: Tensor) -> Tensor:
        shape = (self._K, *like.shape)
        if like.device.type != "cpu":
            # Its allocator keeps what is freed, for whoever is next.
            return like.new_empty(shape)
        n = math.prod(shape)
        flat = _fitting(self._spare, n, like.dtype)
        self._used.append(like.new_empty(n) if flat is None else flat)
        return self._used[-1][:n].view(shape)


def _fitting(spare: list[Tensor], n: int, dtype: torch.dtype) -> Tensor | None:
    """Removes the smallest that holds n elements; where none does, the largest is given up."""
    alike = [flat for flat in spare if flat.dtype == dtype]
    if not alike:
        return None
    found = min((flat for flat in alike if len(flat) >= n), key=len, default=None)
    gone = max(alike, key=len) if found is None else found
    spare[:] = [flat for flat in spare if flat is not gone]
    return found
