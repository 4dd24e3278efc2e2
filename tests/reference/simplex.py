"""The Euclidean projection on the probability simplex, by trying every support."""

from itertools import combinations

import numpy as np


def project(v: np.ndarray) -> np.ndarray:
    """(T,) argmin ||w - v|| with w >= 0 and sum w = 1: on its support, w is v minus what makes it sum to 1."""
    v = np.asarray(v, dtype=np.float64)
    best, best_w = np.inf, None
    for size in range(1, len(v) + 1):
        for support in map(list, combinations(range(len(v)), size)):
            w = np.zeros(len(v))
            w[support] = v[support] - (v[support].sum() - 1) / size
            if w.min() >= 0 and np.linalg.norm(w - v) < best:
                best, best_w = np.linalg.norm(w - v), w
    return best_w
