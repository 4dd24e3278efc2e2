"""The ordinary backward pass of the weighted sum, for weights that are known beforehand."""

import torch
from torch import Tensor

from gradsurgery.engines.engine import Batch, seed_like
from gradsurgery.losses import TaskLosses


def weighted_backward(losses: TaskLosses, weights: Tensor, *, grad_scale: Tensor | None) -> None:
    """``(weights * losses).sum().backward()``: every leaf gets its weighted gradient.

    Args:
        losses: the batch; absent tasks are left out.
        weights: (T,).
        grad_scale: () factor on every gradient (an AMP scale), or None.
    """
    outputs, seeds = _seeds(losses, weights, grad_scale)
    torch.autograd.backward(outputs, seeds)


def split_backward(batch: Batch, weights: Tensor, head_weights: Tensor | None = None) -> None:
    """As `weighted_backward` on the shared parameters, while the task-specific ones get weights of their own.

    It passes the heads twice and the shared trunk once.

    Args:
        batch: whose graph is freed.
        weights: (T,), of the shared parameters.
        head_weights: (T,), of the others; None: the gradient of the plain sum.
    """
    if batch.task_specific:
        own = torch.ones_like(weights) if head_weights is None else head_weights
        outputs, seeds = _seeds(batch.losses, own, batch.grad_scale)
        torch.autograd.backward(outputs, seeds, inputs=list(batch.task_specific), retain_graph=True)
    outputs, seeds = _seeds(batch.losses, weights, batch.grad_scale)
    torch.autograd.backward(outputs, seeds, inputs=list(batch.layout.params))


def _seeds(losses: TaskLosses, weights: Tensor, grad_scale: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    outputs = [losses.outputs[t] for t in losses.present]
    factors = weights if grad_scale is None else weights * grad_scale
    seeds = [seed_like(factors[t], o) for t, o in zip(losses.present, outputs, strict=True) if o is not None]
    return outputs, seeds  # pyright: ignore[reportReturnType]
