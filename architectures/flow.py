"""The data flow of an architecture as its modules run: which part feeds which, and which task a part belongs to."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradsurgery.architectures.architecture import Architecture
from gradsurgery.architectures.dselect_k import SelectorGate
from gradsurgery.architectures.gates import Gate
from gradsurgery.architectures.positions import PerPosition

INPUT = "x"
# Parts that are drawn whole; other modules of the zoo are looked into.
WHOLE = (Gate, SelectorGate, PerPosition)
PLURALS = {
    "decoders": "decoder", "experts": "expert", "fusions": "fusion", "gates": "gate", "layers": "", "levels": "level",
    "masks": "mask", "networks": "network", "skips": "skip", "stages": "stage", "task_experts": "expert",
}  # fmt: skip
# Okabe and Ito's palette, lightened; the first is of what tasks share.
COLOURS = ("#e8e8e8", "#a6d8f5", "#f9d59b", "#9fe0c6", "#f0b6d3", "#f5eea0")


@dataclass(frozen=True)
class Flow:
    """A directed graph of parts.

    Attributes:
        parts: name -> the task that alone reaches it, or None; the input and the predictions among them.
        edges: (from, to).
    """

    parts: dict[str, str | None]
    edges: frozenset[tuple[str, str]]

    def depths(self) -> dict[str, int]:
        """Of each part, the longest way to it from where nothing feeds it."""
        before: dict[str, list[str]] = {part: [a for a, b in self.edges if b == part] for part in self.parts}
        found: dict[str, int] = {}

        def depth(part: str) -> int:
            if part not in found:
                found[part] = 0
                found[part] = max((1 + depth(a) for a in before[part]), default=0)
            return found[part]

        return {part: depth(part) for part in self.parts}


def data_flow(model: Architecture, x: Tensor) -> Flow:
    """What happens to an input, seen in the graph of one forward pass of a copy, in the model's mode.

    Args:
        x: a batch, floating, of any size that the model takes.
    """
    model, x = copy.deepcopy(model), x.detach().requires_grad_()
    with torch.enable_grad():
        runs, outputs = _runs(model, x)
    owner: dict[Any, str] = {_node(x): INPUT}
    for name, _, produced in runs:
        owner |= {node: name for y in produced if (node := _node(y)) is not None}
    fed = [(name, y) for name, given, _ in runs for y in given] + list(outputs.items())
    edges = frozenset((before, name) for name, y in fed for before in _sources(y, owner) if before != name)
    tasks = {id(p): task for task in model.tasks for p in model.task_parameters(task)}
    modules = dict(model.named_modules())
    parts: dict[str, str | None] = {INPUT: None}
    for name, _, _ in runs:
        owners = {tasks.get(id(p)) for p in modules[name].parameters()}
        parts[name] = owners.pop() if len(owners) == 1 else None
    return Flow(parts | {task: task for task in outputs}, edges)


Run = tuple[str, list[Tensor], list[Tensor]]


def _runs(model: Architecture, x: Tensor) -> tuple[list[Run], dict[str, Tensor]]:
    """Outermost parts as they ran (name, what each was given, what it made of it), and the predictions."""
    found: list[Run] = []
    inside: list[str] = []
    handles = []
    for name, module in model.named_modules():
        ours = type(module).__module__.startswith(__package__ or "") and not isinstance(module, WHOLE)
        if ours or isinstance(module, nn.Identity):
            continue

        def enter(_module: nn.Module, _given: Any, name: str = name) -> None:
            inside.append(name)

        def leave(_module: nn.Module, given: Any, produced: Any, name: str = name) -> None:
            inside.pop()
            if not inside:
                found.append((name, list(_tensors(given)), list(_tensors(produced))))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        return found, model(x)
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Sequence | Mapping):
        for inner in nested.values() if isinstance(nested, Mapping) else nested:
            yield from _tensors(inner)


def _node(y: Tensor) -> Any:
    """Where a tensor's gradient goes; None: nowhere."""
    return get_gradient_edge(y).node if y.requires_grad else None


def _sources(y: Tensor, owner: Mapping[Any, str]) -> set[str]:
    """The parts whose outputs a tensor was made of, with nothing but bare operators between."""
    found, seen = set[str](), set[Any]()
    ahead = [_node(y)]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in owner:
            found.add(owner[node])
        else:
            ahead.extend(target for target, _ in node.next_functions)
    return found


def label(name: str) -> str:
    """A module's path in words: ``networks.0.stages.1`` is "network 0 stage 1"."""
    words = [PLURALS.get(word, word.replace("_", " ")) for word in name.split(".")]
    pairs = pairwise(["", *words])
    kept = [w for before, w in pairs if w not in ("", "encoder", "net") and (w != before or w.isdigit())]
    return " ".join(kept).replace("expert stem", "stem") or name


def draw_flow(model: Architecture, x: Tensor, path: str | Path) -> Path:
    """A picture: the input to the left, predictions to the right, a part in its task's colour, or grey if shared.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    flow = data_flow(model, x)
    place = _placed(flow)
    width, height = (1 + max(axis) for axis in zip(*place.values(), strict=True))
    figure = Figure(figsize=(0.4 + 1.75 * width, 0.4 + 0.52 * height), layout="constrained")
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(-0.6, height - 0.4))
    colour = dict(zip((None, *model.tasks), COLOURS, strict=False))
    for a, b in sorted(flow.edges):
        (x0, y0), (x1, y1) = place[a], place[b]
        # One that passes other columns goes round what lies on its way.
        bend = "arc3,rad=-0.25" if x1 - x0 > 1 else "arc3"
        arrow = {"arrowstyle": "-|>", "color": "0.45", "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "connectionstyle": bend}
        axes.annotate("", (x1 - 0.4, y1), (x0 + 0.4, y0), arrowprops=arrow)
    for part, (column, row) in place.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": colour.get(flow.parts[part], "white"), "edgecolor": "0.4"}
        text = part if part in (INPUT, *model.tasks) else label(part)
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, bbox=box)
    figure.savefig(path, dpi=130)
    return Path(path)


def _placed(flow: Flow) -> dict[str, tuple[float, float]]:
    """(column, row) of every part: by depth, and within a column near what feeds it."""
    columns: dict[int, list[str]] = {}
    for part, depth in flow.depths().items():
        columns.setdefault(depth, []).append(part)
    tallest = max(map(len, columns.values()))
    place: dict[str, tuple[float, float]] = {}
    for depth in sorted(columns):
        before = {part: [place[a][1] for a, b in flow.edges if b == part and a in place] for part in columns[depth]}
        ordered = sorted(columns[depth], key=lambda part: -_mean(before[part]))
        gap = tallest / len(ordered)
        for i, part in enumerate(ordered):
            place[part] = (float(depth), tallest - 0.5 - (i + 0.5) * gap)
    return place


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
