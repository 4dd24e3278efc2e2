"""Constant weights, set by hand (unitary scalarisation without any).

No paper; after Vitaly Kurin et al., In Defense of the Unitary Scalarization for Deep Multi-Task Learning, NeurIPS 2022,
https://arxiv.org/abs/2201.04122. Convention: the values are taken as they are, not rescaled; ones if there are none.
"""

from collections.abc import Sequence

import numpy as np

from reference import scalarised


def weights(losses: np.ndarray, values: Sequence[float] | None = None) -> np.ndarray:
    """(T,) gradient in the losses (T,) of sum_i values_i L_i."""
    v = scalarised.tensor(np.ones(len(losses)) if values is None else values)
    return scalarised.gradient(lambda L: (v * L).sum(), losses)
