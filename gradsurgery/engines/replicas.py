"""Rows of several ranks' batches: summed, and each rank's to keep some columns of them.

T rows of d elements cost each of W ranks ``(T + 1) d (W - 1) / W`` elements of traffic (a reduce-scatter of each row
and one all-gather of the direction), where rows that are all-reduced cost ``2 T d (W - 1) / W``; the inner products,
T^2 numbers, are summed beside. Rows travel in buckets of columns, last columns first: a bucket leaves as soon as its
last gradient is there, while the rest of that pass and the next task's are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsurgery import kernels
from gradsurgery.engines.engine import Batch, Measurement, RowMap
from gradsurgery.engines.rows import Rows
from gradsurgery.engines.shards import ShardedRows


class ReplicaRows(Measurement):
    """Task gradients summed over ranks, of which this one holds a part of the columns.

    Args:
        rows: of this rank's own losses.
        batch: whose they are.
    """

    def __init__(self, rows: Rows, batch: Batch):
        ranks, buckets, layout = batch.ranks, batch.layout.buckets, batch.layout
        assert ranks is not None and buckets is not None
        self.engine = rows.engine
        self._rows, self._layout, self._ranks, self._buckets = rows, layout, ranks, buckets
        self._T = len(batch.losses.tasks)
        self._own = torch.empty(self._T, layout.width // ranks.size, dtype=layout.dtype, device=layout.device)
        # On every rank the same, whichever bucket is full first.
        self._unsent = deque((task, k) for task in range(self._T) for k in reversed(range(len(buckets.runs))))
        self._pending: list[Any] = []

    @contextmanager
    def arriving(self, task: int) -> Iterator[set[int]]:
        """As `Rows.arriving`, and sends the buckets that are complete."""
        self._send_through(task - 1)
        missing = list(self._buckets.members)

        def come(n: int) -> None:
            for k in self._buckets.touched[n]:
                missing[k] -= 1
            while self._unsent and self._unsent[0][0] == task and not missing[self._unsent[0][1]]:
                self._send()

        with self._rows.arriving(task, range(len(self._layout.params)), release=True, then=come) as there:
            yield there

    def _send_through(self, task: int) -> None:
        """Sends what is left of the rows up to that of a task, to which nothing more will come."""
        while self._unsent and self._unsent[0][0] <= task:
            self._rows.row(self._unsent[0][0])
            self._send()

    def _send(self) -> None:
        task, k = self._unsent.popleft()
        given = self._rows.part(task, self._buckets.runs[k])
        self._pending.append(self._ranks.scatter(given, self._own[task, self._buckets.own[k]]))

    def _arrived(self) -> Tensor:
        self._send_through(self._T - 1)
        for handle in self._pending:
            handle.wait()
        self._pending = []
        return self._own

    def gramian(self, of: RowMap | None = None) -> Tensor:
        assert of is None
        return self._inner_products(None)

    def cross_gramian(self, other: Measurement) -> Tensor:
        assert isinstance(other, ReplicaRows)
        return self._inner_products(other._arrived())

    def _inner_products(self, others: Tensor | None) -> Tensor:
        own, (blocks, bounds) = self._arrived(), self._buckets.owned(self._layout.bounds)
        total = torch.zeros(self._layout.blocks, self._T, self._T, dtype=torch.float64, device=own.device)
        if len(bounds) > 1:
            total[blocks] = kernels.gramian(own, bounds, others)
        return self._ranks.sum(total)

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        own, (blocks, bounds) = self._arrived(), self._buckets.owned(self._layout.bounds)
        direction = own.new_zeros(own.shape[1])
        if len(bounds) > 1:
            mine = weights if len(weights) == 1 else weights[blocks]
            direction[: bounds[-1]] = kernels.combine(mine, own[:, : bounds[-1]], bounds)
        whole = own.new_empty(self._layout.width)
        runs = zip(self._buckets.own, self._buckets.runs, strict=True)
        for handle in [self._ranks.gather(direction[mine], whole[run]) for mine, run in runs]:
            handle.wait()
        self._rows.write_direction(whole, head_weights)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError  # Whoever wants columns has whole rows summed, see `joined`.


def joined(measured: Measurement, batch: Batch) -> Measurement:
    """What the ranks measured together, given what each measured of its own losses."""
    if batch.ranks is None or not isinstance(measured, Rows):
        return measured
    if batch.layout.shards is not None:
        return ShardedRows(measured, batch.layout, batch.layout.shards)
    if batch.scatter:
        return ReplicaRows(measured, batch)
    measured.total()
    return measured
