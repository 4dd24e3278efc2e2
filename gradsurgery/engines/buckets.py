"""Runs of a row's columns that travel between ranks as one message each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise


class Buckets:
    """A row's columns in runs of one size, the last one shorter; of each run, every rank owns an equal part.

    Attributes:
        runs: of the row's columns.
        own: this rank's columns of each run, among all that it owns, which lie side by side.
        touched: the runs in which each parameter has columns.
        members: how many parameters have columns in each run.

    Args:
        width: columns of a row, a multiple of ``unit``.
        size: columns of a run at the most; it is made a multiple of ``unit``.
        unit: number of ranks, or a multiple of it.
        rank: whose own columns are asked for.
        ranks: their number.
        spans: of each parameter, its first column and the one after its last.
    """

    def __init__(self, width: int, size: int, unit: int, *, rank: int, ranks: int, spans: Sequence[tuple[int, int]]):
        self._rank, self._size = rank, max(size // unit, 1) * unit
        ends = [*range(0, width, self._size), width]
        self.runs = [slice(start, stop) for start, stop in pairwise(ends)]
        self.own = [slice(start // ranks, stop // ranks) for start, stop in pairwise(ends)]
        self.touched = [range(a // self._size, -(-b // self._size)) for a, b in spans]
        members = Counter(k for touched in self.touched for k in touched)
        self.members = [members[k] for k in range(len(self.runs))]

    def owned(self, bounds: Sequence[int]) -> tuple[slice, list[int]]:
        """The blocks that this rank's own columns belong to, and their ends in these, the first of which is 0.

        Args:
            bounds: B + 1 ends of the blocks in a row.
        """
        ends = [self._before(bound) for bound in bounds]
        mine = [b for b, (start, stop) in enumerate(pairwise(ends)) if stop > start]
        return (slice(mine[0], mine[-1] + 1), ends[mine[0] : mine[-1] + 2]) if mine else (slice(0, 0), [0])

    def _before(self, column: int) -> int:
        """How many of this rank's own columns come before a column of the row."""
        k = min(column // self._size, len(self.runs) - 1)
        n = self.own[k].stop - self.own[k].start
        return self.own[k].start + min(max(column - self.runs[k].start - self._rank * n, 0), n)
