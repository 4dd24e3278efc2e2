"""Gramian and combine over flat gradients, in torch on any device: each reads J once.

``J (T, d)`` holds the blocks side by side; ``bounds (B + 1)`` are their ends: block ``b`` is the columns from
``bounds[b]`` to ``bounds[b + 1]``.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Columns of one partial Gramian. A thin GEMM over all of d runs 2-3x slower than a batch of these (and loses digits):
# they stay in cache, fill all cores, and are summed in float64.
CHUNK = 65536


def gramian(jacobian: Tensor, bounds: Sequence[int]) -> Tensor:
    """Inner products of the rows of each block.

    Args:
        jacobian: (T, d), any floating dtype.
        bounds: B + 1 ascending column indices, from 0 to d.

    Returns:
        (B, T, T) float64; accumulated in float32 at least within a chunk and in float64 across chunks.
    """
    return torch.stack([_block_gramian(jacobian[:, start:stop]) for start, stop in pairwise(bounds)])


def _block_gramian(rows: Tensor) -> Tensor:
    T, d = rows.shape
    whole = d // CHUNK * CHUNK
    tail = _accumulable(rows[:, whole:])
    total = (tail @ tail.mT).double()
    if whole:
        chunks = _accumulable(rows[:, :whole].view(T, -1, CHUNK).transpose(0, 1))
        total += torch.bmm(chunks, chunks.mT).double().sum(dim=0)
    return total


def _accumulable(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def combine(weights: Tensor, jacobian: Tensor, bounds: Sequence[int]) -> Tensor:
    """The direction: every block's rows, weighted and summed.

    Args:
        weights: (B, T), or (1, T) for the same weights in all blocks.
        jacobian: (T, d).
        bounds: B + 1 ascending column indices, from 0 to d.

    Returns:
        (d,) in the dtype of ``jacobian``.
    """
    weights = weights.to(jacobian.dtype)
    if len(weights) == 1:
        return weights[0] @ jacobian
    direction = jacobian.new_empty(jacobian.shape[1])
    for weight, start, stop in zip(weights, bounds[:-1], bounds[1:], strict=True):
        torch.mv(jacobian[:, start:stop].mT, weight, out=direction[start:stop])
    return direction
