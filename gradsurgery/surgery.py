"""The way of one step: losses -> engine -> Stats -> method -> weights -> engine -> ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.engines import Engine, Measurement
from gradsurgery.engines.layout import Layout
from gradsurgery.engines.scalar import split_backward, weighted_backward
from gradsurgery.losses import Losses, TaskLosses, read_losses
from gradsurgery.parameters import Parameters
from gradsurgery.rule import Rule
from gradsurgery.stats import Needs, StepInfo


class Surgery:
    """Everything of an `MTLOptimizer` that changes from step to step.

    It stands apart from the optimizer because trainers re-class or copy optimizers (Fabric's carries our methods over
    to an object of its own): whoever calls, there is one of these.

    Args:
        rule: the method, with its state.
        engine: how gradients are measured.
        parameters: which are shared, in which blocks.
    """

    def __init__(self, rule: Rule, engine: Engine, parameters: Parameters):
        self.rule = rule
        self.engine = engine
        self.parameters = parameters
        self.info: StepInfo | None = None
        self.holding = False
        self._held: Measurement | None = None
        self._held_losses: TaskLosses | None = None
        self._held_scale: Tensor | None = None
        self._held_weights: Tensor | None = None
        self._layout: Layout | None = None
        self._signature: tuple[object, ...] = ()

    @property
    def layout(self) -> Layout:
        """Where the shared parameters lie; there from the first step that needs them on."""
        assert self._layout is not None
        return self._layout

    def backward(self, losses: Losses, scaler: torch.amp.GradScaler | None) -> StepInfo:
        """See `MTLOptimizer.backward`."""
        read = read_losses(losses, self.rule.tasks)
        grad_scale = None if scaler is None else scaler.scale(torch.ones((), device=read.values.device))
        gradients = bool(self.rule.method.needs & (Needs.GRAMIAN | Needs.COLUMNS))
        if self.holding or gradients or self.rule.heads == "unweighted":
            self._prepare(read)
        self.rule.start(read.tasks, 1 if self._layout is None else self._layout.blocks, read.values.device)
        before = self.rule.snapshot()
        try:
            if self.holding:
                return self._hold(read, grad_scale)
            if gradients and self.rule.due(read):
                self.info = self._apply(read, self._measure(read, grad_scale), grad_scale)
            else:
                self.info = self._weighted(read, self._next_weights(read), grad_scale)
        except BaseException:
            self.rule.restore(before)
            raise
        return self.info

    def observe(self, losses: Losses) -> None:
        """See `MTLOptimizer.observe`."""
        self.rule.observe(read_losses(losses, self.rule.tasks, graph=False))

    def hold(self) -> None:
        """From now on, `backward` only adds to the rows."""
        self.drop()
        self.holding = True

    def release(self) -> None:
        """Operates on the rows held, if there are any."""
        if self._held_losses is not None:
            if self._held is not None:
                self.info = self._apply(self._held_losses, self._held, self._held_scale)
            elif self._held_weights is not None:
                self.rule.cached()
                self.info = _info(self._held_losses, self._held_weights, None, {}, "weighted")

    def drop(self) -> None:
        """Forgets the rows held."""
        self.holding, self._held, self._held_losses = False, None, None
        self._held_scale, self._held_weights = None, None

    def __getstate__(self) -> dict[str, Any]:
        # Flat rows are rebuilt when they are needed, and nothing of a graph leaves the process.
        held = dict.fromkeys(("_layout", "_held", "_held_losses", "_held_scale", "_held_weights"))
        return {**self.__dict__, **held, "_signature": (), "holding": False}

    def _prepare(self, losses: TaskLosses) -> None:
        """Finds the shared parameters, and lays them out anew where they have changed."""
        self.parameters.trace(losses)
        signature = tuple((id(p), p.dtype, p.device, p.shape, p.stride()) for p in self.parameters.shared)
        if self._layout is None or signature != self._signature:
            _check_local()
            layout = Layout(self.parameters.blocks())
            if layout.device != losses.values.device:
                raise ValueError(
                    f"The losses sit on {losses.values.device} and the shared parameters on {layout.device}; move one "
                    "to the other."
                )
            self._layout, self._signature = layout, signature

    def _measure(self, losses: TaskLosses, grad_scale: Tensor | None) -> Measurement:
        task_specific = self.parameters.task_specific()
        return self.engine.measure(losses, self.layout, task_specific, grad_scale=grad_scale, held=self._held)

    def _hold(self, losses: TaskLosses, grad_scale: Tensor | None) -> StepInfo:
        """A micro-batch: into the rows, or between two solves of ``update_every`` straight into ``.grad``."""
        if self._held_losses is None and self.rule.settled(losses):
            self._held_weights = self.rule.cached(count=False)
        if self._held_weights is not None:
            info = self._weighted(losses, self._held_weights, grad_scale)
        else:
            self._held = self._measure(losses, grad_scale)
            info = StepInfo(losses.tasks, losses.values, None, None, None, self.engine.name)
        self._held_losses = _add(self._held_losses, losses)
        self._held_scale = grad_scale
        return info

    @torch.no_grad()
    def _apply(self, losses: TaskLosses, measured: Measurement, grad_scale: Tensor | None) -> StepInfo:
        # Under the caller's autocast the products of gradients would be rounded to half precision.
        with torch.autocast(losses.values.device.type, enabled=False):
            return self._operate(losses, measured, grad_scale)

    def _operate(self, losses: TaskLosses, measured: Measurement, grad_scale: Tensor | None) -> StepInfo:
        if Needs.COLUMNS in self.rule.method.needs:
            measured.write_columns(self.rule.columns(losses))
            return StepInfo(losses.tasks, losses.values, None, None, None, self.engine.name)
        gramian = None
        if Needs.GRAMIAN in self.rule.method.needs:
            gramian = measured.gramian()
            if grad_scale is not None:
                gramian = gramian / grad_scale.double() ** 2
        weights, diagnostics = self.rule.solve(losses, gramian)
        measured.write(weights, _head_weights(weights, gramian) if self.rule.heads == "weighted" else None)
        return _info(losses, weights, gramian, diagnostics, self.engine.name)

    @torch.no_grad()
    def _next_weights(self, losses: TaskLosses) -> Tensor:
        """Weights (1, T) from the losses alone, or from an earlier solve."""
        return self.rule.solve(losses, None)[0] if self.rule.due(losses) else self.rule.cached()

    def _weighted(self, losses: TaskLosses, weights: Tensor, grad_scale: Tensor | None) -> StepInfo:
        """One ordinary backward, with weights that are known."""
        if self.rule.heads == "weighted":
            weighted_backward(losses, weights[0], grad_scale=grad_scale)
        else:
            task_specific = self.parameters.task_specific()
            split_backward(losses, weights[0], self.layout.params, task_specific, grad_scale=grad_scale)
        return _info(losses, weights, None, {}, "weighted")


def _info(
    losses: TaskLosses, weights: Tensor, gramian: Tensor | None, diagnostics: Mapping[str, Tensor], engine: str
) -> StepInfo:
    extra = dict(diagnostics)
    return StepInfo(losses.tasks, losses.values, weights, gramian, extra.pop("residual", None), engine, extra)


def _head_weights(weights: Tensor, gramian: Tensor | None) -> Tensor:
    """(T,) mean over the blocks that the losses reach."""
    if len(weights) == 1 or gramian is None:
        return weights.mean(dim=0)
    reached = (gramian.diagonal(dim1=-2, dim2=-1) != 0).any(dim=-1).to(weights)
    return reached @ weights / reached.sum().clamp(min=1)


def _check_local() -> None:
    """Per-task gradients bypass the hooks by which DDP averages over ranks: replicas would drift apart in silence."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            f"Surgery on {torch.distributed.get_world_size()} processes is not available in this version: each would "
            "operate on its own gradients, and the replicas would drift apart. Run one process, or use a method that "
            "needs losses only with heads='weighted' (ew, famo), which takes an ordinary backward."
        )


def _add(first: TaskLosses | None, second: TaskLosses) -> TaskLosses:
    """The sum of two micro-batches' losses, without their graphs; a task is present if it is in either."""
    total = {t: second.values[t] for t in second.present}
    if first is not None:
        for t in first.present:
            total[t] = first.values[t] + total[t] if t in total else first.values[t]
    outputs = tuple(total.get(t) for t in range(len(second.tasks)))
    absent = torch.full_like(second.values[0], torch.nan)
    return TaskLosses(second.tasks, outputs, torch.stack([absent if o is None else o for o in outputs]))
