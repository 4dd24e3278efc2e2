"""One symmetric positive definite system: LAPACK called without NumPy's wrapper, which takes longer than the solve."""

from functools import cache
from typing import Any

import numpy as np


@cache
def _dposv() -> Any:
    # SciPy takes a fifth of a second to import, which only a solve has to pay.
    from scipy.linalg import lapack

    return lapack.dposv  # pyright: ignore[reportAttributeAccessIssue]


def solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray | None:
    """x (T,) of matrix x = vector by Cholesky's method; None where the matrix (T, T) is not positive definite."""
    # Either triangle serves, and the transposed one spares LAPACK a copy in its own order.
    _, x, failed = _dposv()(matrix.T, vector)
    return None if failed else x
