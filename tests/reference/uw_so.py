"""Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning (UW-SO).

Lukas Kirchdorfer, Cathrin Elich, Simon Kutsche, Heiner Stuckenschmidt, Lukas Schott, Jan M. Koehler. GCPR 2024.
https://arxiv.org/abs/2408.07985. The best uncertainty for an L1 loss, argmin_sigma L / sigma + log sigma, is sigma = L
in closed form, which weighs by 1 / L (UW-O); UW-SO takes the softmax of that with a temperature t:
w_i = exp(1 / (t L_i)) / sum_j exp(1 / (t L_j)), held fixed while the model descends. Losses must be positive.

Convention: weights sum to 1, as in the paper. No default temperature there: it is tuned.
"""

import numpy as np


def weights(losses: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(T,) weights on the simplex for losses (T,) > 0; temperature > 0."""
    logits = 1 / (temperature * np.asarray(losses, dtype=np.float64))
    w = np.exp(logits - logits.max())  # the shift cancels
    return w / w.sum()
