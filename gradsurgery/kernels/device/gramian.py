"""Gramians of all blocks, in two launches: one of partial Gramians, a program a segment, and one of their sums.

Up to 16 tasks in float32, every thread keeps all T (T + 1) / 2 sums over its own columns in registers, by plain
multiply-adds: 3 for two tasks and 136 for sixteen. By count these stay below a third of what an H100 can do in the time
that the columns take to arrive. ``tl.dot`` would pad two tasks to 16 x 16 products, and in full float32 (never TF32,
whose 11 bits blur conflicts) it reads shared memory for nearly every product. Beyond that, and from 9 tasks on in half
precision, where tensor cores multiply exactly into float32, it is ``tl.dot``; in float32 the products of 17 tasks and
more take longer than the reading, whoever makes them.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.device.segments import Segments, alignment, on, row_major, segments, span

# Registers of a thread: for its sums alone, and with the columns that it has just read. Addresses come on top: at 136
# sums the compiler uses all 255 that there are, and spills none within the loop.
SUMS, REGISTERS = 144, 192
# Threads of a program that keeps its sums in registers.
LANES = 128
# Tasks up to which half precision is better widened than brought to the tensor cores.
FEW = 8
# Columns of one chain of float32 sums in ``tl.dot``, as in the torch body; less than half of it.
CHAIN = 8192
# Entries of a Gramian, and partial Gramians, that a program of the second launch reads at a time.
ENTRIES, PARTIALS = 16, 4096


@triton.constexpr_function
def pairs(T, CROSS):
    """The entries of a Gramian that differ."""
    return tuple((i, j) for i in range(T) for j in range(T if CROSS else i + 1))


@triton.jit
def load_rows(rows, at, column, inside, stride, T: tl.constexpr, ACC: tl.constexpr):
    """T tiles of columns, one a task."""
    x = ()
    for i in tl.static_range(T):
        x += (tl.load(rows + i * stride + at + column, mask=inside, other=0.0).to(ACC),)
    return x


@triton.jit(do_not_specialize=["stride", "stride_other", "size", "d"])
def few_kernel(
    jacobian,
    other,
    table,
    partial,
    stride,
    stride_other,
    size,
    d,
    T: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CROSS: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    start, count = span(table, n, size, d, TABLE, ALIGN)
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    stride_other = tl.multiple_of(stride_other.to(tl.int64), ALIGN)
    jacobian += start
    other += start
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    entries: tl.constexpr = pairs(T, CROSS)
    total = ()
    for _ in tl.static_range(len(entries)):
        total += (tl.zeros((LANES,), ACC),)
    for at in range(0, count, LANES * VECTOR):
        inside = at + column < count
        x = load_rows(jacobian, at, column, inside, stride, T, ACC)
        y = load_rows(other, at, column, inside, stride_other, T, ACC) if CROSS else x
        moved = ()
        for p in tl.static_range(len(entries)):
            moved += (total[p] + tl.sum(x[entries[p][0]] * y[entries[p][1]], axis=1),)
        total = moved
    partial += n * T * T
    for p in tl.static_range(len(entries)):
        entry = tl.sum(total[p].to(tl.float64), axis=0)
        tl.store(partial + entries[p][0] * T + entries[p][1], entry)
        if not CROSS:
            tl.store(partial + entries[p][1] * T + entries[p][0], entry)


@triton.jit(do_not_specialize=["stride", "stride_other", "size", "d", "T"])
def many_kernel(
    jacobian,
    other,
    table,
    partial,
    stride,
    stride_other,
    size,
    d,
    T,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    CROSS: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    start, count = span(table, n, size, d, TABLE, ALIGN)
    stride = tl.multiple_of(stride.to(tl.int64), ALIGN)
    stride_other = tl.multiple_of(stride_other.to(tl.int64), ALIGN)
    i = tl.arange(0, TILE)
    column = tl.arange(0, DEPTH)
    rows = jacobian + start + i[:, None] * stride + column[None, :]
    others = other + start + i[:, None] * stride_other + column[None, :]
    total = tl.zeros((TILE, TILE), ACC)
    for at in range(0, count, DEPTH):
        inside = (i[:, None] < T) & (at + column < count)[None, :]
        x = tl.load(rows + at, mask=inside, other=0.0)
        y = tl.load(others + at, mask=inside, other=0.0) if CROSS else x
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee", out_dtype=ACC)
    entry = partial + n * T * T + i[:, None] * T + i[None, :]
    tl.store(entry, total.to(tl.float64), mask=(i[:, None] < T) & (i[None, :] < T))


@triton.jit(do_not_specialize=["segments", "firsts", "squares"])
def sum_kernel(
    partial, table, gramian, segments, firsts, squares, ROWS: tl.constexpr, ENTRIES: tl.constexpr, TABLE: tl.constexpr
):
    """Of each block's partial Gramians, of ``squares`` entries each."""
    b = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    first, last = b * 0, b * 0 + segments
    if TABLE:
        first, last = tl.load(table + firsts + b), tl.load(table + firsts + b + 1)
    total = tl.zeros((ROWS, ENTRIES), tl.float64)
    for n in range(first, last, ROWS):
        row = n + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (entry < squares)[None, :]
        total += tl.load(partial + row[:, None] * squares + entry[None, :], mask=inside, other=0.0)
    tl.store(gramian + b * squares + entry, tl.sum(total, axis=0), mask=entry < squares)


