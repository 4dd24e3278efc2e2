"""An engine's first step beside plain backward passes, since vmap is wrong for some operators and fails for others.

Gradients are compared by random projections, parameter by parameter: two vectors that differ have equal projections on
a Gaussian one with probability 0, and nothing of the size of J is held.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from gradsurgery.engines.engine import Batch, Engine, Measurement
from gradsurgery.engines.graph import Graph, survey
from gradsurgery.engines.layout import PerLayout

# Largest differences of projections, as a share of the task's gradient, that are put down to rounding.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
CAST = 5e-2


def project(n: int, rows: Sequence[Tensor]) -> Tensor:
    """Projections (K,) float64 of K gradients of a layout's parameter ``n`` on one random vector."""
    device = rows[0].device
    direction = torch.randn(rows[0].numel(), generator=Generator(device).manual_seed(n), device=device)
    return torch.stack([row.reshape(-1).double() @ direction.double() for row in rows])


class Checked(Engine):
    """An engine that compares itself with one backward pass a task before it is trusted with a model, and again before
    it is trusted with an operator that is new in its graph; where it is wrong, or fails, the engine ``instead`` runs
    from then on.

    Args:
        instead: what takes over.
        quiet: whether it does so without a warning.
    """

    def __init__(self, instead: Engine, *, quiet: bool = False):
        self._instead, self._quiet = instead, quiet
        # The operators that have been compared; None once it has failed.
        self._trusted: PerLayout[set[str] | None] = PerLayout()

    @abc.abstractmethod
    def _measure(self, batch: Batch, graph: Graph, held: Measurement | None) -> Measurement:
        """`Engine.measure`, unchecked; ``graph`` is that of the losses."""

    @abc.abstractmethod
    def _fault(self, measured: Any, batch: Batch, expected: Tensor, tolerance: Tensor) -> str | None:
        """What is wrong with a measurement, if anything is; it stays fit for use, and the graph as it was.

        Args:
            measured: what `_measure` returned.
            batch: whose graph is retained.
            expected: (K, P), `project` of the present tasks' gradients.
            tolerance: (K,), how far a projection may be off.
        """

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        trusted = self._trusted.get(batch.layout, set())
        if trusted is None:
            return self._instead.measure(batch, held)
        graph = survey(batch.losses.outputs)
        operators = {node.name() for node in graph.next}
        if operators <= trusted:
            return self._measure(batch, graph, held)
        measured = self._first(batch, graph, operators) if held is None else None
        return self._instead.measure(batch, held) if measured is None else measured

    def _first(self, batch: Batch, graph: Graph, operators: set[str]) -> Measurement | None:
        """A measurement that has been found right; None where there is none."""
        # What is wrong for some tasks may be right for a single one, or where gradients vanish.
        enough = min(2, len(batch.losses.tasks))
        if len(batch.losses.present) < enough:
            return None
        expected = _expected(batch)
        scale = expected.square().sum(dim=1).sqrt()
        if not bool(scale.isfinite().all() & ((scale > 0).sum() >= enough)):
            return None
        kept = dataclasses.replace(batch, retain=True)
        try:
            measured = self._measure(kept, graph, None)
            fault = self._fault(measured, kept, expected, _tolerance(batch, operators) * scale)
        except Exception as error:
            measured, fault = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._trusted[batch.layout] = None if fault else (self._trusted.get(batch.layout) or set()) | operators
        if fault is None or self._quiet:
            return measured if fault is None else None
        warnings.warn(
            f"engine={self.name!r} cannot be used on this model, and {self._instead.name!r} runs instead: {fault} "
            f"Numbers are right either way; pass engine={self._instead.name!r} to be spared the check.",
            stacklevel=6,
        )
        return None


def _expected(batch: Batch) -> Tensor:
    """`project` of the present tasks' gradients, (K, P), one backward pass a task."""
    zero = torch.zeros((), dtype=torch.float64, device=batch.layout.device)

    def sketch(task: int) -> Tensor:
        found = batch.gradients(task, batch.layout.params, retain=True)
        return torch.stack([zero if g is None else project(n, [g.to_dense()])[0] for n, g in enumerate(found)])

    return torch.stack([sketch(task) for task in batch.losses.present])


def _tolerance(batch: Batch, operators: set[str]) -> float:
    """Of the narrowest arithmetic in the graph; a cast there, autocast's perhaps, counts as half precision."""
    if "ToCopyBackward0" in operators:
        return CAST
    return max(TOLERANCE.get(p.dtype, CAST) for p in batch.layout.params)
