"""The rules that work column by column, with NaN where a task gradient is not finite: one launch each.

In half precision the purity of signs is taken in float32, where the torch body rounds it to the width of the rows.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.device.combine import THREADS, group_of
from gradsurgery.kernels.device.segments import alignment, on, row_major

# Tasks up to which a column is sorted in registers; a network for more takes minutes to compile.
SORTED = 32
# Entries of a tile in which ranks are counted, 32 a thread.
TILE = 8192


@triton.jit
def nan_if_not_finite(total, out):
    """0, or NaN where a sum leaves the range of the rows."""
    rounded = total.to(out.dtype.element_ty).to(total.dtype)
    return rounded - rounded


@triton.jit(do_not_specialize=["stride", "T"])
def graddrop_kernel(
    jacobian,
    uniform,
    out,
    stride,
    n,
    T,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    LEAK: tl.constexpr,
    EXACT: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    total = tl.zeros((BLOCK,), ACC)
    above, below = total, total
    for first in range(0, T, GROUP):
        for i in tl.static_range(GROUP):
            t = first + i
            x = tl.load(jacobian + t * stride + column, mask=inside & (t < T), other=0.0).to(ACC)
            total += x
            above += tl.maximum(x, 0.0)
            below += tl.minimum(x, 0.0)
    size = above - below
    there = size > 0
    size = tl.where(there, size, 1.0)
    ratio = tl.div_rn(total, size) if EXACT else total / size
    purity = tl.where(there, ratio, 0.0)
    u = tl.load(uniform + column, mask=inside, other=0.0).to(ACC)
    kept = tl.where(0.5 * (1 + purity) > u, above, below)
    direction = LEAK * total + (1 - LEAK) * kept
    tl.store(out + column, direction + nan_if_not_finite(total, out), mask=inside)


@triton.constexpr_function
def network(n):
    """Batcher's odd-even merge sort of n entries: pairs (i, j), of which the smaller entry goes to i."""
    swaps, p = [], 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                near = [i for i in range(j, min(j + k, n - k)) if i // (2 * p) == (i + k) // (2 * p)]
                swaps += [(i, i + k) for i in near]
            k //= 2
        p *= 2
    return tuple(swaps)


@triton.jit
def swap(x, i: tl.constexpr, j: tl.constexpr):
    """The tuple with entries i < j in order."""
    low = tl.minimum(x[i], x[j])
    high = tl.maximum(x[i], x[j])
    return x[:i] + (low,) + x[i + 1 : j] + (high,) + x[j + 1 :]  # noqa: RUF005


@triton.jit(do_not_specialize=["stride"])
def sorted_kernel(
    jacobian,
    out,
    stride,
    n,
    T: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    x = ()
    for i in tl.static_range(T):
        x += (tl.load(jacobian + i * stride + column, mask=inside, other=0.0).to(ACC),)
    everything = x[0]
    for i in tl.static_range(1, T):
        everything += x[i]
    swaps: tl.constexpr = network(T)
    for s in tl.static_range(len(swaps)):
        x = swap(x, swaps[s][0], swaps[s][1])
    total = x[CUT]
    for i in tl.static_range(CUT + 1, T - CUT):
        total += x[i]
    direction = total / (T - 2 * CUT)
    tl.store(out + column, direction + nan_if_not_finite(everything, out), mask=inside)


@triton.jit(do_not_specialize=["stride", "T", "cut"])
def ranked_kernel(
    jacobian,
    out,
    stride,
    n,
    T,
    cut,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    i = tl.arange(0, SIDE)
    task = i[:, None] < T
    place = jacobian + i[:, None] * stride + column[None, :]
    x = tl.load(place, mask=task & inside[None, :], other=0.0).to(ACC)
    rank = tl.zeros((SIDE, BLOCK), tl.int32)
    for t in range(T):
        # Read a moment ago, and so in cache.
        row = tl.load(jacobian + t * stride + column, mask=inside, other=0.0).to(ACC)[None, :]
        # Of equal entries the earlier comes first.
        rank += ((row < x) | ((row == x) & (t < i)[:, None])).to(tl.int32)
    kept = task & (rank >= cut) & (rank < T - cut)
    everything = tl.sum(x, axis=0)
    direction = tl.sum(tl.where(kept, x, 0.0), axis=0) / (T - 2 * cut).to(ACC)
    tl.store(out + column, direction + nan_if_not_finite(everything, out), mask=inside)


def _prepare(jacobian: Tensor) -> tuple[Tensor, Tensor, tl.dtype]:
    jacobian = row_major(jacobian)
    out = torch.empty(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
    return jacobian, out, tl.float64 if jacobian.dtype == torch.float64 else tl.float32


def block_of(T: int, dtype: torch.dtype) -> int:
    """Columns of a program that sorts them: a thread has registers for some 64 entries."""
    entries = 64 // triton.next_power_of_2(T) // max(1, dtype.itemsize // 4)
    return THREADS * max(1, min(16 // dtype.itemsize, entries))


def graddrop(jacobian: Tensor, uniform: Tensor, leak: float) -> Tensor:
    """See `gradsurgery.kernels.graddrop_columns`."""
    jacobian, out, wide = _prepare(jacobian)
    T, n = jacobian.shape
    block = THREADS * 16 // jacobian.dtype.itemsize
    if n:
        with on(jacobian.device):
            graddrop_kernel[(triton.cdiv(n, block),)](
                jacobian,
                uniform.contiguous(),
                out,
                jacobian.stride(0),
                n,
                T,
                BLOCK=block,
                GROUP=group_of(T),
                LEAK=leak,
                # A plain division in float32 is off by a rounding, which a draw may fall into.
                EXACT=wide == tl.float32,
                ALIGN=alignment(jacobian, uniform),
                ACC=wide,
                num_warps=THREADS // 32,
            )
    return out


def trimmed_mean(jacobian: Tensor, trim: int) -> Tensor:
    """See `gradsurgery.kernels.trimmed_mean_columns`."""
    jacobian, out, wide = _prepare(jacobian)
    T, n = jacobian.shape
    cut = min(trim, (T - 1) // 2)
    arguments = (jacobian, out, jacobian.stride(0), n)
    options = {"ALIGN": alignment(jacobian), "ACC": wide}
    if not n:
        return out
    with on(jacobian.device):
        if T <= SORTED:
            block = block_of(T, jacobian.dtype)
            grid = (triton.cdiv(n, block),)
            sorted_kernel[grid](*arguments, T=T, CUT=cut, BLOCK=block, num_warps=THREADS // 32, **options)
        else:
            side = triton.next_power_of_2(T)
            block = TILE // side
            grid = (triton.cdiv(n, block),)
            ranked_kernel[grid](*arguments, T, cut, SIDE=side, BLOCK=block, num_warps=8, **options)
    return out
