"""The ordinary backward pass of the weighted sum, for weights that are known beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.engines.sequential import seed_like
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


def split_backward(
    losses: TaskLosses,
    weights: Tensor,
    shared: Sequence[Tensor],
    task_specific: Sequence[Tensor],
    *,
    grad_scale: Tensor | None,
) -> None:
    """As `weighted_backward` on ``shared``, while ``task_specific`` get the gradient of the plain sum.

    It passes the heads twice and the shared trunk once.
    """
    if task_specific:
        outputs, ones = _seeds(losses, torch.ones_like(weights), grad_scale)
        torch.autograd.backward(outputs, ones, inputs=list(task_specific), retain_graph=True)
    outputs, seeds = _seeds(losses, weights, grad_scale)
    torch.autograd.backward(outputs, seeds, inputs=list(shared))


def _seeds(losses: TaskLosses, weights: Tensor, grad_scale: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    outputs = [losses.outputs[t] for t in losses.present]
    factors = weights if grad_scale is None else weights * grad_scale
    seeds = [seed_like(factors[t], o) for t, o in zip(losses.present, outputs, strict=True) if o is not None]
    return outputs, seeds  # pyright: ignore[reportReturnType]
