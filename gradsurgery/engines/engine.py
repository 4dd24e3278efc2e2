"""The contract of an engine."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurgery.distributed import Ranks, placed
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
        scatter: whether rows are to be divided among ranks as they come, since inner products and a weighted sum are
            all that is wanted of them.
        retain: whether the graph is wanted once more; else it is freed, at the latest as the direction is written.
    """

    losses: TaskLosses
    layout: Layout
    task_specific: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    hold: bool = False
    scatter: bool = False
    retain: bool = False

    @property
    def ranks(self) -> Ranks | None:
        """Those whose gradients are summed; no hook of a wrapper must then see a backward pass of ours."""
        return self.layout.ranks

    def start(self, task: int) -> tuple[Output, Tensor]:
        """A task's loss, and the gradient that its backward starts from, in the loss's own shape and dtype."""
        output, share = self.losses.outputs[task], self.losses.share
        assert output is not None
        seed = torch.ones_like(self.losses.values[task]) if share is None else share[task]
        return output, seed_like(seed if self.grad_scale is None else seed * self.grad_scale, output)

    def gradients(
        self, task: int, inputs: Sequence[Tensor | GradientEdge], *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Of a task's loss with respect to each input, None where it does not reach it; the graph may outlive it."""
        output, seed = self.start(task)
        return self.differentiate([output], [seed], inputs, retain=retain)

    def differentiate(
        self,
        outputs: Sequence[Output],
        seeds: Sequence[Tensor],
        inputs: Sequence[Tensor | GradientEdge],
        *,
        retain: bool,
    ) -> tuple[Tensor | None, ...]:
        """As `torch.autograd.grad`, of parameters that are divided among ranks too: this rank's part, averaged."""
        if not outputs or not inputs:
            return (None,) * len(inputs)
        if self.ranks is not None and self.ranks.shards is not None:
            # Gradients are divided by the number of ranks as they are summed.
            seeds = [seed * self.ranks.size for seed in seeds]
            return tuple(self.ranks.shards.gradients(outputs, seeds, inputs, retain=retain))  # pyright: ignore
        return torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain, allow_unused=True)  # pyright: ignore


class Engine(abc.ABC):
    """A road from losses to `Measurement`. It holds options, and no state of a training run.

    Attributes:
        name: what `MTLOptimizer` knows it by.
        holds: whether it keeps gradients as rows (`Rows`), which those of further micro-batches can be added to.
        takes_shards: whether `Batch.differentiate` is all that it asks of parameters, which serves divided ones too.
    """

    name: ClassVar[str]
    holds: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = False

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

    def refuse_ranks(self, ranks: Ranks) -> None:
        """Raises ValueError where it cannot average over these ranks."""
        if ranks.shards is not None and not self.takes_shards:
            raise ValueError(
                f"engine={self.name!r} asks for gradients of the parameters that the model computes with, and "
                "fully_shard gives those of the optimizer's, by whole backward passes. Use engine='sequential', "
                "'representation' or 'auto'."
            )


def seed_like(value: Tensor, output: Output) -> Tensor:
    """A gradient of a scalar loss, in the loss's own shape and dtype."""
    if isinstance(output, Tensor):
        return value.to(output.dtype).expand(output.shape)
    metadata = output.node._input_metadata[output.output_nr]
    return value.to(metadata.dtype).expand(metadata.shape)


def add(first: Tensor, second: Tensor) -> Tensor:
    """Of two gradients, either of which may be sparse; in place where it can be."""
    return second + first if first.is_sparse and not second.is_sparse else first.add_(second)


def accumulate(pairs: Iterable[tuple[Tensor, Tensor]], ranks: Ranks | None = None) -> None:
    """Adds gradients to the ``.grad`` of their leaves, whose own they become; of the ranks' shards, to theirs."""
    for p, g in pairs:
        if ranks is not None and ranks.shards is not None:
            g = placed(p, g)
        g = g if g.dtype == p.dtype else g.to(p.dtype)
        p.grad = g if p.grad is None else add(p.grad, g)


def into_grad(
    batch: Batch,
    outputs: Sequence[Output],
    seeds: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain: bool,
    besides: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """One backward into the ``.grad`` of some leaves alone, those that it does not reach left as they are.

    Args:
        batch: what the outputs belong to; its ranks' gradients are summed.
        outputs: where it starts.
        seeds: the gradients there.
        inputs: leaves, the same on every rank.
        retain: whether the graph is wanted once more.
        besides: gradients of some of the leaves that come by other ways.
    """
    besides = besides or {}
    if batch.ranks is None:
        if outputs and inputs:
            torch.autograd.backward(outputs, seeds, inputs=list(inputs), retain_graph=retain)  # pyright: ignore
        accumulate(besides.items())
        return
    found = batch.differentiate(outputs, seeds, inputs, retain=retain)
    pairs = zip(inputs, found, strict=True)
    whole = [besides.get(p) if g is None else g + besides[p] if p in besides else g for p, g in pairs]
    totals = batch.ranks.total(inputs, whole)
    accumulate(((p, g) for p, g in zip(inputs, totals, strict=True) if g is not None), batch.ranks)


def write_own(
    own: Sequence[dict[Tensor, Tensor]],
    head_weights: Tensor | None,
    ranks: Ranks | None = None,
    params: Sequence[Tensor] = (),
) -> None:
    """Adds each task's gradients of its own parameters to their ``.grad``, weighted (T,) in place, or raw.

    Args:
        own: those, by task.
        head_weights: (T,), or None.
        ranks: over which they are summed first.
        params: the parameters that may have such gradients, the same on every rank.
    """
    for task, gradients in enumerate(own):
        if gradients and head_weights is not None:
            torch._foreach_mul_(list(gradients.values()), head_weights[task])
    if ranks is None:
        for gradients in own:
            accumulate(gradients.items())
        return
    sums: dict[Tensor, Tensor] = {}
    for gradients in own:
        for p, g in gradients.items():
            sums[p] = add(sums[p], g) if p in sums else g
    totals = ranks.total(params, [sums.get(p) for p in params])
    accumulate(((p, g) for p, g in zip(params, totals, strict=True) if g is not None), ranks)


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
