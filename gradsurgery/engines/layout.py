"""Where each shared parameter lies in a flat row of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradsurgery.distributed import BUCKET_BYTES, Ranks, Shards, local
from gradsurgery.engines.buckets import Buckets

# Elements. Every parameter starts on a boundary that vectorised kernels like; the gaps stay zero.
ALIGNMENT = 32
# Elements. On the CPU a direction is made in pieces of this size: malloc returns a larger block to the system when it
# is freed, and faulting it in again costs three times the arithmetic.
PIECE = 1 << 18
# Elements of a gradient that the CPU copies as it comes, out of the cache: what a smaller one takes is the call.
LARGE = 1 << 16

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Piece:
    """Consecutive parameters of one block: columns ``start`` to ``stop``, parameters ``first`` to ``last``."""

    block: int
    start: int
    stop: int
    first: int
    last: int


class Layout:
    """Shared parameters side by side, block after block, in a row of d elements: of those that are divided among ranks,
    this rank's parts.

    Attributes:
        params: the P parameters, ordered by block.
        block_of: (P) the block of each.
        bounds: B + 1 ends of the blocks, in elements.
        origins: P + 1, where each parameter starts in a row of whole ones, and its end.
        width: of a row, d or more: it falls into as many equal parts as there are ranks.
        buckets: of a row, which travel between ranks; None where none do.
        ranks: that average gradients; None in a single process.
        dtype: of a row: the widest among the parameters.
        device: of all of them.
        pieces: runs of parameters within a block, in which directions are made.
        spare: memory for gradients elsewhere in the graph, kept from step to step.
        large: positions of parameters whose gradients are worth a copy of their own.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], ranks: Ranks | None = None):
        self.ranks = ranks
        self.params = [p for block in blocks for p in block]
        self.block_of = [b for b, block in enumerate(blocks) for _ in block]
        self.dtype = _common_dtype(self.params)
        self.device = _common_device(self.params)
        self.bounds = [0]
        self._places: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self.origins: list[int] = []
        offset = whole = 0
        for block in blocks:
            for p in block:
                here = local(p)
                self._places.append((here.shape, _strides(here), offset))
                self.origins.append(whole)
                offset += _aligned(here.numel())
                whole += _aligned(p.numel())
            self.bounds.append(offset)
        self.origins.append(whole)
        unit = ALIGNMENT * (1 if ranks is None or self.shards is not None else ranks.size)
        self.width = -(-offset // unit) * unit
        self.buckets = None if ranks is None or self.shards is not None else self._buckets(ranks, unit)
        self.pieces = self._cut(blocks)
        whole_on_cpu = self.device.type == "cpu" and self.shards is None
        self.large = [n for n, p in enumerate(self.params) if whole_on_cpu and p.numel() >= LARGE]
        self.spare: list[Tensor] = []
        self._rows: Tensor | None = None
        self._row_views: list[list[Tensor]] = []
        self._stacked: list[Tensor] = []

    def _cut(self, blocks: Sequence[Sequence[Tensor]]) -> list[Piece]:
        limit = PIECE if self.device.type == "cpu" else self.origins[-1]
        ends, origins = [*(offset for _, _, offset in self._places), self.bounds[-1]], self.origins
        pieces, first = [], 0
        for b, block in enumerate(blocks):
            stop_block = first + len(block)
            while first < stop_block:
                last = first + 1
                while last < stop_block and origins[last + 1] - origins[first] <= limit:
                    last += 1
                pieces.append(Piece(b, ends[first], ends[last], first, last))
                first = last
        return pieces

    def _buckets(self, ranks: Ranks, unit: int) -> Buckets:
        spans = [(offset, offset + shape.numel()) for shape, _, offset in self._places]
        size = BUCKET_BYTES // self.dtype.itemsize
        return Buckets(self.width, size, unit, rank=ranks.rank, ranks=ranks.size, spans=spans)

    @property
    def shards(self) -> Shards | None:
        """How parameters are divided among the ranks, if they are."""
        return None if self.ranks is None else self.ranks.shards

    @property
    def blocks(self) -> int:
        """B, their number."""
        return len(self.bounds) - 1

    def has_blocks_of(self, other: Layout) -> bool:
        """Whether the same parameters lie in the same blocks there."""
        return self.bounds == other.bounds and list(map(id, self.params)) == list(map(id, other.params))

    def rows(self, T: int) -> Tensor:
        """A (T, width) matrix kept from step to step; its gaps are zero and its rows hold what was last written."""
        if self._rows is None or len(self._rows) != T:
            self._rows = torch.zeros(T, self.width, dtype=self.dtype, device=self.device)
            self._row_views = [self.views(row) for row in self._rows]
            self._stacked = [
                self._rows.as_strided((T, *shape), (self.width, *stride), offset)
                for shape, stride, offset in self._places
            ]
        return self._rows

    def row_views(self, T: int) -> list[list[Tensor]]:
        """The T x P pieces of `rows`, made once."""
        self.rows(T)
        return self._row_views

    def stacked_views(self, T: int) -> list[Tensor]:
        """The P pieces (T, *shape) of `rows`, made once."""
        self.rows(T)
        return self._stacked

    def memory(self, piece: Piece, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The memory (n,) of a gradient that makes up the whole piece and lies as in a row; None where there is none.

        Args:
            piece: of n elements.
            gradients: P gradients that may be overwritten, or None.
        """
        g = gradients[piece.first]
        shape, stride, _ = self._places[piece.first]
        n = piece.stop - piece.start
        if piece.last > piece.first + 1 or g is None or g.layout is not torch.strided or g.dtype != self.dtype:
            return None
        return g.as_strided((n,), (1,)) if g.stride() == stride and shape.numel() == n else None

    def chosen(self, piece: Piece) -> Tensor:
        """(n,) of a piece's columns, their places in the piece as it is where parameters are whole; 0 in the gaps."""
        assert self.shards is not None
        index = torch.zeros(piece.stop - piece.start, dtype=torch.int64, device=self.device)
        for n in range(piece.first, piece.last):
            p, (shape, stride, offset) = self.params[n], self._places[n]
            memory = torch.arange(p.numel(), device=self.device).as_strided(p.shape, _strides(p))
            mine = self.shards.part(p, memory) + (self.origins[n] - self.origins[piece.first])
            index.as_strided(shape, stride, offset - piece.start).copy_(mine)
        return index

    def views(self, row: Tensor, piece: Piece | None = None) -> list[Tensor]:
        """What a row (d,), or that piece of one, holds of each parameter, in its shape and memory order."""
        places = self._places if piece is None else self._places[piece.first : piece.last]
        start = row.storage_offset() - (0 if piece is None else piece.start)
        return [row.as_strided(shape, stride, start + offset) for shape, stride, offset in places]


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _strides(p: Tensor) -> tuple[int, ...]:
    """A gradient in its parameter's memory order (where that is dense) is what optimizers run fastest on."""
    return torch.empty_like(p, device="meta").stride()


def _common_dtype(params: Iterable[Tensor]) -> torch.dtype:
    dtypes = {p.dtype for p in params}
    if any(dtype.is_complex for dtype in dtypes):
        raise ValueError("Shared parameters are complex; surgery is defined on real gradients: keep them out of it.")
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return common


def _common_device(params: Iterable[Tensor]) -> torch.device:
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"Shared parameters sit on several devices ({', '.join(sorted(map(str, devices)))}); their gradients must "
            "meet on one: move them, or pass as shared_params those of one device."
        )
    return devices.pop()


class PerLayout(WeakKeyDictionary[Layout, Entry]):
    """What an engine has found out about models, forgotten with their layouts: no copy or pickle of it has any."""

    def __deepcopy__(self, memo: object) -> PerLayout[Entry]:
        return PerLayout()

    def __reduce__(self) -> tuple[type[PerLayout[Entry]], tuple[()]]:
        return PerLayout, ()
