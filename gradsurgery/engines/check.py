"""An engine beside plain backward passes, since vmap is wrong for some operators and fails for others.

That is done at the first step, at every one that brings an operator which was not there before, and, since what passes
a gate that starts at zero (or a hook that has not begun to clip) shows later, at steps 2, 4, 8 and so on.

Gradients are compared by random projections, parameter by parameter: two vectors that differ have equal projections on
a Gaussian one with probability 0, and nothing of the size of J is held.
"""

from __future__ import annotations

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from gradsurgery.engines.engine import Batch, Engine, Measurement
from gradsurgery.engines.layout import PerLayout
from gradsurgery.graph import Graph, survey

# Largest differences of projections, as a share of the task's gradient, that are put down to rounding.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
CAST = 5e-2
# Elements that are in float64 at a time.
PIECE = 1 << 20


def project(n: int, rows: Sequence[Tensor]) -> Tensor:
    """Projections (K,) float64 of K gradients of a layout's parameter ``n`` on one random vector."""
    device = rows[0].device
    direction = torch.randn(rows[0].numel(), generator=Generator(device).manual_seed(n), device=device).split(PIECE)
    return torch.stack([_inner(row.reshape(-1).split(PIECE), direction) for row in rows])


def _inner(pieces: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Inner product () float64."""
    return torch.stack([a.double() @ b.double() for a, b in zip(pieces, others, strict=True)]).sum()


@dataclass
class _Finding:
    """Whether an engine is right about a model, as far as these operators go, and the steps that it has taken."""

    right: bool
    operators: set[str]
    steps: int


class Checked(Engine):
    """An engine that compares itself with one backward pass a task before it is trusted with a model or an operator,
    and again in steps 2, 4, 8, ...; where it is wrong, or fails, the engine ``instead`` runs from then on.

    Args:
        instead: what takes over.
        quiet: whether it does so without a warning.
    """

    def __init__(self, instead: Engine, *, quiet: bool = False):
        self._instead, self._quiet = instead, quiet
        self._found: PerLayout[_Finding] = PerLayout()

    @abc.abstractmethod
    def _measure(self, batch: Batch, held: Measurement | None, graph: Graph) -> Measurement:
        """`Engine.measure`, unchecked, of losses whose graph has been surveyed."""

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
        found = self._found.get(batch.layout)
        if found is not None and not found.right:
            return self._instead.measure(batch, held)
        graph = survey(batch.losses.outputs)
        operators = {node.name() for node in graph.next}
        known = found is not None and operators <= found.operators
        if held is None:
            steps = 1 if found is None else found.steps + 1
            if not known or steps & (steps - 1) == 0:
                measured = self._check(batch, graph, operators)
                if measured is not None:
                    return measured
            elif found is not None:
                found.steps = steps
        found = self._found.get(batch.layout)
        right = known and found is not None and found.right
        return self._measure(batch, held, graph) if right else self._instead.measure(batch, held)

    def _check(self, batch: Batch, graph: Graph, operators: set[str]) -> Measurement | None:
        """A measurement that has been found right; None where it is wrong, or nothing can be told."""
        # What is wrong for some tasks may be right for a single one, or where gradients vanish.
        enough = min(2, len(batch.losses.tasks))
        if len(batch.losses.here) < enough:
            return None
        expected = _expected(batch)
        scale = expected.square().sum(dim=1).sqrt()
        if not bool(scale.isfinite().all() & ((scale > 0).sum() >= enough)):
            return None
        kept = dataclasses.replace(batch, retain=True)
        try:
            measured = self._measure(kept, None, graph)
            fault = self._fault(measured, kept, expected, _tolerance(batch, operators) * scale)
        except Exception as error:
            measured, fault = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        before = self._found.get(batch.layout, _Finding(True, set(), 0))
        self._found[batch.layout] = _Finding(fault is None, before.operators | operators, before.steps + 1)
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

    return torch.stack([sketch(task) for task in batch.losses.here])


def _tolerance(batch: Batch, operators: set[str]) -> float:
    """Of the narrowest arithmetic in the graph; a cast there, autocast's perhaps, counts as half precision."""
    if "ToCopyBackward0" in operators:
        return CAST
    return max(TOLERANCE.get(p.dtype, CAST) for p in batch.layout.params)
