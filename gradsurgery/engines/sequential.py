"""One backward pass a task: exact for any model, and the oracle of every other engine."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery import kernels
from gradsurgery.engines.engine import Engine, Measurement, RowMap
from gradsurgery.engines.layout import Layout, Piece
from gradsurgery.losses import Output, TaskLosses

Gradients = Sequence[Tensor | None]


class Rows(Measurement):
    """Per-task gradients: those of shared parameters as rows of one matrix, the others parameter by parameter."""

    def __init__(self, T: int, layout: Layout):
        self._layout = layout
        self._rows = layout.rows(T)
        self._views = layout.row_views(T)
        self._filled = [False] * T
        self._reached = [False] * len(layout.params)
        self._own: list[dict[Tensor, Tensor]] = [{} for _ in range(T)]
        self._spare: Gradients = [None] * len(layout.params)

    def put(self, task: int, shared: Gradients, own: Iterable[tuple[Tensor, Tensor | None]], *, ours: bool) -> None:
        """Adds a task's gradients: None stands for a parameter that its loss does not reach.

        Args:
            task: its row.
            shared: gradients of the layout's parameters.
            own: other parameters with their gradients.
            ours: whether nothing else shares the gradients' memory, so that it may be written to.
        """
        self._reached = [seen or g is not None for seen, g in zip(self._reached, shared, strict=True)]
        if self._filled[task]:
            _add(self._views[task], shared)
        else:
            _copy(self._views[task], shared)
            self._filled[task] = True
        kept = self._own[task]
        for p, g in own:
            if g is not None:
                kept[p] = _sum(kept[p], g) if p in kept else (g if ours else g.clone())
        if ours:
            self._spare = shared

    def _complete(self) -> Tensor:
        for task, filled in enumerate(self._filled):
            if not filled:
                self._rows[task].zero_()
                self._filled[task] = True
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
            direction = kernels.combine(weights, self._complete(), self._layout.bounds)
            self._write(lambda piece, rows: direction[piece.start : piece.stop], head_weights)
        else:
            self._write(combine, head_weights)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        self._write(lambda piece, rows: columns(rows), None)

    def _write(self, direct: Callable[[Piece, Tensor], Tensor], head_weights: Tensor | None) -> None:
        rows = self._complete()
        for piece in self._layout.pieces:
            direction = direct(piece, rows[:, piece.start : piece.stop])
            views = self._layout.views(direction, piece)
            span = slice(piece.first, piece.last)
            reached = zip(self._layout.params[span], views, self._reached[span], strict=True)
            _accumulate([(p, view) for p, view, seen in reached if seen])
        for task, own in enumerate(self._own):
            if own and head_weights is not None:
                torch._foreach_mul_(list(own.values()), head_weights[task])
            _accumulate(own.items())


class Sequential(Engine):
    """A backward pass a task, each copied once into its row of a preallocated (T, d) matrix."""

    name: ClassVar[str] = "sequential"

    def measure(
        self,
        losses: TaskLosses,
        layout: Layout,
        task_specific: Sequence[Tensor],
        *,
        grad_scale: Tensor | None,
        held: Measurement | None,
    ) -> Rows:
        rows = held if isinstance(held, Rows) else Rows(len(losses.tasks), layout)
        inputs = [*layout.params, *task_specific]
        split = len(layout.params)
        present = losses.present
        for task in present:
            output = losses.outputs[task]
            assert output is not None
            seed = torch.ones_like(losses.values[task]) if grad_scale is None else grad_scale
            seed = seed_like(seed, output)
            if task == present[-1]:
                gradients = _own_gradients(output, seed, inputs)
            else:
                gradients = torch.autograd.grad(output, inputs, grad_outputs=seed, retain_graph=True, allow_unused=True)
            own = zip(task_specific, gradients[split:], strict=True)
            rows.put(task, gradients[:split], own, ours=task == present[-1])
            # Freed before the next pass, which then finds its memory: one set of gradients at a time, still in cache.
            del gradients, own
        return rows


def _own_gradients(output: Output, seed: Tensor, inputs: Sequence[Tensor]) -> Gradients:
    """Gradients that may be written to. What `torch.autograd.grad` returns may share memory with the graph, another
    gradient or the user; what a backward pass leaves in ``.grad`` is the parameter's own."""
    before = [p.grad for p in inputs]
    try:
        for p in inputs:
            p.grad = None
        torch.autograd.backward(output, seed, inputs=inputs)
        return [p.grad for p in inputs]
    finally:
        for p, g in zip(inputs, before, strict=True):
            p.grad = g


def seed_like(value: Tensor, output: Tensor | torch.autograd.graph.GradientEdge) -> Tensor:
    """A gradient of a scalar loss, in the loss's own shape and dtype."""
    if isinstance(output, Tensor):
        return value.to(output.dtype).expand(output.shape)
    metadata = output.node._input_metadata[output.output_nr]
    return value.to(metadata.dtype).expand(metadata.shape)


def _copy(views: Sequence[Tensor], gradients: Gradients) -> None:
    if all(g is not None and g.layout is torch.strided for g in gradients):
        torch._foreach_copy_(views, gradients)  # pyright: ignore[reportArgumentType]
        return
    for view, g in zip(views, gradients, strict=True):
        view.zero_() if g is None else view.copy_(g.to_dense())


def _add(views: Sequence[Tensor], gradients: Gradients) -> None:
    for view, g in zip(views, gradients, strict=True):
        if g is not None:
            view.add_(g.to_dense())


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Of two gradients, either of which may be sparse; in place where it can be."""
    return second + first if first.is_sparse and not second.is_sparse else first.add_(second)


def _accumulate(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for p, g in pairs:
        g = g if g.dtype == p.dtype else g.to(p.dtype)
        p.grad = g if p.grad is None else _sum(p.grad, g)
