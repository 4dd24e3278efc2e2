"""Any network of named layers, some of whose outputs are tasks: torchMTL's description, a list of dicts.

Bock, "torchMTL: A lightweight module for Multi-Task Learning in pytorch", 2020, https://doi.org/10.5281/zenodo.4362515.
Its lists load unchanged, and `MTLModel` gives what its model gives. A graph that could not run is refused when it is
made; only what outputs depend on is run, and nothing is kept of it. ``'auto'`` weights are those of uncertainty
weighting (Kendall, Gal, Cipolla, CVPR 2018), since a bare learned factor of a loss makes away with it: the weight w is
positive, and `w L` comes with the term `-log(w)` that gives w its optimum at 1 / L.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task

if TYPE_CHECKING:
    import networkx as nx

ROOT = "root"
"""the graph's input"""
KEYS = ("name", "layers", "anchor_layer", "loss", "loss_weight", "loss_init_val")


@final
class TaskGraph(Architecture):
    """Layers by name, each fed by others or by the input.

    A mapping is one input: with an input for each task, pass `PerTask({task: input})`.

    Args:
        layers: a dict a layer: ``name``; ``layers``, a module or a function; ``anchor_layer``, the name of the layer
            that feeds it, or several, for as many positional arguments (none, None or "root": the input); ``loss``, a
            function of output and target; ``loss_weight``, a number, or ``"auto"`` for a learned one; and
            ``loss_init_val``, where that starts, above 0.
        outputs: names of layers whose outputs are the tasks, in order.

    Raises:
        ValueError: a key or a name that is unknown or missing or there twice, layers that feed each other in a circle,
            a weight that is none.

    >>> layers = [
    ...     {"name": "trunk", "layers": nn.Linear(4, 8)},
    ...     {"name": "a", "layers": nn.Linear(8, 1), "anchor_layer": "trunk", "loss": nn.MSELoss(), "loss_weight": 1.0},
    ...     {"name": "b", "layers": nn.Linear(8, 2), "anchor_layer": "trunk"},
    ... ]
    >>> {task: tuple(y.shape) for task, y in TaskGraph(layers, ["a", "b"])(torch.zeros(3, 4)).items()}
    {'a': (3, 1), 'b': (3, 2)}
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> None:
        super().__init__(outputs)
        self.takes_mappings = True
        self.parents = _checked(layers, outputs)
        self.order = tuple(TopologicalSorter(self.parents).static_order())
        self.layers = by_task({layer["name"]: _module(layer["layers"]) for layer in layers})
        losses = {layer["name"]: layer["loss"] for layer in layers if layer.get("loss") is not None}
        self.losses = nn.ModuleDict({name: _module(loss) for name, loss in losses.items()})
        weights = {layer["name"]: layer["loss_weight"] for layer in layers if layer.get("loss_weight") is not None}
        self.weights = {name: float(weight) for name, weight in weights.items() if weight != "auto"}
        starts = {layer["name"]: layer["loss_init_val"] for layer in layers if layer.get("loss_weight") == "auto"}
        self.log_weights = nn.ParameterDict({name: torch.tensor(float(w)).log() for name, w in starts.items()})
        ancestors = {task: _ancestors(task, self.parents) for task in outputs}
        self.needed = {task: tuple(name for name in self.order if name in ancestors[task]) for task in outputs}
        used = Counter(name for names in self.needed.values() for name in names)
        self.shared = tuple(name for name in self.order if used[name] > 1 and name != ROOT)

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Any]:
        """The input, and the outputs of layers that several tasks depend on."""
        names = [name for name in self.shared if any(name in self.needed[task] for task in tasks)]
        return self._run({ROOT: x}, names)

    def predict(self, z: Mapping[str, Any], task: str) -> Tensor:
        return self._run(z, [name for name in self.needed[task] if name not in z])[task]

    def task_parts(self, task: str) -> Iterable[Part]:
        own = [name for name in self.needed[task] if name not in self.shared and name != ROOT]
        parts: list[Any] = [self.layers[name] for name in own]
        parts += [self.losses[task]] if task in self.losses else []
        return parts + ([self.log_weights[task]] if task in self.log_weights else [])

    def loss_weight(self, task: str) -> float | Tensor | None:
        """Its weight, a tensor () with a graph where it is learned; None where there is none."""
        return self.log_weights[task].exp() if task in self.log_weights else self.weights.get(task)

    def loss(self, task: str) -> Callable[..., Tensor] | None:
        """Its loss, without any weight; None where there is none."""
        if task not in self.losses:
            return None
        loss: Any = self.losses[task]
        return loss.function if isinstance(loss, _Function) else loss

    def weighted_loss(self, task: str, *args: Any) -> Tensor:
        """() `w L`, and `w L - log(w)` for a learned weight w; `L` where there is none.

        Args:
            args: of the loss: output and target.

        Raises:
            ValueError: a task without a loss.
        """
        loss, weight = self.loss(task), self.loss_weight(task)
        if loss is None:
            raise ValueError(f"Layer {task!r} has no 'loss'.")
        if task in self.log_weights:
            return self.log_weights[task].exp() * loss(*args) - self.log_weights[task]
        return loss(*args) if weight is None else weight * loss(*args)

    def graph(self) -> "nx.DiGraph":
        """Layers and what feeds them; needs networkx."""
        import networkx as nx

        graph = nx.DiGraph()
        graph.add_node(ROOT)
        graph.add_nodes_from((name, {"output": name in self.tasks}) for name in self.layers)
        graph.add_edges_from((parent, name) for name, parents in self.parents.items() for parent in parents)
        return graph

    def draw(self, path: str | Path) -> Path:
        """A picture of the graph, the input to the left and outputs filled; needs networkx and matplotlib."""
        import networkx as nx
        from matplotlib.figure import Figure

        graph = self.graph()
        generations = list(nx.topological_generations(graph))
        for depth, names in enumerate(generations):
            for name in names:
                graph.nodes[name]["depth"] = depth
        place = nx.multipartite_layout(graph, subset_key="depth")
        figure = Figure(figsize=(1.8 * len(generations), 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axis("off")
        axes.margins(0.15)
        nx.draw_networkx_edges(graph, place, ax=axes, node_size=2600, edge_color="0.5")
        for name, (x, y) in place.items():
            filled = "#cfe3f5" if name in self.tasks else "white"
            box = {"boxstyle": "round,pad=0.4", "facecolor": filled, "edgecolor": "0.4"}
            axes.text(x, y, name, ha="center", va="center", bbox=box)
        figure.savefig(path, dpi=150)
        return Path(path)

    def _run(self, known: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        values = dict(known)
        for name in names:
            values[name] = self.layers[name](*(values[parent] for parent in self.parents[name]))
        return values


@final
class MTLModel(nn.Module):
    """torchMTL's model: outputs, losses and weights in the order of the tasks, for its loop.

    That multiplies the loss by the weight: what comes as the loss of a task with a learned weight is
    `TaskGraph.weighted_loss` divided by it.

    Args:
        task_layers, output_tasks: as in `TaskGraph`.
    """

    def __init__(self, task_layers: Sequence[Mapping[str, Any]], output_tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = TaskGraph(task_layers, output_tasks)
        self.task_layers, self.output_tasks = list(task_layers), list(output_tasks)

    @property
    def g(self) -> "nx.DiGraph":
        return self.tasks.graph()

    @property
    def layer_names(self) -> list[str]:
        return list(self.tasks.layers)

    @property
    def losses(self) -> dict[str, Callable[..., Tensor] | None]:
        return {name: self._loss(name) for name in self.layer_names}

    @property
    def loss_weights(self) -> dict[str, float | Tensor | None]:
        return {name: self.tasks.loss_weight(name) for name in self.layer_names}

    def forward(self, x: Any) -> tuple[list[Tensor], list[Callable[..., Tensor] | None], list[float | Tensor | None]]:
        names = self.tasks.tasks
        return list(self.tasks(x).values()), list(map(self._loss, names)), list(map(self.tasks.loss_weight, names))

    def _loss(self, task: str) -> Callable[..., Tensor] | None:
        if task not in self.tasks.log_weights:
            return self.tasks.loss(task)
        return lambda *args: self.tasks.weighted_loss(task, *args) / self.tasks.log_weights[task].exp()


@final
class Concat(nn.Module):
    """Several inputs side by side along ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)


