"""Every registered method over the matrix zoo: against its oracle, and the properties that it declares."""

import importlib
import inspect
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from models import independent
from reference import famo as famo_reference
from reference import matrices
from reference import pcgrad as pcgrad_reference

from gradsurgery import aggregate, functional, get_method, list_methods
from gradsurgery.losses import TaskLosses
from gradsurgery.methods.pcgrad import draw_orders
from gradsurgery.registry import GUARANTEES, Method, build_method, register
from gradsurgery.rule import Rule
from gradsurgery.solvers import cagrad_multipliers, conic, dual_cone, dual_projection, fair, min_norm, nash
from gradsurgery.stats import Needs, Stats

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
HPARAMS: dict[str, list[dict[str, Any]]] = {
    "mgda": [{}, {"normalization": "l2"}],
    "cagrad": [{}, {"c": 0.9, "rescale": 0, "scale": "mean"}, {"c": 0.0}, {"c": 3.0, "rescale": 2}],
    "conicgrad": [{}, {"c": 0.0}, {"c": 0.9}, {"c": 1.0}],
}
METHODS = list_methods()
COLUMN_METHODS = list_methods(needs=Needs.COLUMNS)
WEIGHTING_METHODS = [name for name in METHODS if name not in COLUMN_METHODS]
GRAMIAN_FUNCTIONS = [
    name for name in list_methods(needs=Needs.GRAMIAN) if "G" in inspect.signature(getattr(functional, name)).parameters
]
INDEX_ORDERED = ("gradvac", "pcgrad")


def direction(name: str, J: torch.Tensor, seed: int = 0, **hparams: Any) -> torch.Tensor:
    hparams = {**independent(name, J, J), **hparams}
    return aggregate(J, name, generator=torch.Generator().manual_seed(seed), **hparams)


def assert_close(u: torch.Tensor, expected: torch.Tensor, J: torch.Tensor, rtol: float = 1e-8) -> None:
    """Relative to the answer, with the rounding of J's largest row as the floor under an answer near zero."""
    floor = 1e-13 * J.norm(dim=1).max() * len(J)
    assert (u - expected).norm() <= rtol * expected.norm() + floor, f"{u} against {expected}"


def stats_of(J: torch.Tensor) -> Stats:
    G = (J @ J.T).unsqueeze(0)
    return Stats(torch.ones(len(J), dtype=torch.float64), G, G)


def oracle(name: str) -> ModuleType:
    """The reference implementation of a method, which every one must have."""
    return importlib.import_module(f"reference.{name}")


def sees_gradients(name: str) -> bool:
    """Whether the oracle goes from a matrix alone to a direction: others are tested apart."""
    return (
        name not in COLUMN_METHODS
        and hasattr(oracle(name), "direction")
        and "losses" not in inspect.signature(oracle(name).direction).parameters
    )


def solvable(name: str, zoo: str) -> bool:
    """The fair rules have no solution at a Pareto-stationary point, and their answer there is tested apart."""
    return name not in ("nash_mtl", "fairgrad", "pivrg") or not matrices.expected_stationary(zoo)


def cancels(name: str, J: torch.Tensor, u: torch.Tensor) -> bool:
    """Whether the weighted gradients cancel out up to rounding, so that the direction has no meaning."""
    method = build_method(name, {})
    assert isinstance(method, Method)
    state = method.init(len(J), 1, dtype=torch.float64, device=J.device)
    w = method.weights(stats_of(J), state, torch.Generator())[0][0]
    return bool(u.norm() <= 1e-12 * (w.abs() * J.norm(dim=1)).sum())


