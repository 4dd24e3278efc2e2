"""One backward pass a task: exact for any model, and the oracle of every other engine."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery import kernels
from gradsurgery.engines.engine import Engine, Measurement
from gradsurgery.engines.layout import Layout
from gradsurgery.losses import TaskLosses

Gradients = Sequence[Tensor | None]


class Rows(Measurement):
    """Per-task gradients: those of shared parameters as rows of one matrix, the others as autograd returned them."""

    def __init__(self, T: int, layout: Layout, task_specific: Sequence[Tensor]):
        self._layout = layout
        self._task_specific = task_specific
        self._rows = layout.rows(T)
        self._views = layout.row_views(T)
        self._filled = [False] * T
        self._reached = [False] * len(layout.params)
        self._own: list[list[tuple[int, Tensor]]] = [[] for _ in range(T)]

    def put(self, task: int, shared: Gradients, own: Gradients) -> None:
        """Adds a task's gradients to its row; None stands for a parameter that its loss does not reach."""
        self._reached = [seen or g is not None for seen, g in zip(self._reached, shared, strict=True)]
        views = self._views[task]
        if self._filled[task]:
            _add(views, shared)
        else:
            _copy(views, shared)
            self._filled[task] = True
        self._own[task] += [(i, g) for i, g in enumerate(own) if g is not None]

    def _complete(self) -> Tensor:
        for task, filled in enumerate(self._filled):
            if not filled:
                self._rows[task].zero_()
                self._filled[task] = True
        return self._rows

    def gramian(self) -> Tensor:
        return kernels.gramian(self._complete(), self._layout.bounds)

    def write(self, weights: Tensor, head_weights: Tensor | None) -> None:
        rows = self._complete()
        for piece in self._layout.pieces:
            columns = rows[:, piece.start : piece.stop]
            block = piece.block if len(weights) > 1 else 0
            direction = kernels.combine(weights[block : block + 1], columns, [0, columns.shape[1]])
            views = self._layout.views(direction, piece)
            span = slice(piece.first, piece.last)
            reached = zip(self._layout.params[span], views, self._reached[span], strict=True)
            _accumulate([(p, view) for p, view, seen in reached if seen])
        for task, own in enumerate(self._own):
            if own:
                weight = 1.0 if head_weights is None else head_weights[task]
                # A copy even for weight 1: what autograd returns may share memory with the graph or another gradient.
                scaled = torch._foreach_mul([g for _, g in own], weight)
                _accumulate([(self._task_specific[i], g) for (i, _), g in zip(own, scaled, strict=True)])


class Sequential(Engine):
    """T calls of `torch.autograd.grad`, each copied once into its row of a preallocated (T, d) matrix."""

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
        rows = held if isinstance(held, Rows) else Rows(len(losses.tasks), layout, task_specific)
        inputs = [*layout.params, *task_specific]
        split = len(layout.params)
        present = losses.present
        for task in present:
            output = losses.outputs[task]
            assert output is not None
            seed = torch.ones_like(losses.values[task]) if grad_scale is None else grad_scale
            gradients = torch.autograd.grad(
                output,
                inputs,
                grad_outputs=seed_like(seed, output),
                retain_graph=task != present[-1],
                allow_unused=True,
            )
            rows.put(task, gradients[:split], gradients[split:])
        return rows


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


def _accumulate(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for p, g in pairs:
        if p.grad is None:
            p.grad = g if g.dtype == p.dtype else g.to(p.dtype)
        else:
            p.grad.add_(g)
