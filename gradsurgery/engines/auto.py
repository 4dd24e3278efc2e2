"""The cheapest engine for a model, from what its graph says of the sizes."""

from __future__ import annotations

from typing import ClassVar

from gradsurgery.engines.batched import Batched
from gradsurgery.engines.engine import Batch, Engine, Measurement
from gradsurgery.engines.gramian import Gramian
from gradsurgery.engines.layout import PerLayout
from gradsurgery.engines.sequential import Sequential


class Auto(Engine):
    """`Sequential`.

    Args:
        rows: whether the gradients themselves are needed.
    """

    name: ClassVar[str] = "auto"

    def __init__(self, *, rows: bool):
        self._rows = rows
        self._sequential, self._batched, self._gramian = Sequential(), Batched(), Gramian()
        self._chosen: PerLayout[Engine] = PerLayout()

    def measure(self, batch: Batch, held: Measurement | None = None) -> Measurement:
        return self._sequential.measure(batch, held)