def apart(name: str, J: torch.Tensor) -> str | None:
    """Why the paper's formula has no answer on J, or another than ours by a documented choice."""
    dependent = torch.linalg.matrix_rank(J / J.norm(dim=1, keepdim=True).clamp(min=1e-300)) < len(J)
    if name in ("imtl", "imtl_g") and (dependent or oracle("imtl_g").denominator(J.numpy()) < 1e-3):
        return "dependent rows, or a sum of weights that is not clearly positive"
    if name == "krum":
        scores = oracle("krum").scores(J.numpy())
        return "a tie, which the oracle breaks by index" if (scores <= scores.min() * (1 + 1e-9)).sum() > 1 else None
    return None


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize(
    ("name", "hparams"),
    [(name, hparams) for name in METHODS if sees_gradients(name) for hparams in HPARAMS.get(name, [{}])],
)
def test_oracle(name: str, hparams: dict[str, Any], zoo: str) -> None:
    if not solvable(name, zoo):
        pytest.skip("no bargain at a Pareto-stationary point")
    if hparams.get("normalization") == "l2" and zoo in (
        "collinear",
        "two_parameters",
        "more_tasks_than_parameters",
        "rank_two",
        "duplicate_rows",
    ):
        pytest.skip("with dependent normalised rows the weights are not unique, nor is the raw direction")
    J = ZOO[zoo]
    if reason := apart(name, J):
        pytest.skip(reason)
    if name in INDEX_ORDERED:
        orders = draw_orders(len(J), torch.Generator().manual_seed(3), J.device)
        u = getattr(functional, name)(J @ J.T, orders=orders) @ J
        expected = torch.from_numpy(oracle(name).direction(J.numpy(), orders=orders.numpy()))
    else:
        u = direction(name, J, **hparams)
        expected = torch.from_numpy(oracle(name).direction(J.numpy(), **hparams))
    assert_close(u, expected, J, rtol=1e-7)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if "preference" in get_method(name).hparams and sees_gradients(name)]
)
@pytest.mark.parametrize("zoo", ["random_3", "random_10", "conflicting_pairs", "norm_spread_1e4"])
def test_preference_oracle(name: str, zoo: str) -> None:
    J = ZOO[zoo]
    p = np.random.default_rng(1).uniform(0.2, 3.0, len(J))
    u = direction(name, J, preference=tuple(p))
    if name == "cagrad":  # the paper's problem with the preferred mean, solved by its own optimality gap
        mean = torch.from_numpy(p / p.sum())
        multipliers, gap = cagrad_multipliers(J @ J.T, mean, 0.4)
        d = (mean + multipliers) @ J
        assert gap <= 1e-10
        assert (d - mean @ J).norm() <= 0.4 * (mean @ J).norm() * (1 + 1e-10)
        assert_close(u, len(J) / 1.16 * d, J)
        return
    expected = oracle(name).direction(J.numpy(), preference=p)
    assert_close(u, torch.from_numpy(expected), J, rtol=1e-7)


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_normalised_by_losses(normalization: str) -> None:
    J, losses = ZOO["random_5"], torch.tensor([0.2, 3.0, 1.0, 7.0, 0.05]).double()
    size = losses if normalization == "loss" else losses * J.norm(dim=1)
    w = torch.from_numpy(oracle("mgda").weights((J / size[:, None]).numpy()))
    u = direction("mgda", J, losses=losses, normalization=normalization)
    assert_close(u, w @ J, J)
    assert direction("mgda", J, losses=0 * losses, normalization=normalization).isfinite().all()


def test_famo_oracle() -> None:
    rng = np.random.default_rng(0)
    ours, reference = build_method("famo", {"lr": 0.1, "weight_decay": 0.01}), famo_reference.Famo(4, 0.1, 0.01)
    state = ours.init(4, 1, dtype=torch.float64, device=torch.device("cpu"))
    for _ in range(30):
        before, after = rng.uniform(0.1, 3, 4), rng.uniform(0.1, 3, 4)
        w, state, _ = ours.weights(Stats(torch.from_numpy(before)), state, None)
        np.testing.assert_allclose(w[0].numpy(), reference.weights(before), rtol=1e-9)
        state = ours.observe(torch.from_numpy(after), state)
        reference.update(before, after)
    np.testing.assert_allclose(state["logits"].numpy(), reference.xi.detach().numpy(), rtol=1e-8)


