"""Hugging Face's `Trainer` (https://huggingface.co/docs/transformers) on several losses, by way of Accelerate.

`MultiTaskTrainer` is a `Trainer` whose subclass returns a loss a task. In a loop of one's own over Accelerate nothing
of this is needed: wrap the base optimizer, pass it through ``accelerator.prepare``, and call
`gradsurgery.backward(optimizer, losses)` where ``accelerator.backward(loss)`` stood.
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gradsurgery.integrations.trainers import MicroBatches, step_log
from gradsurgery.optimizer import MTLOptimizer, scaler_of, unwrap


class MultiTaskTrainer(Trainer, abc.ABC):
    """A `Trainer` of one model on several losses.

    A subclass has `compute_losses`. Everything else, arguments, callbacks, mixed precision, DistributedDataParallel,
    checkpoints, is the `Trainer`'s. Every logged row has ``loss/<task>`` and, where the method weighs,
    ``weight/<task>`` of the last step.

    Args:
        *args, **kwargs: the `Trainer`'s.
        method: as in `MTLOptimizer`.
        shared: model -> its shared parameters; None finds them in the first batch.
        surgery: further arguments of `MTLOptimizer`, hyperparameters of the method among them.
        automatic: return `MTLOptimizer.combine` of the losses from ``compute_loss`` and let the `Trainer` pass it
            backward, at the price of one backward more a step and with weighted gradients for the heads. Otherwise
            surgery proper; the task gradients of ``gradient_accumulation_steps`` micro-batches are summed before it.

    Raises:
        ValueError: DeepSpeed runs the backward pass, and surgery proper is asked for.
    """

    def __init__(
        self,
        *args: Any,
        method: Any = "cagrad",
        shared: Callable[[Any], Iterable[Tensor]] | None = None,
        surgery: Mapping[str, Any] | None = None,
        automatic: bool = False,
        **kwargs: Any,
    ) -> None:
        self._method, self._shared, self._surgery, self._automatic = method, shared, dict(surgery or {}), automatic
        self._micro_batches = MicroBatches()
        super().__init__(*args, **kwargs)
        # Losses are means over the micro-batch, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = False
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed puts its own optimizer in the place of any that it is given, and its own backward. Call "
                "combine() of an MTLOptimizer over the same parameters in a loop of your own, and pass what it returns "
                "to engine.backward()."
            )
        if self.optimizer is not None:
            self.optimizer = self._wrapped(self.optimizer)

    @abc.abstractmethod
    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Mapping[str, Tensor | None], Any]:
        """The losses of a batch by task, and the model's outputs, of which evaluation makes predictions."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = self._wrapped(super().create_optimizer(*args, **kwargs))
        return self.optimizer

    def _wrapped(self, base: Any) -> MTLOptimizer:
        if isinstance(base, MTLOptimizer):
            return base
        shared = None if self._shared is None else self._shared(self.model)
        return MTLOptimizer(base, self._method, shared, **self._surgery)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The combined losses in training, their plain sum in evaluation."""
        losses, outputs = self.compute_losses(model, inputs)
        total = unwrap(self.optimizer).combine(losses) if model.training and torch.is_grad_enabled() else _sum(losses)
        return (total, outputs) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._automatic:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, _ = self.compute_losses(model, inputs)
        steps = self.current_gradient_accumulation_steps
        last, scaler = self.accelerator.sync_gradients, scaler_of(self.optimizer)
        self._micro_batches.backward(unwrap(self.optimizer), losses, of=steps, last=last, scaler=scaler)
        return _sum(losses) / steps

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        info = None if self.optimizer is None else unwrap(self.optimizer).info
        if "loss" in logs:
            logs = {**logs, **{name: value.item() for name, value in step_log(info).items()}}
        super().log(logs, *args, **kwargs)


def _sum(losses: Mapping[str, Tensor | None]) -> Tensor:
    return torch.stack([loss.detach() for loss in losses.values() if loss is not None]).sum()
