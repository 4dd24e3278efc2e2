"""How d columns are shared out to programs: in segments, none of which reaches over the end of a block."""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements. Loads are 16 bytes wide where all that they start from is a multiple of this.
ALIGNMENT = 16
# Columns: a segment is a multiple of it, and no shorter for the sake of more programs.
GRAIN = 1024
# Of an H100; where there is no device, kernels are interpreted and nothing depends on it.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Segments:
    """N segments of B blocks.

    Attributes:
        count: N.
        size: columns of a segment, but for the last of a block.
        longest: segments of the block that has most.
        aligned: whether every block starts and ends at a multiple of `ALIGNMENT`.
        table: (2 N + B + 2,) int64 on the device: the N + 1 edges of the segments; the B + 1 places of the blocks'
            first segments; the N blocks that they belong to. None for a single block, whose edges are multiples of
            ``size``.
    """

    count: int
    size: int
    longest: int
    aligned: bool
    table: Tensor | None

    @property
    def firsts(self) -> int:
        """Where in the table the blocks' first segments are."""
        return self.count + 1


def segments(bounds: Sequence[int], programs: int, device: torch.device, *, least: int = 0, most: int = 0) -> Segments:
    """Cuts blocks into about as many segments as there are to be programs.

    Args:
        bounds: B + 1 ascending column indices, from 0 to d.
        programs: wanted on each multiprocessor.
        device: where the table is to be.
        least, most: columns of a segment, 0 for no limit.

    Raises:
        RuntimeError: the table is not there yet, and cannot be made while a CUDA graph is captured.
    """
    d = bounds[-1]
    size = max(d // (_multiprocessors(device) * programs), least) + 1
    size = -(-min(size, most or size) // GRAIN) * GRAIN
    if len(bounds) == 2:
        count = -(-d // size)
        return Segments(count, size, count, d % ALIGNMENT == 0, None)
    found = _cut(tuple(bounds), size, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph knows the table by its address, and does not keep it alive.
        _CAPTURED.add(found.table)
    return found


_CAPTURED: set[Tensor | None] = set()


@functools.lru_cache(maxsize=64)
def _cut(bounds: tuple[int, ...], size: int, device: torch.device) -> Segments:
    edges, firsts, owners = [0], [0], []
    for block, (start, stop) in enumerate(pairwise(bounds)):
        edges += [*range(start + size, stop, size), *([stop] if stop > start else [])]
        owners += [block] * (len(edges) - 1 - len(owners))
        firsts.append(len(owners))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"The table of these {len(firsts) - 1} blocks is made at the first call, which copies it to the device: "
            "take one step before the CUDA graph is captured."
        )
    aligned = all(bound % ALIGNMENT == 0 for bound in bounds)
    # The copy is waited for, once, since streams other than this one will read it, too.
    longest = max(stop - start for start, stop in pairwise(firsts))
    table = torch.tensor([*edges, *firsts, *owners], device=device)
    return Segments(len(owners), size, longest, aligned, table)


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def row_major(rows: Tensor) -> Tensor:
    """The matrix, with columns side by side in memory; rows may be any stride apart."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def alignment(*tensors: Tensor) -> int:
    """Elements of which every row of these starts at a multiple: `ALIGNMENT`, or 1."""
    strides = [tensor.stride(0) for tensor in tensors if tensor.ndim > 1]
    aligned = all(n % ALIGNMENT == 0 for n in strides) and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return ALIGNMENT if aligned else 1


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes it the device that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def span(table, n, size, d, TABLE: tl.constexpr, ALIGN: tl.constexpr):
    """First column (int64) of segment n, and how many it has (int32)."""
    if TABLE:
        start, stop = tl.load(table + n), tl.load(table + n + 1)
    else:
        start = n * size
        stop = tl.minimum(start + size, d)
    start, count = tl.multiple_of(start, ALIGN), tl.multiple_of((stop - start).to(tl.int32), ALIGN)
    return start, count
