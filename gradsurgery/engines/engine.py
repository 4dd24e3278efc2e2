"""The contract of an engine."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurgery.engines.layout import Layout, Piece
from gradsurgery.losses import Output, TaskLosses
from gradsurgery.stats import Needs

# What stands for the rows (T, n) of a piece of the parameters, given the task gradients (T, n) there.
RowMap = Callable[[Piece, Tensor], Tensor]


class Measurement(abc.ABC):
    """What an engine measured of one batch, or of several that were held.

    Attributes:
        engine: the name of the engine that did.
    """

    engine: str

    @abc.abstractmethod
    def gramian(self, of: RowMap | None = None) -> Tensor:
        """(B, T, T) float64 inner products of the task gradients, or of what stands for them; 0 in the rows of an
        absent task."""

    @abc.abstractmethod
    def cross_gramian(self, other: "Measurement") -> Tensor:
        """(B, T, T) float64 inner products of the task gradients with those of another batch (second task axis)."""

    @abc.abstractmethod
    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        """Accumulates into ``.grad``, as ``loss.backward()`` does.

        Args:
            weights: (B, T), of the shared parameters, or (1, T) for the same in all blocks.
            head_weights: (T,), of the task-specific parameters; None leaves their gradients raw.
            of: what the weights multiply; the task gradients if None. Called once a piece.
        """

    @abc.abstractmethod
    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        """As `write`, for a rule that works column by column; task-specific gradients stay raw.

        Args:
            columns: (T, n) columns of the task gradients -> (n,) of the direction.
        """


@dataclass(frozen=True)
class Batch:
    """What is to be differentiated.

    Attributes:
        losses: of the present tasks.
        layout: the shared parameters and their blocks.
        task_specific: the other parameters that losses may reach.
        grad_scale: () factor on every gradient (an AMP scale), or None.
        hold: whether further micro-batches are to be added.
        retain: whether the graph is wanted once more; else it is freed, at the latest as the direction is written.
    """

    losses: TaskLosses
    layout: Layout
    task_specific: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    hold: bool = False
    retain: bool = False

    def start(self, task: int) -> tuple[Output, Tensor]:
        """A task's loss, and the gradient that its backward starts from, in the loss's own shape and dtype."""
        output, value = self.losses.outputs[task], self.losses.values[task]
        assert output is not None
        return output, seed_like(torch.ones_like(value) if self.grad_scale is None else self.grad_scale, output)

    def gradients(
        self, task: int, inputs: Sequence[Tensor | GradientEdge], *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Of a task's loss with respect to each input, None where it does not reach it; the graph may outlive it."""
        output, seed = self.start(task)
        return torch.autograd.grad(output, inputs, seed, retain_graph=retain, allow_unused=True)  # pyright: ignore


class Engine(abc.ABC):
    """A road from losses to `Measurement`. It holds options, and no state of a training run.

    Attributes:
        name: what `MTLOptimizer` knows it by.
        holds: whether it keeps gradients as rows (`Rows`), which those of further micro-batches can be added to.
    """

    name: ClassVar[str]
    holds: ClassVar[bool] = True

    @abc.abstractmethod
    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        """Differentiates every present loss.

        Args:
            batch: the losses, and the parameters.
            held: an earlier measurement of the same optimizer step, to which this one is added.
        """

    def refuse(self, needs: Needs, name: str, *, blocks: bool) -> None:
        """Raises ValueError where it cannot serve a method exactly.

        Args:
            needs: of the method.
            name: of the method.
            blocks: whether shared parameters are operated on in blocks.
        """
        return


def seed_like(value: Tensor, output: Output) -> Tensor:
    """A gradient of a scalar loss, in the loss's own shape and dtype."""
    if isinstance(output, Tensor):
        return value.to(output.dtype).expand(output.shape)
    metadata = output.node._input_metadata[output.output_nr]
    return value.to(metadata.dtype).expand(metadata.shape)


def add(first: Tensor, second: Tensor) -> Tensor:
    """Of two gradients, either of which may be sparse; in place where it can be."""
    return second + first if first.is_sparse and not second.is_sparse else first.add_(second)


def accumulate(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Adds gradients to the ``.grad`` of their leaves, whose own they become."""
    for p, g in pairs:
        g = g if g.dtype == p.dtype else g.to(p.dtype)
        p.grad = g if p.grad is None else add(p.grad, g)


def write_own(own: Sequence[dict[Tensor, Tensor]], head_weights: Tensor | None) -> None:
    """Adds each task's gradients of its own parameters to their ``.grad``, weighted (T,) in place, or raw."""
    for task, gradients in enumerate(own):
        if gradients and head_weights is not None:
            torch._foreach_mul_(list(gradients.values()), head_weights[task])
        accumulate(gradients.items())


def flat(rows: Tensor) -> Tensor:
    """Gradients (K, *shape) as rows (K, n)."""
    return rows.reshape(len(rows), -1)


def spread(rows: Tensor, present: Sequence[int], T: int, axes: Sequence[int] = (0,)) -> Tensor:
    """Axes over K present tasks -> over all T, 0 for the absent ones."""
    if len(present) == T:
        return rows
    for axis in axes:
        rows = rows.movedim(axis, 0)
        whole = rows.new_zeros(T, *rows.shape[1:])
        # Row by row: a list of positions that is copied to the device makes the host wait.
        for row, t in zip(rows, present, strict=True):
            whole[t] = row
        rows = whole.movedim(0, axis)
    return rows