@final
class SimpleSelect(nn.Module):
    """`x[selection_axis]`: an index or a key, whatever the name says, which is torchMTL's."""

    def __init__(self, selection_axis: Any) -> None:
        super().__init__()
        self.selection_axis = selection_axis

    def forward(self, x: Any) -> Any:
        return x[self.selection_axis]


@final
class SliceSelect(nn.Module):
    """`x[sel_slice]`."""

    def __init__(self, sel_slice: Any) -> None:
        super().__init__()
        self.sel_slice = sel_slice

    def forward(self, x: Any) -> Any:
        return x[self.sel_slice]


@final
class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _ancestors(name: str, parents: Mapping[str, Sequence[str]]) -> set[str]:
    """A layer and all that it depends on."""
    found, ahead = set[str](), [name]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(parents.get(name, ()))
    return found


def _module(function: Any) -> nn.Module:
    return function if isinstance(function, nn.Module) else _Function(function)


def _checked(layers: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By name, what feeds each layer."""
    parents: dict[str, tuple[str, ...]] = {}
    for position, layer in enumerate(layers):
        name = layer.get("name")
        where = f"Layer {name!r}" if name else f"Layer {position} (without a name)"
        if unknown := [key for key in layer if key not in KEYS]:
            raise ValueError(f"{where} has an unknown key {unknown[0]!r}{_close(unknown[0], KEYS)}.")
        if not isinstance(name, str) or not name or name == ROOT or "." in name:
            raise ValueError(f"{where} needs a name, a string without dots other than {ROOT!r}; got {name!r}.")
        if name in parents:
            raise ValueError(f"Two layers are named {name!r}: rename one.")
        if not callable(layer.get("layers")):
            raise ValueError(f"{where} needs 'layers', a module or a function; got {layer.get('layers')!r}.")
        _check_loss(layer, where)
        anchors = layer.get("anchor_layer") or (ROOT,)
        parents[name] = (anchors,) if isinstance(anchors, str) else tuple(anchors)
    for name, anchors in parents.items():
        for anchor in anchors:
            if anchor not in parents and anchor != ROOT:
                raise ValueError(f"Layer {name!r} is fed by {anchor!r}, which is no layer{_close(anchor, parents)}.")
    if not outputs or len(set(outputs)) < len(outputs):
        raise ValueError(f"outputs must name one layer at least, and none twice; got {list(outputs)}.")
    for output in outputs:
        if output not in parents:
            raise ValueError(f"Output {output!r} is no layer{_close(output, parents)}.")
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        raise ValueError(f"Layers feed each other in a circle: {' -> '.join(error.args[1])}.") from error
    return parents


def _check_loss(layer: Mapping[str, Any], where: str) -> None:
    weight, loss = layer.get("loss_weight"), layer.get("loss")
    if loss is not None and not callable(loss):
        raise ValueError(f"{where} needs a 'loss' that can be called, or none; got {loss!r}.")
    if weight == "auto":
        start = layer.get("loss_init_val")
        if not isinstance(start, int | float) or not start > 0:
            raise ValueError(f"{where} has loss_weight 'auto', and needs loss_init_val, above 0; got {start!r}.")
    elif not (weight is None or isinstance(weight, int | float)):
        raise ValueError(f"{where} needs a loss_weight that is a number, 'auto' or None; got {weight!r}.")


def _close(name: Any, known: Iterable[str]) -> str:
    names = list(known)
    found = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {found[0]!r}? There are {names}" if found else f"; there are {names}"
