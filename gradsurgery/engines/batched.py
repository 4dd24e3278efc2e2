"""All tasks' backward passes as one, by `torch.vmap`: what launching T passes of small operators costs is paid once."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gradsurgery.engines.check import Checked
from gradsurgery.engines.cut import Cut, cut
from gradsurgery.engines.engine import Batch, Measurement
from gradsurgery.engines.flow import flow
from gradsurgery.engines.rows import Rows
from gradsurgery.engines.sequential import Sequential
from gradsurgery.graph import Graph


class Batched(Checked):
    """Heads are passed one by one, and the part that tasks share by all of them at once.

    The first step, and now and then a later one, is compared with `Sequential`, which takes over, with a warning, where
    vmap is wrong, fails, or has no rule for an operator and would loop over it.

    Args:
        chunk_size: tasks a pass, against memory; None: all of them.
        quiet: no warning where `Sequential` takes over.

    Raises:
        ValueError: a chunk of no task.
    """

    name: ClassVar[str] = "batched"

    def __init__(self, chunk_size: int | None = None, *, quiet: bool = False):
        super().__init__(Sequential(), quiet=quiet)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 task or more, or None for all at once; got {chunk_size}.")
        self.chunk_size = chunk_size

    def _measure(self, batch: Batch, held: Measurement | None, graph: Graph) -> Rows:
        parts = cut(batch, graph)
        rows = held if isinstance(held, Rows) else Rows(batch, self.name)
        wanted = {id(p) for p in (*batch.layout.params, *parts.foreign)}
        inside = [p for p in parts.trunk.leaves.values() if id(p) in wanted]
        size = self.chunk_size or len(parts.present) or 1
        for first in range(0, len(parts.present), size):
            chunk = slice(first, first + size)
            retain = batch.retain or first + size < len(parts.present)
            found = flow(parts.edges, [seed[chunk] for seed in parts.seeds], inside, retain=retain, fallback=False)
            _put(rows, batch, parts, chunk, dict(zip(inside, found, strict=True)))
        return rows

    def _fault(self, measured: Rows, batch: Batch, expected: Tensor, tolerance: Tensor) -> str | None:
        off = (measured.sketch(batch.losses.here) - expected).abs() > tolerance[:, None]
        if not bool(off.any()):
            return None
        shapes = [tuple(batch.layout.params[n].shape) for n in off.any(dim=0).nonzero().flatten().tolist()]
        return f"its gradients differ from plain ones, at {len(shapes)} parameters, the last of shape {shapes[-1]}."


def _put(rows: Rows, batch: Batch, parts: Cut, chunk: slice, found: dict[Tensor, Tensor | None]) -> None:
    for p, direct in parts.direct.items():
        g = found.get(p)
        found[p] = direct[chunk] if g is None else g + direct[chunk]
    tasks = parts.present[chunk]
    shared = [found.get(p) for p in batch.layout.params]
    if len(tasks) == parts.T:
        rows.put_all(shared)
    else:
        apart = [[None] * len(tasks) if g is None else g.unbind() for g in shared]
        for k, t in enumerate(tasks):
            rows.put(t, [g[k] for g in apart], (), ours=False)
    for k, t in enumerate(tasks):
        foreign = ((p, g[k].clone()) for p in parts.foreign if (g := found.get(p)) is not None)
        rows.put_own(t, (*parts.own[t].items(), *foreign))
