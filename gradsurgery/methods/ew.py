"""Equal weighting: the plain sum of the losses, the baseline of the field.

With a preference it is fixed linear scalarisation. Authors differ between sum and mean; the sum is what a loop
without any method does.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor, device, dtype

from gradsurgery.methods.preference import Preference, check_preference, preference_state
from gradsurgery.registry import Method, State, register
from gradsurgery.stats import Needs, Stats


@register(
    "ew",
    paper="Equal weighting (linear scalarisation)",
    venue="-",
    heads="weighted",
    guarantees=frozenset({"nonnegative", "linear_under_scaling", "homogeneous"}),
)
@dataclass(frozen=True)
class EW(Method):
    """Weights T p / sum(p): 1 for every task without a preference.

    Args:
        preference: T positive numbers p, in proportion to which losses count.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    preference: Preference = None

    def __post_init__(self) -> None:
        check_preference(self.preference)

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return preference_state(self.preference, T, dtype=dtype, device=device)

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        p = state["preference"]
        return (len(p) * p / p.sum()).unsqueeze(0), state, {}
