"""Every task's own part of the graph differentiated, down to where it joins the part that several tasks share.

Heads are passed once, all in one pass, whatever happens below: what is left of a batch is the shared part of the graph,
the edges at which gradients enter it, and a gradient a task at each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradsurgery import kernels
from gradsurgery.engines.engine import Batch, flat, into_grad, spread, write_own
from gradsurgery.engines.stacks import Stacks
from gradsurgery.graph import Edge, Graph, spread_bits, survey


@dataclass(frozen=True)
class Cut:
    """A batch, its own parts differentiated. K of its T tasks are present.

    Attributes:
        batch: that.
        T: tasks.
        present: positions of the K present ones.
        trunk: the shared part of the graph.
        edges: where gradients enter it.
        seeds: at each edge, the gradients (K, *shape) that enter there.
        own: by task (T), the gradients of parameters that are not shared, from its own part.
        direct: the gradients (K, *shape) of shared parameters, as far as they come from the tasks' own parts.
        foreign: parameters in the shared part that are not to be operated on.
        stacks: what ``seeds`` and ``direct`` are memory of.
    """

    batch: Batch
    T: int
    present: list[int]
    trunk: Graph
    edges: list[GradientEdge]
    seeds: list[Tensor]
    own: list[dict[Tensor, Tensor]]
    direct: dict[Tensor, Tensor]
    foreign: list[Tensor]
    stacks: Stacks

    def pull(self, direct: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], *, retain: bool) -> None:
        """One ordinary backward through the shared part, into ``.grad`` of ``inputs``.

        Args:
            direct: what becomes of gradients (K, *shape), (*shape).
            inputs: leaves; those that it does not reach are left alone.
            retain: whether the graph is wanted once more.
        """
        seeds = [direct(seed) for seed in self.seeds]
        besides = {p: direct(self.direct[p]) for p in inputs if p in self.direct}
        into_grad(self.batch, self.edges, seeds, inputs, retain=retain, besides=besides)

    def passed(self) -> set[Edge]:
        """Of the edges where gradients enter, those that gradients from others of them flow into."""
        return _tainted(self.trunk, [(edge.node, edge.output_nr) for edge in self.edges])

    def weighted(self, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """Gradients (K, *shape) -> their weighted sum, for weights (T,)."""
        w = torch.stack([weights[t] for t in self.present])
        return lambda rows: kernels.combine_block(w, flat(rows)).reshape(rows.shape[1:])

    def by_columns(self, columns: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Gradients (K, *shape) -> what a rule for columns (T, n) makes of them."""
        return lambda rows: columns(spread(flat(rows), self.present, self.T)).reshape(rows.shape[1:])

    def write_heads(self, head_weights: Tensor | None) -> None:
        """The task-specific parameters' gradients into ``.grad``, weighted (T,) or raw; the graph outlives it."""
        write_own(self.own, head_weights, self.batch.ranks, self.batch.task_specific)
        if self.foreign:
            ones = torch.ones(self.T, device=self.foreign[0].device)
            self.pull(self.weighted(ones if head_weights is None else head_weights), self.foreign, retain=True)


def cut(batch: Batch, graph: Graph | None = None, at: Sequence[Edge] | None = None) -> Cut:
    """Differentiates the tasks' own parts.

    Args:
        batch: whose ``retain`` is about these parts; the shared part is left as it is.
        graph: of the losses, if it has been surveyed.
        at: edges where the shared part begins; None: at the nodes that more than one loss reaches.
    """
    losses, shared = batch.losses, batch.layout.params
    graph = survey(losses.outputs) if graph is None else graph
    common = common_part(graph) if at is None else graph.below(node for node, _ in at)
    trunk = graph.within(common)
    operated, wanted = {id(p) for p in shared}, {id(p) for p in (*shared, *batch.task_specific)}
    row = {t: k for k, t in enumerate(losses.here)}
    stacks = Stacks(len(row), batch.layout.spare)
    own: list[dict[Tensor, Tensor]] = [{} for _ in losses.tasks]
    for (t, edge), g in _Heads(batch, graph, trunk, wanted, stacks, row).gradients().items():
        p = graph.leaves[edge[0]]
        if id(p) in operated:
            stacks.add(row[t], edge, g)
        else:
            # What passes a node may be memory of the graph, or of another gradient.
            own[t][p] = g.clone()
    entering: dict[Edge, Tensor] = {}
    direct: dict[Tensor, Tensor] = {}
    for edge, rows in stacks.whole().items():
        p = graph.leaves.get(edge[0])
        if p is None:
            entering[edge] = rows
        elif id(p) in operated:
            direct[p] = rows
        else:
            for t in losses.here:
                if row[t] in stacks.there(edge):
                    own[t][p] = rows[row[t]].clone()
    return Cut(
        batch,
        len(losses.tasks),
        losses.here,
        trunk,
        [GradientEdge(*edge) for edge in entering],
        list(entering.values()),
        own,
        direct,
        [p for p in trunk.leaves.values() if id(p) in wanted and id(p) not in operated],
        stacks,
    )


