"""The way of one step: losses -> engine -> Stats -> method -> weights -> engine -> ``.grad``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.distributed import Group, Ranks, Shards, find_ranks, several
from gradsurgery.engines import Auto, Batch, Engine, Measurement, Representation, Rows
from gradsurgery.engines.layout import Layout
from gradsurgery.engines.replicas import joined
from gradsurgery.engines.representation import Nested
from gradsurgery.engines.scalar import split_backward, weighted_backward, weighted_sum
from gradsurgery.losses import Losses, TaskLosses, node_of, read_losses
from gradsurgery.parameters import Parameters
from gradsurgery.registry import TrackedMethod
from gradsurgery.rule import Rule
from gradsurgery.stats import Needs, StepInfo
from gradsurgery.tracked import Tracked

# Independent batches that a method with `Needs.CROSS` learns from.
SAMPLES = 2
# Cosine of a step with a task's gradient below which it is said to conflict; a solution's own may be 0 up to rounding.
CONFLICT = -1e-2


class Surgery:
    """Everything of an `MTLOptimizer` that changes from step to step.

    It stands apart from the optimizer because trainers re-class or copy optimizers (Fabric's carries our methods over
    to an object of its own): whoever calls, there is one of these.

    Args:
        rule: the method, with its state.
        engine: how gradients are measured.
        parameters: which are shared, in which blocks.
        resolve_on_conflict: see `MTLOptimizer`.
        process_group: see `MTLOptimizer`.
    """

    def __init__(
        self,
        rule: Rule,
        engine: Engine,
        parameters: Parameters,
        *,
        resolve_on_conflict: bool = False,
        process_group: Group | None = None,
    ):
        self.rule = rule
        self.engine = engine
        self.parameters = parameters
        self.info: StepInfo | None = None
        self.holding = False
        self._broken = False
        self.resolve_on_conflict = resolve_on_conflict
        self._solved: Rows | None = None
        self._held: list[Measurement] = []
        self._held_losses: TaskLosses | None = None
        self._held_scale: Tensor | None = None
        self._held_weights: Tensor | None = None
        self._layouts: list[Layout] = []
        self._tracked: Tracked | None = None
        self._remembered: list[tuple[Tensor, Tensor]] = []
        self._signature: tuple[object, ...] = ()
        self._process_group = process_group
        self._team: tuple[list[int], Ranks | None] = [], None

    @property
    def layout(self) -> Layout:
        """Where the shared parameters lie; there from the first step that needs them on."""
        return self._layouts[0]

    @property
    def _shards(self) -> Shards | None:
        """How parameters are divided among the ranks, if the last losses came from several and they are."""
        ranks = self._team[1]
        return None if ranks is None else ranks.shards

    def backward(
        self,
        losses: Losses,
        scaler: torch.amp.GradScaler | None,
        independent: Sequence[Losses] | None,
        representation: Nested | None,
    ) -> StepInfo:
        """See `MTLOptimizer.backward`."""
        engine = self.engine if representation is None else self._at(representation)
        read = self._read(losses)
        if self._shards is not None:
            self._shards.warn_of_used()
        due = self._due(read)
        samples = self._read_samples(read, independent, due=due)
        grad_scale = None if scaler is None else scaler.scale(torch.ones((), device=read.values.device))
        gradients = self.rule.method.needs is not Needs.LOSSES
        if self.holding or gradients or self.rule.heads == "unweighted":
            self.prepare(read)
            self.parameters.refuse_hooks()
        self.rule.start(read.tasks, self.layout.blocks if self._layouts else 1, read.values.device)
        before = self.rule.snapshot()
        try:
            if self.holding:
                return self._hold([read, *samples], grad_scale, due=due)
            if gradients and due:
                measured = self._measure([read, *samples], grad_scale, engine)
                self.info = self._apply(read, measured, grad_scale)
            else:
                self.info = self._weighted(read, self._next_weights(read), grad_scale)
        except BaseException:
            self.rule.restore(before)
            self._broken = self.holding
            raise
        return self.info

    def combine(self, losses: Losses, independent: Sequence[Losses] | None) -> Tensor:
        """See `MTLOptimizer.combine`."""
        self._check_combines()
        read = self._read(losses)
        due = self._due(read)
        samples = self._read_samples(read, independent, due=due)
        gradients = self.rule.method.needs is not Needs.LOSSES
        if gradients:
            self.prepare(read)
        self.rule.start(read.tasks, 1, read.values.device)
        before = self.rule.snapshot()
        try:
            if gradients and due:
                weights = self._solve([read, *samples])
            else:
                weights = self._next_weights(read)
                self.info = step_info(read, weights, None, {}, "combined")
        except BaseException:
            self.rule.restore(before)
            raise
        ranks = self._team[1]
        # An ordinary backward is averaged over ranks by whoever wraps the model.
        factors = weights[0] if ranks is None or read.share is None else weights[0] * read.share * ranks.size
        return weighted_sum(losses, read, factors, [] if ranks is None else ranks.awaited)

    def _solve(self, batches: Sequence[TaskLosses]) -> Tensor:
        """Weights (1, T) from gradients of shared parameters, which leave the graph as it was."""
        measured = []
        for losses, layout in zip(batches, self._layouts, strict=True):
            batch = dataclasses.replace(self._batch(losses, layout), retain=len(measured) == 0)
            measured.append(joined(self.engine.measure(batch), batch))
        with torch.no_grad(), torch.autocast(batches[0].values.device.type, enabled=False):
            weights, gramian, diagnostics = self._weights(batches[0], measured, None)
        self.info = step_info(batches[0], weights, gramian, diagnostics, measured[0].engine)
        return weights

    def _check_combines(self) -> None:
        """Raises ValueError or RuntimeError where the step is not the gradient of a weighted sum."""
        method, name = self.rule.method, self.rule.name
        if Needs.COLUMNS in method.needs or isinstance(method, TrackedMethod):
            how = "column by column" if Needs.COLUMNS in method.needs else "along rows that it tracks"
            raise ValueError(f"{name} moves {how}, which is no weighted sum of losses. Use opt.backward(losses).")
        if self.parameters.in_blocks:
            raise ValueError(
                "combine() returns one weighted sum for all parameters, while blocks give each its own weights. Use "
                "blocks='model', or opt.backward(losses)."
            )
        if self.holding or self.resolve_on_conflict:
            what = "accumulate() holds" if self.holding else "resolve_on_conflict compares"
            raise RuntimeError(
                f"{what} gradients that combine() leaves to your own backward. Use opt.backward(losses)."
            )

    def stepped(self) -> None:
        """To be called when the base optimizer has used the gradients."""
        if self._shards is not None:
            self._shards.stepped()

    def observe(self, losses: Losses) -> None:
        """See `MTLOptimizer.observe`."""
        self.rule.observe(self._read(losses, graph=False))

    def ranks(self) -> Ranks | None:
        """The ranks that train this model together; None for a single process.

        Raises:
            RuntimeError, ValueError: see `find_ranks`; and those of an engine that cannot average over them.
        """
        params = self.parameters.all()
        known = [id(p) for p in params]
        if known != self._team[0] or (self._team[1] is None and several()):
            self.parameters.refuse_replaced()
            self._team = known, find_ranks(params, self._process_group)
            if self._team[1] is not None:
                self._check_ranks(self._team[1])
        return self._team[1]

    def _check_ranks(self, ranks: Ranks) -> None:
        self.engine.refuse_ranks(ranks)
        if ranks.shards is None:
            return
        if self.resolve_on_conflict:
            raise ValueError(
                "resolve_on_conflict compares whole gradients, of which fully_shard gives each rank a part. Leave it "
                "out."
            )
        self.parameters.refuse_search()

    def _read(self, losses: Losses, *, graph: bool = True) -> TaskLosses:
        """The losses, of all ranks where there are several."""
        ranks = self.ranks()
        if ranks is None:
            return read_losses(losses, self.rule.tasks, graph=graph)
        known = self.rule.tasks
        read = read_losses(losses, known, graph=graph, device=None if known is None else ranks.params[0].device)
        if not ranks.agreed:
            ranks.agree({"tasks": read.tasks, **self.rule.setup})
            self.rule.seed = ranks.first(self.rule.seed)
        return ranks.join(read)

    def _at(self, representation: Nested) -> Engine:
        """The engine that operates at a representation."""
        if self.holding:
            raise RuntimeError("A representation belongs to one micro-batch: leave it out inside accumulate().")
        if isinstance(self.engine, Auto):
            engine = Representation()
            engine.refuse(self.rule.method.needs, self.rule.name, blocks=self.parameters.in_blocks)
        elif isinstance(self.engine, Representation):
            engine = self.engine
        else:
            raise ValueError(
                f"engine={self.engine.name!r} goes by the parameters' gradients and has no use for a representation. "
                "Leave it out, or use engine='representation' (or 'auto')."
            )
        return engine.given(representation)

    def hold(self) -> None:
        """From now on, `backward` only adds to the rows.

        Raises:
            RuntimeError: the engine has no rows to add to.
        """
        if not self.engine.holds:
            raise RuntimeError(
                f"accumulate() adds up the rows of micro-batches, and engine={self.engine.name!r} has none. Use "
                "engine='auto', 'sequential' or 'batched'."
            )
        self.drop()
        self.holding = True

    def release(self) -> None:
        """Operates on the rows held, if there are any.

        Raises:
            RuntimeError: a micro-batch failed on its way into them.
        """
        if self._broken:
            raise RuntimeError(
                "A micro-batch failed inside accumulate(), and part of it is in the sum of the others, which has been "
                "dropped; take the block again without it."
            )
        if self._held_losses is not None:
            if self._held:
                batches = [self._batch(self._held_losses, layout) for layout in self._layouts]
                held = [joined(rows, batch) for rows, batch in zip(self._held, batches, strict=False)]
                self.info = self._apply(self._held_losses, held, self._held_scale)
            elif self._held_weights is not None:
                self.rule.cached()
                self.info = step_info(self._held_losses, self._held_weights, None, {}, "weighted")

    def drop(self) -> None:
        """Forgets the rows held."""
        self._broken = False
        self.holding, self._held, self._held_losses = False, [], None
        self._held_scale, self._held_weights = None, None

    def __getstate__(self) -> dict[str, Any]:
        # Flat rows are rebuilt when they are needed, and nothing of a graph leaves the process.
        held = dict.fromkeys(("_tracked", "_solved", "_held_losses", "_held_scale", "_held_weights"))
        empty = {"_layouts": [], "_held": [], "_signature": (), "holding": False, "_broken": False}
        held |= {"_process_group": None, "_team": ([], None)}
        return {**self.__dict__, **held, **empty, "_remembered": self.remembered()}

    def remembered(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters with what a `TrackedMethod` remembers of each, (T, *shape)."""
        return [*self._remembered, *([] if self._tracked is None else self._tracked.by_parameter())]

    def remember(self, known: list[tuple[Tensor, Tensor]]) -> None:
        """Takes over what `remembered` gave; an empty list starts afresh."""
        if not known and self.rule.tasks is not None and isinstance(self.rule.method, TrackedMethod):
            warnings.warn(
                f"The checkpoint brings no rows for {self.rule.name} to go on from; they start at 0. "
                "torch.distributed.checkpoint keeps them unless flattened, and reads them into an optimizer that has "
                "taken a backward before.",
                stacklevel=4,
            )
        self._tracked, self._remembered = None, known

    def _due(self, losses: TaskLosses) -> bool:
        """Whether gradients of this batch go into a solve for weights."""
        if self.holding:
            return self._held_weights is None and (self._held_losses is not None or not self.rule.settled(losses))
        return self.rule.due(losses)

    def _read_samples(self, losses: TaskLosses, independent: Sequence[Losses] | None, *, due: bool) -> list[TaskLosses]:
        """The independent batches, where the method learns from such and is due.

        Raises:
            ValueError: they are missing, of no use, not two, share a graph with each other, or miss a task.
        """
        name, wanted = self.rule.name, Needs.CROSS in self.rule.method.needs
        if independent is None:
            if wanted and due:
                raise ValueError(
                    f"{name} learns its weights from two batches that are independent of the one that moves the model: "
                    "draw two more, and pass their losses as backward(losses, independent=(losses_a, losses_b))."
                )
            return []
        if not wanted:
            raise ValueError(f"{name} has no use for independent batches; leave `independent` out.")
        if isinstance(independent, Tensor) or len(independent) != SAMPLES:
            raise ValueError(f"independent must hold the losses of {SAMPLES} batches; got {len(independent)}.")
        if not due:
            return []
        samples = [self._read(sample) for sample in independent]
        first = [batch.outputs[batch.here[0]] for batch in (losses, *samples) if batch.here]
        nodes = [node for output in first if (node := node_of(output)) is not None]
        if len({*nodes}) < len(nodes):
            raise ValueError("The same losses were passed twice: independent batches come from forwards of their own.")
        if any(sample.present != losses.present for sample in samples):
            raise ValueError("A task that is absent from one of the batches must be absent from all three.")
        return samples

    def prepare(self, losses: TaskLosses) -> None:
        """Finds the shared parameters, and lays them out anew where they have changed."""
        if self._shards is None:
            # Where parameters are divided, the graph has others in their place.
            self.parameters.trace(losses)
        signature = tuple((id(p), p.dtype, p.device, p.shape, p.stride()) for p in self.parameters.shared)
        if not self._layouts or signature != self._signature:
            blocks = self.parameters.blocks()
            samples = SAMPLES if Needs.CROSS in self.rule.method.needs else 0
            layouts = [Layout(blocks, self._team[1]) for _ in range(1 + samples)]
            if len(blocks) > 1 and self._layouts and not layouts[0].has_blocks_of(self.layout):
                raise ValueError(
                    "The shared parameters have changed (one was frozen, or thawed), and with them the blocks, whose "
                    "state the method keeps apart. Make a new MTLOptimizer, or use blocks='model'."
                )
            if layouts[0].device != losses.values.device:
                raise ValueError(
                    f"The losses sit on {losses.values.device} and the shared parameters on {layouts[0].device}; move "
                    "one to the other."
                )
            self._layouts, self._signature, self._solved = layouts, signature, None

    def _measure(self, batches: Sequence[TaskLosses], grad_scale: Tensor | None, engine: Engine) -> list[Measurement]:
        """Of the batch that moves the model, and of independent ones, of which heads learn nothing."""
        # Its rows are about to be overwritten.
        self._solved = None
        task_specific, held = self._task_specific(), self._held or [None] * len(batches)
        measured = []
        for n, (losses, rows) in enumerate(zip(batches, held, strict=True)):
            batch = self._batch(losses, self._layouts[n], task_specific if n == 0 else [], grad_scale)
            found = engine.measure(batch, rows)
            measured.append(found if self.holding else joined(found, batch))
        return measured

    def _task_specific(self) -> list[Tensor]:
        """The parameters that are not operated on; over ranks, the same ones on each.

        Raises:
            ValueError: one that the losses reach is not of those that the ranks train.
        """
        found, ranks = self.parameters.task_specific(), self._team[1]
        if ranks is None:
            return found
        trained, shared = {id(p) for p in ranks.params}, {id(p) for p in self.parameters.shared}
        if strangers := [p for p in found if id(p) not in trained]:
            raise ValueError(
                f"The losses reach {len(strangers)} parameters (one of shape {tuple(strangers[0].shape)}) that are "
                "neither in the base optimizer nor in the wrapped model: their gradients would differ from rank to "
                "rank. Add them to the base optimizer, or freeze them."
            )
        return [p for p in ranks.params if id(p) not in shared]

    def _batch(
        self, losses: TaskLosses, layout: Layout, own: Sequence[Tensor] = (), grad_scale: Tensor | None = None
    ) -> Batch:
        whole = bool(self.rule.method.needs & (Needs.COLUMNS | Needs.TRACKED)) or self.resolve_on_conflict
        scatter = layout.ranks is not None and layout.shards is None and not whole
        return Batch(losses, layout, own, grad_scale, hold=self.holding, scatter=scatter)

    def _hold(self, batches: Sequence[TaskLosses], grad_scale: Tensor | None, *, due: bool) -> StepInfo:
        """A micro-batch: into the rows, or between two solves of ``update_every`` straight into ``.grad``."""
        losses = batches[0]
        if due:
            self._held = self._measure(batches, grad_scale, self.engine)
            info = StepInfo(losses.tasks, losses.values, None, None, None, self._held[0].engine)
        else:
            if self._held_weights is None:
                self._held_weights = self.rule.cached(count=False)
            info = self._weighted(losses, self._held_weights, grad_scale)
        self._held_losses = _add(self._held_losses, losses)
        self._held_scale = grad_scale
        return info

    @torch.no_grad()
    def _apply(self, losses: TaskLosses, measured: Sequence[Measurement], grad_scale: Tensor | None) -> StepInfo:
        # Under the caller's autocast the products of gradients would be rounded to half precision.
        with torch.autocast(losses.values.device.type, enabled=False):
            return self._operate(losses, measured, grad_scale)

    def _operate(self, losses: TaskLosses, measured: Sequence[Measurement], grad_scale: Tensor | None) -> StepInfo:
        batch = measured[0]
        self._solved = batch if self.resolve_on_conflict and isinstance(batch, Rows) else None
        method, name = self.rule.method, batch.engine
        if Needs.COLUMNS in method.needs:
            batch.write_columns(self.rule.columns(losses))
            return StepInfo(losses.tasks, losses.values, None, None, None, name)
        if isinstance(method, TrackedMethod):
            return self._track(losses, batch, method, grad_scale)
        weights, gramian, diagnostics = self._weights(losses, measured, grad_scale)
        batch.write(weights, self.head_weights(weights, gramian, diagnostics))
        return step_info(losses, weights, gramian, diagnostics, name)

    def _weights(
        self, losses: TaskLosses, measured: Sequence[Measurement], grad_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Weights (B, T), the Gramian (B, T, T) where the method goes by it, and what it reports."""
        batch, *samples = measured
        needs = self.rule.method.needs
        gramian = batch.gramian() if Needs.GRAMIAN in needs else None
        cross = samples[0].cross_gramian(samples[1]) if Needs.CROSS in needs else None
        if grad_scale is not None:
            gramian, cross = (None if G is None else G / grad_scale.double() ** 2 for G in (gramian, cross))
        weights, diagnostics = self.rule.solve(losses, gramian, cross)
        return weights, gramian, diagnostics

    def _track(
        self, losses: TaskLosses, measured: Measurement, method: TrackedMethod, grad_scale: Tensor | None
    ) -> StepInfo:
        """Solves for what the method makes of the rows, and remembers it as the direction is written."""
        if self._tracked is None or self._tracked.layout is not self.layout:
            known = self.remembered()
            self._tracked = Tracked(len(losses.tasks), self.layout, known)
            # What is remembered of frozen parameters waits for them.
            here = {id(p) for p in self.layout.params}
            self._remembered = [(p, rows) for p, rows in known if id(p) not in here]
        track = self.rule.track(losses)
        gramian = measured.gramian(self._tracked.measured(track, grad_scale))
        weights, diagnostics = self.rule.solve(losses, gramian)
        finite, gradients = weights.isfinite().all(), method.acts_on == "gradients"
        rows = self._tracked.committed(track, grad_scale, finite, gradients=gradients)
        measured.write(weights, self.head_weights(weights, gramian, diagnostics), rows)
        return step_info(losses, weights, None, diagnostics, measured.engine)

    def head_weights(self, weights: Tensor, gramian: Tensor | None, diagnostics: dict[str, Tensor]) -> Tensor | None:
        """(T,) of the task-specific parameters: the method's own, or the mean over the blocks that the losses reach;
        None leaves them raw."""
        own = diagnostics.pop("head_weights", None)
        if self.rule.heads == "unweighted":
            return None
        if own is not None:
            return torch.where(weights.isfinite().all(), own, torch.nan)
        if len(weights) == 1 or gramian is None:
            return weights.mean(dim=0)
        reached = (gramian.diagonal(dim1=-2, dim2=-1) != 0).any(dim=-1).to(weights)
        return reached @ weights / reached.sum().clamp(min=1)

    @torch.no_grad()
    def _next_weights(self, losses: TaskLosses) -> Tensor:
        """Weights (1, T) from the losses alone, or from an earlier solve."""
        return self.rule.solve(losses, None)[0] if self.rule.due(losses) else self.rule.cached()

    def _weighted(self, losses: TaskLosses, weights: Tensor, grad_scale: Tensor | None) -> StepInfo:
        """One ordinary backward, with weights that are known."""
        rows = self._solved
        fresh = rows is not None and all(p.grad is None for p in self.layout.params)
        if self.rule.heads == "weighted":
            weighted_backward(losses, weights[0], grad_scale=grad_scale, ranks=self._team[1])
        else:
            split_backward(Batch(losses, self.layout, self._task_specific(), grad_scale), weights[0])
        if rows is not None and fresh:
            with torch.autocast(losses.values.device.type, enabled=False):
                cosines = rows.cosines([p.grad for p in self.layout.params])
            self.rule.conflict((cosines < CONFLICT).any())
        return step_info(losses, weights, None, {}, "weighted")


def step_info(
    losses: TaskLosses, weights: Tensor | None, gramian: Tensor | None, diagnostics: Mapping[str, Tensor], engine: str
) -> StepInfo:
    """What came of a step, with the residual taken out of the method's diagnostics."""
    extra = dict(diagnostics)
    return StepInfo(losses.tasks, losses.values, weights, gramian, extra.pop("residual", None), engine, extra)


def _add(first: TaskLosses | None, second: TaskLosses) -> TaskLosses:
    """The sum of two micro-batches' losses, without their graphs; a task is present if it is in either."""
    total = {t: second.values[t] for t in second.present}
    if first is not None:
        for t in first.present:
            total[t] = first.values[t] + total[t] if t in total else first.values[t]
    outputs = tuple(total.get(t) for t in range(len(second.tasks)))
    absent = torch.full_like(second.values[0], torch.nan)
    return TaskLosses(second.tasks, outputs, torch.stack([absent if o is None else o for o in outputs]))
