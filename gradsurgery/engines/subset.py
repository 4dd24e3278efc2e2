"""Inner products measured on some of the shared parameters, and weights that act on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from gradsurgery.distributed import Ranks
from gradsurgery.engines.engine import Batch, Engine, Measurement, RowMap
from gradsurgery.engines.layout import Layout, PerLayout
from gradsurgery.engines.replicas import joined
from gradsurgery.engines.scalar import split_backward
from gradsurgery.stats import Needs


class Subset(Engine):
    """T short backward passes, which end at the subset, and one ordinary backward of the weighted sum.

    Args:
        engine: what measures.
        params: the subset.
    """

    name: ClassVar[str] = "measure_on"
    holds: ClassVar[bool] = False

    def __init__(self, engine: Engine, params: Sequence[Tensor]):
        self._engine, self._params = engine, list(params)
        self._layouts: PerLayout[Layout] = PerLayout()

    def refuse(self, needs: Needs, name: str, *, blocks: bool) -> None:
        if needs & (Needs.COLUMNS | Needs.TRACKED):
            raise ValueError(
                f"{name} works on whole gradients, and measure_on has those of some parameters only. Leave it out, or "
                "use a method that goes by inner products."
            )
        if blocks:
            raise ValueError(
                "measure_on finds one weight a task, which acts on all shared parameters, while blocks give each its "
                "own. Use blocks='model', or leave measure_on out."
            )
        self._engine.refuse(needs, name, blocks=blocks)

    def refuse_ranks(self, ranks: Ranks) -> None:
        self._engine.refuse_ranks(ranks)

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        layout = self._layouts.get(batch.layout)
        if layout is None:
            layout = self._layouts[batch.layout] = self._layout(batch.layout)
        part = dataclasses.replace(batch, layout=layout, task_specific=(), retain=True)
        return OnSubset(joined(self._engine.measure(part), part), batch)

    def _layout(self, whole: Layout) -> Layout:
        shared = {id(p) for p in whole.params}
        params = [p for p in self._params if p.requires_grad]
        if not params or any(id(p) not in shared for p in params):
            what = "holds a parameter that the tasks do not share" if params else "is empty, or frozen"
            raise ValueError(f"measure_on {what}; pass some of the shared parameters, those of the last block, say.")
        return Layout([params], whole.ranks)


class OnSubset(Measurement):
    """Rows of a subset, and the graph, for the pass that writes."""

    def __init__(self, measured: Measurement, batch: Batch):
        self.engine = measured.engine
        self._measured, self._batch = measured, batch

    def gramian(self, of: RowMap | None = None) -> Tensor:
        return self._measured.gramian(of)

    def cross_gramian(self, other: Measurement) -> Tensor:
        assert isinstance(other, OnSubset)
        return self._measured.cross_gramian(other._measured)

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        split_backward(self._batch, weights[0], head_weights)

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError  # `Subset.refuse` keeps such methods away.