def common_part(graph: Graph) -> set[Node]:
    """The nodes that more than one loss reaches."""
    return {node for node, tasks in graph.tasks.items() if tasks & (tasks - 1)}


class _Heads:
    """The tasks' own parts of a graph.

    Args:
        batch: whose losses they are.
        graph: of all losses.
        trunk: its shared part.
        wanted: ids of all leaves that want a gradient.
        stacks: for gradients that enter the shared part.
        row: where a task's are there.
    """

    def __init__(
        self, batch: Batch, graph: Graph, trunk: Graph, wanted: set[int], stacks: Stacks, row: Mapping[int, int]
    ):
        self._batch, self._graph, self._trunk, self._wanted = batch, graph, trunk, wanted
        self._stacks, self._row = stacks, row
        self._nodes = [node for node in graph.next if node not in trunk.next]
        # Where the shared part begins is up to the user, several tasks may pass a node before it.
        self._apart = all(not graph.tasks[node] & (graph.tasks[node] - 1) for node in self._nodes)
        self._users: dict[Edge, list[Node]] = {}
        for node in self._nodes:
            for edge in dict.fromkeys(graph.next[node]):
                if edge[0] in trunk.next and self._wants(edge[0]):
                    self._users.setdefault(edge, []).append(node)
        self._tainted = _tainted(trunk, self._users)
        if any(graph.leaves[node]._backward_hooks for node, _ in self._users if node in graph.leaves):
            raise ValueError(
                "A parameter that tasks use by themselves as well as together has a hook, which would see its gradient "
                "in parts. Use engine='sequential'."
            )

    def _wants(self, node: Node) -> bool:
        p = self._graph.leaves.get(node)
        return p is None or id(p) in self._wanted

    def gradients(self) -> dict[tuple[int, Edge], Tensor]:
        """By task, at the leaves of its own part; what enters the shared part is added to the stacks."""
        found: dict[tuple[int, Edge], Tensor] = {}
        started = []
        for t in self._batch.losses.here:
            root = self._graph.roots[t]
            assert root is not None
            if root[0] in self._trunk.next:
                self._stacks.add(self._row[t], root, self._batch.start(t)[1])
            else:
                started.append(t)
        for tasks in [started] if self._apart else [[t] for t in started]:
            self._pass(tasks, found)
        return found

    def _pass(self, tasks: Sequence[int], found: dict[tuple[int, Edge], Tensor]) -> None:
        """One backward of some tasks' losses; what each adds at an edge is seen as it leaves that task's own part."""
        passing = _Passing(self._graph.tasks, sum(1 << t for t in tasks), self._stacks, self._row)
        nodes = [node for node in self._nodes if passing.concerns(node)]
        users = {edge: [user for user in users if passing.concerns(user)] for edge, users in self._users.items()}
        leaves = [(node, 0) for node in nodes if node in self._graph.leaves and self._wants(node)]
        ends = [edge for edge in users if users[edge] and edge not in self._tainted]
        last = dict.fromkeys(user for edge in self._tainted for user in users[edge])
        arriving = [(user, nr) for user in last for nr in range(len(user._input_metadata))]
        with passing.watched(dict.fromkeys(u for end in ends for u in users[end]), ends, last) as came:
            gradients = self._differentiate(tasks, [*leaves, *ends, *arriving], retain=bool(last))
        for edge, g in zip(leaves, gradients, strict=False):
            if g is not None:
                found[passing.task_of(edge[0]), edge] = g
        at = dict(zip(arriving, gradients[len(leaves) + len(ends) :], strict=True))
        for user in last:
            ended = [at[user, nr] for nr in range(len(user._input_metadata))]
            passing.add(user, _apply(user, came.get(user, ended)), self._tainted)

    def _differentiate(self, tasks: Sequence[int], targets: Sequence[Edge], *, retain: bool) -> list[Tensor | None]:
        if not targets:
            return []
        leaves = self._graph.leaves
        inputs = [leaves[edge[0]] if edge[0] in leaves else GradientEdge(*edge) for edge in targets]
        outputs, seeds = zip(*(self._batch.start(t) for t in tasks), strict=True)
        kept = retain or self._batch.retain or not self._apart
        found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=kept, allow_unused=True)  # pyright: ignore
        return [None if g is None else g.to_dense() for g in found]