def vector_of(T: int, dtype: torch.dtype, *, cross: bool) -> int:
    """Columns that a thread reads at a time where its registers hold all sums; 0 where they had better not."""
    words = 2 if dtype == torch.float64 else 1
    sums = words * len(pairs(T, cross))
    if sums > SUMS or (dtype.itemsize == 2 and T > FEW):
        return 0
    vector = 16 // dtype.itemsize
    while vector > 1 and sums + words * vector * T * (2 if cross else 1) > REGISTERS:
        vector //= 2
    return vector


def tile_of(T: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Side of the padded Gramian, columns a step, and warps, of ``tl.dot``."""
    side = max(16, triton.next_power_of_2(T))
    depth = min(512 // dtype.itemsize, 16384 // (side * dtype.itemsize))
    return side, max(16, depth), 8 if side > 64 else 4


def gramian(jacobian: Tensor, bounds: Sequence[int], other: Tensor | None) -> Tensor:
    """See `gradsurgery.kernels.gramian`; up to 128 tasks."""
    T, B = len(jacobian), len(bounds) - 1
    jacobian = row_major(jacobian)
    rows = (jacobian,) if other is None else (jacobian, row_major(other))
    result = torch.zeros(B, T, T, dtype=torch.float64, device=jacobian.device)
    if not bounds[-1]:
        return result
    vector = vector_of(T, jacobian.dtype, cross=other is not None)
    limits = {} if vector else {"least": 64 * T, "most": CHAIN}
    # As many programs as fit at a time, each with some 2 KiB on the way a task.
    cut = segments(bounds, max(2, 32 // T), jacobian.device, **limits)
    partial = torch.empty(cut.count, T, T, dtype=torch.float64, device=jacobian.device)
    with on(jacobian.device):
        _launch(rows, bounds[-1], cut, partial, vector)
        entries = min(ENTRIES, triton.next_power_of_2(T * T))
        sum_kernel[(B, triton.cdiv(T * T, entries))](
            partial,
            result if cut.table is None else cut.table,
            result,
            cut.count,
            cut.firsts,
            T * T,
            ROWS=min(PARTIALS // entries, max(16, triton.next_power_of_2(cut.longest))),
            ENTRIES=entries,
            TABLE=cut.table is not None,
            num_warps=8,
        )
    return result


def _launch(rows: tuple[Tensor, ...], d: int, cut: Segments, partial: Tensor, vector: int) -> None:
    jacobian, other, T = rows[0], rows[-1], len(rows[0])
    table = partial if cut.table is None else cut.table
    arguments = (jacobian, other, table, partial, jacobian.stride(0), other.stride(0), cut.size, d)
    options = {
        "CROSS": len(rows) > 1,
        "TABLE": cut.table is not None,
        "ALIGN": alignment(*rows) if cut.aligned else 1,
        "ACC": tl.float64 if jacobian.dtype == torch.float64 else tl.float32,
    }
    if vector:
        few_kernel[(cut.count,)](*arguments, T=T, LANES=LANES, VECTOR=vector, num_warps=LANES // 32, **options)
    else:
        side, depth, warps = tile_of(T, jacobian.dtype)
        many_kernel[(cut.count,)](*arguments, T, TILE=side, DEPTH=depth, num_warps=warps, **options)
