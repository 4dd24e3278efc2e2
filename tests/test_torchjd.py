"""Where the semantics agree, our numbers are TorchJD's to 1e-4, with its regularisers turned off where it has them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import independent
from reference import matrices

from gradsurgery import aggregate, functional
from gradsurgery.losses import TaskLosses
from gradsurgery.registry import Method, build_method
from gradsurgery.rule import Rule
from gradsurgery.stats import Stats

aggregation = pytest.importorskip("torchjd.aggregation")
linalg = pytest.importorskip("torchjd.linalg")
scalarization = pytest.importorskip("torchjd.scalarization")

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
# Independent rows of comparable size: what theirs and ours both answer by the paper.
BENIGN = ["random_2", "random_3", "random_5", "random_10", "conflicting_2", "conflicting_pairs", "norm_spread_1e2"]


def exact(dual: Callable[..., Any]) -> Any:
    return dual(projector=linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12))


# name -> (hyperparameters of ours, theirs, factor of ours)
AGGREGATORS: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "upgrad": ({}, lambda T: exact(aggregation.UPGrad)),
    "dualproj": ({}, lambda T: exact(aggregation.DualProj)),
    "cagrad": ({"rescale": 0, "scale": "mean"}, lambda T: aggregation.CAGrad(c=0.4, norm_eps=1e-12)),
    "imtl_g": ({}, lambda T: aggregation.IMTLG()),
    "config": ({}, lambda T: aggregation.ConFIG()),
    "fairgrad": ({}, lambda T: aggregation.FairGrad(alpha=2.0)),
    "aligned_mtl": ({}, lambda T: aggregation.AlignedMTL(pref_vector=torch.ones(T).double())),
    "ew": ({}, lambda T: aggregation.Sum()),
    "trimmed_mean": ({}, lambda T: aggregation.TrimmedMean(1)),
}


@pytest.mark.parametrize("zoo", BENIGN)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators(name: str, zoo: str) -> None:
    J = ZOO[zoo]
    if name == "trimmed_mean" and len(J) <= 2:
        pytest.skip("nothing is left of two rows less their extremes")
    hparams, theirs = AGGREGATORS[name]
    expected = theirs(len(J))(J)
    u = aggregate(J, name, **hparams)
    if name == "fairgrad" and not torch.allclose(u, expected, rtol=1e-4, atol=1e-4):
        G = J @ J.T
        w = aggregation.FairGradWeighting(alpha=2.0)(G)
        assert ((G @ w) * w.sqrt() - 1).abs().max() > 1e-4, "theirs solves the equation, and ours is elsewhere"
        pytest.skip("SciPy's least squares stopped short of the solution")
    torch.testing.assert_close(u, expected, rtol=1e-4, atol=1e-4 * float(J.norm(dim=1).max()))


def test_config_with_a_preference() -> None:
    J, p = ZOO["random_5"], torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0]).double()
    theirs = aggregation.ConFIG(pref_vector=p)(J)
    torch.testing.assert_close(aggregate(J, "config", preference=tuple(p.tolist())), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("zoo", [*BENIGN, "duplicate_rows"])
def test_aligned_mtl(zoo: str, scale: str) -> None:
    J = ZOO[zoo]
    mean = aggregation.AlignedMTL(scale_mode=scale)(J)
    torch.testing.assert_close(aggregate(J, "aligned_mtl", scale=scale), len(J) * mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zoo", ["random_2", "random_3", "conflicting_2"])
def test_mgda_given_time(zoo: str) -> None:
    J = ZOO[zoo]
    theirs = aggregation.MGDA(epsilon=1e-12, max_iters=3000)(J)
    torch.testing.assert_close(aggregate(J, "mgda"), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zoo", ["random_2", "conflicting_2", "near_opposite"])
def test_pcgrad_of_two(zoo: str) -> None:
    torch.testing.assert_close(aggregate(ZOO[zoo], "pcgrad"), aggregation.PCGrad()(ZOO[zoo]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_krum(byzantine: int) -> None:
    J = ZOO["random_10"]
    ours = aggregate(J, "krum", byzantine=byzantine, selected=3)
    torch.testing.assert_close(ours, aggregation.Krum(byzantine, 3)(J), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_on_the_same_draw(leak: float) -> None:
    J = ZOO["random_5"].float()
    ours = aggregate(J, "graddrop", generator=torch.Generator().manual_seed(4), leak=leak)
    torch.manual_seed(4)
    torch.testing.assert_close(ours, aggregation.GradDrop(leak=torch.full((5,), leak))(J), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_independent_batches(name: str) -> None:
    """The weights of successive steps, which theirs takes to any batch by hand."""
    T = 4
    theirs = aggregation.MoDoWeighting(gamma=0.05) if name == "modo" else aggregation.SDMGradWeighting()
    method = build_method(name, {"lr": 0.05} if name == "modo" else {"scale": "mean"})
    assert isinstance(method, Method)
    state = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        J = torch.randn(T, 12, generator=generator).double()
        A, B = (J + 0.3 * torch.randn(T, 12, generator=generator).double() for _ in range(2))
        w, state, _ = method.weights(Stats(torch.ones(T).double(), None, (A @ B.T)[None]), state, None)
        torch.testing.assert_close(w[0], theirs(A @ B.T), rtol=1e-4, atol=1e-6)
    assert independent(name, A, B)


def test_excess_mtl() -> None:
    """Theirs takes a first step by raw risks, which the authors' code and ours do not: from there on."""
    T = 4
    method = build_method("excess_mtl", {"lr": 0.5})
    theirs = aggregation.ExcessMTLWeighting(robust_step_size=0.5)
    state, tracked = method.init(T, 1, dtype=torch.float64, device=torch.device("cpu")), torch.zeros(T, 12).double()
    first = torch.ones(T).double()
    for step in range(10):
        J = torch.randn(T, 12, generator=torch.Generator().manual_seed(step)).double()
        told = theirs(J)
        first = told.clone() if step == 0 else first
        tracked, rows = method.track(J, tracked, torch.ones(T).double(), state)
        w, state, _ = method.weights(Stats(torch.ones(T).double(), (rows @ rows.T)[None]), state, None)
        torch.testing.assert_close(w[0] / T, (told / first) / (told / first).sum(), rtol=1e-4, atol=1e-6)


