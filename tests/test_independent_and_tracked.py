"""Methods that learn from independent batches, and those that remember rows of their own, step by step through the
optimizer and against their oracles."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Toy, batch, jacobian, optimizer, samples, trunk_gradient
from reference import db_mtl, excess_mtl, moco, modo, sdmgrad, simplex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gradsurgery import MTLOptimizer, aggregate
from gradsurgery.methods.simplex import project
from gradsurgery.tracked import Tracked

T, D = 3, 72
LEARNED: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("sdmgrad", {"scale": "mean"}, lambda: sdmgrad.Sdmgrad(T)),
    ("sdmgrad", {"lam": 0.7, "steps": 5, "lr": 0.5, "momentum": 0.1}, lambda: _sum_scale(0.7, 5, 0.5, 0.1)),
    ("modo", {}, lambda: modo.Modo(T)),
    ("modo", {"lr": 0.02, "rho": 0.5}, lambda: modo.Modo(T, 0.02, 0.5)),
]
TRACKED: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("moco", {}, lambda: moco.Moco(T, D)),
    ("moco", {"beta": 0.2, "gamma": 0.01, "rho": 0.3}, lambda: moco.Moco(T, D, 0.2, 0.01, 0.3)),
    ("db_mtl", {}, lambda: db_mtl.DbMtl(T, D)),
    ("db_mtl", {"beta": 0.5, "decay": 0.0}, lambda: db_mtl.DbMtl(T, D, 0.5, 0.0)),
    ("excess_mtl", {}, lambda: excess_mtl.ExcessMtl(T, D)),
    ("excess_mtl", {"lr": 0.3}, lambda: excess_mtl.ExcessMtl(T, D, 0.3)),
]
NAMES = ["moco", "db_mtl", "excess_mtl"]


def _sum_scale(lam: float, steps: int, lr: float, momentum: float) -> Any:
    return sdmgrad.Sdmgrad(T, lam, steps, lr, momentum, scale="sum")


def moving(model: Toy, name: str, **options: Any) -> MTLOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    return MTLOptimizer(base, name, list(model.trunk.parameters()), **options)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9, 1e25])
def test_projection_on_the_simplex(scale: float) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 6):
        v = scale * rng.standard_normal((20, size)) / size + rng.choice([0.0, 1 / size], (20, 1))
        w = project(torch.from_numpy(v))
        assert (w >= 0).all()
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(20).double())
        if scale <= 1:
            np.testing.assert_allclose(w.numpy(), [simplex.project(row) for row in v], atol=1e-12)
    torch.testing.assert_close(project(torch.tensor([0.3, 0.3, 0.3]).double()), torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize(("name", "hparams", "make"), LEARNED)
def test_independent_batches_against_the_oracle(name: str, hparams: dict[str, Any], make: Callable[[], Any]) -> None:
    model, reference, seen = Toy(), make(), []
    opt = moving(model, name, **hparams)
    for step in range(15):
        x, a, b = (batch(6, seed=100 * k + step) for k in range(3))
        opt.zero_grad()
        expected = reference.direction(*(jacobian(model, y).numpy() for y in (a, b, x)))
        info = opt.backward(model.losses(x), independent=(model.losses(a), model.losses(b)))
        np.testing.assert_allclose(trunk_gradient(model).numpy(), expected, rtol=1e-7, atol=1e-10)
        assert info.gramian is None
        opt.step()
        seen.append(info.weights.clone())
    assert not torch.allclose(seen[-1], seen[-1].mean(), rtol=1e-4)


def test_independent_batches_leave_no_gradient_of_their_own() -> None:
    model, x = Toy(), batch()
    alone = copy.deepcopy(model)
    optimizer(model, "modo").backward(model.losses(x), **samples(model, "modo", x))
    optimizer(alone, "ew", heads="unweighted").backward(alone.losses(x))
    for head, other in zip(model.heads.parameters(), alone.heads.parameters(), strict=True):
        torch.testing.assert_close(head.grad, other.grad)


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_independent_batches_are_asked_for_and_checked(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name)
    with pytest.raises(ValueError, match=r"independent=\(losses_a, losses_b\)"):
        opt.backward(model.losses(x))
    with pytest.raises(ValueError, match=r"losses of 2 batches; got 1"):
        opt.backward(model.losses(x), independent=[model.losses(x)])
    losses, other = model.losses(x), model.losses(x)
    for aliased in ((losses, other), (other, other)):
        with pytest.raises(ValueError, match="passed twice"):
            opt.backward(losses, independent=aliased)
    with pytest.raises(ValueError, match="absent from all three"):
        opt.backward([*model.losses(x)[:2], None], independent=(model.losses(x), model.losses(x)))
    assert all(p.grad is None for p in model.parameters())
    assert opt.info is None
    with pytest.raises(ValueError, match="no use for independent batches"):
        optimizer(model, "cagrad").backward(model.losses(x), independent=(model.losses(x), model.losses(x)))
    J = jacobian(model, x)
    with pytest.raises(ValueError, match=r"independent=\(J_a, J_b\)"):
        aggregate(J, name)
    with pytest.raises(ValueError, match="no use for independent"):
        aggregate(J, "upgrad", independent=(J, J))


def test_between_two_solves_no_independent_batch_is_needed() -> None:
    model = Toy()
    opt = optimizer(model, "modo", engine="sequential", update_every=3)
    for step in range(7):
        x = batch(seed=step)
        extra = samples(model, "modo", x) if step % 3 == 0 else {}
        opt.step(model.losses(x), **extra)
        assert opt.info.engine == ("sequential" if step % 3 == 0 else "weighted")


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_independent_batches_under_an_amp_scale(name: str) -> None:
    model, x = Toy(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = optimizer(model, name), optimizer(model, name)
    w = plain.backward(model.losses(x), **samples(model, name, x)).weights
    direction = trunk_gradient(model).clone()
    plain.zero_grad()
    info = scaled.backward(model.losses(x), scaler=scaler, **samples(model, name, x))
    torch.testing.assert_close(info.weights, w)
    torch.testing.assert_close(trunk_gradient(model), 2.0**10 * direction)


@pytest.mark.parametrize("blocks", ["model", "tensor"])
@pytest.mark.parametrize(("name", "hparams", "make"), TRACKED)
def test_tracked_rows_against_the_oracle(
    name: str, hparams: dict[str, Any], make: Callable[[], Any], blocks: str
) -> None:
    """Block by block, each against an oracle of its own, while the model trains."""
    model, reference = Toy(), make()
    params = list(model.trunk.parameters())
    sizes = [p.numel() for p in params] if blocks == "tensor" else [D]
    references = [copy.deepcopy(reference) for _ in sizes]
    for one, size in zip(references, sizes, strict=True):
        for key in ("Y", "h", "S"):
            if hasattr(one, key):
                setattr(one, key, np.zeros((T, size)))
    opt = moving(model, name, blocks=blocks, **hparams)
    for step in range(15):
        x = batch(6, seed=step)
        opt.zero_grad()
        losses = torch.stack(model.losses(x)).detach().numpy()
        pieces = np.split(jacobian(model, x).numpy(), np.cumsum(sizes)[:-1], axis=1)
        expected = [one.direction(J, losses) for one, J in zip(references, pieces, strict=True)]
        opt.backward(model.losses(x))
        np.testing.assert_allclose(trunk_gradient(model).numpy(), np.concatenate(expected), rtol=1e-7, atol=1e-9)
        opt.step()


@pytest.mark.parametrize("name", NAMES)
def test_tracked_rows_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Toy(), batch()
    whole = copy.deepcopy(model)
    runs = []
    for net, piece in ((whole, 1 << 18), (model, 8)):
        monkeypatch.setattr("gradsurgery.engines.layout.PIECE", piece)
        opt = optimizer(net, name)
        for _ in range(3):
            opt.zero_grad()
            opt.backward(net.losses(x))
        runs.append(trunk_gradient(net))
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("road", ["state_dict", "pickle", "deepcopy", "the same object"])
def test_tracked_rows_come_back(name: str, road: str) -> None:
    def run(model: Toy, opt: MTLOptimizer, steps: range) -> None:
        for step in steps:
            opt.zero_grad()
            opt.step(model.losses(batch(seed=step)))

    def make(model: Toy) -> MTLOptimizer:
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        return MTLOptimizer(base, name, list(model.trunk.parameters()))

    model = Toy()
    opt = make(model)
    run(model, opt, range(4))
    if road == "state_dict":
        twin = Toy(seed=1)
        other = make(twin)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif road == "the same object":
        twin, other = copy.deepcopy((model, opt))
        kept = copy.deepcopy((model.state_dict(), opt.state_dict()))
        run(twin, other, range(7, 9))
        twin.load_state_dict(kept[0])
        other.load_state_dict(kept[1])
    else:
        twin, other = pickle.loads(pickle.dumps((model, opt))) if road == "pickle" else copy.deepcopy((model, opt))
    run(model, opt, range(4, 8))
    run(twin, other, range(4, 8))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_optimizer_loads_tracked_rows_and_passes_them_by(name: str) -> None:
    model, x = Toy(), batch()
    opt = MTLOptimizer(torch.optim.Adam(model.parameters(), 0.01), name, list(model.trunk.parameters()))
    opt.step(model.losses(x))
    assert "mtl_rows" not in next(iter(opt.state.values())), "a live entry would look like Adam's own to Adam"
    plain = torch.optim.Adam(model.parameters(), 0.01)
    plain.load_state_dict(opt.state_dict())
    sum(model.losses(x)).backward()
    plain.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_lacks_the_rows_or_fits_no_parameter(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name)
    opt.step(model.losses(x))
    state = opt.state_dict()
    wide = Toy(width=7)
    with pytest.raises(ValueError, match="another model"):
        optimizer(wide, name).load_state_dict(state)
    without = {**state, "state": {}}
    with pytest.warns(UserWarning, match="they start at 0"):
        opt.load_state_dict(without)
    opt.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_tracked_rows_wait_for_an_absent_task_and_forget_a_bad_step(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name)
    opt.backward(model.losses(x))

    def rows() -> torch.Tensor:
        return torch.cat([r.flatten(1) for _, r in opt._surgery.remembered()], dim=1)

    first = rows()
    assert first.any(dim=1).all()
    a, _, c = model.losses(x)
    opt.backward([a, None, c])
    second = rows()
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    opt.zero_grad()
    info = opt.backward([loss * float("nan") if t == 1 else loss for t, loss in enumerate(model.losses(x))])
    assert info.weights.isnan().all()
    assert trunk_gradient(model).isnan().any()
    assert torch.equal(rows(), second)


@pytest.mark.parametrize("name", NAMES)
def test_a_solve_that_raises_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name)
    opt.backward(model.losses(x))
    before = [r for _, r in opt._surgery.remembered()]
    gradient = trunk_gradient(model).clone()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no weights")

    monkeypatch.setattr(type(opt._surgery.rule.method), "weights", fail)
    with pytest.raises(RuntimeError, match="no weights"):
        opt.backward(model.losses(x))
    assert all(torch.equal(r, b) for (_, r), b in zip(opt._surgery.remembered(), before, strict=True))
    assert torch.equal(trunk_gradient(model), gradient)


@pytest.mark.parametrize("name", NAMES)
def test_tracked_rows_under_an_amp_scale_and_in_half_precision(name: str) -> None:
    model, x = Toy(), batch()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = optimizer(model, name), optimizer(twin, name)
    for _ in range(3):
        plain.zero_grad()
        scaled.zero_grad()
        plain.backward(model.losses(x))
        scaled.backward(twin.losses(x), scaler=scaler)
    torch.testing.assert_close(trunk_gradient(twin), 2.0**10 * trunk_gradient(model))
    half = Toy(dtype=torch.bfloat16)
    opt = optimizer(half, name)
    for _ in range(3):
        opt.backward(half.losses(x.bfloat16()))
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())
    assert {r.dtype for _, r in opt._surgery.remembered()} == {torch.float32}


def test_tracked_rows_follow_a_parameter_that_is_frozen_and_thawed() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "moco", beta=0.5, gamma=1e-9)
    frozen = model.trunk[0].weight
    opt.backward(model.losses(x))
    frozen.requires_grad_(False)
    opt.backward(model.losses(x))
    frozen.requires_grad_(True)
    saved = opt.state_dict()["state"]
    for p, steps in ((frozen, 1), (model.trunk[2].weight, 2)):
        J = torch.stack([torch.autograd.grad(model.losses(x)[t], p)[0] for t in range(T)])
        n = [id(q) for q in model.parameters()].index(id(p))
        torch.testing.assert_close(saved[n]["mtl_rows"], (1 - 0.5**steps) * J)
    opt.backward(model.losses(x))
    J = torch.stack([torch.autograd.grad(model.losses(x)[t], frozen)[0] for t in range(T)])
    torch.testing.assert_close(dict(opt._surgery.remembered())[frozen], 0.75 * J)


@pytest.mark.parametrize("name", [*NAMES, "modo", "gradvac"])
def test_blocks_that_change_are_refused(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name, blocks="tensor")
    opt.backward(model.losses(x), **samples(model, name, x))
    model.trunk[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen, or thawed"):
        opt.backward(model.losses(x), **samples(model, name, x))


def test_a_finite_gradient_whose_square_is_not_is_not_remembered() -> None:
    model = Toy(dtype=torch.float32)
    opt, x = optimizer(model, "excess_mtl"), batch(dtype=torch.float32)
    opt.backward(model.losses(x))
    before = [r for _, r in opt._surgery.remembered()]
    info = opt.backward([loss * 1e21 for loss in model.losses(x)])
    assert info.weights.isnan().all()
    assert all(torch.equal(r, b) for (_, r), b in zip(opt._surgery.remembered(), before, strict=True))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", NAMES)
def test_tracked_rows_through_distributed_checkpoints(name: str, base: Any) -> None:
    model, x = Toy(), batch()
    opt = MTLOptimizer(base(model.parameters(), lr=0.01), name, list(model.trunk.parameters()))
    for _ in range(2):
        opt.step(model.losses(x))
    before = [r for _, r in opt._surgery.remembered()]
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    opt.step(model.losses(x))
    set_optimizer_state_dict(model, opt, saved)
    assert all(torch.equal(r, b) for (_, r), b in zip(opt._surgery.remembered(), before, strict=True))
    opt.step(model.losses(x))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, opt, options=options)
    with pytest.warns(UserWarning, match="unless flattened"):
        set_optimizer_state_dict(model, opt, flat, options=options)


def test_rows_are_another_methods_once_the_text_is_gone() -> None:
    model, x = Toy(), batch()
    opt = MTLOptimizer(torch.optim.Adam(model.parameters(), 0.01), "moco", list(model.trunk.parameters()))
    opt.step(model.losses(x))
    state = opt.state_dict()
    state["param_groups"][0]["mtl"] = ""
    other = MTLOptimizer(torch.optim.Adam(model.parameters(), 0.01), "upgrad", list(model.trunk.parameters()))
    other.load_state_dict(state)
    other.step(model.losses(x))
    plain = torch.optim.Adam(model.parameters(), 0.01)
    plain.load_state_dict(opt.state_dict())
    again = MTLOptimizer(plain, "upgrad", list(model.trunk.parameters()))
    assert all("mtl_rows" not in entry for entry in again.state_dict()["state"].values())


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_micro_batches_ask_for_samples_when_their_block_will_solve(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name, update_every=2)
    a, _, c = model.losses(x)
    without = [[first, None, third] for first, _, third in samples(model, name, x)["independent"]]
    opt.backward([a, None, c], independent=without)
    with opt.accumulate():
        for _ in range(2):
            a, _, c = model.losses(x)
            without = [[first, None, third] for first, _, third in samples(model, name, x)["independent"]]
            opt.backward([a, None, c], independent=without)
    with pytest.raises(ValueError, match="independent="), opt.accumulate():
        opt.backward(model.losses(x))


def test_a_micro_batch_that_fails_spoils_its_block_and_says_so() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "modo")

    def step(spoil: bool) -> None:
        first, second = samples(model, "modo", x)["independent"]
        opt.backward(model.losses(x), independent=(first, [second[0], first[1], second[2]] if spoil else second))

    with pytest.raises(RuntimeError, match="A micro-batch failed"), opt.accumulate():
        step(False)
        with pytest.raises(RuntimeError):
            step(True)
    assert all(p.grad is None for p in model.trunk.parameters())
    with opt.accumulate():
        step(False)


def test_independent_batches_without_losses_are_refused() -> None:
    model, x = Toy(), batch()
    opt, extra = optimizer(model, "modo"), samples(model, "modo", x)
    with pytest.raises(ValueError, match="no losses to operate on"):
        opt.step(**extra)
    with pytest.raises(ValueError, match="returned no losses"):
        opt.step(lambda: None, **extra)


def test_aggregate_tracks_in_single_precision_at_least() -> None:
    J = (torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 1e-2).half()
    losses = torch.full((2,), 1e5)
    u = aggregate(J, "db_mtl", losses=losses)
    assert u.dtype == torch.float16
    torch.testing.assert_close(u, aggregate(J.float(), "db_mtl", losses=losses).half(), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["moco", "db_mtl"])
def test_a_schedule_is_refused_where_the_direction_is_of_tracked_rows(name: str) -> None:
    with pytest.raises(ValueError, match="update_every=1"):
        optimizer(Toy(), name, update_every=2)
    opt = optimizer(model := Toy(), "excess_mtl", update_every=2)
    for step in range(3):
        opt.step(model.losses(batch(seed=step)))


def test_excess_mtl_waits_for_a_tasks_first_gradient() -> None:
    """A block that one task does not reach must not stop the others' weights there."""
    model = Toy()
    opt = optimizer(model, "excess_mtl", lr=0.1, blocks="tensor")
    for step in range(4):
        a, b, c = model.losses(batch(seed=step))
        info = opt.backward([a, b, c * 0.0])
    w = info.weights
    torch.testing.assert_close(w[:, 2], torch.ones(4).double())
    torch.testing.assert_close(w.sum(dim=1), torch.full((4,), 3.0).double())
    assert not torch.allclose(w[:, 0], w[:, 1])


def test_rows_that_were_known_of_other_parameters_are_forgotten() -> None:
    from gradsurgery.engines.layout import Layout

    p, q = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    tracked = Tracked(2, Layout([[p, q]]), [(q, torch.ones(2, 4)), (torch.zeros(1), torch.ones(2, 1))])
    by_parameter = dict(tracked.by_parameter())
    assert torch.equal(by_parameter[q], torch.ones(2, 4))
    assert not by_parameter[p].any()
