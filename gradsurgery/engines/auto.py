"""The cheapest engine for a model, from what its graph says of the sizes.

The rule, for K tasks. Of every layer of the shared part that has a `gramian_rule`, multiply-adds are counted: one
backward to its input costs F, and so does one to its weight (of n elements). Elements of rows count as `TRAFFIC`
multiply-adds each time that they are written or read.

    sequential   K (2 F + 3 n TRAFFIC)
    gramian      K F + min(rule, K F + K n TRAFFIC) + 2 F

`Gramian` runs where that saves 15 % of the sum over layers, and `WORTH` at least; `Batched` where layers are so
small (F under `LAUNCH` on average) that launching them costs more than their arithmetic, for `FEW` tasks or more, on
the CPU; else `Sequential`. Where rows are wanted (methods that go by column, remember rows or compare batches;
`accumulate`; several blocks; several ranks), `Gramian` is out; where the chosen one does not pass its check,
`Sequential` runs.
``benchmarks/overhead.py`` has what each of them takes.
"""

from __future__ import annotations

from typing import ClassVar

from gradsurgery.engines.batched import Batched
from gradsurgery.engines.cut import common_part
from gradsurgery.engines.engine import Batch, Engine, Measurement
from gradsurgery.engines.gramian import Gramian
from gradsurgery.engines.layout import PerLayout
from gradsurgery.engines.rules import rule_of
from gradsurgery.engines.sequential import Sequential
from gradsurgery.graph import survey

# Multiply-adds: of one element's way to memory, of what a change of engine must save, and of a layer that takes longer
# to launch than to run.
TRAFFIC = 20
WORTH = 1e8
LAUNCH = 1 << 18
FEW = 3


class Auto(Engine):
    """Picks an engine in the first batch with several tasks, and stays with it.

    Args:
        rows: whether the gradients themselves are wanted.
    """

    name: ClassVar[str] = "auto"
    takes_shards: ClassVar[bool] = True

    def __init__(self, *, rows: bool):
        self._rows = rows
        self._sequential = Sequential()
        self._batched, self._gramian = Batched(quiet=True), Gramian(quiet=True)
        self._chosen: PerLayout[Engine] = PerLayout()

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        if batch.layout not in self._chosen and len(batch.losses.here) > 1:
            self._chosen[batch.layout] = self._choose(batch)
        chosen = self._chosen.get(batch.layout, self._sequential)
        return (chosen if chosen.holds or not batch.hold else self._sequential).measure(batch, held)

    def _choose(self, batch: Batch) -> Engine:
        if batch.layout.shards is not None:
            return self._sequential
        K = len(batch.losses.here)
        by_rows, by_layer, layers, flops = 0.0, 0.0, 0, 0.0
        for node in common_part(survey(batch.losses.outputs)):
            rule = rule_of(node)
            if rule is None:
                continue
            F, n, ruled = rule.costs(node, K)
            by_rows += K * (2 * F + 3 * n * TRAFFIC)
            by_layer += K * F + min(ruled, K * F + K * n * TRAFFIC) + 2 * F
            layers, flops = layers + 1, flops + F
        single = batch.layout.blocks == 1 and not self._rows and batch.ranks is None
        if single and by_layer < 0.85 * by_rows and by_rows - by_layer > WORTH:
            return self._gramian
        if batch.layout.device.type == "cpu" and K >= FEW and layers and flops / layers < LAUNCH:
            return self._batched
        return self._sequential