def test_famo_takes_the_next_losses_for_the_outcome_unless_told() -> None:
    method = build_method("famo", {})
    state = method.init(3, 1, dtype=torch.float64, device=torch.device("cpu"))
    first, second = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 1.9, 3.3]).double()
    _, told, _ = method.weights(Stats(first), state, None)
    told = method.observe(second, told)
    w_told, _, _ = method.weights(Stats(second), told, None)
    _, untold, _ = method.weights(Stats(first), state, None)
    w_untold, _, _ = method.weights(Stats(second), untold, None)
    assert torch.equal(w_told, w_untold)
    assert not torch.allclose(w_told, functional.famo(second, torch.zeros(3).double()), rtol=1e-6)


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("name", METHODS)
def test_finite(name: str, zoo: str) -> None:
    assert direction(name, ZOO[zoo]).isfinite().all()


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("name", WEIGHTING_METHODS)
def test_depends_on_angles_and_norms_alone(name: str, zoo: str) -> None:
    """u(J Q) = u(J) Q for an orthogonal Q."""
    J = ZOO[zoo]
    if matrices.expected_stationary(zoo) and name in ("nash_mtl", "fairgrad", "pivrg", "mgda"):
        pytest.skip("the direction there is zero up to rounding")
    if name == "sdmgrad" and zoo == "exactly_opposite":
        pytest.skip("its steps are too long to settle there: rounding grows from step to step")
    Q = torch.linalg.qr(torch.randn(J.shape[1], J.shape[1], generator=torch.Generator().manual_seed(5)).double())[0]
    assert_close(direction(name, J @ Q), direction(name, J) @ Q, J, rtol=1e-6)


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("name", METHODS)
def test_permutation_equivariant(name: str, zoo: str) -> None:
    """Renaming tasks leaves the direction alone (randomised methods: with the renamed draw)."""
    J = ZOO[zoo]
    order = torch.randperm(len(J), generator=torch.Generator().manual_seed(2))
    if name in INDEX_ORDERED:
        function = getattr(functional, name)
        orders = torch.from_numpy(pcgrad_reference.index_orders(len(J)))
        inverse = order.argsort()
        u = function(J[order] @ J[order].T, orders=inverse[orders[order]]) @ J[order]
        assert_close(u, function(J @ J.T, orders=orders) @ J, J, rtol=1e-7)
    elif name == "rlw":
        pytest.skip("its weights are drawn without a look at the tasks")
    else:
        assert not get_method(name).randomized or name in COLUMN_METHODS
        hparams = {"target": int(order.argsort()[0])} if "target" in get_method(name).hparams else {}
        assert_close(direction(name, J[order], **hparams), direction(name, J), J, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTING_METHODS)
def test_blocks_are_the_loop_over_blocks(name: str) -> None:
    J = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).double()
    whole = direction(name, J, blocks=[7, 0, 3, 20])
    pieces = [direction(name, piece) for piece in (J[:, :7], J[:, 7:10], J[:, 10:])]
    assert_close(whole, torch.cat(pieces), J)


@pytest.mark.parametrize("name", METHODS)
def test_deterministic_under_a_generator(name: str) -> None:
    J = ZOO["conflicting_pairs"]
    torch.manual_seed(0)
    first = direction(name, J, seed=4)
    torch.manual_seed(1)
    assert torch.equal(first, direction(name, J, seed=4))
    if get_method(name).randomized:
        assert any(not torch.equal(first, direction(name, ZOO["conflicting_pairs"], seed=s)) for s in range(5, 15))


@pytest.mark.parametrize("name", METHODS)
def test_compiles_into_one_graph(name: str) -> None:
    method = build_method(name, {})
    J, stats = ZOO["random_3"], stats_of(ZOO["random_3"])
    state = method.init(3, 1, dtype=torch.float64, device=torch.device("cpu"))

    def rule(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return method.weights(stats, state, None)[0] if isinstance(method, Method) else method.columns(J, state, None)

    torch._dynamo.reset()  # every method compiles the one `rule` anew
    torch.manual_seed(0)
    eager = rule(state)
    torch.manual_seed(0)
    compiled = torch.compile(rule, fullgraph=True, backend="aot_eager")(state)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("name", "guarantee"), [(name, g) for name in METHODS for g in sorted(get_method(name).guarantees)]
)
@pytest.mark.parametrize("zoo", ZOO)
def test_guarantee(name: str, guarantee: str, zoo: str) -> None:
    J = ZOO[zoo]
    u = direction(name, J)
    norms = J.norm(dim=1)
    rng = np.random.default_rng(7)
    if guarantee == "non_conflicting":
        assert (J @ u >= -1e-9 * norms * u.norm() - 1e-13 * norms * norms.max() * len(J)).all()
    elif guarantee in ("simplex", "nonnegative"):
        method = build_method(name, {})
        state = method.init(len(J), 1, dtype=torch.float64, device=J.device)
        w = method.weights(stats_of(J), state, torch.Generator())[0]
        assert (w >= 0).all()
        if guarantee == "simplex":
            assert w.sum() == pytest.approx(1, abs=1e-12)
    elif guarantee == "scale_invariant":
        if solvable(name, zoo):
            scaled = torch.from_numpy(10.0 ** rng.uniform(-3, 3, len(J)))[:, None] * J
            other = direction(name, scaled)
            if cancels(name, J, u):
                assert cancels(name, scaled, other)
                return
            assert_close(other / other.norm().clamp(min=1e-300), u / u.norm().clamp(min=1e-300), J / norms.max(), 1e-6)
    elif guarantee == "linear_under_scaling":
        a, b = (torch.from_numpy(rng.uniform(0.1, 3, len(J)))[:, None] for _ in range(2))
        assert_close(direction(name, a * J) + direction(name, b * J), direction(name, (a + b) * J), 10 * J, 1e-7)
    elif guarantee == "homogeneous":
        for a in (1e-3, 7.0):
            assert_close(direction(name, a * J), a * u, a * J, 1e-7)
    else:
        raise AssertionError(f"no test of {guarantee}")


