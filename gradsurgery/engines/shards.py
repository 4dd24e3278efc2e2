"""Rows of parameters that are divided among ranks: each rank has its parts of all rows, averaged as they came.

Inner products of the parts are summed over the ranks, T^2 numbers; directions are made of the parts alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradsurgery.distributed import Shards
from gradsurgery.draws import Chosen
from gradsurgery.engines.engine import Measurement, RowMap
from gradsurgery.engines.layout import Layout, Piece
from gradsurgery.engines.rows import Rows


class ShardedRows(Measurement):
    """Task gradients, of whose columns this rank has its parameters' own.

    Args:
        rows: those.
        layout: in which they lie.
        shards: how the parameters are divided.
    """

    def __init__(self, rows: Rows, layout: Layout, shards: Shards):
        self.engine = rows.engine
        self._rows, self._layout, self._shards = rows, layout, shards

    def gramian(self, of: RowMap | None = None) -> Tensor:
        return self._shards.sum(self._rows.gramian(of))

    def cross_gramian(self, other: Measurement) -> Tensor:
        assert isinstance(other, ShardedRows)
        return self._shards.sum(self._rows.cross_gramian(other._rows))

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        self._rows.write(weights, head_weights, of)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        def direct(piece: Piece, rows: Tensor) -> Tensor:
            whole = self._layout.origins[piece.last] - self._layout.origins[piece.first]
            with Chosen(whole, torch.Size(rows.shape[1:]), lambda: self._layout.chosen(piece)):
                return columns(rows)

        self._rows.write_pieces(direct, None)
