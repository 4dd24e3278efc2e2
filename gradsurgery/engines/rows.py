"""Per-task gradients as rows of one matrix: J (T, d), written once and read twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gradsurgery import kernels
from gradsurgery.engines.check import project
from gradsurgery.engines.engine import Batch, Measurement, RowMap, accumulate, add, write_own
from gradsurgery.engines.layout import Piece

Gradients = Sequence[Tensor | None]


class Rows(Measurement):
    """Per-task gradients: those of shared parameters as rows of one matrix, the others parameter by parameter."""

    def __init__(self, batch: Batch, engine: str):
        T, layout = len(batch.losses.tasks), batch.layout
        self.engine = engine
        self._layout, self._others = layout, batch.task_specific
        self._rows = layout.rows(T)
        self._views = layout.row_views(T)
        self._stacked = layout.stacked_views(T)
        self._filled = [False] * T
        self._reached = [False] * len(layout.params)
        self._own: list[dict[Tensor, Tensor]] = [{} for _ in range(T)]
        self._norms: Tensor | None = None
        self._spare: Gradients = [None] * len(layout.params)

    @contextmanager
    def arriving(
        self, task: int, which: Iterable[int], *, release: bool, then: Callable[[int], object] | None = None
    ) -> Iterator[set[int]]:
        """Adds gradients of a pass that is taken meanwhile to the task's row, each as it comes, while it is in cache;
        `put` must follow.

        Args:
            task: its row.
            which: parameters of the layout, by position.
            release: whether the gradients may be freed, which lets the pass work in less memory, in cache as well: it
                returns others for them.
            then: called with a position when its gradient is there.

        Yields:
            The positions whose gradients have come, for `put`.
        """
        there: set[int] = set()
        views, put = self._views[task], _add if self._filled[task] else _copy

        def come(n: int, gradient: Tensor) -> Tensor | None:
            put(views[n : n + 1], [gradient])
            there.add(n)
            if then is not None:
                then(n)
            alike = gradient.layout is torch.strided and gradient.dtype == views[n].dtype
            return views[n] if release and alike else None

        handles = [self._layout.params[n].register_hook(partial(come, n)) for n in which]
        try:
            yield there
        finally:
            for handle in handles:
                handle.remove()

    def put(
        self,
        task: int,
        shared: Gradients,
        own: Iterable[tuple[Tensor, Tensor | None]],
        *,
        ours: bool,
        there: Collection[int] = (),
    ) -> None:
        """Adds a task's gradients: None stands for a parameter that its loss does not reach.

        Args:
            task: its row.
            shared: gradients of the layout's parameters.
            own: other parameters with their gradients.
            ours: whether nothing else shares the gradients' memory, so that it may be written to.
            there: the positions that the row has already, see `arriving`.
        """
        self._reached = [seen or g is not None for seen, g in zip(self._reached, shared, strict=True)]
        views, gradients = self._views[task], shared
        if there:
            rest = [n for n in range(len(views)) if n not in there]
            views, gradients = [views[n] for n in rest], [shared[n] for n in rest]
        if self._filled[task]:
            _add(views, gradients)
        else:
            _copy(views, gradients)
            self._filled[task] = True
        self.put_own(task, ((p, g if ours else g.clone()) for p, g in own if g is not None))
        if ours:
            self._spare = shared

    def part(self, task: int, columns: slice) -> Tensor:
        """Columns of a task, as they stand."""
        return self._rows[task, columns]

    def put_all(self, shared: Gradients) -> None:
        """Adds all tasks' gradients, (T, *shape) of each of the layout's parameters."""
        self._reached = [seen or g is not None for seen, g in zip(self._reached, shared, strict=True)]
        if any(self._filled):
            self._complete()
            _add(self._stacked, shared)
        else:
            _copy(self._stacked, shared)
            self._filled = [True] * len(self._filled)

    def put_own(self, task: int, own: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Adds a task's gradients of other parameters, which become these rows' own."""
        kept = self._own[task]
        for p, g in own:
            kept[p] = add(kept[p], g) if p in kept else g

    def sketch(self, tasks: Sequence[int]) -> Tensor:
        """`project` of these tasks' rows: (K, P)."""
        views = [self._views[t] for t in tasks]
        columns = [project(n, [row[n] for row in views]) for n in range(len(self._layout.params))]
        return torch.stack(columns, dim=1)

    def row(self, task: int) -> Tensor:
        """(width,) of a task; zeros where nothing was put there."""
        if not self._filled[task]:
            self._rows[task].zero_()
            self._filled[task] = True
        return self._rows[task]

    def total(self) -> None:
        """Sums the rows over ranks."""
        assert self._layout.ranks is not None
        for row in self._complete():
            self._layout.ranks.sum(row)

    def _complete(self) -> Tensor:
        for task in range(len(self._filled)):
            self.row(task)
        return self._rows

    def gramian(self, of: RowMap | None = None) -> Tensor:
        rows = self._complete()
        if of is None:
            return kernels.gramian(rows, self._layout.bounds)
        total = torch.zeros(self._layout.blocks, len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for piece in self._layout.pieces:
            total[piece.block] += kernels.block_gramian(of(piece, rows[:, piece.start : piece.stop]))
        return total

    def cross_gramian(self, other: Measurement) -> Tensor:
        assert isinstance(other, Rows)
        return kernels.gramian(self._complete(), self._layout.bounds, other._complete())

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        def combine(piece: Piece, rows: Tensor) -> Tensor:
            weight = weights[piece.block if len(weights) > 1 else 0]
            if of is not None:
                return kernels.combine_block(weight, of(piece, rows))
            return kernels.combine_block(weight, rows, self._layout.memory(piece, self._spare))

        if of is None and self._rows.is_cuda:
            # All blocks in one launch.
            self.write_direction(kernels.combine(weights, self._complete(), self._layout.bounds), head_weights)
        else:
            self.write_pieces(combine, head_weights)

    def write_direction(self, direction: Tensor, head_weights: Tensor | None) -> None:
        """As `write`, where the direction (d,) is known."""
        self.write_pieces(lambda piece, rows: direction[piece.start : piece.stop], head_weights)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        self.write_pieces(lambda piece, rows: columns(rows), None)

    def cosines(self, gradients: Gradients) -> Tensor:
        """(T,) float64, of each row with the P gradients side by side; 0 for a row of zeros. None stands for zeros."""
        if self._norms is None:
            self._norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in self._complete()])
        flat = [None if g is None else g.to_dense().to(self._layout.dtype) for g in gradients]
        products = [self._along(views, flat) for views in self._views]
        square = sum(g.double().square().sum() for g in flat if g is not None)
        scale = self._norms * torch.as_tensor(square, device=self._layout.device).sqrt()
        return torch.where(scale > 0, torch.stack(products) / scale, 0.0)

    def _along(self, views: Sequence[Tensor], gradients: Gradients) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self._layout.device)
        pairs = [(v, g) for v, g in zip(views, gradients, strict=True) if g is not None]
        return torch.stack([zero, *((v.reshape(-1) @ g.reshape(-1)).double() for v, g in pairs)]).sum()

    def write_pieces(self, direct: Callable[[Piece, Tensor], Tensor], head_weights: Tensor | None) -> None:
        """As `write`, by a rule for each piece's rows (T, n)."""
        rows, ranks = self._complete(), self._layout.ranks
        if ranks is not None:
            self._reached = ranks.anywhere(self._reached)
        for piece in self._layout.pieces:
            direction = direct(piece, rows[:, piece.start : piece.stop])
            views = self._layout.views(direction, piece)
            span = slice(piece.first, piece.last)
            reached = zip(self._layout.params[span], views, self._reached[span], strict=True)
            accumulate([(p, view) for p, view, seen in reached if seen], ranks)
        write_own(self._own, head_weights, ranks, self._others)
        # Given away, and not to be kept alive by these rows.
        self._own, self._spare = [{} for _ in self._own], [None] * len(self._layout.params)


def _copy(views: Sequence[Tensor], gradients: Gradients) -> None:
    if not views:
        return
    if all(g is not None and g.layout is torch.strided for g in gradients):
        torch._foreach_copy_(views, gradients)  # pyright: ignore[reportArgumentType]
        return
    for view, g in zip(views, gradients, strict=True):
        view.zero_() if g is None else view.copy_(g.to_dense())


def _add(views: Sequence[Tensor], gradients: Gradients) -> None:
    for view, g in zip(views, gradients, strict=True):
        if g is not None:
            view.add_(g.to_dense())
