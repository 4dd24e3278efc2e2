"""Methods that read losses only, that keep state, or that work column by column, step by step against their oracles."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    dwa,
    go4align,
    graddrop,
    gradnorm,
    gradvac,
    igb,
    imtl,
    imtl_l,
    metabalance,
    rlw,
    stch,
    trimmed_mean,
    uw,
)

from gradsurgery import aggregate, functional, list_methods
from gradsurgery.methods.pcgrad import draw_orders
from gradsurgery.registry import EpochMethod, Method, build_method
from gradsurgery.stats import Needs, Stats

T = 4
P = (0.5, 2.0, 1.0, 0.7)
STATELESS: list[tuple[str, dict[str, Any]]] = [
    ("constant", {}),
    ("constant", {"values": (0.5, 0.0, 3.0, 1.0)}),
    ("gls", {}),
    ("si", {}),
    ("uw_so", {}),
    ("uw_so", {"temperature": 0.3}),
    ("pbi", {}),
    ("pbi", {"theta": 0.4, "preference": P, "ideal": (0.1, -0.2, 0.0, 0.05)}),
    ("cosmos", {"lam": 2.0}),
    ("cosmos", {"lam": 0.3, "preference": P}),
]
STATEFUL: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("uw", {}, lambda: uw.Uw(T)),
    ("uw", {"lr": 0.2, "initial": -0.5}, lambda: uw.Uw(T, 0.2, -0.5)),
    ("imtl_l", {"lr": 0.1}, lambda: imtl_l.ImtlL(T, 0.1)),
    ("go4align", {"groups": 2, "step_size": 0.05}, lambda: go4align.Go4Align(T, 2, 0.05)),
    ("go4align", {"groups": 9, "step_size": 0.05}, lambda: go4align.Go4Align(T, 9, 0.05)),
    ("dwa", {}, lambda: dwa.Dwa(T)),
    ("dwa", {"temperature": 0.5, "window": 5}, lambda: dwa.Dwa(T, 0.5, 5)),
    ("stch", {"mu": 0.3, "warmup_epochs": 2}, lambda: stch.Stch(T, 0.3, 2)),
    ("stch", {"warmup_epochs": 1, "window": 4}, lambda: stch.Stch(T, 1.0, 1, 4)),
    ("igb", {}, lambda: igb.Igb(T)),
    ("igb", {"base_epoch": 0, "window": 6}, lambda: igb.Igb(T, 0, 6)),
]
# Of methods that read gradients, too: made from (T,) and called with (J, losses).
LEARNED: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("imtl", {"lr": 0.1}, lambda: imtl.Imtl(T, 0.1)),
    ("gradnorm", {"lr": 0.01}, lambda: gradnorm.GradNorm(T, 1.5, 0.01)),
    ("gradnorm", {"alpha": 0.12}, lambda: gradnorm.GradNorm(T, 0.12)),
    ("metabalance", {}, lambda: metabalance.MetaBalance(T)),
    ("metabalance", {"target": 2, "relax": 1.0, "beta": 0.5}, lambda: metabalance.MetaBalance(T, 2, 1.0, 0.5)),
]


def batches(steps: int = 40) -> list[np.ndarray]:
    """Losses of quite different sizes that fall."""
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 1.5, T) * [1.0, 10.0, 0.1, 2.0] * 0.97**step for step in range(steps)]


@pytest.mark.parametrize(("name", "hparams"), STATELESS)
def test_stateless(name: str, hparams: dict[str, Any]) -> None:
    method = build_method(name, hparams)
    assert isinstance(method, Method)
    state = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))
    for losses in batches(5):
        w, _, _ = method.weights(Stats(torch.from_numpy(losses)), state, None)
        expected = importlib.import_module(f"reference.{name}").weights(losses, **hparams)
        np.testing.assert_allclose(w[0].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "hparams", "make"), STATEFUL)
def test_stateful(name: str, hparams: dict[str, Any], make: Callable[[], Any]) -> None:
    method, reference = build_method(name, hparams), make()
    assert isinstance(method, Method)
    state = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))
    seen = []
    for step, losses in enumerate(batches()):
        w, state, _ = method.weights(Stats(torch.from_numpy(losses)), state, None)
        np.testing.assert_allclose(w[0].numpy(), reference.weights(losses), rtol=1e-7, err_msg=f"step {step}")
        seen.append(w[0])
        if isinstance(method, EpochMethod) and method.window is None and step % 7 == 6:
            state = method.epoch_end(state)
            reference.epoch_end()
    assert not torch.allclose(seen[-1] / seen[-1].sum(), seen[0] / seen[0].sum(), rtol=1e-3)


def rows(step: int) -> np.ndarray:
    """Gradients (T, 9) of different lengths, some in conflict."""
    J = np.random.default_rng(100 + step).standard_normal((T, 9))
    return (J - 0.4 * J.mean(axis=0)) * np.array([1.0, 5.0, 0.2, 2.0])[:, None]


@pytest.mark.parametrize(("name", "hparams", "make"), LEARNED)
def test_learned(name: str, hparams: dict[str, Any], make: Callable[[], Any]) -> None:
    method, reference = build_method(name, hparams), make()
    assert isinstance(method, Method)
    state = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))
    for step, losses in enumerate(batches()):
        J = rows(step)
        stats = Stats(torch.from_numpy(losses), torch.from_numpy(J @ J.T).unsqueeze(0))
        w, state, _ = method.weights(stats, state, None)
        np.testing.assert_allclose(w[0].numpy(), reference.weights(J, losses), rtol=1e-7, err_msg=f"step {step}")


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_gradvac(beta: float) -> None:
    reference = gradvac.GradVac(T, beta)
    method = build_method("gradvac", {"beta": beta})
    assert isinstance(method, Method)
    state = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        J = rows(step)
        before = generator.get_state()
        w, state, _ = method.weights(Stats(torch.ones(T), torch.from_numpy(J @ J.T).unsqueeze(0)), state, generator)
        orders = draw_orders(T, torch.Generator().set_state(before), w.device)
        np.testing.assert_allclose(w[0].numpy(), reference.weights(J, orders=orders.numpy()), rtol=1e-7)


def test_rlw_law() -> None:
    draws = torch.randn(T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w = functional.rlw(torch.ones(T, dtype=torch.float64), generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(w.numpy(), rlw.weights_normal(draws.numpy()), rtol=1e-12)


def test_graddrop_and_trimmed_mean() -> None:
    J = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).double()
    uniforms = torch.rand(30, generator=torch.Generator().manual_seed(9))
    for leak in (0.0, 0.3):
        u = aggregate(J, "graddrop", generator=torch.Generator().manual_seed(9), leak=leak)
        np.testing.assert_allclose(u.numpy(), graddrop.direction(J.numpy(), uniforms.numpy(), leak), rtol=1e-12)
    for trim in (0, 1, 2):
        u = aggregate(J, "trimmed_mean", trim=trim)
        np.testing.assert_allclose(u.numpy(), trimmed_mean.direction(J.numpy(), trim), rtol=1e-12)


def test_every_method_that_reads_losses_is_here() -> None:
    here = {name for name, _ in STATELESS} | {name for name, _, _ in STATEFUL} | {"rlw"}
    assert here >= set(list_methods(needs=Needs.LOSSES)) - {"ew", "famo"}
