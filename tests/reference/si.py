"""Scale-invariant loss weighting (SI): the sum of the logarithms of the losses.

No paper of its own; the baseline "SI" of Aviv Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022,
https://arxiv.org/abs/2202.01017. Losses must be positive. Convention: sum scale, no preference.
"""

import numpy as np

from reference import scalarised


def weights(losses: np.ndarray) -> np.ndarray:
    """(T,) gradient in the losses (T,) > 0 of sum_i log L_i."""
    return scalarised.gradient(lambda L: L.log().sum(), losses)
