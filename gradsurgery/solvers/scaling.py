"""Unit-diagonal form of a Gramian, in which a solver sees angles alone, whatever the norms of the rows."""

from math import inf
from typing import TypeVar

import numpy as np

_Batch = TypeVar("_Batch")


def unit_diagonal(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits G = diag(n) C diag(n).

    Args:
        gramian: (N, T, T).

    Returns:
        C (N, T, T), cosines, with a diagonal of 1 (0 for a zero row), and the norms n (N, T), 1 for a zero row.
    """
    norm = np.sqrt(np.maximum(gramian.diagonal(0, -2, -1), 0.0))
    if norm.min() > 0:
        return gramian / (norm[:, :, None] * norm[:, None, :]), norm
    zero = norm == 0
    norm = np.where(zero, 1.0, norm)
    # A zero row must not couple to anything, even if rounding left crumbs off the diagonal.
    coupled = ~(zero[:, :, None] | zero[:, None, :])
    return np.where(coupled, gramian / (norm[:, :, None] * norm[:, None, :]), 0.0), norm


def unit_diagonal_one(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """`unit_diagonal` of one Gramian (T, T); None where a row is zero or not finite."""
    square = gramian.diagonal()
    values = square.tolist()
    if not (min(values) > 0 and sum(values) < inf):
        return None
    norm = np.sqrt(square)
    return gramian / (norm[:, None] * norm), norm


def unit_mean(gramian: np.ndarray) -> np.ndarray:
    """Gramians (N, T, T), each divided by its mean squared norm; a zero one as it is."""
    mean = np.diagonal(gramian, axis1=-2, axis2=-1).mean(-1)
    return gramian / np.where(mean > 0, mean, 1.0)[:, None, None]


def take(batch: _Batch, index: np.ndarray) -> _Batch:
    """The problems at those places of an object whose attributes are arrays with a leading axis of problems."""
    part = object.__new__(type(batch))
    part.__dict__.update({key: array[index] for key, array in batch.__dict__.items()})
    return part
