"""Gramian and combine over flat gradients: each reads J once. Kernels on CUDA where there are such, else torch.

``J (T, d)`` holds the blocks side by side; ``bounds (B + 1)`` are their ends: block ``b`` is the columns from
``bounds[b]`` to ``bounds[b + 1]``.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradsurgery.kernels.accelerator import flat_combine, flat_gramian, has_kernel

# Columns of one partial Gramian. A thin GEMM over all of d runs 2-3x slower than a batch of these (and loses digits):
# they stay in cache, fill all cores, and are summed in float64.
CHUNK = 16384
# Rows from which products one after another, of longer pieces, are faster than a batch: by 1.7 to 2 for 16 to 64 rows.
MANY = 16
LONG = 1 << 16
# Columns of half-precision rows that are widened at a time.
STRIP = 1 << 22
# Columns of a direction that stay in cache while rows are added to it.
CACHED = 1 << 19
HALF = (torch.bfloat16, torch.float16)


def gramian(jacobian: Tensor, bounds: Sequence[int], other: Tensor | None = None) -> Tensor:
    """Inner products of the rows of each block.

    Args:
        jacobian: (T, d), any floating dtype.
        bounds: B + 1 ascending column indices, from 0 to d.
        other: (T, d), whose rows make the second axis; ``jacobian`` itself if None.

    Returns:
        (B, T, T) float64; accumulated in float32 at least within a chunk and in float64 across chunks. Rows in float32
        keep their digits for norms from about 1e-16 to 1e18, beyond which their squares leave its range.
    """
    # Asked first, here and below: on the CPU, half a microsecond of a call counts.
    if jacobian.is_cuda and has_kernel(jacobian, other):
        return flat_gramian(jacobian, bounds, other)
    blocks = [slice(start, stop) for start, stop in pairwise(bounds)]
    return torch.stack([block_gramian(jacobian[:, b], None if other is None else other[:, b]) for b in blocks])


def block_gramian(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Inner products (T, T) float64 of one block's rows (T, n) with those of others (T, n), or among themselves."""
    if rows.is_cuda and has_kernel(rows, others):
        return flat_gramian(rows, [0, rows.shape[1]], others)[0]
    if len(rows) >= MANY and not rows.is_cuda:
        others = rows if others is None else others
        pairs = zip(rows.split(LONG, dim=1), others.split(LONG, dim=1), strict=True)
        return torch.stack([(accumulable(a) @ accumulable(b).mT).double() for a, b in pairs]).sum(dim=0)
    whole = rows.shape[1] // CHUNK * CHUNK
    tail = accumulable(rows[:, whole:])
    total = (tail @ (tail if others is None else accumulable(others[:, whole:])).mT).double()
    if whole:
        chunks = _chunks(rows[:, :whole])
        against = chunks if others is None else _chunks(others[:, :whole])
        total += torch.bmm(chunks, against.mT).double().sum(dim=0)
    return total


def _chunks(rows: Tensor) -> Tensor:
    return accumulable(rows.view(len(rows), -1, CHUNK).transpose(0, 1))


def accumulable(rows: Tensor) -> Tensor:
    """In a dtype whose products can be summed: half precision is widened."""
    return rows.float() if rows.dtype in HALF else rows


def combine(weights: Tensor, jacobian: Tensor, bounds: Sequence[int], out: Tensor | None = None) -> Tensor:
    """The direction: every block's rows, weighted and summed.

    Args:
        weights: (B, T), or (1, T) for the same weights in all blocks.
        jacobian: (T, d).
        bounds: B + 1 ascending column indices, from 0 to d.
        out: contiguous memory (d,) in the dtype of ``jacobian``, used where that saves time; not part of it.

    Returns:
        (d,) in the dtype of ``jacobian``.
    """
    if jacobian.is_cuda and has_kernel(jacobian, weights):
        return flat_combine(weights, jacobian, bounds, out)
    if len(weights) == 1:
        return combine_block(weights[0], jacobian, out)
    blocks = zip(weights, pairwise(bounds), strict=True)
    return torch.cat([combine_block(weight, jacobian[:, start:stop]) for weight, (start, stop) in blocks])


def combine_block(weight: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """One block's rows (T, n), weighted (T,) and summed: (n,), in the memory of ``out`` where that saves time."""
    if rows.is_cuda and has_kernel(rows, weight):
        return flat_combine(weight.unsqueeze(0), rows, [0, rows.shape[1]], out)
    if rows.dtype in HALF:
        # Rounding the weights to half precision would turn a direction that conflicts with no task into one that does.
        return torch.cat([(weight.float() @ strip.float()).to(rows.dtype) for strip in rows.split(STRIP, dim=1)])
    weight = weight.to(rows.dtype)
    if rows.device.type != "cpu" or out is None:
        return weight @ rows
    for part, strip in zip(out.split(CACHED), rows.split(CACHED, dim=1), strict=True):
        torch.mv(strip.mT, weight, out=part)
    return out
