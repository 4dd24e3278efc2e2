"""Rows of several ranks' batches: summed, and each rank's to keep some columns of them.

T rows of d elements cost each of W ranks ``(T + 1) d (W - 1) / W`` elements of traffic (a reduce-scatter a row and one
all-gather of the direction), where rows that are all-reduced cost ``2 T d (W - 1) / W``; the inner products, T^2
numbers, are summed beside. A row is on its way while the next task is passed backward.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self.engine = rows.engine
        self._rows, self._layout, self._T = rows, batch.layout, len(batch.losses.tasks)
        assert batch.ranks is not None
        self._ranks = batch.ranks
        n = batch.layout.width // batch.ranks.size
        self._own = torch.empty(self._T, n, dtype=batch.layout.dtype, device=batch.layout.device)
        self._sent = 0
        self._pending: list[Any] = []

    def send(self, through: int) -> None:
        """Sends the rows up to that of a task, which are complete. In their order, as every rank does."""
        for task in range(self._sent, through + 1):
            self._pending.append(self._ranks.scatter(self._rows.row(task), self._own[task]))
        self._sent = max(self._sent, through + 1)

    def _arrived(self) -> Tensor:
        self.send(self._T - 1)
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
        own, (blocks, bounds) = self._arrived(), self._layout.owned()
        total = torch.zeros(self._layout.blocks, self._T, self._T, dtype=torch.float64, device=own.device)
        if len(bounds) > 1:
            total[blocks] = kernels.gramian(own, bounds, others)
        return self._ranks.sum(total)

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        own, (blocks, bounds) = self._arrived(), self._layout.owned()
        direction = own.new_zeros(own.shape[1])
        if len(bounds) > 1:
            mine = weights if len(weights) == 1 else weights[blocks]
            direction[: bounds[-1]] = kernels.combine(mine, own[:, : bounds[-1]], bounds)
        self._rows.write_direction(self._ranks.gather(direction), head_weights)

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