def test_every_guarantee_has_a_description() -> None:
    assert all(get_method(name).guarantees <= GUARANTEES.keys() for name in METHODS)


@pytest.mark.parametrize("zoo", [z for z in ZOO if not matrices.expected_stationary(z)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_solvers_reach_their_residual(zoo: str, scale: float) -> None:
    J = ZOO[zoo] * scale
    G, T = J @ J.T, len(J)
    ones = torch.ones(T, dtype=torch.float64)
    solved = [
        min_norm(G),
        dual_cone(G, ones),
        dual_projection(G, ones),
        nash(G, ones),
        *(fair(G, ones, alpha) for alpha in (0.5, 2.0)),
        *(conic(G, c) for c in (0.2, 0.5, 0.9)),
        *(cagrad_multipliers(G, ones / T, c) for c in (0.1, 0.4, 5.0)),
    ]
    for w, residual in solved:
        assert w.isfinite().all()
        assert residual <= 1e-8


@pytest.mark.parametrize("T", [20, 50, 100])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_many_tasks(T: int, spread: float) -> None:
    rng = np.random.default_rng(T)
    J = torch.from_numpy(rng.standard_normal((T, 2 * T)) * spread ** rng.uniform(-0.5, 0.5, (T, 1)))
    J = J - 0.9 * J.mean(dim=0)
    G, ones = J @ J.T, torch.ones(T, dtype=torch.float64)
    exact = (min_norm(G), dual_cone(G, ones), dual_projection(G, ones), cagrad_multipliers(G, ones / T, 0.4))
    for _, residual in (*exact, conic(G, 0.5)):
        assert residual <= 1e-8
    for w, residual in (nash(G, ones), fair(G, ones, 2.0)):
        # At a spread of 1e4 these rows are within 1e-4 of Pareto stationary: G's own rounding is felt w^2-fold.
        assert residual <= max(1e-8, 4 * torch.finfo(torch.float64).eps * T * (w.square() * G.diagonal()).max())
        assert residual <= 1e-6


def test_nash_says_that_there_is_no_bargain() -> None:
    J = ZOO["pareto_stationary"]
    w, residual = nash(J @ J.T, torch.ones(3, dtype=torch.float64))
    assert residual > 1e-8
    assert w.isfinite().all()
    assert (w @ J).norm() <= 1e-6 * J.norm()
    assert not torch.allclose(w, w[0].expand(3))


def test_batched_over_leading_axes() -> None:
    J = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1)).double()
    G = J @ J.mT
    for name in GRAMIAN_FUNCTIONS:
        function = getattr(functional, name)
        extra = {"orders": torch.from_numpy(pcgrad_reference.index_orders(4))} if name in INDEX_ORDERED else {}
        batched = function(G, **extra)
        assert batched.shape == (2, 3, 4)
        torch.testing.assert_close(batched[1, 2], function(G[1, 2], **extra))


def test_float32_in_float32_out() -> None:
    G = (ZOO["random_3"] @ ZOO["random_3"].T).float()
    for name in GRAMIAN_FUNCTIONS:
        assert getattr(functional, name)(G).dtype == torch.float32
    assert direction("upgrad", ZOO["random_3"].float()).dtype == torch.float32


@pytest.mark.parametrize("name", WEIGHTING_METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_does_not_poison_state(name: str, bad: float) -> None:
    """Two runs, one of which meets a non-finite batch in between, agree afterwards (the random draw aside)."""
    J = ZOO["conflicting_2"]
    good = TaskLosses(("a", "b"), (J[0, 0], J[1, 0]), torch.tensor([1.0, 2.0]).double())
    poisoned = TaskLosses(("a", "b"), good.outputs, torch.tensor([bad, 2.0]).double())
    G = (J @ J.T).unsqueeze(0)
    rules = [Rule(build_method(name, {}), name, 1, 0) for _ in range(2)]
    for rule, batches in zip(rules, ([good, poisoned, good], [good, good]), strict=True):
        rule.start(good.tasks, 1, torch.device("cpu"))
        for batch in batches:
            w, _ = rule.solve(batch, G, G)
            assert w.isnan().all() if batch is poisoned else w.isfinite().all()
    states = [dict(rule.__dict__["_state"]) for rule in rules]
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key])
    spoiled = G.clone()
    spoiled[0, 0, 1] = bad
    if rules[0].method.needs is not Needs.LOSSES:
        assert rules[0].solve(good, spoiled, spoiled)[0].isnan().all()
        assert rules[0].solve(good, G, G)[0].isfinite().all()


