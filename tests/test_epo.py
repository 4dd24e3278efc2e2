"""EPO Search and its linear programs: against the oracle by value and constraints, and against other solvers."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import epo, matrices
from scipy.optimize import linprog

from gradsurgery import aggregate, functional
from gradsurgery.losses import TaskLosses
from gradsurgery.registry import Method, build_method
from gradsurgery.rule import Rule
from gradsurgery.solvers import linear_program
from gradsurgery.stats import Stats

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
FREE = -math.inf


def cases(T: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Losses and preferences: uniform, nearly so, lopsided, with a preference, and tied for the worst."""
    rng = np.random.default_rng(T)
    r = rng.uniform(1, 3, T)
    return [
        (np.ones(T), None),
        (1 + 1e-3 * rng.standard_normal(T), None),
        (np.linspace(1, 3, T), None),
        (rng.uniform(0.1, 2, T), r),
        (1 / r, r),
        (np.where(np.arange(T) < 2, 2.0, 0.5), None),
    ]


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_oracle_by_value_and_constraints(zoo: str, case: int, scale: float) -> None:
    J = ZOO[zoo] * scale
    losses, r = cases(len(J))[case]
    method = build_method("epo", {"preference": None if r is None else tuple(r)})
    assert isinstance(method, Method)
    state = method.init(len(J), 1, dtype=torch.float64, device=torch.device("cpu"))
    w, _, info = method.weights(Stats(torch.from_numpy(losses), (J @ J.T)[None]), state, None)
    expected = epo.alphas(J.numpy(), losses, r)
    if expected is None:
        assert info["residual"].isinf()
        np.testing.assert_allclose(w[0], np.ones(len(J)) if r is None else len(J) * r / r.sum())
        return
    assert info["residual"] <= 1e-8
    value, broken = epo.value(J.numpy(), losses, r, w[0].numpy())
    best, theirs = epo.value(J.numpy(), losses, r, len(J) * expected)
    assert broken <= max(theirs, 1e-9)
    assert value == pytest.approx(best, abs=1e-6)


def test_dominance_by_hand() -> None:
    # C alpha >= 0 with C = [[4, -1], [-1, 1]] asks for alpha_1 in [1/5, 1/2]; sum(C alpha) = 3 alpha_1
    w = functional.epo(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]).double(), torch.ones(2).double())
    torch.testing.assert_close(w, torch.ones(2).double())
    # nothing conflicts: the task that helps all of them most
    w = functional.epo(torch.tensor([[1.0, 0.2], [0.2, 2.0]]), torch.ones(2))
    torch.testing.assert_close(w, torch.tensor([0.0, 2.0]))


