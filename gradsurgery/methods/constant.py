"""Constant weighting: the user's own weights, or ones.

Fixed linear scalarisation, the baseline that Xin et al. (NeurIPS 2022, https://arxiv.org/abs/2209.11379) find hard to
beat once it is tuned. Unlike the preference of `ew`, the weights are used as they are, not scaled to sum to T.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.hparams import per_task
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


@register(
    "constant",
    paper="Constant weights (linear scalarisation)",
    venue="-",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class Constant(Method):
    """Weights that never change.

    Args:
        values: T finite numbers >= 0; 1 for every task if None.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in self.values or ()):
            raise ValueError(f"values must hold finite numbers >= 0, one a task; got {self.values}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {"values": per_task("values", self.values, 1.0, T, dtype=dtype, device=device)}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        return state["values"].unsqueeze(0), state, {}
