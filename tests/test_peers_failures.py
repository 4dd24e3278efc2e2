"""What known implementations get wrong stays right here; where theirs is at hand, that it is still wrong."""

import numpy as np
import pytest
import torch
from reference import matrices

from gradsurgery import aggregate, functional, get_method, list_methods
from gradsurgery.losses import TaskLosses
from gradsurgery.registry import build_method
from gradsurgery.rule import Rule
from gradsurgery.solvers import min_norm
from gradsurgery.stats import Needs

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
GRAMIAN = list_methods(needs=Needs.GRAMIAN)


def cosines(J: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return (J @ u) / (J.norm(dim=1) * u.norm())


@pytest.mark.parametrize("name", [n for n in GRAMIAN if "non_conflicting" in get_method(n).guarantees])
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
def test_no_conflict_at_unequal_norms_or_small_gradients(name: str, ratio: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for T in (2, 3, 8):
        for _ in range(10):
            J = torch.randn(T, 2 * T, generator=generator).double()
            J = (J - 0.8 * J.mean(dim=0)) * scale * ratio ** torch.rand(T, 1, generator=generator).double()
            assert (cosines(J, aggregate(J, name)) >= -1e-9).all()
    J = scale * torch.tensor([[ratio, 0.0], [-0.9, 0.5]], dtype=torch.float64)
    assert (cosines(J, aggregate(J, name)) >= -1e-9).all()


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_torchjd_conflicts_there(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = getattr(aggregation, name)()
    for J in (torch.tensor([[1e2, 0.0], [-0.9, 0.5]]), 1e-3 * torch.tensor([[3.0, 0.0], [-0.9, 0.5]])):
        J = J.double()
        assert cosines(J, theirs(J)).min() < -0.5
        assert cosines(J, aggregate(J, name.lower())).min() >= -1e-9


def test_mgda_reaches_the_minimum_of_many_tasks() -> None:
    """The optimum is bounded from below by the duality gap, so no other solver is needed to judge."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    excess = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        J = torch.from_numpy(rng.standard_normal((32, 320)) * rng.uniform(0, 3, (32, 1)))
        G = J @ J.T
        w = functional.mgda(G)
        value = w @ G @ w
        assert value - (G @ w).min() <= 1e-10 * value
        theirs = aggregation.MGDAWeighting()(G)
        excess.append(float(theirs @ G @ theirs / value) - 1)
    assert np.median(excess) > 0.05, "theirs has improved: compare anew"


@pytest.mark.parametrize("zoo", [*ZOO])
def test_nash_mtl_never_falls_back_to_equal_weights(zoo: str) -> None:
    J = ZOO[zoo]
    if len(J) == 1 or zoo in ("all_zero", "exactly_opposite", "nearly_collinear"):
        pytest.skip("equal weights are the answer")
    w = functional.nash_mtl(J @ J.T)
    assert not torch.allclose(w, w.mean().expand(len(w)), rtol=1e-3, atol=0)


def test_config_needs_no_more_than_the_gramian() -> None:
    assert get_method("config").needs is Needs.GRAMIAN


def test_imtl_g_is_guarded_where_its_denominator_nears_zero() -> None:
    """Rows for which 1^T M^-1 d passes through 0: the paper's weights blow up, and change sign."""
    raw, ours = [], []
    for factor in np.logspace(-3, 3, 400):
        J = torch.tensor(
            [[factor, 0.3 * factor, 0.0], [0.02, 0.0, 0.0], [factor, -0.3 * factor, 0.1 * factor]]
        ).double()
        raw.append(float(torch.linalg.solve(J @ J.T, J.norm(dim=1)).sum()))
        w = functional.imtl_g(J @ J.T)
        ours.append(float(w.abs().sum()))
        assert (cosines(J, w @ J) >= -1e-9).all()
    assert min(raw) < 0 < max(raw)
    assert max(ours) < 1e4


def test_gradvac_clamps_its_roots() -> None:
    """Cosines that rounding takes above 1."""
    J = torch.tensor([[1.0, 1e-9], [1.0, 0.0], [3.0, 1e-9]], dtype=torch.float32)
    target = torch.full((3, 3), 1.0)
    assert functional.gradvac(J @ J.T, target).isfinite().all()
    assert functional.gradvac(J @ J.T, -target).isfinite().all()


def test_gradvacs_blocks_are_outermost() -> None:
    """One block's targets and altered gradients are its own: as many runs, one a block."""
    generator = torch.Generator().manual_seed(0)
    J = [torch.randn(3, n, generator=generator).double() for n in (4, 9)]
    rules = [Rule(build_method("gradvac", {"beta": 0.5}), "gradvac", 1, 7) for _ in range(3)]
    outputs = tuple(torch.ones((), requires_grad=True) for _ in range(3))
    losses = TaskLosses(("a", "b", "c"), outputs, torch.ones(3).double())
    for rule, blocks in zip(rules, (2, 1, 1), strict=True):
        rule.start(losses.tasks, blocks, torch.device("cpu"))
    for _ in range(4):
        G = torch.stack([rows @ rows.T for rows in J])
        whole = rules[0].solve(losses, G)[0]
        for b in range(2):
            torch.testing.assert_close(whole[b], rules[1 + b].solve(losses, G[b : b + 1])[0][0])
        J = [rows.roll(1, 1) * (1 + rows.sign() / 4) for rows in J]


@pytest.mark.parametrize("name", GRAMIAN)
def test_a_single_task_keeps_its_direction(name: str) -> None:
    J = ZOO["single"]
    u = aggregate(J, name)
    assert cosines(J, u) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", GRAMIAN)
def test_an_all_zero_gramian_gives_finite_weights(name: str) -> None:
    method = build_method(name, {})
    losses = TaskLosses(("a", "b"), tuple(torch.ones((), requires_grad=True) for _ in range(2)), torch.ones(2).double())
    rule = Rule(method, name, 1, 0)
    rule.start(losses.tasks, 1, torch.device("cpu"))
    for _ in range(3):
        assert rule.solve(losses, torch.zeros(1, 2, 2).double())[0].isfinite().all()


@pytest.mark.parametrize("name", [n for n in GRAMIAN if not get_method(n).randomized and n not in ("krum",)])
def test_a_zero_row_and_duplicate_rows_change_no_more_than_they_say(name: str) -> None:
    """A duplicated task gets the same weight twice."""
    J = ZOO["random_3"][[0, 1, 0, 2]]
    method = build_method(name, {"target": 1} if name == "metabalance" else {})
    rule = Rule(method, name, 1, 0)
    outputs = tuple(torch.ones((), requires_grad=True) for _ in range(4))
    rule.start(("a", "b", "c", "d"), 1, torch.device("cpu"))
    losses = TaskLosses(("a", "b", "c", "d"), outputs, torch.ones(4).double())
    w = rule.solve(losses, (J @ J.T)[None])[0][0]
    # There the weights of equal rows are free to differ.
    if name not in ("mgda", "cagrad", "conicgrad", "upgrad", "dualproj"):
        torch.testing.assert_close(w[0], w[2])
    with_zero = torch.cat([ZOO["random_3"], torch.zeros(1, 11).double()])
    assert aggregate(with_zero, name).isfinite().all()


def test_min_norm_of_a_zero_row_is_that_row() -> None:
    J = torch.cat([ZOO["random_3"], torch.zeros(2, 11).double()])
    w, residual = min_norm(J @ J.T)
    torch.testing.assert_close(w, torch.tensor([0, 0, 0, 0.5, 0.5]).double())
    assert residual == 0
