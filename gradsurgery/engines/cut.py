"""Every task's own part of the graph differentiated, down to where it joins the part that several tasks share.

Heads are passed once, whatever happens below: what is left of a batch is the shared part of the graph, the edges at
which gradients enter it, and a gradient a task at each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery.engines.engine import Batch, accumulate
from gradsurgery.engines.graph import Edge, Graph, below, leaf, survey


@dataclass(frozen=True)
class Cut:
    """A batch, its own parts differentiated. K of its T tasks are present.

    Attributes:
        T: tasks.
        present: positions of the K present ones.
        order: nodes of the shared part, each before those that it passes gradients on to.
        edges: where gradients enter it.
        seeds: at each edge, the gradients (K, *shape) that enter there.
        own: by task (T), the gradients of parameters that are not shared, from its own part.
        direct: the gradients (K, *shape) of shared parameters, as far as they come from the tasks' own parts.
        foreign: parameters in the shared part that are not to be operated on.
    """

    T: int
    present: list[int]
    order: list[Node]
    edges: list[GradientEdge]
    seeds: list[Tensor]
    own: list[dict[Tensor, Tensor]]
    direct: dict[Tensor, Tensor]
    foreign: list[Tensor]

    def pull(self, direct: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], *, retain: bool) -> None:
        """One ordinary backward through the shared part, into ``.grad`` of ``inputs``.

        Args:
            direct: what becomes of gradients (K, *shape), (*shape).
            inputs: leaves; those that it does not reach are left alone.
            retain: whether the graph is wanted once more.
        """
        if self.seeds and inputs:
            seeds = [direct(seed) for seed in self.seeds]
            torch.autograd.backward(self.edges, seeds, inputs=list(inputs), retain_graph=retain)
        accumulate((p, direct(self.direct[p])) for p in inputs if p in self.direct)

    def weighted(self, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """Gradients (K, *shape) -> their weighted sum, for weights (T,)."""
        w = torch.stack([weights[t] for t in self.present])
        return lambda rows: combine(w, rows)

    def write_heads(self, head_weights: Tensor | None) -> None:
        """The task-specific parameters' gradients into ``.grad``, weighted (T,) or raw; the graph outlives it."""
        for task, own in enumerate(self.own):
            if own and head_weights is not None:
                torch._foreach_mul_(list(own.values()), head_weights[task])
            accumulate(own.items())
        if self.foreign:
            ones = torch.ones(self.T, device=self.foreign[0].device)
            self.pull(self.weighted(ones if head_weights is None else head_weights), self.foreign, retain=True)


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Rows (K, *shape), weighted (K,) and summed, in float32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.tensordot(weights.to(wide), rows.to(wide), dims=1).to(rows.dtype)


def cut(batch: Batch, graph: Graph | None = None, at: Sequence[Edge] | None = None) -> Cut:
    """Differentiates the tasks' own parts.

    Args:
        batch: whose ``retain`` is about these parts; the shared part is left as it is.
        graph: of the losses, if it has been surveyed.
        at: edges where the shared part begins; None: at the nodes that more than one loss reaches.
    """
    losses, shared = batch.losses, batch.layout.params
    graph = survey(losses.outputs) if graph is None else graph
    if at is None:
        common = {node for node, tasks in graph.tasks.items() if tasks & (tasks - 1)}
    else:
        common = below(graph.order, (node for node, _ in at))
    order = [node for node in graph.order if node in common]
    operated, wanted = {id(p) for p in shared}, {id(p) for p in (*shared, *batch.task_specific)}
    own: list[dict[Tensor, Tensor]] = [{} for _ in losses.tasks]
    entering: dict[Edge, dict[int, Tensor]] = {}
    direct: dict[Tensor, dict[int, Tensor]] = {}
    head = _Heads(graph, common, order, wanted, retain=batch.retain)
    for row, t in enumerate(losses.present):
        for edge, g in head.gradients(t, batch).items():
            p = leaf(edge[0])
            if p is None:
                entering.setdefault(edge, {})[row] = g
            elif id(p) in operated:
                direct.setdefault(p, {})[row] = g
            else:
                own[t][p] = g.clone()
    K = len(losses.present)
    variables = [p for node in order if (p := leaf(node)) is not None]
    return Cut(
        len(losses.tasks),
        losses.present,
        order,
        [GradientEdge(*edge) for edge in entering],
        [_stack(rows, K) for rows in entering.values()],
        own,
        {p: _stack(rows, K) for p, rows in direct.items()},
        [p for p in variables if id(p) in wanted and id(p) not in operated],
    )


def _stack(rows: Mapping[int, Tensor], K: int) -> Tensor:
    """(K, *shape), 0 where there is no row."""
    some = next(iter(rows.values()))
    stacked = torch.zeros((K, *some.shape), dtype=some.dtype, device=some.device)
    for k, g in rows.items():
        stacked[k] = g
    return stacked


