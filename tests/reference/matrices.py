"""The matrix zoo: small Jacobians (T, d), one row a task, that every method must survive.

`zoo` is deterministic in its seed. What a name promises holds exactly in float32 and in float64 wherever equality is
promised: duplicates, opposites, ties and stationary combinations are made of copies, signs and small integers.
"""

import numpy as np

STATIONARY = frozenset(
    {"exactly_opposite", "opposite_unequal", "zero_row", "all_zero", "pareto_stationary", "partially_stationary"}
)


def expected_stationary(name: str) -> bool:
    """Whether some convex combination of the rows is zero (Pareto stationary)."""
    return name in STATIONARY


def zoo(dtype: type = np.float64, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> Jacobian (T, d) of the given dtype."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    matrices = {f"random_{T}": normal((T, d)) for T, d in ((2, 7), (3, 11), (5, 13), (10, 24))}

    pair = normal((2, 12))
    matrices["conflicting_pairs"] = np.concatenate([pair, 0.3 * normal((2, 12)) - 0.9 * pair])
    g = normal(9)
    matrices["conflicting_2"] = np.stack([g, 0.3 * normal(9) - 0.9 * g])
    matrices["near_opposite"] = np.stack([g, 1e-3 * normal(9) - 0.7 * g])
    matrices["exactly_opposite"] = np.stack([g, -g])
    matrices["opposite_unequal"] = np.stack([g, -4 * g])

    J = normal((3, 8))
    matrices["duplicate_rows"] = J[[0, 1, 0, 2, 1]]
    matrices["zero_row"] = np.stack([J[0], J[1], np.zeros(8), J[2]])
    matrices["all_zero"] = np.zeros((3, 6))
    matrices["single"] = normal((1, 5))

    # a positive first column keeps the rows in a half-space, hence not stationary, although T > d
    for name, shape in (("more_tasks_than_parameters", (5, 3)), ("two_parameters", (4, 2))):
        J = normal(shape)
        J[:, 0] = np.abs(J[:, 0]) + 0.1
        matrices[name] = J
    factor = normal((5, 2))
    factor[:, 0] = np.abs(factor[:, 0]) + 0.1
    matrices["rank_two"] = factor @ normal((2, 9))

    matrices["norm_spread_1e2"] = normal((4, 10)) * np.array([1, 1e2, 1e-1, 10])[:, None] / np.sqrt(10)
    matrices["norm_spread_1e4"] = normal((4, 10)) * np.array([1e2, 1e-2, 1, 10])[:, None] / np.sqrt(10)
    matrices["scale_1e-12"] = 1e-12 * normal((3, 8))
    matrices["scale_1e12"] = 1e12 * normal((3, 8))

    matrices["orthogonal"] = np.linalg.qr(normal((9, 4)))[0].T * np.array([1.0, 2.0, 0.5, 3.0])[:, None]
    signs = rng.choice([-1.0, 1.0], size=(4, 10))
    signs[:, 0] = 1
    matrices["tied_norms"] = signs * np.abs(normal(10))
    matrices["all_aligned"] = np.abs(normal((4, 9)))
    matrices["collinear"] = np.outer([1.0, 2.0, 0.5, 4.0], normal(8))
    matrices["nearly_collinear"] = normal(8) + 1e-3 * normal((4, 8))

    a, b, free = rng.integers(-8, 9, size=(3, 7)).astype(np.float64)
    matrices["pareto_stationary"] = np.stack([a, b, -(a + 2 * b)])  # weights 1/4, 1/2, 1/4; the mean is not zero
    matrices["partially_stationary"] = np.stack([a, -2 * a, free])  # the third task can still improve alone
    return {name: J.astype(dtype) for name, J in matrices.items()}
