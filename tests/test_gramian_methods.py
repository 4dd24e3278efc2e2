"""Gramian methods by hand-computed values, by identities between them, and against other implementations."""

import math
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import matrices

from gradsurgery import aggregate, functional
from gradsurgery.losses import TaskLosses
from gradsurgery.registry import State, build_method
from gradsurgery.rule import Rule
from gradsurgery.solvers import fair, nash
from gradsurgery.stats import Stats

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
INDEPENDENT = [
    *("random_2", "random_3", "random_5", "random_10", "conflicting_pairs", "conflicting_2", "near_opposite"),
    *("norm_spread_1e2", "norm_spread_1e4", "scale_1e-12", "scale_1e12", "orthogonal", "nearly_collinear"),
]


def gram(*rows: list[float]) -> torch.Tensor:
    J = torch.tensor(rows, dtype=torch.float64)
    return J @ J.T


def cosine(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (u @ v) / u.norm() / v.norm()


def state_of(name: str, T: int, blocks: int = 1, **hparams: Any) -> tuple[Any, State]:
    method = build_method(name, hparams)
    return method, method.init(T, blocks, dtype=torch.float64, device=torch.device("cpu"))


def close(got: torch.Tensor, expected: list[float] | torch.Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


def test_imtl_g_by_hand() -> None:
    close(functional.imtl_g(gram([2.0, 0.0], [0.0, 0.5])), [0.2, 0.8])
    for zoo in INDEPENDENT:
        J = ZOO[zoo]
        w = functional.imtl_g(J @ J.T)
        projections = (J / J.norm(dim=1, keepdim=True)) @ (w @ J)
        torch.testing.assert_close(projections, projections.mean().expand(len(J)), rtol=1e-6, atol=0)
        assert (projections > 0).all()


def test_imtl_g_never_ascends_or_blows_up() -> None:
    # The middle gradient is long and lies behind the other two: 1^T M^-1 d is negative.
    J = torch.tensor([[1.0, 0.3, 0.0], [0.02, 0.0, 0.0], [1.0, -0.3, 0.1]], dtype=torch.float64)
    units = J / J.norm(dim=1, keepdim=True)
    raw = torch.linalg.solve(J @ J.T, J.norm(dim=1))
    scale = torch.where(raw > 0, 1e3, 1.0).double()[:, None]  # shrinks the share of the positive weights
    J = J * scale
    raw = torch.linalg.solve(J @ J.T, J.norm(dim=1))
    assert raw.sum() < 0
    w = functional.imtl_g(J @ J.T)
    assert w.abs().sum() == pytest.approx(1)
    assert (units @ (w @ J) > 0).all()
    assert cosine(w @ J, aggregate(J, "config")) == pytest.approx(1)
    close(functional.imtl_g(gram([1.0, 2.0], [-1.0, -2.0])), [0.0, 0.0])


def test_config_by_hand_and_its_guarantees() -> None:
    # u || (1, 1)/sqrt 2, of length (2 + 0.5)/sqrt 2
    close(aggregate(torch.tensor([[2.0, 0.0], [0.0, 0.5]]).double(), "config"), [1.25, 1.25])
    for zoo in INDEPENDENT:
        u = aggregate(ZOO[zoo], "config")
        assert u.norm() == pytest.approx(float((ZOO[zoo] @ u).sum() / u.norm()), rel=1e-6)
        assert (ZOO[zoo] @ u > 0).all()


def test_aligned_mtl_by_hand() -> None:
    J = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]).double()
    for scale, length in {"min": 1.0, "median": 2.0, "rmse": math.sqrt(14 / 3)}.items():
        close(aggregate(J, "aligned_mtl", scale=scale), [length] * 3)
    close(functional.aligned_mtl(gram([2.0, 0.0], [2.0, 0.0])), [1.0, 1.0])  # one component, which keeps its length
    close(functional.aligned_mtl(torch.zeros(2, 2).double()), [1.0, 1.0])
    w = ZOO["random_5"]
    B = torch.stack([functional.aligned_mtl(w @ w.T, preference=p) for p in torch.eye(5).double()])
    aligned = B @ w / 5  # a preference counts by its ratios: e_i is T e_i
    close(aligned @ aligned.T, torch.linalg.eigvalsh(w @ w.T)[0] * torch.eye(5).double(), atol=1e-10)


@pytest.mark.parametrize("zoo", ZOO)
def test_dualproj_agrees_with_cvxpy(zoo: str) -> None:
    J = ZOO[zoo].numpy()
    J = J / max(np.linalg.norm(J, axis=1).max(), 1e-300)
    u = cp.Variable(J.shape[1])
    norms = np.linalg.norm(J, axis=1, keepdims=True)
    unit = J / np.where(norms > 0, norms, 1)
    cp.Problem(cp.Minimize(cp.sum_squares(u - J.mean(axis=0))), [unit @ u >= 0]).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(aggregate(torch.from_numpy(J), "dualproj").numpy(), u.value, atol=1e-4)


