"""The roads of one small Gramian against the batched road, and what sends a problem from one to the other."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import matrices

from gradsurgery.solvers import cagrad_multipliers, dual_cone, min_norm, nash
from gradsurgery.solvers.nash import nash_small
from gradsurgery.solvers.nnqp import kkt_residual, kkt_residual_small, nnqp, nnqp_small

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items() if not matrices.expected_stationary(name)}


def solvers(T: int) -> dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    p = torch.linspace(1.0, 2.0, T, dtype=torch.float64)
    return {
        "dual_cone": lambda G: dual_cone(G, p),
        "min_norm": min_norm,
        "nash": lambda G: nash(G, p),
        "cagrad": lambda G: cagrad_multipliers(G, p / p.sum(), 0.4),
    }


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("name", solvers(1))
def test_one_gramian_is_solved_as_among_many(name: str, zoo: str) -> None:
    """Two equal blocks take the batched road."""
    J = ZOO[zoo]
    G = J @ J.T
    solve = solvers(len(J))[name]
    one, residual = solve(G)
    many, _ = solve(torch.stack([G, G]))
    assert residual <= 1e-8
    assert ((one - many[0]) @ J).norm() <= 1e-7 * (one @ J).norm() + 1e-13 * J.norm(dim=1).max() * len(J)


@pytest.mark.parametrize("T", [1, 2, 3, 6, 12])
def test_small_pivoting_is_the_batched_one(T: int) -> None:
    rng = np.random.default_rng(T)
    for _ in range(20):
        J = rng.standard_normal((T, T + 2)) - 0.5
        J /= np.linalg.norm(J, axis=1, keepdims=True)
        H, f = J @ J.T, J @ rng.standard_normal(T + 2)
        solved = nnqp_small(H.tolist(), f.tolist())
        expected, _ = nnqp(H[None], f[None])
        assert solved is not None
        np.testing.assert_allclose(solved[0], expected[0], rtol=1e-8, atol=1e-9 * np.abs(expected).max())
        noise = rng.standard_normal(T)
        residual = kkt_residual_small(H.tolist(), f.tolist(), noise.tolist())
        assert residual == pytest.approx(kkt_residual(H[None], f[None], noise[None])[0])


def test_many_programs_fall_to_single_flips() -> None:
    """Ties and dependent rows keep block flips busy; what is left must still be solved."""
    rng = np.random.default_rng(0)
    J = rng.integers(-1, 2, (300, 8, 3)).astype(float)
    J /= np.maximum(np.linalg.norm(J, axis=-1, keepdims=True), 1)
    H = J @ J.transpose(0, 2, 1)
    _, residual = nnqp(H, -H[:, 0])
    assert residual.max() <= 1e-11


@pytest.mark.parametrize("c", [-0.999, -0.5, 0.0, 0.5, 0.999])
@pytest.mark.parametrize("p", [(1.0, 1.0), (0.2, 1.8)])
def test_nash_of_two_tasks_in_closed_form(c: float, p: tuple[float, float]) -> None:
    G = [[4.0, 2 * c], [2 * c, 1.0]]
    solved = nash_small(G, list(p))
    assert solved is not None
    a, residual = solved
    assert residual <= 1e-12
    np.testing.assert_allclose(np.array(G) @ a * a, p, rtol=1e-11)


def test_no_bargain_of_two_opposite_tasks_in_closed_form() -> None:
    assert nash_small([[1.0, -1.0], [-1.0, 1.0]], [1.0, 1.0]) is None


def test_nothing_to_project_where_nothing_conflicts() -> None:
    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    w, residual = dual_cone(torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64), p)
    assert torch.equal(w, p)
    assert residual == 0


@pytest.mark.parametrize("T", [2, 3, 10])
def test_a_nan_is_not_solved_in_silence(T: int) -> None:
    G = torch.eye(T, dtype=torch.float64)
    G[0, 1] = math.nan
    for name in ("dual_cone", "min_norm"):
        w, residual = solvers(T)[name](G)
        assert w.isnan().any() or residual.isnan()
