"""Reading what a loop hands over: a sequence, mapping or vector of losses, some of which may be absent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Output: TypeAlias = Tensor | GradientEdge


class Absent:
    """In the place of a loss that this batch can't have, where its outputs are there nonetheless.

    As None, but for ranks under `torch.distributed.fsdp.fully_shard`: every one of them must then take part in every
    backward pass, and one that lacks a task passes its outputs with a gradient of zero. The task's loss is the mean
    over the ranks that have it.

        losses = [criterion(out, y) if y is not None else Absent(out) for out, y in zip(model(x), labels)]

    Args:
        *outputs: what the loss would have been computed from, in any shape.

    Raises:
        TypeError: no outputs, or one that is no tensor.
    """

    def __init__(self, *outputs: Tensor):
        if not outputs or not all(isinstance(output, Tensor) for output in outputs):
            raise TypeError("Absent stands for a loss of some outputs: pass those, as tensors with their graph.")
        self._outputs = outputs

    @property
    def has_graph(self) -> bool:
        """Whether there is anything to pass."""
        return any(output.requires_grad for output in self._outputs)

    def loss(self) -> Tensor:
        """Zero (), with a graph through the outputs."""
        with torch.enable_grad():
            terms = [(output * 0).sum() for output in self._outputs]
            return torch.stack([term.to(terms[0].dtype) for term in terms]).sum()


Loss: TypeAlias = Tensor | Absent | None
Losses: TypeAlias = Sequence[Loss] | Mapping[str, Loss] | Tensor


@dataclass(frozen=True)
class TaskLosses:
    """The losses of one batch, or of this process's part of it.

    Attributes:
        tasks: names of all T tasks, in the order of their axes.
        outputs: what to differentiate, a task; None where it is absent here.
        values: (T,) float64, detached, of the whole batch; NaN where a task is absent from it.
        share: (T,) float64, of this process's losses in those of the whole batch; None where it has the whole.
        elsewhere: positions of the tasks that only other processes have.
        stand_ins: what was given for absent tasks, by position.
    """

    tasks: tuple[str, ...]
    outputs: tuple[Output | None, ...]
    values: Tensor
    share: Tensor | None = None
    elsewhere: frozenset[int] = frozenset()
    stand_ins: Mapping[int, Absent] = field(default_factory=dict)

    @property
    def here(self) -> list[int]:
        """Positions of the tasks that there is something to differentiate of."""
        return [t for t, output in enumerate(self.outputs) if output is not None]

    @property
    def present(self) -> list[int]:
        """Positions of the tasks in the whole batch."""
        return sorted({*self.here, *self.elsewhere}) if self.elsewhere else self.here


def read_losses(
    losses: Losses, tasks: tuple[str, ...] | None, *, graph: bool = True, device: torch.device | None = None
) -> TaskLosses:
    """Checks losses and lines them up with the tasks known so far.

    Args:
        losses: T scalars: a sequence or mapping (None, `Absent` or a missing key for an absent task), or a vector (T,).
        tasks: names from an earlier batch, or None at the first.
        graph: whether the losses are to be differentiated, and must have a graph.
        device: of the values, where every task may be absent; None: one must be there.

    Raises:
        TypeError: not one of those forms, or an entry is no tensor.
        ValueError: no losses, a loss that is not scalar, not floating, without a graph or on another device, or tasks
            other than those known.
    """
    entries: Mapping[str, Loss] = {}
    if isinstance(losses, Mapping):
        entries = {str(name): loss for name, loss in losses.items()}
        if len(entries) < len(losses):
            raise ValueError(f"Task names must differ as text; got {list(losses)}.")
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        entries = {str(t): loss for t, loss in enumerate(losses)}
    elif not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a sequence, a mapping or a 1-D tensor of losses; got {type(losses).__name__}.")
    checked = {name: _check(name, loss, graph) for name, loss in entries.items()}
    given = _from_vector(losses, graph) if isinstance(losses, Tensor) else checked
    if not given:
        raise ValueError("No losses: pass one scalar loss a task.")
    known = tuple(given) if tasks is None else _match(given, tasks, by_name=isinstance(losses, Mapping))
    outputs = tuple(given.get(name) for name in known)
    stand_ins = {t: entry for t, name in enumerate(known) if isinstance(entry := entries.get(name), Absent)}
    if device is not None and all(output is None for output in outputs):
        values = torch.full((len(known),), torch.nan, dtype=torch.float64, device=device)
    else:
        _check_devices(known, outputs)
        values = losses.detach().double() if isinstance(losses, Tensor) else _values(outputs)
    return TaskLosses(known, outputs, values, stand_ins=stand_ins)


def _from_vector(losses: Tensor, graph: bool) -> dict[str, Output]:
    """A vector's entries. What `torch.stack` joined is taken apart again, since a gradient that passes through the
    joint sends zeros down every other task's head (and 0 * inf = NaN with them)."""
    if losses.ndim != 1:
        raise ValueError(
            f"losses is one tensor of shape {tuple(losses.shape)}; surgery needs a loss a task: pass a list or dict of "
            "scalar losses, or a 1-D tensor."
        )
    with torch.enable_grad():
        checked = {str(t): _check(f"{t}", loss, graph) for t, loss in enumerate(losses.unbind())}
    node = losses.grad_fn
    # Hooks on the joint are the user's, and must see what passes.
    if node is None or node.name() != "StackBackward0" or losses._backward_hooks or losses.retains_grad:
        return checked  # pyright: ignore[reportReturnType]
    edges = [GradientEdge(parent, nr) for parent, nr in node.next_functions if parent is not None]
    if len(edges) != len(losses) or any(accumulates(edge.node) for edge in edges):
        return checked  # pyright: ignore[reportReturnType]
    return dict(zip(checked, edges, strict=True))