@pytest.mark.parametrize("zoo", SOLVABLE)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_fairgrad_solves_its_equation(zoo: str, alpha: float, scale: float) -> None:
    J = scale * ZOO[zoo]
    G = J @ J.T
    w, residual = fair(G, torch.ones(len(J)).double(), alpha)
    assert (w > 0).all()
    assert residual <= 1e-8
    torch.testing.assert_close((G @ w) * w ** (1 / alpha), torch.ones(len(J)).double(), rtol=1e-6, atol=0)
    if alpha == 1:
        torch.testing.assert_close(w, nash(G, torch.ones(len(J)).double())[0], rtol=1e-6, atol=0)


def test_fairgrad_without_a_solution_falls_back_on_the_least_norm() -> None:
    J = ZOO["pareto_stationary"]
    w, residual = fair(J @ J.T, torch.ones(3).double(), 2.0)
    assert residual > 1e-8
    close(w, [0.25, 0.5, 0.25], rtol=1e-6)
    G = gram([1.0, 0.0], [0.0, 0.0])
    close(functional.fairgrad(G), [1.0, 0.0])


@pytest.mark.parametrize("T", [20, 100])
def test_fairgrad_many_tasks(T: int) -> None:
    rng = np.random.default_rng(T)
    J = torch.from_numpy(rng.standard_normal((T, 2 * T)) * 1e4 ** rng.uniform(-0.5, 0.5, (T, 1)))
    assert fair(J @ J.T, torch.ones(T).double(), 2.0)[1] <= 1e-8


def test_krum_by_hand() -> None:
    G = gram([0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0], [1.0, 1.0])
    # byzantine = 1: the 2 nearest of each: 1 + sqrt 2; 1 + 1; 2 + sqrt 2; ...; 1 + sqrt 2
    close(functional.krum(G, byzantine=1), [0.0, 1.0, 0.0, 0.0, 0.0])
    close(functional.krum(G, byzantine=1, selected=3), [1 / 3, 1 / 3, 0.0, 0.0, 1 / 3])
    close(functional.krum(G, byzantine=1, selected=2), [0.25, 0.5, 0.0, 0.0, 0.25])  # two tie for the last place
    close(functional.krum(G, selected=9), [0.2] * 5)
    close(functional.krum(gram([1.0, 0.0], [0.0, 3.0])), [0.5, 0.5])


def test_gradvac_starts_as_pcgrad_and_meets_its_targets() -> None:
    G = gram([1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0])
    orders = torch.tensor([[1, 2], [2, 0], [0, 1]])
    close(functional.gradvac(G, orders=orders), functional.pcgrad(G, orders))
    J, rho = ZOO["conflicting_2"], 0.3
    target = torch.full((2, 2), rho, dtype=torch.float64)
    w = functional.gradvac(J @ J.T, target)
    # w = (1 + c_2, 1 + c_1): v_1 = g_1 + c_1 g_2 has the target cosine with g_2, and v_2 with g_1.
    assert cosine(J[0] + (w[1] - 1) * J[1], J[1]) == pytest.approx(rho)
    assert cosine(J[1] + (w[0] - 1) * J[0], J[0]) == pytest.approx(rho)


def test_gradvac_targets_follow_the_cosines() -> None:
    method, state = state_of("gradvac", 2, 2, beta=0.1)
    G = torch.stack([gram([1.0, 0.0], [1.0, 1.0]), gram([1.0, 0.0], [0.0, 1.0])])
    for step in range(1, 4):
        _, state, _ = method.weights(Stats(torch.ones(2).double(), G), state, torch.Generator())
        met = (1 - 0.9**step) / math.sqrt(2)
        close(state["target"][0], [[0.0, met], [met, 0.0]])
        close(state["target"][1], torch.zeros(2, 2))


def test_gradvac_of_equal_gradients_stays_finite() -> None:
    method, state = state_of("gradvac", 3, beta=1.0)
    for J in (ZOO["collinear"][:3], -ZOO["collinear"][:3], ZOO["random_3"][:, :8]):
        w, state, _ = method.weights(Stats(torch.ones(3).double(), (J @ J.T)[None]), state, torch.Generator())
        assert w.isfinite().all()
    assert state["target"].isfinite().all()


