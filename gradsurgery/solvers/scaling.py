"""Unit-diagonal form of a Gramian, in which a solver sees angles alone, whatever the norms of the rows."""

from math import sqrt

import numpy as np


def unit_diagonal(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits G = diag(n) C diag(n).

    Args:
        gramian: (N, T, T).

    Returns:
        C (N, T, T), cosines, with a diagonal of 1 (0 for a zero row), and the norms n (N, T), 1 for a zero row.
    """
    diagonal = np.diagonal(gramian, axis1=-2, axis2=-1)
    norm = np.sqrt(np.maximum(diagonal, 0.0))
    zero = norm == 0
    any_zero = zero.any()
    if any_zero:
        norm = np.where(zero, 1.0, norm)
    # Two divisions: the product of two norms could leave the range of a float where the quotient does not.
    cosine = gramian / norm[:, :, None] / norm[:, None, :]
    # A zero row must not couple to anything, even if rounding left crumbs off the diagonal.
    if any_zero:
        cosine = np.where(zero[:, :, None] | zero[:, None, :], 0.0, cosine)
    return cosine, norm


def unit_diagonal_small(gramian: list[list[float]]) -> tuple[list[list[float]], list[float]]:
    """`unit_diagonal` of one Gramian in plain floats."""
    norm = [sqrt(row[i]) if row[i] > 0 else 0.0 for i, row in enumerate(gramian)]
    if all(norm):
        return [[g / m / n for g, n in zip(row, norm, strict=True)] for row, m in zip(gramian, norm, strict=True)], norm
    cosine, filled = unit_diagonal(np.array([gramian]))
    return cosine[0].tolist(), filled[0].tolist()
