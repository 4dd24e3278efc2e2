"""ConicGrad and its solver: by hand, against the oracle and cvxpy, and by the duality gap."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import conicgrad, matrices

from gradsurgery import aggregate, functional
from gradsurgery.registry import build_method
from gradsurgery.solvers import cagrad_multipliers, conic

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
COSINES = [0.0, 0.1, 0.5, 0.9, 0.999, 1.0]


def cosine(u: torch.Tensor, v: torch.Tensor) -> float:
    return float((u @ v) / u.norm() / v.norm())


def test_by_hand() -> None:
    G = torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double()
    # rows (2, 0), (0, 1): g0 = (1, 1/2), and d = (1/2, 1) at a cosine of 0.8
    torch.testing.assert_close(functional.conicgrad(G), torch.tensor([0.25, 1.0]).double())
    # a narrower cone turns d back towards g0
    angle = math.atan(0.5) + math.acos(0.9)
    d = math.sqrt(1.25) * torch.tensor([math.cos(angle), math.sin(angle)]).double()
    torch.testing.assert_close(functional.conicgrad(G, c=0.9), d / torch.tensor([2.0, 1.0]).double())
    torch.testing.assert_close(functional.conicgrad(G, c=1.0), torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(functional.conicgrad(torch.tensor([[9.0]])), torch.ones(1))


def test_where_nothing_in_the_cone_helps_every_task() -> None:
    # g0 = (4, 1/2) conflicts with the second task, and what helps both is 90 - 14 degrees from the first
    J = torch.tensor([[10.0, 0.0], [-2.0, 1.0]]).double()
    torch.testing.assert_close(aggregate(J, "conicgrad", c=0.9), J.mean(dim=0))
    assert (J @ aggregate(J, "conicgrad", c=0.3) > 0).all()


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("c", COSINES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_oracle_at_every_scale(zoo: str, c: float, scale: float) -> None:
    J = ZOO[zoo] * scale
    G, expected = J @ J.T, torch.from_numpy(conicgrad.direction(J.numpy(), c))
    floor = 1e-13 * J.norm(dim=1).max() * len(J)
    # alone a few tasks take the short road, in company the long one
    for w, residual in (conic(G, c), (part[1] for part in conic(torch.stack([G, G]), c))):
        d = w @ J
        assert (d - expected).norm() <= 1e-7 * expected.norm() + floor
        assert (w >= 0).all()
        assert residual <= (1e-6 if matrices.expected_stationary(zoo) else 1e-10)
        if expected.norm() > floor:
            assert d.norm() == pytest.approx(float(J.mean(dim=0).norm()), rel=1e-7)
            assert cosine(d, J.mean(dim=0)) >= c - 1e-12


@pytest.mark.parametrize("zoo", SOLVABLE)
@pytest.mark.parametrize("c", [0.5, 0.95])
def test_agrees_with_cvxpy(zoo: str, c: float) -> None:
    J = ZOO[zoo].numpy() / np.linalg.norm(ZOO[zoo].numpy(), axis=1).max()
    g0 = J.mean(axis=0)
    axis, n = g0 / np.linalg.norm(g0), np.linalg.norm(J, axis=1)
    unit, worst = cp.Variable(J.shape[1]), cp.Variable()
    # in units of the shortest gradient, in which the worst gain is of order 1
    gains = [(J / n[:, None]) @ unit >= worst * n.min() / n, cp.norm(unit) <= 1, axis @ unit >= c * cp.norm(unit)]
    cp.Problem(cp.Maximize(worst), gains).solve(solver=cp.CLARABEL)
    ours = (J @ aggregate(torch.from_numpy(J), "conicgrad", c=c).numpy()).min() / np.linalg.norm(g0) / n.min()
    assert max(ours, 0.0) == pytest.approx(float(worst.value), abs=1e-6)


@pytest.mark.parametrize("T", [2, 5, 10, 40, 100])
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("c", [0.1, 0.7, 0.95])
def test_many_tasks(T: int, spread: float, c: float) -> None:
    rng = np.random.default_rng(T)
    J = torch.from_numpy(rng.standard_normal((T, 2 * T)) * spread ** rng.uniform(-0.5, 0.5, (T, 1)))
    J = J - 0.3 * J.mean(dim=0)
    w, residual = conic(J @ J.T, c)
    assert residual <= 1e-8
    assert (w >= 0).all()
    assert cosine(w @ J, J.mean(dim=0)) >= c - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_no_rival_does_better(seed: int) -> None:
    """Dependent rows, copies and nearly equal rows; the residual, and random directions in the cone."""
    rng = np.random.default_rng(seed)
    T, d = int(rng.integers(2, 9)), int(rng.integers(1, 6))
    J = rng.integers(-2, 3, (T, d)) + (rng.integers(0, 2) * 10.0 ** -rng.integers(1, 5)) * rng.standard_normal((T, d))
    J[:, 0] = np.abs(J[:, 0]) + 0.1
    for c in (0.2, 0.6, 0.9):
        w, residual = conic(torch.from_numpy(J @ J.T), c)
        assert residual <= 1e-8
        u, g0 = w.numpy() @ J, J.mean(axis=0)
        length = np.linalg.norm(g0)
        rivals = u + rng.standard_normal((500, d)) * 10.0 ** rng.uniform(-4, 0, (500, 1))
        rivals *= length / np.linalg.norm(rivals, axis=1, keepdims=True)
        rivals = rivals[rivals @ g0 >= c * length**2]
        best = (rivals @ J.T).min(axis=1).max(initial=-np.inf)
        assert best <= max((J @ u).min(), 0.0) + 1e-9 * length * np.linalg.norm(J, axis=1).max()


def test_it_is_one_of_cagrads_points() -> None:
    """On the cone's boundary d is the point nearest to some multiple of g0, in CAGrad's ball of some radius."""
    J = ZOO["norm_spread_1e2"]
    G, mean, c = J @ J.T, torch.full((4,), 0.25).double(), 0.9
    d = conic(G, c)[0] @ J
    low, high = 0.0, 10.0
    for _ in range(100):
        radius = 0.5 * (low + high)
        rival = (mean + cagrad_multipliers(G, mean, radius)[0]) @ J
        low, high = (radius, high) if cosine(rival, J.mean(dim=0)) > c else (low, radius)
    assert cosine(rival, d) == pytest.approx(1, abs=1e-12)


def test_blocks_of_every_kind_are_solved_together() -> None:
    names = ["conflicting_pairs", "norm_spread_1e2", "norm_spread_1e4", "zero_row", "tied_norms", "collinear"]
    G = torch.stack([ZOO[name] @ ZOO[name].T for name in names if len(ZOO[name]) == 4])
    for c in COSINES:
        w, residual = conic(G.expand(2, *G.shape), c)
        assert w.shape == (2, *G.shape[:2])
        assert residual.shape == (2, len(G))
        for n, gramian in enumerate(G):
            torch.testing.assert_close(w[1, n], conic(gramian, c)[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("T", [2, 3, 10])
def test_a_nan_is_not_solved_in_silence(T: int) -> None:
    G = torch.eye(T, dtype=torch.float64)
    G[0, 1] = math.nan
    w, residual = conic(G, 0.5)
    assert w.isnan().any() or residual.isnan()


@pytest.mark.parametrize("c", [-0.1, 1.1, math.nan])
def test_c_out_of_range_is_refused(c: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        build_method("conicgrad", {"c": c})
