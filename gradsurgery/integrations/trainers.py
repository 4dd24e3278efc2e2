"""What trainers have in common: micro-batches that come one call at a time, and rows for their logs."""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from gradsurgery.losses import Losses
from gradsurgery.optimizer import MTLOptimizer
from gradsurgery.stats import StepInfo


class MicroBatches:
    """`MTLOptimizer.accumulate` over several calls of a training step.

    Attributes:
        waiting: micro-batches whose task gradients are held.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.waiting = 0

    def backward(
        self, opt: MTLOptimizer, losses: Losses, *, of: int, last: bool, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Passes a micro-batch backward; what is held is dropped if that fails.

        Args:
            opt: the optimizer.
            losses: means over the micro-batch.
            of: micro-batches a step, by which losses are divided.
            last: whether the step has all that it will get, and the surgery is due.
            scaler: as in `MTLOptimizer.backward`.
        """
        if of > 1:
            if not self.waiting:
                self._held.enter_context(opt.accumulate())
            losses = _divided(losses, of)
        try:
            opt.backward(losses, scaler=scaler)
        except BaseException:
            self.waiting = 0
            with contextlib.suppress(RuntimeError):
                self._held.close()
            raise
        self.waiting += 1
        if last:
            self.waiting = 0
            self._held.close()


def step_log(info: StepInfo | None) -> dict[str, Tensor]:
    """``loss/<task>`` and, where the method weighs, ``weight/<task>`` (the mean over blocks) of a step, () float64."""
    if info is None:
        return {}
    row = {f"loss/{task}": loss for task, loss in zip(info.tasks, info.losses, strict=True)}
    if info.weights is not None:
        row |= {f"weight/{task}": w for task, w in zip(info.tasks, info.weights.mean(dim=0), strict=True)}
    return row


def _divided(losses: Losses, n: int) -> Losses:
    if isinstance(losses, Tensor):
        return losses / n
    if isinstance(losses, Mapping):
        return {name: loss / n if isinstance(loss, Tensor) else loss for name, loss in losses.items()}
    return [loss / n if isinstance(loss, Tensor) else loss for loss in losses]
