"""Methods that read losses only: values worked out by hand, what they do over steps and epochs, and identities."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from models import Toy, batch, optimizer
from torch import Tensor

from gradsurgery import functional, get_method, list_methods
from gradsurgery.methods.hparams import EPS
from gradsurgery.methods.kmeans import group_means
from gradsurgery.registry import EpochMethod, Method, State, build_method
from gradsurgery.stats import Needs, Stats

METHODS = list_methods(needs=Needs.LOSSES)
BY_EPOCHS = [name for name in METHODS if issubclass(get_method(name).cls, EpochMethod)]
FUNCTIONS: dict[str, tuple[int, dict[str, Any]]] = {  # how many tensors (..., T) each takes, and options
    "uw": (1, {}),
    "uw_so": (1, {"temperature": 0.5}),
    "dwa": (1, {}),
    "gls": (1, {}),
    "si": (1, {}),
    "imtl_l": (1, {}),
    "stch": (2, {"mu": 0.3}),
    "go4align": (2, {"groups": 2}),
    "igb": (2, {}),
    "pbi": (1, {"ideal": 0.1}),
    "cosmos": (1, {}),
    "famo": (2, {}),
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(name: str, T: int, **hparams: Any) -> tuple[Method, State]:
    method = build_method(name, hparams)
    return method, method.init(T, 1, dtype=torch.float64, device=torch.device("cpu"))


def run(name: str, steps: list[Tensor], **hparams: Any) -> list[Tensor]:
    """Weights (T,) of every step."""
    method, state = make(name, len(steps[0]), **hparams)
    weights = []
    for losses in steps:
        w, state, _ = method.weights(Stats(losses), state, torch.Generator().manual_seed(0))
        weights.append(w[0])
    return weights


def assert_weights(w: Tensor, *expected: float) -> None:
    torch.testing.assert_close(w, tensor(*expected), rtol=1e-12, atol=1e-14)


def gradient(scalarisation: Any, losses: Tensor) -> Tensor:
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(scalarisation(losses), losses)[0]


# One step


def test_values_worked_out_by_hand() -> None:
    losses = tensor(0.5, 2.0, 4.0)
    assert_weights(run("constant", [losses])[0], 1, 1, 1)
    assert_weights(run("constant", [losses], values=(0.0, 2.0, 0.5))[0], 0, 2, 0.5)
    assert_weights(run("si", [losses])[0], 2, 0.5, 0.25)
    mean = 4 ** (1 / 3)
    assert_weights(run("gls", [losses])[0], mean / 1.5, mean / 6, mean / 12)
    e = [math.exp(1 / (0.5 * loss)) for loss in (0.5, 2.0, 4.0)]
    assert_weights(run("uw_so", [losses], temperature=0.5)[0], *(x / sum(e) for x in e))
    assert_weights(run("uw", [losses])[0], 0.5, 0.5, 0.5)
    assert_weights(run("uw", [losses], initial=-0.5)[0], *[math.exp(0.5) / 2] * 3)
    assert_weights(run("imtl_l", [losses])[0], 1, 1, 1)
    for name, hparams in (("dwa", {}), ("go4align", {"step_size": 1e-300})):
        assert_weights(run(name, [tensor(2.0, 2.0)], **hparams)[0], 1, 1)
    for name in ("stch", "igb"):
        assert_weights(run(name, [losses])[0], 2, 0.5, 0.25)
    assert_weights(functional.stch(tensor(1.0, 4.0), tensor(1.0, 2.0), mu=0.5), 2 * 1 / 5, 2 * 4 / 5 / 4)
    assert_weights(run("pbi", [tensor(3.0, 4.0)], theta=0.0, preference=(3.0, 4.0))[0], 0.6, 0.8)
    assert_weights(run("pbi", [tensor(1.0, 0.0)], theta=1.0)[0], math.sqrt(2), 0)
    assert_weights(run("cosmos", [tensor(3.0, 4.0)], lam=0.0, preference=(1.0, 3.0))[0], 0.25, 0.75)
    # cos = 3/5 along the first axis alone, nearly: its gradient is (1 - 0.36, -0.48) / 5
    w = run("cosmos", [tensor(3.0, 4.0)], lam=1.0, preference=(1.0, 1e-300))[0]
    assert_weights(w, 1 - 0.64 / 5, 0.48 / 5)


def test_weights_are_the_gradients_of_what_the_papers_minimise() -> None:
    losses, z = tensor(0.3, 1.7, 2.2), tensor(0.9, 1.0, 4.0)
    p, ideal = tensor(1.0, 0.5, 2.0), tensor(0.1, 0.2, -0.3)
    ray, r = p / p.norm(), p / p.sum()

    def boundary(L: Tensor) -> Tensor:
        d1 = (L - ideal) @ ray
        return d1 + 5 * (L - ideal - d1 * ray).norm()

    cases = [
        (functional.si(losses), lambda L: L.log().sum()),
        (functional.gls(losses), lambda L: L.prod() ** (1 / 3)),
        (functional.stch(losses, z, mu=0.4), lambda L: 3 * 0.4 * ((L / z).log() / 0.4).logsumexp(0)),
        (functional.igb(losses, z), lambda L: (3 * (losses / z).softmax(0) * L.log()).sum()),
        (functional.pbi(losses, preference=p, ideal=ideal), boundary),
        (
            functional.cosmos(losses, lam=8.0, preference=p),
            lambda L: r @ L - 8 * torch.cosine_similarity(L, r, dim=0),
        ),
    ]
    for w, scalarisation in cases:
        torch.testing.assert_close(w, gradient(scalarisation, losses), rtol=1e-12, atol=1e-14)


def test_preferences_count_as_proportions() -> None:
    losses = tensor(0.3, 1.7)
    for name in ("pbi", "cosmos"):
        few, many = (run(name, [losses], preference=(k * 1.0, k * 3.0))[0] for k in (1, 50))
        torch.testing.assert_close(few, many)
        assert torch.equal(run(name, [losses])[0], run(name, [losses], preference=(1.0, 1.0))[0])


def test_on_the_ray_of_pbi_rounding_is_no_direction() -> None:
    p = np.random.default_rng(0).uniform(0.1, 2, 100)
    for scale in (1e-9, 1.0, 1e9):
        ray = torch.from_numpy(p / np.linalg.norm(p))
        w = run("pbi", [scale * ray], preference=tuple(p))[0]
        torch.testing.assert_close(w, ray, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_random_weights_follow_their_distribution(distribution: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w = functional.rlw(torch.ones(20000, 3).double(), distribution=distribution, generator=generator)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(dim=-1), torch.ones(20000).double())
    torch.testing.assert_close(w.mean(dim=0), torch.full((3,), 1 / 3).double(), atol=0.01, rtol=0)
    if distribution == "dirichlet":  # a marginal has P(w > x) = (1 - x)^2
        for x in (0.1, 0.5, 0.9):
            assert (w[:, 0] > x).double().mean() == pytest.approx((1 - x) ** 2, abs=0.01)
    else:
        draw = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.equal(w, draw.softmax(dim=-1))


def test_random_weights_are_drawn_anew_every_step() -> None:
    method, state = make("rlw", 3)
    generator = torch.Generator().manual_seed(1)
    first, second = (method.weights(Stats(tensor(1, 1, 1)), state, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


# Losses that are zero or negative, and hyperparameters


@pytest.mark.parametrize(
    ("name", "hparams"), [*((name, {}) for name in METHODS), *((name, {"window": 2}) for name in BY_EPOCHS)]
)
def test_losses_at_or_below_zero_leave_everything_finite(name: str, hparams: dict[str, Any]) -> None:
    for losses in ([0.0, 0.0, 0.0], [-3.0, 0.0, 2.0], [1e-300, -1e-300, 1.0], [1e6, 1e-6, -1e6]):
        method, state = make(name, 3, **hparams)
        for _ in range(40):
            w, state, _ = method.weights(Stats(tensor(*losses)), state, None)
            assert w.isfinite().all(), losses
            assert all(value.isfinite().all() for value in state.values()), losses


@pytest.mark.parametrize("name", ["si", "gls", "stch", "igb", "uw_so"])
def test_a_loss_under_the_floor_counts_as_the_floor(name: str) -> None:
    at, under = (run(name, [tensor(1.0, value)])[0] for value in (EPS, -2.0))
    assert torch.equal(at, under)


@pytest.mark.parametrize(("name", "limit"), [("uw", 1 / (2 * EPS)), ("imtl_l", 1 / EPS)])
def test_what_is_learned_from_a_loss_of_zero_has_an_end(name: str, limit: float) -> None:
    weights = run(name, [tensor(0.0, -1.0)] * 400, lr=0.5)
    torch.testing.assert_close(weights[-1], tensor(limit, limit), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "hparams", "message"),
    [
        ("constant", {"values": (1.0, -1.0)}, ">= 0"),
        ("constant", {"values": (1.0, math.inf)}, "finite"),
        ("uw", {"lr": 0.0}, "lr must be positive"),
        ("uw", {"initial": math.nan}, "initial must be finite"),
        ("imtl_l", {"lr": -1.0}, "lr must be positive"),
        ("uw_so", {"temperature": 0.0}, "temperature must be positive"),
        ("dwa", {"temperature": math.inf}, "positive and finite"),
        ("dwa", {"window": 0}, "window must be a whole number"),
        ("rlw", {"distribution": "uniform"}, "'normal' or 'dirichlet'"),
        ("stch", {"mu": 0.0}, "mu must be positive"),
        ("stch", {"warmup_epochs": 0}, "warmup_epochs must be a whole number, 1 or more"),
        ("stch", {"window": 1.5}, "window must be a whole number"),
        ("igb", {"base_epoch": -1}, "base_epoch must be a whole number, 0 or more"),
        ("igb", {"window": -1}, "window must be a whole number"),
        ("go4align", {"groups": 0}, "groups must be a whole number, 1 or more"),
        ("go4align", {"step_size": math.nan}, "step_size must be positive"),
        ("pbi", {"theta": -1.0}, "theta must be finite and >= 0"),
        ("pbi", {"preference": (0.0, 1.0)}, "positive finite"),
        ("pbi", {"ideal": (math.nan, 1.0)}, "ideal must hold finite"),
        ("cosmos", {"lam": math.inf}, "lam must be finite and >= 0"),
        ("cosmos", {"preference": (1.0, -1.0)}, "positive finite"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(name, hparams)


@pytest.mark.parametrize(
    ("name", "key"), [("constant", "values"), ("pbi", "ideal"), ("pbi", "preference"), ("famo", "min_losses")]
)
def test_one_value_a_task(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} has 2 entries for 3 tasks"):
        make(name, 3, **{key: (1.0, 2.0)})


# Over steps


@pytest.mark.parametrize(
    ("name", "objective", "start"),
    [("uw", lambda s, L: ((-s).exp() * L + s).sum() / 2, -0.5), ("imtl_l", lambda s, L: (s.exp() * L - s).sum(), 0.0)],
)
def test_learned_scales_take_the_steps_of_torchs_adam(name: str, objective: Any, start: float) -> None:
    rng = np.random.default_rng(0)
    steps = [torch.from_numpy(rng.uniform(0.1, 4, 3)) for _ in range(30)]
    s = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.1)
    expected = []
    for losses in steps:
        expected.append((-s).exp() / 2 if name == "uw" else s.exp())
        adam.zero_grad()
        objective(s, losses).backward()
        adam.step()
        expected[-1] = expected[-1].detach()
    ours = run(name, steps, lr=0.1, **({"initial": start} if name == "uw" else {}))
    torch.testing.assert_close(torch.stack(ours), torch.stack(expected), rtol=1e-10, atol=0)


def test_go4align_indicators_fall_with_the_losses_they_have_seen() -> None:
    first, second = tensor(1.0, 3.0, 2.0), tensor(2.0, 1.0, 2.0)
    weights = run("go4align", [first, second], groups=3, step_size=0.5)
    for w, losses, seen in zip(weights, (first, second), (first, first + second), strict=True):
        p = (-0.5 * seen).exp() / (-0.5 * seen).exp().sum()
        torch.testing.assert_close(w, p * losses.sum() / losses)
    grouped = run("go4align", [first, second], groups=1, step_size=0.5)
    torch.testing.assert_close(grouped[1], weights[1].mean().expand(3))


def test_k_means_on_a_line_is_exact() -> None:
    """Against every way to cut the sorted numbers into runs."""
    rng = np.random.default_rng(0)
    for T, K in [(1, 1), (1, 4), (2, 2), (5, 2), (6, 3), (7, 4), (4, 9)]:
        x = rng.lognormal(0, 2, T)
        order, groups = np.argsort(x), min(K, T)
        best, means = math.inf, x
        for cuts in itertools.combinations(range(1, T), groups - 1):
            pieces = np.split(x[order], cuts)
            cost = sum(((piece - piece.mean()) ** 2).sum() for piece in pieces)
            if cost < best:
                best, means = cost, np.concatenate([np.full(len(piece), piece.mean()) for piece in pieces])
        np.testing.assert_allclose(group_means(torch.from_numpy(x), K).numpy()[order], means, rtol=1e-12)


# Over epochs


EPOCHS = [[tensor(1.0, 4.0), tensor(3.0, 2.0)], [tensor(1.0, 1.0), tensor(2.0, 1.0)], [tensor(0.5, 0.9)] * 2]
EPOCHS = [*EPOCHS, [tensor(0.4, 0.8), tensor(0.2, 0.6)], [tensor(0.1, 0.7), tensor(0.3, 0.2)], [tensor(0.1, 0.1)] * 2]


def run_epochs(name: str, epochs: list[list[Tensor]], **hparams: Any) -> list[list[Tensor]]:
    method, state = make(name, 2, **hparams)
    assert isinstance(method, EpochMethod)
    weights = []
    for epoch in epochs:
        weights.append([])
        for losses in epoch:
            w, state, _ = method.weights(Stats(losses), state, None)
            weights[-1].append(w[0])
        state = method.epoch_end(state)
    return weights


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_a_window_is_an_epoch(name: str) -> None:
    by_call, by_window = run_epochs(name, EPOCHS), run(name, list(itertools.chain(*EPOCHS)), window=2)
    assert torch.equal(torch.stack(list(itertools.chain(*by_call))), torch.stack(by_window))
    both = run_epochs(name, [list(itertools.chain(*EPOCHS))[i : i + 3] for i in range(0, 12, 3)], window=2)
    assert torch.equal(torch.stack(list(itertools.chain(*both))), torch.stack(by_window))


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_an_epoch_without_a_step_is_none(name: str) -> None:
    padded = [[], EPOCHS[0], [], [], *EPOCHS[1:]]
    weights = [w for w in run_epochs(name, padded) if w]
    for ours, expected in zip(weights, run_epochs(name, EPOCHS), strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(expected))


def test_dwa_compares_the_last_two_epochs() -> None:
    weights = run_epochs("dwa", EPOCHS, temperature=0.7)
    means = [torch.stack(epoch).mean(dim=0) for epoch in EPOCHS]
    for e, epoch in enumerate(weights):
        for w in epoch:
            expected = torch.ones(2).double() if e < 2 else 2 * (means[e - 1] / means[e - 2] / 0.7).softmax(dim=0)
            torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("warmup_epochs", [1, 3, 4])
def test_stch_starts_from_its_last_warm_up_epoch(warmup_epochs: int) -> None:
    weights = run_epochs("stch", EPOCHS, warmup_epochs=warmup_epochs, mu=0.5)
    z = torch.stack(EPOCHS[warmup_epochs - 1]).mean(dim=0)
    for e, (epoch, steps) in enumerate(zip(weights, EPOCHS, strict=True)):
        for w, losses in zip(epoch, steps, strict=True):
            expected = 1 / losses if e < warmup_epochs else functional.stch(losses, z, mu=0.5)
            torch.testing.assert_close(w, expected)


def test_stch_with_mu_1_is_the_sum_of_normalised_losses() -> None:
    losses, z = tensor(0.3, 1.7, 2.2), tensor(0.9, 1.0, 4.0)
    torch.testing.assert_close(functional.stch(losses, z), 1 / z / (losses / z).mean())
    torch.testing.assert_close(functional.stch(losses, z), 3 * gradient(lambda L: (L / z).sum().log(), losses))


@pytest.mark.parametrize("base_epoch", [0, 1, 3])
def test_igb_measures_from_its_base_epoch(base_epoch: int) -> None:
    weights = run_epochs("igb", EPOCHS, base_epoch=base_epoch)
    base = torch.stack(EPOCHS[base_epoch]).mean(dim=0)
    for e, (epoch, steps) in enumerate(zip(weights, EPOCHS, strict=True)):
        for w, losses in zip(epoch, steps, strict=True):
            expected = 1 / losses if e <= base_epoch else 2 * (losses / base).softmax(dim=0) / losses
            torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_an_optimizer_hears_of_epochs(name: str) -> None:
    """`epoch_end` of the optimizer and a window agree, and a task that was away has had fewer epochs."""
    x = batch()
    models, opts = zip(*((m := Toy(), optimizer(m, name, **h)) for h in ({}, {"window": 3})), strict=True)
    for step in range(16):
        for model, opt in zip(models, opts, strict=True):
            losses = [loss.exp() for loss in model.losses(x)]
            opt.step([losses[0], None if step in (2, 3, 4) else losses[1], losses[2]])
        # Once the second task has been away, its window is no one else's, nor an epoch of the others.
        if step < 3:
            assert torch.equal(opts[0].info.weights, opts[1].info.weights)
        if step % 3 == 2:
            opts[0].epoch_end()
    states = [opt._surgery.rule._state for opt in opts]
    assert states[1]["epochs"][0] >= states[1]["epochs"][1]
    assert torch.equal(states[0]["epochs"][[0, 2]], states[1]["epochs"][[0, 2]])
    assert all(opt.info.weights.isfinite().all() for opt in opts)


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_a_run_cut_in_the_middle_of_an_epoch_resumes(name: str) -> None:
    x = batch()
    model, opt = (m := Toy(), optimizer(m, name, lr=1e-3, window=3))
    twin, twin_opt = (m := Toy(seed=1), optimizer(m, name, lr=1e-3, window=3))
    for step in range(25):
        if step == 7:
            twin.load_state_dict(model.state_dict())
            twin_opt.load_state_dict(opt.state_dict())
        for m, o in ((model, opt), (twin, twin_opt))[: 1 + (step >= 7)]:
            o.zero_grad()
            o.step(m.losses(x))
    assert torch.equal(opt.info.weights, twin_opt.info.weights)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", [n for n in METHODS if n != "rlw"])
def test_an_absent_task_is_as_good_as_unheard_of(name: str) -> None:
    """Steps of the others alone: they get the weights that they would get if it did not exist."""
    x = batch()
    model, opt = (m := Toy(), optimizer(m, name))
    with torch.no_grad():
        values = [float(loss.exp()) for loss in model.losses(x)]
    for _ in range(4):
        opt.backward([loss.exp() if t != 1 else None for t, loss in enumerate(model.losses(x))])
        opt.zero_grad()
    alone = run(name, [tensor(values[0], values[2])] * 4)[-1]
    torch.testing.assert_close(opt.info.weights[0, [0, 2]], alone)


# Identities, batches and compilers


def parallel(a: Tensor, b: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a / a.sum(), b / b.sum(), rtol=rtol, atol=0)


def test_the_family_of_inverse_losses() -> None:
    losses = tensor(0.03, 0.4, 5.0, 60.0)
    inverse = 1 / losses
    parallel(functional.si(losses), inverse)
    parallel(functional.gls(losses), inverse)
    parallel(functional.famo(losses, torch.zeros(4).double()), inverse, rtol=1e-6)
    for name, factor in (("uw", 0.5), ("imtl_l", 1.0)):
        settled = run(name, [losses] * 8000, lr=0.02)[-1]
        torch.testing.assert_close(settled, factor * inverse, rtol=1e-6, atol=0)
    parallel(functional.stch(losses, losses), inverse)
    parallel(functional.igb(losses, losses), inverse)


def test_limits_of_temperatures() -> None:
    losses, ones = tensor(0.5, 2.0, 4.0), torch.ones(3).double()
    torch.testing.assert_close(functional.uw_so(losses, temperature=1e9), ones / 3)
    torch.testing.assert_close(functional.dwa(losses, temperature=1e9), ones)
    torch.testing.assert_close(functional.uw_so(losses, temperature=1e-3), tensor(1.0, 0.0, 0.0))
    torch.testing.assert_close(functional.stch(losses, ones, mu=1e-3), tensor(0.0, 0.0, 3 / 4.0))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_are_batched_over_leading_axes(name: str, dtype: torch.dtype) -> None:
    count, options = FUNCTIONS[name]
    rng = np.random.default_rng(3)
    given = [torch.from_numpy(rng.uniform(0.1, 3, (2, 3, 5))).to(dtype) for _ in range(count)]
    function = getattr(functional, name)
    whole = function(*given, **options)
    assert whole.shape == (2, 3, 5)
    assert whole.dtype == dtype
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(whole[i, j], function(*(x[i, j] for x in given), **options))


def test_every_function_is_exported() -> None:
    assert set(METHODS) - {"ew", "constant", "rlw"} == set(FUNCTIONS)
    assert {*FUNCTIONS, "rlw"} <= set(functional.__all__)


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("go4align", {"groups": 2}),
        ("rlw", {"distribution": "dirichlet"}),
        *((name, {"window": 2}) for name in BY_EPOCHS),
        ("pbi", {"preference": (1.0, 2.0, 3.0)}),
        ("uw", {}),
    ],
)
def test_compiles_into_one_graph_with_its_state(name: str, hparams: dict[str, Any]) -> None:
    method, state = make(name, 3, **hparams)
    torch.compiler.reset()
    step = torch.compile(lambda L, s: method.weights(Stats(L), s, None)[:2], fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled, eager = state, state
    for losses in (tensor(1, 2, 3), tensor(0.5, 2, 1), tensor(0.1, 2, 2)):
        seed = torch.get_rng_state()
        w, compiled = step(losses, compiled)
        torch.set_rng_state(seed)
        expected, eager, _ = method.weights(Stats(losses), eager, None)
        torch.testing.assert_close(w, expected)
        torch.testing.assert_close(compiled, eager)


def test_permuting_tasks_permutes_the_weights() -> None:
    steps = [tensor(0.5, 2.0, 4.0, 0.5), tensor(0.6, 1.0, 4.0, 0.7), tensor(0.3, 3.0, 2.0, 0.1)]
    order = [2, 0, 3, 1]
    for name in METHODS:
        if name == "rlw":
            continue
        hparams = {"window": 1} if name in BY_EPOCHS else {"groups": 2} if name == "go4align" else {}
        plain, renamed = run(name, steps, **hparams), run(name, [losses[order] for losses in steps], **hparams)
        torch.testing.assert_close(torch.stack(renamed), torch.stack(plain)[:, order])
