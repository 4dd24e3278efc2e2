"""The graph of a batch's losses: what each task has to itself, and where that joins what several share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradsurgery.losses import Output, accumulates

# A node, and which of its outputs the gradient flows into.
Edge = tuple[Node, int]


@dataclass(frozen=True)
class Graph:
    """Attributes:
    order: every node, before those that it passes gradients on to.
    tasks: of every node, the tasks whose losses reach it: bit t for task t.
    roots: where each task's gradient starts; None for an absent task.
    """

    order: list[Node]
    tasks: dict[Node, int]
    roots: list[Edge | None]


def survey(outputs: Sequence[Output | None]) -> Graph:
    """Walks the graphs of all losses at once, each node a single time."""
    roots = [_root(output) for output in outputs]
    order = _sorted(root[0] for root in roots if root is not None)
    tasks = dict.fromkeys(order, 0)
    for t, root in enumerate(roots):
        if root is not None:
            tasks[root[0]] |= 1 << t
    for node in order:
        reached = tasks[node]
        for target, _ in node.next_functions:
            if target is not None:
                tasks[target] |= reached
    return Graph(order, tasks, roots)


def _root(output: Output | None) -> Edge | None:
    if output is None:
        return None
    edge = output if isinstance(output, GradientEdge) else get_gradient_edge(output)
    return edge.node, edge.output_nr


def _sorted(roots: Iterable[Node]) -> list[Node]:
    """Topologically, from the roots on."""
    done: list[Node] = []
    seen: set[Node] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(root.next_functions))]
        while stack:
            node, targets = stack[-1]
            for target, _ in targets:
                if target is not None and target not in seen:
                    seen.add(target)
                    stack.append((target, iter(target.next_functions)))
                    break
            else:
                done.append(node)
                stack.pop()
    return done[::-1]


def below(order: Sequence[Node], starts: Iterable[Node]) -> set[Node]:
    """The nodes that gradients at ``starts`` flow through, these among them."""
    found = set(starts)
    for node in order:
        if node in found:
            found.update(target for target, _ in node.next_functions if target is not None)
    return found


def above(order: Sequence[Node], targets: Iterable[Node]) -> set[Node]:
    """The nodes whose gradients flow into ``targets``, these left out where nothing of theirs does."""
    goals, found = set(targets), set[Node]()
    for node in reversed(order):
        if any(target in goals or target in found for target, _ in node.next_functions):
            found.add(node)
    return found


def leaf(node: Node) -> Tensor | None:
    """The leaf tensor that the node stands for, if it does."""
    return node.variable if accumulates(node) else None  # pyright: ignore[reportAttributeAccessIssue]