def test_gradvac_keeps_an_absent_tasks_targets() -> None:
    rule = Rule(build_method("gradvac", {"beta": 0.5}), "gradvac", 1, 0)
    rule.start(("a", "b", "c"), 1, torch.device("cpu"))
    x = torch.ones((), requires_grad=True)
    values = torch.ones(3).double()
    G = gram([1.0, 0.0], [1.0, 1.0], [1.0, 2.0])[None]
    rule.solve(TaskLosses(("a", "b", "c"), (x, x, x), values), G)
    before = rule.__dict__["_state"]["target"].clone()
    w, _ = rule.solve(TaskLosses(("a", "b", "c"), (x, None, x), values), G)
    after = rule.__dict__["_state"]["target"]
    assert w[0, 1] == 0
    assert torch.equal(before[:, 1], after[:, 1])
    assert torch.equal(before[:, :, 1], after[:, :, 1])
    assert (before[0, 0, 2] != after[0, 0, 2]) and (before[0, 2, 0] != after[0, 2, 0])


def test_imtl_scales_losses_to_one() -> None:
    method, state = state_of("imtl", 2, lr=0.1)
    losses, G = torch.tensor([4.0, 0.5]).double(), gram([2.0, 0.0], [0.0, 0.5])
    w, _, _ = method.weights(Stats(losses, G[None]), state, None)
    close(w[0], functional.imtl_g(G))
    for _ in range(500):
        w, state, _ = method.weights(Stats(losses, G[None]), state, None)
    close(state["log_scale"].exp() * losses, [1.0, 1.0], rtol=1e-3)
    assert cosine(w[0] * G.diagonal().sqrt(), torch.ones(2).double()) == pytest.approx(1)


def test_gradnorm_by_hand_and_at_rest() -> None:
    # norms 2 and 1, losses at half and all of the first: rates 2/3 and 4/3, targets 1.5 times these.
    close(
        functional.gradnorm(gram([2.0, 0.0], [0.0, 1.0]), torch.ones(2).double(), torch.tensor([0.5, 1.0]), alpha=1),
        [2, -1],
    )
    method, state = state_of("gradnorm", 2, alpha=1.0, lr=0.01)
    G, first = gram([2.0, 0.0], [0.0, 1.0])[None], torch.tensor([3.0, 5.0]).double()
    w, state, _ = method.weights(Stats(first, G), state, None)
    close(w[0], [1.0, 1.0])
    for _ in range(400):
        w, state, _ = method.weights(Stats(first * torch.tensor([0.5, 1.0]).double(), G), state, None)
    assert w.sum() == pytest.approx(2)
    assert float(w[0, 1] / w[0, 0] / 2) == pytest.approx(2, rel=0.1)  # norms as 1 : 2, the rates
    close(state["first"], first)


def test_metabalance_by_hand() -> None:
    method, state = state_of("metabalance", 3, target=1, relax=0.5, beta=0.5)
    G = torch.diag(torch.tensor([16.0, 4.0, 0.0]).double())[None]
    w, state, _ = method.weights(Stats(torch.ones(3).double(), G), state, None)
    close(w[0], [0.75, 1.0, 1.0])
    w, state, _ = method.weights(Stats(torch.ones(3).double(), 4 * G[:, [1, 1, 2]][:, :, [1, 1, 2]]), state, None)
    close(state["magnitudes"][0], [3.0, 2.5, 0.0])
    close(w[0], [0.5 * 2.5 / 3 + 0.5, 1.0, 1.0])
    close(functional.metabalance(torch.tensor([2.0, 5.0]).double(), torch.zeros(2).double()), [1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("gradvac", {"beta": 1.5}, r"\[0, 1\]"),
        ("aligned_mtl", {"scale": "mean"}, "'min', 'median' or 'rmse'"),
        ("dualproj", {"preference": (0.0, 1.0)}, "positive finite"),
        ("fairgrad", {"alpha": 0.0}, "positive and finite"),
        ("krum", {"byzantine": -1}, ">= 0"),
        ("krum", {"selected": 0}, ">= 1"),
        ("ntkmtl", {"exponent": -0.5}, "finite and >= 0"),
        ("imtl", {"lr": 0.0}, "positive and finite"),
        ("gradnorm", {"alpha": -1.0}, "finite and >= 0"),
        ("gradnorm", {"lr": math.inf}, "positive and finite"),
        ("metabalance", {"target": -1}, ">= 0"),
        ("metabalance", {"relax": 2.0}, r"\[0, 1\]"),
        ("metabalance", {"beta": 1.0}, r"\[0, 1\)"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(name, hparams)


def test_metabalance_refuses_a_target_that_is_no_task() -> None:
    with pytest.raises(ValueError, match="3 tasks"):
        aggregate(ZOO["random_3"], "metabalance", target=3)