class _Heads:
    """The tasks' own parts of a graph.

    Args:
        graph: of all losses.
        common: its shared part, and ``order``, the same in order.
        wanted: ids of all leaves that want a gradient.
        retain: whether the parts are kept.
    """

    def __init__(self, graph: Graph, common: set[Node], order: Sequence[Node], wanted: set[int], *, retain: bool):
        self._graph, self._common, self._wanted = graph, common, wanted
        self._nodes: dict[int, list[Node]] = {}
        self._retain = retain
        self._hooked: dict[Edge, bool] = {}
        for node in graph.order:
            if node not in common:
                tasks = graph.tasks[node]
                self._retain |= bool(tasks & (tasks - 1))
                for t in range(tasks.bit_length()):
                    if tasks >> t & 1:
                        self._nodes.setdefault(t, []).append(node)
        entries = {target for node in graph.order if node not in common for target, _ in self._leaving(node)}
        self._bits = {node: 1 << n for n, node in enumerate(entries)}
        self._upstream = _upstream(order, self._bits) if len(entries) > 1 else dict.fromkeys(entries, 0)

    def _leaving(self, node: Node) -> list[Edge]:
        return [(target, nr) for target, nr in node.next_functions if target is not None and target in self._common]

    def gradients(self, t: int, batch: Batch) -> dict[Edge, Tensor]:
        """Of a task's loss, at the edges where it enters the shared part, and at the leaves of its own part."""
        nodes, root = self._nodes.get(t, []), self._graph.roots[t]
        assert root is not None
        if not nodes:
            return {root: batch.start(t)[1]}
        consumers: dict[Edge, list[Node]] = {}
        for node in nodes:
            for edge in self._leaving(node):
                if self._wants(edge[0]) and node not in (known := consumers.setdefault(edge, [])):
                    known.append(node)
        tainted = self._tainted(consumers) | {edge for edge in consumers if self._is_hooked(edge)}
        targets = [(node, 0) for node in nodes if leaf(node) is not None and self._wants(node)]
        targets += [edge for edge in consumers if edge not in tainted]
        last = dict.fromkeys(user for edge in tainted for user in consumers[edge])
        watched = [(user, nr) for user in last for nr in range(len(user._input_metadata))]
        found = _gradients(batch, t, [*targets, *watched], retain=self._retain or bool(last))
        gradients = {edge: g for edge, g in zip(targets, found, strict=False) if g is not None}
        arriving = dict(zip(watched, found[len(targets) :], strict=True))
        for user in last:
            _add(gradients, tainted, user, [arriving[user, nr] for nr in range(len(user._input_metadata))])
        return gradients

    def _is_hooked(self, edge: Edge) -> bool:
        """Whether a hook changes gradients that arrive there: as one is asked for, and again as the shared part is
        passed. Nothing tells but a try."""
        if edge not in self._hooked:
            metadata = edge[0]._input_metadata[edge[1]]
            probe = torch.ones(metadata.shape, dtype=metadata.dtype, device=metadata.device)
            point = GradientEdge(*edge)
            (arrived,) = torch.autograd.grad(point, [point], probe, retain_graph=True)  # pyright: ignore
            self._hooked[edge] = leaf(edge[0]) is None and arrived is not probe
        return self._hooked[edge]

    def _wants(self, node: Node) -> bool:
        p = leaf(node)
        return p is None or id(p) in self._wanted

    def _tainted(self, edges: Iterable[Edge]) -> set[Edge]:
        """The edges that gradients from others of them flow into: a backward to both would pass the shared part."""
        edges = list(edges)
        entered = 0
        for node, _ in edges:
            entered |= self._bits[node]
        return {edge for edge in edges if self._upstream[edge[0]] & entered}


def _upstream(order: Sequence[Node], bits: Mapping[Node, int]) -> dict[Node, int]:
    """By node of the shared part, the bits of those above it."""
    upstream = dict.fromkeys(order, 0)
    for node in order:
        passed = upstream[node] | bits.get(node, 0)
        for target, _ in node.next_functions:
            if target is not None:
                upstream[target] |= passed
    return upstream


def _gradients(batch: Batch, task: int, targets: Sequence[Edge], *, retain: bool) -> list[Tensor | None]:
    if not targets:
        return []
    inputs = [GradientEdge(*edge) if (p := leaf(edge[0])) is None else p for edge in targets]
    return [None if g is None else g.to_dense() for g in batch.gradients(task, inputs, retain=retain)]


def _add(gradients: dict[Edge, Tensor], wanted: set[Edge], user: Node, arriving: Sequence[Tensor | None]) -> None:
    """Adds what a node makes of the gradients that arrive at it, where that is wanted."""
    passed = user(*arriving)  # pyright: ignore[reportCallIssue]
    passed = passed if isinstance(passed, tuple) else (passed,)
    for (node, nr), g in zip(user.next_functions, passed, strict=True):
        if node is not None and g is not None and (edge := (node, nr)) in wanted:
            gradients[edge] = gradients[edge] + g if edge in gradients else g
