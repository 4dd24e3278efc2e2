"""MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning (GLS).

Sumanth Chennupati, Ganesh Sistu, Senthil Yogamani, Samir A Rawashdeh. CVPR Workshops 2019.
https://arxiv.org/abs/1904.08492, the geometric mean of the losses, (prod_i L_i)^(1/T). Losses must be positive.

Deviation: none of the paper's focused loss (the product of the squared losses of some tasks).
"""

import numpy as np

from reference import scalarised


def weights(losses: np.ndarray) -> np.ndarray:
    """(T,) gradient in the losses (T,) > 0 of their geometric mean. The product must neither over- nor underflow."""
    return scalarised.gradient(lambda L: L.prod() ** (1 / len(L)), losses)
