"""What a `TrackedMethod` remembers: T x d numbers beside the gradients, which follow the parameters about."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradsurgery.distributed import is_sharded, local, placed
from gradsurgery.engines import RowMap
from gradsurgery.engines.layout import Layout, Piece

# (rows (T, n), tracked (T, n)) -> (next tracked (T, n), rows to measure (T, n)).
Track = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Tracked:
    """The rows (T, d), 0 at first, in the coordinates of a layout; float32 where gradients are narrower.

    Args:
        T: tasks.
        layout: where each parameter lies.
        known: what is remembered of single parameters, (T, *shape) each; those that the layout lacks are forgotten.
    """

    def __init__(self, T: int, layout: Layout, known: Iterable[tuple[Tensor, Tensor]] = ()):
        self.layout = layout
        self.dtype = torch.promote_types(layout.dtype, torch.float32)
        self._rows = torch.zeros(T, layout.bounds[-1], dtype=self.dtype, device=layout.device)
        self._views = [layout.views(row) for row in self._rows]
        places = {p: n for n, p in enumerate(layout.params)}
        shards = layout.shards
        for p, rows in known:
            if p in places:
                mine = local(rows) if is_sharded(rows) or shards is None else shards.part(p, rows, axes=1)
                for views, row in zip(self._views, mine, strict=True):
                    views[places[p]].copy_(row)

    def by_parameter(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters, each with a copy (T, *shape) of what is remembered of it, divided as the parameter is."""
        stacks = [torch.stack([views[n] for views in self._views]) for n in range(len(self.layout.params))]
        return [(p, placed(p, rows, axes=1)) for p, rows in zip(self.layout.params, stacks, strict=True)]

    def measured(self, track: Track, grad_scale: Tensor | None) -> RowMap:
        """The rows that the method measures; nothing is remembered yet."""

        def of(piece: Piece, rows: Tensor) -> Tensor:
            new, measured = track(self._unscaled(rows, grad_scale), self._piece(piece))
            # What is not finite must show in the inner products, or it would be remembered.
            return torch.where(new.isfinite(), measured, torch.nan)

        return of

    def committed(self, track: Track, grad_scale: Tensor | None, finite: Tensor, *, gradients: bool) -> RowMap:
        """What the weights multiply, in the scale of the gradients. As it is read, the step is remembered, if finite.

        Args:
            track: as in `measured`.
            grad_scale: () factor on every gradient (an AMP scale), or None.
            finite: () whether the step is to be remembered.
            gradients: whether the weights multiply the task gradients, or the rows that were measured.
        """

        def of(piece: Piece, rows: Tensor) -> Tensor:
            old = self._piece(piece)
            new, measured = track(self._unscaled(rows, grad_scale), old)
            old.copy_(torch.where(finite, new, old))
            if gradients:
                return rows
            return measured if grad_scale is None else measured * grad_scale.to(self.dtype)

        return of

    def _piece(self, piece: Piece) -> Tensor:
        return self._rows[:, piece.start : piece.stop]

    def _unscaled(self, rows: Tensor, grad_scale: Tensor | None) -> Tensor:
        rows = rows.to(self.dtype)
        return rows if grad_scale is None else rows / grad_scale.to(self.dtype)