def test_balance_by_hand() -> None:
    # the worse task alone, at the price of an ascent of the other that a, too, would cause
    G, losses = torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double(), torch.tensor([3.0, 1.0]).double()
    torch.testing.assert_close(functional.epo(G, losses), torch.tensor([2.0, 0.0]).double())
    r = torch.tensor([1.0, 9.0]).double()
    # r L = (0.6, 1.8) turns the tables: task 1 may ascend, as fast as under a: alpha_1 - alpha_2 / 2 >= (G a)_1
    mu = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    second = (1 - 0.2 * (math.log(0.5) - mu) + 0.9 * (math.log(1.5) - mu)) / 1.5
    expected = torch.tensor([2 - 2 * second, 2 * second]).double()
    torch.testing.assert_close(functional.epo(G, losses, preference=r), expected)
    torch.testing.assert_close(functional.epo(torch.ones(1, 1), torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("T", [3, 49, 98])
def test_rounding_is_no_preference(T: int) -> None:
    """1 / T in floats may leave crumbs of a that would pin alpha to a single task."""
    J = torch.randn(T, 2 * T, generator=torch.Generator().manual_seed(T)).double()
    G = J @ J.T
    w = functional.epo(G, torch.full((T,), 0.1).double())
    A = -G.numpy() / G.diagonal().max().item()
    best = linprog(A.sum(0), A_ub=A, b_ub=np.zeros(T), A_eq=np.ones((1, T)), b_eq=[1])
    assert float(-(w / T).numpy() @ A.sum(0)) == pytest.approx(-best.fun, rel=1e-7)


def test_leads_the_losses_to_the_preferred_proportion() -> None:
    x = np.array([0.9, 1.5])
    a, b = np.array([1.0, 0.0]), np.array([-1.0, 0.0])
    for _ in range(400):
        L = np.array([(x - a) @ (x - a), (x - b) @ (x - b)])
        J = torch.from_numpy(np.stack([2 * (x - a), 2 * (x - b)]))
        x = x - 0.02 * aggregate(J, "epo", losses=torch.from_numpy(L), preference=(1.0, 3.0)).numpy()
    assert abs(x[1]) < 0.02
    assert L[0] / L[1] == pytest.approx(3.0, rel=0.1)


def test_batched_in_its_own_dtype() -> None:
    generator = torch.Generator().manual_seed(1)
    J, losses = torch.randn(2, 3, 4, 9, generator=generator), torch.rand(2, 3, 4, generator=generator) + 0.1
    G = J @ J.mT
    w = functional.epo(G, losses)
    assert w.shape == (2, 3, 4)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w[1, 2], functional.epo(G[1, 2], losses[1, 2]))
    torch.testing.assert_close(functional.epo(G, losses[0, 0])[1, 2], functional.epo(G[1, 2], losses[0, 0]))


def test_blocks_share_the_losses() -> None:
    J = ZOO["random_5"]
    losses = torch.tensor([1.0, 2.0, 0.3, 0.7, 1.5]).double()
    whole = aggregate(J, "epo", losses=losses, blocks=[6, 7])
    parts = [aggregate(J[:, :6], "epo", losses=losses), aggregate(J[:, 6:], "epo", losses=losses)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_an_absent_tasks_preference_waits() -> None:
    rule = Rule(build_method("epo", {"preference": (1.0, 5.0, 2.0)}), "epo", 1, 0)
    rule.start(("a", "b", "c"), 1, torch.device("cpu"))
    J, x, values = ZOO["random_3"], torch.ones(()), torch.tensor([1.0, 2.0, 3.0]).double()
    w, _ = rule.solve(TaskLosses(("a", "b", "c"), (x, None, x), values), (J @ J.T)[None])
    pair = J[[0, 2]]
    expected = functional.epo(pair @ pair.T, values[[0, 2]], preference=torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(w[0, [0, 2]], expected)
    assert w[0, 1] == 0


@pytest.mark.parametrize("losses", [(0.0, 0.0, 0.0), (1.0, -2.0, 0.0), (1e-30, 1e30, 1.0)])
def test_odd_losses_stay_finite(losses: tuple[float, ...]) -> None:
    u = aggregate(ZOO["random_3"], "epo", losses=torch.tensor(losses).double())
    assert u.isfinite().all()


def test_preference_is_checked() -> None:
    with pytest.raises(ValueError, match="positive finite"):
        build_method("epo", {"preference": (1.0, 0.0)})
    with pytest.raises(ValueError, match="2 entries for 3 tasks"):
        aggregate(ZOO["random_3"], "epo", preference=(1.0, 2.0))


# The solver


def program(G: np.ndarray, c: np.ndarray, b: np.ndarray, d: np.ndarray, e: float) -> tuple[np.ndarray, float]:
    x, residual = linear_program(*(torch.from_numpy(v) for v in (G, c, b, d)), torch.tensor(e, dtype=torch.float64))
    return x.numpy(), float(residual)


def corners(A: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """All vertices of {x on the simplex: A x >= b}."""
    T = A.shape[1]
    planes, levels, found = np.vstack([np.eye(T), A]), np.concatenate([np.zeros(T), b]), []
    for active in map(list, itertools.combinations(range(len(planes)), T - 1)):
        system = np.vstack([np.ones(T), planes[active]])
        if abs(np.linalg.det(system)) > 1e-9:
            x = np.linalg.solve(system, np.append(1.0, levels[active]))
            if (planes @ x >= levels - 1e-10).all():
                found.append(x)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_small_programs_by_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 5))
    J = rng.standard_normal((T, int(rng.integers(1, 7))))
    G, c, d = J @ J.T, rng.standard_normal(T), rng.standard_normal(T)
    b = 0.1 * rng.standard_normal(T) * G.diagonal()
    x, residual = program(G, c, b, d, -0.2)
    vertices = corners(np.vstack([G, d]), np.append(b, -0.2))
    if vertices:
        assert residual <= 1e-10
        assert (G @ x >= b - 1e-10).all()
        assert c @ x == pytest.approx(max(c @ v for v in vertices), abs=1e-9)
    else:
        assert residual == math.inf
        np.testing.assert_array_equal(x, np.full(T, 1 / T))


@pytest.mark.parametrize("T", [10, 40, 100])
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_large_programs_agree_with_highs(T: int, spread: float, scale: float) -> None:
    rng = np.random.default_rng(T)
    J = rng.standard_normal((T, T)) * spread ** rng.uniform(-0.5, 0.5, (T, 1))
    J = J - 0.5 * J.mean(axis=0)
    G = J @ J.T
    x, residual = program(scale**2 * G, G.sum(axis=0), np.zeros(T), np.zeros(T), FREE)
    assert residual <= 1e-10
    n = np.sqrt(G.diagonal())
    A, c = G / n[:, None] / n.max(), G.sum(axis=0) / np.abs(G.sum(axis=0)).max()
    best = linprog(-c, A_ub=-A, b_ub=np.zeros(T), A_eq=np.ones((1, T)), b_eq=[1])
    assert c @ x == pytest.approx(-best.fun, abs=1e-6)


def test_ties_and_copies_do_not_cycle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        J = rng.integers(-1, 2, (8, 3)).astype(float)
        _, residual = program(J @ J.T, (J @ J.T).sum(axis=0), np.zeros(8), np.zeros(8), FREE)
        assert residual <= 1e-10  # the point of least norm is always feasible


def test_zero_rows_ask_nothing() -> None:
    x, residual = program(np.diag([1.0, 0.0]), np.array([1.0, 0.0]), np.zeros(2), np.zeros(2), FREE)
    np.testing.assert_array_equal(x, [1.0, 0.0])
    assert residual == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_solved_in_silence(bad: float) -> None:
    G = np.eye(3)
    G[0, 1] = bad
    x, residual = program(G, np.ones(3), np.zeros(3), np.zeros(3), FREE)
    assert np.isnan(x).all()
    assert math.isnan(residual)
    x, residual = program(np.eye(3), np.ones(3), np.array([0.0, math.nan, 0.0]), np.zeros(3), FREE)
    assert math.isnan(residual)
