"""The weighted sum of rows, of all blocks in one launch."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.device.segments import alignment, on, row_major, segments, span

# Rows whose loads are under way at a time.
GROUP = 8
THREADS = 128
# On each multiprocessor.
PROGRAMS = 16


def group_of(T: int) -> int:
    """Rows a round: T in rounds of equal size, as near as can be."""
    return -(-T // -(-T // GROUP))


@triton.jit(do_not_specialize=["stride", "size", "d", "T", "owners"])
def combine_kernel(
    weights,
    jacobian,
    table,
    out,
    stride,
    size,
    d,
    T,
    owners,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    OWN: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    start, count = span(table, n, size, d, TABLE, ALIGN)
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    if OWN:
        weights += tl.load(table + owners + n) * T
    column = tl.arange(0, BLOCK)
    for at in range(0, count, BLOCK):
        inside = at + column < count
        total = tl.zeros((BLOCK,), ACC)
        for first in range(0, T, GROUP):
            for i in tl.static_range(GROUP):
                t = first + i
                w = tl.load(weights + t, mask=t < T, other=0.0).to(ACC)
                total += w * tl.load(jacobian + t * stride + start + at + column, mask=inside & (t < T), other=0.0).to(
                    ACC
                )
        tl.store(out + start + at + column, total, mask=inside)


def combine(weights: Tensor, jacobian: Tensor, bounds: Sequence[int], out: Tensor) -> None:
    """Writes what `gradsurgery.kernels.combine` returns to ``out (d,)``."""
    T, d = jacobian.shape
    if not d:
        return
    jacobian = row_major(jacobian)
    own = len(weights) > 1
    # The same weights everywhere need no blocks.
    cut = segments(bounds if own else (0, d), PROGRAMS, jacobian.device)
    with on(jacobian.device):
        combine_kernel[(cut.count,)](
            weights.double().contiguous(),
            jacobian,
            out if cut.table is None else cut.table,
            out,
            jacobian.stride(0),
            cut.size,
            d,
            T,
            cut.firsts + len(bounds),
            BLOCK=THREADS * 16 // jacobian.dtype.itemsize,
            GROUP=group_of(T),
            OWN=own,
            TABLE=cut.table is not None,
            ALIGN=alignment(jacobian, out) if cut.aligned else 1,
            ACC=tl.float64 if jacobian.dtype == torch.float64 else tl.float32,
            num_warps=THREADS // 32,
        )