class _Passing:
    """What leaves tasks' own parts in one backward.

    Args:
        tasks: of every node, by bits.
        mask: those that the backward is of.
        stacks: what is added to.
        row: where a task's gradients are there.
    """

    def __init__(self, tasks: Mapping[Node, int], mask: int, stacks: Stacks, row: Mapping[int, int]):
        self._tasks, self._mask, self._stacks, self._row = tasks, mask, stacks, row

    def concerns(self, node: Node) -> bool:
        """Whether one of the tasks reaches it."""
        return bool(self._tasks[node] & self._mask)

    def task_of(self, node: Node) -> int:
        """The one that does."""
        return (self._tasks[node] & self._mask).bit_length() - 1

    def add(self, user: Node, passed: Sequence[Tensor | None], edges: Iterable[Edge]) -> None:
        """Adds what a node passes on, where it goes to one of these edges."""
        wanted, k = set(edges), self._row[self.task_of(user)]
        for (target, nr), g in zip(user.next_functions, passed, strict=True):
            if target is not None and g is not None and (target, nr) in wanted:
                self._stacks.add(k, (target, nr), g)

    @contextlib.contextmanager
    def watched(
        self, users: Iterable[Node], ends: Sequence[Edge], last: Iterable[Node]
    ) -> Iterator[dict[Node, Sequence[Tensor | None]]]:
        """Inside, what ``users`` pass on to ``ends`` is added. Of ``last`` it yields what arrives after the user's
        hooks, of those that are passed; where the pass ends, that is what it returns."""
        came: dict[Node, Sequence[Tensor | None]] = {}

        def watch(user: Node) -> Callable[[Sequence[Tensor | None], Any], None]:
            return lambda passed, _: self.add(user, passed, ends)

        def note(user: Node) -> Callable[[Sequence[Tensor | None]], None]:
            return lambda arriving: came.update({user: arriving})

        handles = [user.register_hook(watch(user)) for user in users]
        handles += [user.register_prehook(note(user)) for user in last]
        try:
            yield came
        finally:
            for handle in handles:
                handle.remove()


def _apply(node: Node, arriving: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What a node passes on. A pass has no graph of it, and fits it to where it goes; and so must this call."""
    with torch.no_grad():
        passed: Any = node(*arriving)  # pyright: ignore[reportCallIssue]
        passed = passed if isinstance(passed, tuple) else (passed,)
        return tuple(_fit(g, *edge) for g, edge in zip(passed, node.next_functions, strict=True))


def _fit(gradient: Tensor | None, target: Node | None, nr: int) -> Tensor | None:
    """Summed where the node broadcast, and in the dtype of what it belongs to."""
    if gradient is None or target is None:
        return None
    wanted = target._input_metadata[nr]
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient.to(wanted.dtype)


def _tainted(trunk: Graph, entries: Iterable[Edge]) -> set[Edge]:
    """Of the edges where gradients enter, those that gradients from others of them flow into: a backward to both would
    pass what lies between."""
    entries = list(entries)
    nodes = list(dict.fromkeys(node for node, _ in entries))
    if len(nodes) < 2:
        return set()
    above = dict.fromkeys(trunk.next, 0)
    for n, node in enumerate(nodes):
        above[node] = 1 << n
    spread_bits(trunk.next, above)
    return {(node, nr) for node, nr in entries if above[node] & (above[node] - 1)}
