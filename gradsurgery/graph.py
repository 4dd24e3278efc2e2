"""The graph of a batch's losses: what each task has to itself, and where that joins what several share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradsurgery.losses import Output, accumulates

# A node, and which of its outputs the gradient flows into.
Edge = tuple[Node, int]


@dataclass(frozen=True)
class Graph:
    """A graph of losses, or a part of it that gradients do not leave.

    Attributes:
        next: by node, where it passes gradients on to. The nodes are in order: each before those.
        leaves: the leaf tensors that some of the nodes stand for.
        tasks: of every node, the tasks whose losses reach it: bit t for task t.
        roots: where each task's gradient starts; None for an absent task.
    """

    next: dict[Node, list[Edge]]
    leaves: dict[Node, Tensor]
    tasks: dict[Node, int]
    roots: Sequence[Edge | None]

    def below(self, starts: Iterable[Node]) -> set[Node]:
        """The nodes that gradients at ``starts`` flow through, these among them."""
        found = set(starts)
        for node, edges in self.next.items():
            if node in found:
                found.update(target for target, _ in edges)
        return found

    def within(self, nodes: set[Node]) -> "Graph":
        """The part that consists of these nodes."""
        return Graph(
            {node: edges for node, edges in self.next.items() if node in nodes},
            {node: leaf for node, leaf in self.leaves.items() if node in nodes},
            self.tasks,
            self.roots,
        )


def survey(outputs: Sequence[Output | None]) -> Graph:
    """Walks the graphs of all losses at once, each node a single time."""
    roots = [None if output is None else _edge(output) for output in outputs]
    after = _sorted(root[0] for root in roots if root is not None)
    # Of all nodes, a leaf's alone passes nothing on.
    leaves = {node: node.variable for node, edges in after.items() if not edges and accumulates(node)}  # pyright: ignore
    tasks = dict.fromkeys(after, 0)
    for t, root in enumerate(roots):
        if root is not None:
            tasks[root[0]] |= 1 << t
    spread_bits(after, tasks)
    return Graph(after, leaves, tasks, roots)


def spread_bits(after: Mapping[Node, Sequence[Edge]], bits: dict[Node, int]) -> None:
    """Hands every node's bits on to all nodes after it."""
    for node, edges in after.items():
        mine = bits[node]
        if mine:
            for target, _ in edges:
                bits[target] |= mine


def _edge(output: Output) -> Edge:
    edge = output if isinstance(output, GradientEdge) else get_gradient_edge(output)
    return edge.node, edge.output_nr


def _sorted(roots: Iterable[Node]) -> dict[Node, list[Edge]]:
    """Topologically, from the roots on; each node with the edges that lead out of it."""
    after: dict[Node, list[Edge]] = {}
    done: list[Node] = []
    for root in roots:
        if root in after:
            continue
        stack = [(root, iter(_open(root, after)))]
        while stack:
            node, edges = stack[-1]
            for target, _ in edges:
                if target not in after:
                    stack.append((target, iter(_open(target, after))))
                    break
            else:
                done.append(node)
                stack.pop()
    return {node: after[node] for node in reversed(done)}


def _open(node: Node, after: dict[Node, list[Edge]]) -> list[Edge]:
    after[node] = [(target, nr) for target, nr in node.next_functions if target is not None]
    return after[node]
