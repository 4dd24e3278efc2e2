"""One backward pass a task: exact for any model, and the oracle of every other engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.engines.engine import Batch, Engine, Measurement
from gradsurgery.engines.replicas import ReplicaRows
from gradsurgery.engines.rows import Gradients, Rows


class Sequential(Engine):
    """A backward pass a task, each copied once into its row of a preallocated (T, d) matrix."""

    name: ClassVar[str] = "sequential"
    takes_shards: ClassVar[bool] = True

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        losses, layout = batch.losses, batch.layout
        rows = held if isinstance(held, Rows) else Rows(batch, self.name)
        replicas = ReplicaRows(rows, batch) if batch.scatter and not batch.hold else None
        inputs = [*layout.params, *batch.task_specific]
        split = len(layout.params)
        present = losses.here
        for task in present:
            retain = batch.retain or task != present[-1]
            # Hooks of a wrapper, or of a backward to come, must see no pass but their own.
            last = not retain and batch.ranks is None
            coming = (
                rows.arriving(task, layout.large, release=not last) if replicas is None else replicas.arriving(task)
            )
            with coming as there:
                gradients = _ours(batch, task, inputs) if last else batch.gradients(task, inputs, retain=retain)
            own = zip(batch.task_specific, gradients[split:], strict=True)
            rows.put(task, gradients[:split], own, ours=last, there=there)
            # Freed before the next pass, which then finds its memory: one set of gradients at a time, still in cache.
            del gradients, own
        return rows if replicas is None else replicas


def _ours(batch: Batch, task: int, inputs: Sequence[Tensor]) -> Gradients:
    """Gradients that may be written to. What `torch.autograd.grad` returns may share memory with the graph, another
    gradient or the user; what a backward pass leaves in ``.grad`` is the parameter's own."""
    before = [p.grad for p in inputs]
    output, seed = batch.start(task)
    try:
        for p in inputs:
            p.grad = None
        torch.autograd.backward(output, seed, inputs=inputs)
        return [p.grad for p in inputs]
    finally:
        for p, g in zip(inputs, before, strict=True):
            p.grad = g
