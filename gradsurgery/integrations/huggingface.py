"""Hugging Face's `Trainer` (https://huggingface.co/docs/transformers) on several losses, by way of Accelerate.

`MultiTaskTrainer` is a `Trainer` whose subclass returns a loss a task. In a loop of one's own over Accelerate nothing
of this is needed: wrap the base optimizer, pass it through ``accelerator.prepare``, and call
`gradsurgery.backward(optimizer, losses)` where ``accelerator.backward(loss)`` stood.
"""

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gradsurgery.losses import Losses
from gradsurgery.optimizer import MTLOptimizer, backward, unwrap


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
        self._held = contextlib.ExitStack()
        self._holding = False
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
        if model.training and torch.is_grad_enabled():
            total = unwrap(self.optimizer).combine(losses)
        else:
            total = torch.stack([loss.detach() for loss in losses.values() if loss is not None]).sum()
        return (total, outputs) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._automatic:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, _ = self.compute_losses(model, inputs)
        steps = self.current_gradient_accumulation_steps
        total = torch.stack([loss.detach() for loss in losses.values() if loss is not None]).sum() / steps
        if steps > 1 and not self._holding:
            self._held.enter_context(unwrap(self.optimizer).accumulate())
            self._holding = True
        self._backward({name: None if loss is None else loss / steps for name, loss in losses.items()})
        return total

    def _backward(self, losses: Losses) -> None:
        try:
            backward(self.optimizer, losses)
        except BaseException:
            self._holding = False
            with contextlib.suppress(RuntimeError):
                self._held.close()
            raise
        if self._holding and self.accelerator.sync_gradients:
            self._holding = False
            self._held.close()

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        info = None if self.optimizer is None else unwrap(self.optimizer).info
        if info is not None and "loss" in logs:
            logs = {**logs, **{f"loss/{task}": v for task, v in zip(info.tasks, info.losses.tolist(), strict=True)}}
            if info.weights is not None:
                weights = info.weights.mean(dim=0).tolist()
                logs |= {f"weight/{task}": w for task, w in zip(info.tasks, weights, strict=True)}
        super().log(logs, *args, **kwargs)