def node_of(output: Output | None) -> Node | None:
    """Where a loss's graph begins; None for an absent loss or a leaf."""
    if isinstance(output, GradientEdge):
        return output.node
    return None if output is None else output.grad_fn


def accumulates(node: Node) -> bool:
    """Whether the node stands for a leaf. Its full name differs from compiler to compiler."""
    return node.name().endswith("AccumulateGrad")


def _check(name: str, loss: Loss, graph: bool) -> Tensor | None:
    if loss is None:
        return None
    if isinstance(loss, Absent):
        if graph and not loss.has_graph:
            raise ValueError(
                f"The outputs that stand in for task {name!r} have no graph: pass Absent what the model returned."
            )
        return None
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss of task {name!r} is a {type(loss).__name__}; pass the tensor, with its graph.")
    if loss.numel() != 1:
        raise ValueError(
            f"The loss of task {name!r} has shape {tuple(loss.shape)}; reduce it to a scalar, e.g. by .mean()."
        )
    if not loss.is_floating_point():
        raise ValueError(f"The loss of task {name!r} has dtype {loss.dtype}; a loss must be a real floating number.")
    if graph and not loss.requires_grad:
        raise ValueError(
            f"The loss of task {name!r} has no graph (requires_grad is False): it was detached, computed under "
            "torch.no_grad(), or depends on no parameter. Pass None if the task is absent from this batch."
        )
    return loss


def _match(given: Mapping[str, Output | None], tasks: tuple[str, ...], *, by_name: bool) -> tuple[str, ...]:
    unknown = [name for name in given if name not in tasks]
    if unknown or (not by_name and len(given) != len(tasks)):
        raise ValueError(
            f"The tasks of this optimizer are {list(tasks)}, as its first losses (or its checkpoint) named them; now "
            f"it got {list(given)}. Pass None for a task that is absent, or make a new MTLOptimizer for other tasks."
        )
    return tasks


def _check_devices(tasks: tuple[str, ...], outputs: tuple[Output | None, ...]) -> None:
    devices = {name: o.device for name, o in zip(tasks, outputs, strict=True) if isinstance(o, Tensor)}
    if all(output is None for output in outputs):
        raise ValueError(f"Every task ({', '.join(tasks)}) is absent from this batch; skip the step instead.")
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name!r} on {device}" for name, device in devices.items())
        raise ValueError(f"The losses sit on different devices ({where}); move them to one with .to(device).")


@torch.no_grad()
def _values(outputs: tuple[Output | None, ...]) -> Tensor:
    tensors = [o for o in outputs if isinstance(o, Tensor)]
    if len(tensors) == len(outputs) and all(not o.ndim and o.dtype == tensors[0].dtype for o in tensors):
        return torch.stack(tensors).double()
    absent = torch.full((), torch.nan, dtype=torch.float64, device=tensors[0].device)
    return torch.stack([o.double().reshape(()) if isinstance(o, Tensor) else absent for o in outputs])