@pytest.mark.parametrize("name", COLUMN_METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_column_shows_and_spoils_no_other(name: str, bad: float) -> None:
    J = ZOO["random_5"].clone()
    J[2, 3] = bad
    u = direction(name, J)
    assert u[3].isnan()
    assert u.isfinite().sum() == J.shape[1] - 1


def test_graddrop_keeps_signs_by_their_purity() -> None:
    J = ZOO["random_5"]
    positive, negative = J.clamp(min=0).sum(dim=0), J.clamp(max=0).sum(dim=0)
    draws = torch.stack([direction("graddrop", J, seed=s) for s in range(2000)])
    kept = torch.isclose(draws, positive)
    assert (kept | torch.isclose(draws, negative)).all()
    purity = 0.5 * (1 + J.sum(dim=0) / J.abs().sum(dim=0))
    assert ((kept.double().mean(dim=0) - purity).abs() < 0.05).all()
    leaky = direction("graddrop", J, leak=0.25)
    torch.testing.assert_close(leaky, 0.25 * J.sum(dim=0) + 0.75 * direction("graddrop", J))
    torch.testing.assert_close(direction("graddrop", ZOO["all_aligned"]), ZOO["all_aligned"].sum(dim=0))


def test_trimmed_mean_against_the_median() -> None:
    odd = ZOO["random_5"]
    torch.testing.assert_close(direction("trimmed_mean", odd, trim=7), odd.median(dim=0).values)
    torch.testing.assert_close(direction("trimmed_mean", odd, trim=0), odd.mean(dim=0))


def test_list_and_get() -> None:
    assert list_methods("*grad") == sorted(n for n in METHODS if n.endswith("grad"))
    assert {"ew", "famo"} <= set(list_methods(needs=Needs.LOSSES))
    assert "pcgrad" in list_methods(needs=Needs.GRAMIAN)
    for alias in ("CAGrad", "cagrad", "CA-Grad"):
        assert get_method(alias).name == "cagrad"
    assert get_method("Nash_MTL").name == "nash_mtl"
    assert get_method("cagrad").hparams["c"] == 0.4
    with pytest.raises(ValueError, match=r"no method named 'cagrat'.*Did you mean 'cagrad'"):
        get_method("cagrat")
    with pytest.raises(ValueError, match=r"no hyperparameter 'cc'.*'c'"):
        build_method("cagrad", {"cc": 1})


def test_a_duplicate_name_is_refused() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register("CA-Grad", paper="", venue="", heads="weighted")(get_method("cagrad").cls)
    assert issubclass(get_method("cagrad").cls, Method)


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("cagrad", {"c": -1.0}, "finite and >= 0"),
        ("cagrad", {"c": math.nan}, "finite and >= 0"),
        ("cagrad", {"rescale": 3}, "0, 1 or 2"),
        ("cagrad", {"scale": "median"}, "'sum' or 'mean'"),
        ("mgda", {"normalization": "l1"}, "one of"),
        ("nash_mtl", {"preference": (1.0, -1.0)}, "positive finite"),
        ("famo", {"lr": 0.0}, "positive"),
        ("famo", {"weight_decay": -1.0}, ">= 0"),
        ("graddrop", {"leak": 1.5}, "a share"),
        ("trimmed_mean", {"trim": -1}, "0 or more"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(name, hparams)


def test_aggregate_checks_its_input() -> None:
    J = torch.randn(3, 5)
    with pytest.raises(ValueError, match="matrix"):
        aggregate(J[0])
    with pytest.raises(ValueError, match="losses must have shape"):
        aggregate(J, "famo", losses=torch.ones(2))
    with pytest.raises(ValueError, match="sum to the 5 columns"):
        aggregate(J, blocks=[2, 2])
    with pytest.raises(ValueError, match="2 entries for 3 tasks"):
        aggregate(J, "nash_mtl", preference=(1.0, 2.0))


def test_aggregate_is_differentiable_where_the_method_is() -> None:
    J = ZOO["conflicting_pairs"].clone().requires_grad_()
    orders = torch.Generator().manual_seed(0)
    assert torch.autograd.gradcheck(lambda J: aggregate(J, "pcgrad", generator=orders.manual_seed(0)), J)
    assert torch.autograd.gradcheck(lambda J: aggregate(J, "ew"), J)
    with pytest.raises(RuntimeError, match="autograd"):
        aggregate(J, "upgrad").sum().backward()
