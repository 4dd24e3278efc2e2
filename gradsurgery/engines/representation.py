"""Surgery on gradients with respect to what the tasks share of the forward pass, and one backward of the trunk.

MGDA-UB (Sener and Koltun, NeurIPS 2018, eq. 4) and the ``rep_grad`` mode of later code: the T backward passes end where
the heads begin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from gradsurgery import kernels
from gradsurgery.engines.cut import Cut, cut
from gradsurgery.engines.engine import Batch, Engine, Measurement, RowMap, flat, spread
from gradsurgery.engines.scalar import replaced_backward
from gradsurgery.graph import Edge, Graph, survey
from gradsurgery.stats import Needs

Reduce = Literal["none", "sum"]

Nested: TypeAlias = Tensor | Sequence["Nested"] | Mapping[str, "Nested"]
"""Tensors in tuples, lists and mappings; those without a graph (inputs, say) are passed over."""


class Representation(Engine):
    """Heads are passed once a task, the trunk once.

    Exact: the trunk's gradient is ``sum_t w_t dL_t/dz`` pulled back, heads take what they take under any engine, and
    tasks whose gradients agree or vanish at z do so at the parameters. An upper bound: weights come from inner products
    at z. With ``dz/dp`` of norm s, ``|sum_t w_t dL_t/dp| <= s |sum_t w_t dL_t/dz|``, so that a point that is Pareto
    stationary at z is so at the parameters; gradients that conflict at z may agree at the parameters, and the other way
    round, so a method's guarantees (no conflict, equal projections) hold at z alone.

    Args:
        reduce: ``"none"``: a gradient is all of dL_t/dz, batch and features side by side, as MGDA's authors have it.
            ``"sum"``: inner products are those of dL_t/dz summed over the batch (its first axis), as LibMTL has it,
            which forgets what cancels between samples; the weights act on the whole of dL_t/dz all the same.
        at: where z lies in this step's graph; None finds it: the tensors at which the tasks' own parts of the graph
            enter the part that several share.

    Raises:
        ValueError: another reduction.
    """

    name: ClassVar[str] = "representation"
    holds: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = True

    def __init__(self, reduce: Reduce = "none", at: Sequence[Edge] | None = None):
        if reduce not in ("none", "sum"):
            raise ValueError(f"reduce must be 'none' or 'sum'; got {reduce!r}.")
        self.reduce: Reduce = reduce
        self.at = at

    def given(self, representation: Nested) -> Representation:
        """This engine, for a step whose z is known."""
        edges = [get_gradient_edge(z) for z in _tensors(representation) if z.requires_grad]
        if not edges:
            raise ValueError(
                "representation must hold a tensor, or several, of the forward pass that led to the losses, with its "
                "graph; it has none that is not detached."
            )
        return Representation(self.reduce, [(edge.node, edge.output_nr) for edge in edges])

    def refuse(self, needs: Needs, name: str, *, blocks: bool) -> None:
        if needs & (Needs.TRACKED | Needs.CROSS):
            raise ValueError(
                f"{name} compares gradients of different batches, and those at a representation belong to the samples "
                "of one. Use engine='sequential'."
            )
        if blocks:
            raise ValueError(
                "Blocks are of shared parameters, and engine='representation' has no gradients of theirs: "
                "leave blocks at 'model', or use engine='sequential'."
            )

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        graph = survey(batch.losses.outputs)
        if self.at is not None and batch.layout.shards is None:
            # The graph has other parameters in the place of those that are divided.
            _check_reach(graph, self.at, batch)
        if batch.ranks is None:
            return AtRepresentation(cut(batch, graph, self.at), batch.layout.params, self.reduce, retain=batch.retain)
        return OverRanks(
            cut(dataclasses.replace(batch, task_specific=(), retain=True), graph, self.at), batch, self.reduce
        )


class AtRepresentation(Measurement):
    """Gradients of a batch at its representation."""

    engine = "representation"

    def __init__(self, parts: Cut, shared: Sequence[Tensor], reduce: Reduce, *, retain: bool):
        self._cut, self._shared, self._retain = parts, shared, retain
        self._reduce: Reduce = reduce

    def gramian(self, of: RowMap | None = None) -> Tensor:
        assert of is None
        return _gramian(self._cut, [*_reduced(self._cut, self._reduce), *self._cut.direct.values()])

    def cross_gramian(self, other: Measurement) -> Tensor:
        raise NotImplementedError  # `Representation.refuse` keeps such methods away.

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        self._cut.write_heads(head_weights)
        self._cut.pull(self._cut.weighted(weights[0]), self._shared, retain=self._retain)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        self._cut.write_heads(None)
        self._cut.pull(self._cut.by_columns(columns), self._shared, retain=self._retain)


class OverRanks(Measurement):
    """Gradients of every rank's samples at its part of the representation, side by side.

    One ordinary backward follows, which the model's wrapper averages as ever: heads see the losses, and the trunk what
    the gradients at the representation become.
    """

    engine = "representation"

    def __init__(self, parts: Cut, batch: Batch, reduce: Reduce):
        self._cut, self._batch = parts, batch
        self._reduce: Reduce = reduce
        assert batch.ranks is not None
        self._ranks = batch.ranks
        if parts.direct:
            raise ValueError(
                f"Tasks use {len(parts.direct)} shared parameters past the representation too (one of shape "
                f"{tuple(next(iter(parts.direct)).shape)}), whose gradients are not whole on one rank. Use "
                "engine='sequential'."
            )
        if reduce == "sum" and len(batch.losses.here) < len(batch.losses.present):
            raise ValueError(
                "reduce='sum' adds up gradients at the representation over all ranks, and a task is absent on one of "
                "them. Use reduce='none'."
            )

    def gramian(self, of: RowMap | None = None) -> Tensor:
        assert of is None
        parts = self._cut
        rows = _reduced(parts, self._reduce)
        if self._reduce == "sum":
            return _gramian(parts, [self._ranks.sum(row.clone()) for row in rows])
        if not rows:
            zeros = torch.zeros(1, parts.T, parts.T, dtype=torch.float64, device=self._batch.losses.values.device)
            return self._ranks.sum(zeros)
        return self._ranks.sum(_gramian(parts, rows))

    def cross_gramian(self, other: Measurement) -> Tensor:
        raise NotImplementedError  # `Representation.refuse` keeps such methods away.

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        parts = self._cut
        ones = torch.ones_like(weights[0])
        wanted = [parts.weighted(weights[0])(seed) for seed in parts.seeds]
        raw = [parts.weighted(ones if head_weights is None else head_weights)(seed) for seed in parts.seeds]
        through = parts.passed()

        def change(n: int, arriving: Tensor) -> Tensor:
            edge = parts.edges[n]
            flows = (edge.node, edge.output_nr) in through
            # What arrives by way of other edges has been changed there.
            return (arriving - raw[n] + wanted[n] if flows else wanted[n]).to(arriving.dtype)

        replaced_backward(self._batch, head_weights, parts.edges, change)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        raise ValueError(
            "A method that works column by column draws for every sample at the representation, which other ranks have "
            "of their own. Use engine='sequential'."
        )


def _reduced(parts: Cut, reduce: Reduce) -> list[Tensor]:
    """Rows (K, ...) at each edge."""
    return [seed.sum(dim=1) if reduce == "sum" and seed.ndim > 1 else seed for seed in parts.seeds]


def _gramian(parts: Cut, rows: Sequence[Tensor]) -> Tensor:
    total = torch.stack([kernels.block_gramian(flat(row)) for row in rows]).sum(dim=0)
    return spread(total[None], parts.present, parts.T, axes=(1, 2))


def _tensors(nested: Nested) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Sequence | Mapping) and not isinstance(nested, str):
        for inner in nested.values() if isinstance(nested, Mapping) else nested:
            yield from _tensors(inner)
    else:
        raise TypeError(
            f"representation must be a tensor, or tensors in tuples, lists and mappings; got a {type(nested).__name__}."
        )


def _check_reach(graph: Graph, at: Sequence[Edge], batch: Batch) -> None:
    """Raises ValueError where a loss reaches shared parameters past the representation, or it reaches none."""
    stops, shared = set(at), {id(p) for p in batch.layout.params}
    passed = {root[0] for root in graph.roots if root is not None and root not in stops}
    for node, edges in graph.next.items():
        if node in passed:
            passed.update(edge[0] for edge in edges if edge not in stops)
    around = [p for node, p in graph.leaves.items() if node in passed and id(p) in shared]
    if around:
        raise ValueError(
            f"Losses bypass the representation: they reach {len(around)} shared parameters (one of shape "
            f"{tuple(around[0].shape)}) by other ways, so that its gradient is not all of theirs. Pass every tensor at "
            "which heads begin, leave those parameters out of shared_params, or use engine='sequential'."
        )
    inside = graph.below(node for node, _ in at)
    if not any(node in inside and id(p) in shared for node, p in graph.leaves.items()):
        raise ValueError(
            "No shared parameter lies below the representation in the losses' graph: pass the trunk's output itself, "
            "not a detached copy or a tensor of another forward."
        )
