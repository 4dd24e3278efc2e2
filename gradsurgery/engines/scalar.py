"""The ordinary backward pass of the weighted sum, for weights that are known beforehand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurgery.distributed import Ranks
from gradsurgery.engines.engine import Batch, accumulate, into_grad, seed_like
from gradsurgery.graph import survey
from gradsurgery.losses import Losses, Output, TaskLosses


def weighted_backward(
    losses: TaskLosses, weights: Tensor, *, grad_scale: Tensor | None, ranks: Ranks | None = None
) -> None:
    """``(weights * losses).sum().backward()``: every leaf gets its weighted gradient.

    Args:
        losses: the batch; absent tasks are left out.
        weights: (T,).
        grad_scale: () factor on every gradient (an AMP scale), or None.
        ranks: over which gradients are summed, by the model's wrapper where that can be.
    """
    native = ranks is not None and ranks.native
    factor = ranks.size if ranks is not None and native else 1
    _backward(losses, *_seeds(losses, weights * factor, grad_scale), ranks, native=native)


def replaced_backward(
    batch: Batch, head_weights: Tensor | None, edges: Sequence[GradientEdge], change: Callable[[int, Tensor], Tensor]
) -> None:
    """One ordinary backward of all losses, raw or weighted, in which the gradients at some edges become others.

    Args:
        batch: whose graph is freed.
        head_weights: (T,), or None for the plain sum.
        edges: where gradients are replaced; what lies below takes what they become.
        change: of the edge with that number, the gradient (*shape) that arrives, in the scale of this rank's share ->
            what it becomes.
    """
    losses, ranks = batch.losses, batch.ranks
    native = ranks is not None and ranks.native
    factor = ranks.size if ranks is not None and native else 1
    weights = torch.ones_like(losses.values) if head_weights is None else head_weights

    def hook(n: int) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
        def replace(arriving: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            nr = edges[n].output_nr
            g = arriving[nr]
            changed = None if g is None else change(n, g / factor) * factor
            return (*arriving[:nr], changed, *arriving[nr + 1 :])

        return replace

    handles = [edge.node.register_prehook(hook(n)) for n, edge in enumerate(edges)]
    try:
        _backward(losses, *_seeds(losses, weights * factor, batch.grad_scale), ranks, native=native)
    finally:
        for handle in handles:
            handle.remove()


def weighted_sum(losses: Losses, read: TaskLosses, factors: Tensor, params: Sequence[Tensor]) -> Tensor:
    """``(factors * losses).sum()`` (), for a backward of the caller's.

    Args:
        losses: as they were given.
        read: the same.
        factors: (T,), without a graph.
        params: those that its backward must reach, come what may: a wrapper over several ranks waits for them.
    """
    if isinstance(losses, Tensor):
        return (losses * factors.to(losses.dtype)).sum()
    terms = [o * factors[t].to(o.dtype) for t, o in enumerate(read.outputs) if isinstance(o, Tensor)]
    terms += [(p * 0).sum() for p in _unreached(read, params)]
    # One by one: they may be of several dtypes.
    total = terms[0].reshape(())
    for term in terms[1:]:
        total = total + term.reshape(())
    return total


def _backward(
    losses: TaskLosses, outputs: Sequence[Output], seeds: Sequence[Tensor], ranks: Ranks | None, *, native: bool
) -> None:
    if ranks is None:
        torch.autograd.backward(outputs, seeds)  # pyright: ignore
        return
    if native:
        # The wrapper divides by the number of ranks, and waits for every parameter of its own.
        missing = _unreached(losses, ranks.awaited)
        # All ranks know of a task that none has.
        nowhere = _unreached_anywhere(missing, ranks) if len(losses.present) < len(losses.tasks) else []
        untouched = [p for p in nowhere if p.grad is None]
        torch.autograd.backward([*outputs, *missing], [*seeds, *(torch.zeros_like(p) for p in missing)])  # pyright: ignore
        for p in untouched:
            p.grad = None
        return
    params = ranks.params
    found: Sequence[Tensor | None] = [None] * len(params)
    if outputs:
        found = torch.autograd.grad(outputs, params, seeds, allow_unused=True)  # pyright: ignore
    totals = ranks.total(params, found)
    accumulate((p, g) for p, g in zip(params, totals, strict=True) if g is not None)


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
        into_grad(batch, *_seeds(batch.losses, own, batch.grad_scale), batch.task_specific, retain=True)
    into_grad(batch, *_seeds(batch.losses, weights, batch.grad_scale), batch.layout.params, retain=False)


def _seeds(losses: TaskLosses, weights: Tensor, grad_scale: Tensor | None) -> tuple[list[Output], list[Tensor]]:
    factors = weights if losses.share is None else weights * losses.share
    factors = factors if grad_scale is None else factors * grad_scale
    outputs = [losses.outputs[t] for t in losses.here]
    seeds = [seed_like(factors[t], o) for t, o in zip(losses.here, outputs, strict=True) if o is not None]
    return outputs, seeds  # pyright: ignore[reportReturnType]


def _unreached(losses: TaskLosses, params: Sequence[Tensor]) -> list[Tensor]:
    """Parameters that the losses at hand do not reach, where some are absent."""
    if not params or len(losses.here) == len(losses.tasks):
        return []
    reached = {id(p) for p in survey(losses.outputs).leaves.values()}
    return [p for p in params if id(p) not in reached]


def _unreached_anywhere(missing: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Those that no rank's losses reach."""
    here = {id(p) for p in missing}
    reached = ranks.anywhere([id(p) not in here for p in ranks.awaited])
    return [p for p, seen in zip(ranks.awaited, reached, strict=True) if not seen]