def test_the_running_mean_of_weights_is_cr_mogm() -> None:
    rule = Rule(build_method("mgda", {}), "mgda", 1, 0, average=0.7)
    theirs = aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(epsilon=1e-12, max_iters=3000), alpha=0.7)
    outputs = tuple(torch.ones((), requires_grad=True) for _ in range(2))
    losses = TaskLosses(("a", "b"), outputs, torch.ones(2).double())
    rule.start(losses.tasks, 1, torch.device("cpu"))
    for step in range(8):
        J = torch.randn(2, 6, generator=torch.Generator().manual_seed(step)).double()
        w, _ = rule.solve(losses, (J @ J.T)[None])
        torch.testing.assert_close(w[0], theirs(J @ J.T), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gls", "cosmos", "pbi"])
def test_scalarizations(name: str) -> None:
    """Our weights are the gradient of their value of the losses."""
    losses = torch.tensor([0.4, 2.0, 1.1, 0.05], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.5, 2.0, 1.0, 0.5], dtype=torch.float64)
    p = p / p.sum()
    theirs, ours = {
        "gls": lambda: (scalarization.GeometricMean(), functional.gls(losses.detach())),
        "cosmos": lambda: (scalarization.COSMOS(0.7, p), functional.cosmos(losses.detach(), lam=0.7, preference=p)),
        "pbi": lambda: (scalarization.PBI(0.4, p), functional.pbi(losses.detach(), theta=0.4, preference=p)),
    }[name]()
    expected = torch.autograd.grad(theirs(losses), losses)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert math.isfinite(float(expected.sum()))
