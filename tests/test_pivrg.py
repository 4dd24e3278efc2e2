"""PIVRG: by hand, against its oracle epoch by epoch, and what it refuses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference import matrices, pivrg

from gradsurgery import aggregate, functional
from gradsurgery.losses import TaskLosses
from gradsurgery.registry import EpochMethod, State, build_method
from gradsurgery.rule import Rule
from gradsurgery.stats import Stats

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
BASELINES = (0.7, 9.0, 0.2, 1.5)


def make(T: int = 4, **hparams: Any) -> tuple[EpochMethod, State]:
    method = build_method("pivrg", hparams)
    assert isinstance(method, EpochMethod)
    return method, method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))


def rows(step: int) -> np.ndarray:
    J = np.random.default_rng(50 + step).standard_normal((4, 9))
    return (J - 0.4 * J.mean(axis=0)) * np.array([1.0, 5.0, 0.2, 2.0])[:, None]


def test_by_hand() -> None:
    # w^2 = s / w on orthonormal rows; at a range of 50 percent the temperature is 50 / log 2, and the shares 2 : 1
    w = functional.pivrg(torch.eye(2).double(), torch.tensor([50.0, 0.0]).double())
    torch.testing.assert_close(w, torch.tensor([4 / 3, 2 / 3]).double() ** (1 / 3))
    # at 5 percent it is the least one
    w = functional.pivrg(torch.eye(2).double(), torch.tensor([5.0, 0.0]).double())
    torch.testing.assert_close((w[0] / w[1]).log(), torch.tensor(0.5 / 3).double())
    torch.testing.assert_close(functional.pivrg(4 * torch.eye(1)), torch.tensor([16 ** (-1 / 3)]))


@pytest.mark.parametrize("zoo", SOLVABLE)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_oracle_with_drops(zoo: str, scale: float) -> None:
    J = ZOO[zoo] * scale
    D = np.random.default_rng(0).uniform(-30, 80, len(J))
    for bound, least in ((2.0, 10.0), (5.0, 1.0)):
        w = functional.pivrg(J @ J.T, torch.from_numpy(D), bound=bound, min_temperature=least)
        expected = pivrg.direction(J.numpy(), D, bound, least)
        np.testing.assert_allclose((w @ J).numpy(), expected, rtol=0, atol=1e-7 * np.linalg.norm(expected))


@pytest.mark.parametrize("window", [None, 3])
def test_epoch_by_epoch(window: int | None) -> None:
    method, state = make(window=window, baselines=BASELINES, bound=3.0, min_temperature=2.0)
    rng = np.random.default_rng(0)
    D, epoch, seen = np.zeros(4), [], []
    for step in range(15):
        losses = rng.uniform(0.5, 1.5, 4) * [1.0, 10.0, 0.1, 2.0] * 0.9**step
        J = rows(step)
        stats = Stats(torch.from_numpy(losses), torch.from_numpy(J @ J.T)[None])
        w, state, info = method.weights(stats, state, None)
        np.testing.assert_allclose(w[0].numpy(), pivrg.weights(J, D, 3.0, 2.0), rtol=1e-7, err_msg=f"step {step}")
        assert info["residual"] <= 1e-8
        epoch.append(losses)
        if step % 3 == 2:
            D, epoch = pivrg.drops(np.mean(epoch, axis=0), BASELINES), []
            seen.append(D)
            state = method.epoch_end(state)
    assert not np.allclose(seen[0], seen[-1])


def test_without_baselines_it_is_fairgrad() -> None:
    method, state = make()
    J = ZOO["random_5"][:4]
    for step in range(4):
        losses = torch.tensor([1.0, 2.0, 3.0, 4.0]).double() / (step + 1)
        w, state, _ = method.weights(Stats(losses, (J @ J.T)[None]), state, None)
        torch.testing.assert_close(w[0], functional.fairgrad(J @ J.T))
        state = method.epoch_end(state)


def test_a_task_that_was_absent_has_no_drop() -> None:
    rule = Rule(build_method("pivrg", {"baselines": (1.0, 1.0, 1.0), "window": 1}), "pivrg", 1, 0)
    rule.start(("a", "b", "c"), 1, torch.device("cpu"))
    x, values, G = torch.ones(()), torch.tensor([2.0, 3.0, 5.0]).double(), torch.eye(3).double()[None]
    w, _ = rule.solve(TaskLosses(("a", "b", "c"), (x, None, x), values), G)
    torch.testing.assert_close(w[0], torch.tensor([1.0, 0.0, 1.0]).double())
    w, _ = rule.solve(TaskLosses(("a", "b", "c"), (x, x, x), values), G)
    expected = functional.pivrg(G[0], torch.tensor([100.0, 0.0, 400.0]).double())
    torch.testing.assert_close(w[0], expected)


def test_batched_in_its_own_dtype() -> None:
    J = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1))
    D = torch.tensor([1.0, 40.0, -20.0, 5.0])
    w = functional.pivrg(J @ J.mT, D)
    assert w.shape == (2, 3, 4)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w[1, 2], functional.pivrg(J[1, 2] @ J[1, 2].T, D))


@pytest.mark.parametrize("zoo", sorted(matrices.STATIONARY))
def test_where_there_is_no_solution_it_is_the_least_norm(zoo: str) -> None:
    J = ZOO[zoo]
    D = torch.linspace(0, 50, len(J)).double()
    w = functional.pivrg(J @ J.T, D)
    assert w.isfinite().all()
    assert (w >= 0).all()
    if zoo in ("pareto_stationary", "exactly_opposite", "opposite_unequal"):
        assert (w @ J).norm() <= 1e-6 * J.norm()


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"baselines": (1.0, 0.0)}, "positive finite losses"),
        ({"baselines": (1.0, math.nan)}, "positive finite losses"),
        ({"bound": 1.0}, "> 1"),
        ({"bound": math.inf}, "> 1"),
        ({"min_temperature": 0.0}, "positive and finite"),
        ({"window": 0}, "1 or more"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method("pivrg", hparams)


def test_baselines_must_fit_the_tasks() -> None:
    with pytest.raises(ValueError, match="baselines has 2 entries for 3 tasks"):
        aggregate(ZOO["random_3"], "pivrg", baselines=(1.0, 2.0))
