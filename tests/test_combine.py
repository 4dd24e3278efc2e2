"""`MTLOptimizer.combine`: the weighted sum whose plain gradient is the method's direction."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import Toy, batch, flat, optimizer, own_random_state, samples  # noqa: F401  (an autouse fixture)
from torch import Tensor, nn

import gradsurgery
from gradsurgery import MTLOptimizer, get_method, list_methods
from gradsurgery.registry import ColumnMethod, TrackedMethod

METHODS = [name for name in list_methods() if not issubclass(get_method(name).cls, (ColumnMethod, TrackedMethod))]


def gradients(model: nn.Module) -> Tensor:
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def pair(models: list[Toy], name: str, **options: Any) -> tuple[MTLOptimizer, MTLOptimizer]:
    """One to pass backward, and one to combine, which weighs heads too."""
    return optimizer(models[0], name, heads="weighted", **options), optimizer(models[1], name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_its_gradient_is_the_direction(name: str) -> None:
    """Step for step, with the same state, random numbers and weights."""
    models = [Toy(), Toy()]
    direct, combined = pair(models, name, lr=0.05, seed=3)
    for step in range(4):
        x = batch(seed=step)
        for opt in (direct, combined):
            opt.zero_grad()
        direct.backward(models[0].losses(x), **samples(models[0], name, x))
        combined.combine(models[1].losses(x), **samples(models[1], name, x)).backward()
        torch.testing.assert_close(gradients(models[1]), gradients(models[0]), rtol=1e-9, atol=1e-12)
        assert direct.info is not None and combined.info is not None
        torch.testing.assert_close(combined.info.weights, direct.info.weights, rtol=1e-9, atol=1e-12)
        direct.step()
        combined.step()


@pytest.mark.parametrize("engine", ["sequential", "batched", "gramian", "representation"])
def test_any_engine_measures_for_it(engine: str) -> None:
    models = [Toy(), Toy()]
    direct, combined = pair(models, "cagrad", engine=engine)
    for x in (batch(seed=0), batch(seed=1)):
        for opt in (direct, combined):
            opt.zero_grad()
        direct.backward(models[0].losses(x))
        combined.combine(models[1].losses(x)).backward()
        torch.testing.assert_close(gradients(models[1]), gradients(models[0]))


def test_measure_on_measures_for_it() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", measure_on=list(model.trunk[2].parameters()))
    opt.combine(model.losses(x)).backward()
    found = gradients(model)
    model.zero_grad()
    assert opt.info is not None and opt.info.weights is not None
    sum(w * loss for w, loss in zip(opt.info.weights[0], model.losses(x), strict=True)).backward()  # pyright: ignore
    torch.testing.assert_close(found, gradients(model))


def test_grad_and_graph_are_left_as_they_were() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad")
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    losses = model.losses(x)
    total = opt.combine(losses)
    assert all(bool((p.grad == 0.5).all()) for p in model.parameters() if p.grad is not None)
    assert total.shape == () and total.requires_grad
    total.backward(retain_graph=True)
    sum(losses).backward()  # pyright: ignore[reportAttributeAccessIssue]


def test_value_is_the_weighted_sum() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "nash_mtl")
    losses = model.losses(x)
    total = opt.combine(losses)
    assert opt.info is not None and opt.info.weights is not None
    torch.testing.assert_close(total, opt.info.weights[0] @ torch.stack(losses).detach())


@pytest.mark.parametrize("form", ["dict", "vector", "one element", "absent"])
def test_losses_come_in_any_form(form: str) -> None:
    model, x = Toy(), batch()
    opt, plain = optimizer(model, "cagrad"), optimizer(model, "cagrad", heads="weighted")
    if form == "absent":
        for o in (opt, plain):
            o.combine(model.losses(x))

    def given() -> Any:
        losses = model.losses(x)
        if form == "dict":
            return {f"{t}": loss for t, loss in enumerate(losses)}
        if form == "absent":
            return [losses[0], None, losses[2]]
        return torch.stack(losses) if form == "vector" else [loss.reshape(1, 1) for loss in losses]

    opt.combine(given()).backward()
    found = gradients(model)
    model.zero_grad()
    plain.backward(given())
    torch.testing.assert_close(found, gradients(model))


def test_losses_of_several_dtypes_add_up() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad")
    first, *others = model.losses(x)
    total = opt.combine([first.float(), *others])
    assert total.dtype == torch.float64


def test_steps_between_two_solves_take_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", update_every=3, engine="sequential")
    passes = 0
    plain = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    seen = []
    for _ in range(6):
        passes = 0
        opt.combine(model.losses(x)).backward()
        seen.append(passes)
    assert seen == [3, 0, 0, 3, 0, 0]


def test_what_is_not_finite_shows_and_leaves_the_state() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "famo")
    opt.combine(model.losses(x)).backward()
    before = opt.state_dict()["param_groups"][0]["mtl"]
    losses = model.losses(x)
    total = opt.combine([losses[0] * torch.nan, *losses[1:]])
    assert total.isnan()
    after = opt.state_dict()["param_groups"][0]["mtl"]
    assert before.partition('"state"')[2] == after.partition('"state"')[2]


def test_a_scaler_scales_what_it_returns() -> None:
    models = [Toy(), Toy()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    direct, scaled = pair(models, "nash_mtl", lr=0.1)
    direct.step(models[0].losses(batch()))
    scaler.scale(scaled.combine(models[1].losses(batch()))).backward()
    scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 4096
    torch.testing.assert_close(flat(list(models[1].parameters())), flat(list(models[0].parameters())))


@pytest.mark.parametrize("name", ["graddrop", "trimmed_mean", "moco", "db_mtl", "excess_mtl"])
def test_methods_without_a_weighted_sum_are_refused(name: str) -> None:
    model = Toy()
    with pytest.raises(ValueError, match="no weighted sum"):
        optimizer(model, name).combine(model.losses(batch()))


def test_options_without_a_weighted_sum_are_refused() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="blocks"):
        optimizer(model, "cagrad", blocks="tensor").combine(model.losses(batch()))
    with pytest.raises(ValueError, match="heads='unweighted' was asked for"):
        optimizer(model, "cagrad", heads="unweighted").combine(model.losses(batch()))
    opt = optimizer(model, "cagrad", update_every=2, resolve_on_conflict=True)
    with pytest.raises(RuntimeError, match="resolve_on_conflict"):
        opt.combine(model.losses(batch()))
    opt = optimizer(model, "cagrad")
    with opt.accumulate(), pytest.raises(RuntimeError, match="accumulate"):
        opt.combine(model.losses(batch()))


def test_backward_reaches_through_what_hides_it() -> None:
    """Accelerate's wrapper has neither our methods nor a way to them."""
    models = [Toy(), Toy()]
    plain = optimizer(models[0], "cagrad", 0.1)
    accelerator = Accelerator(cpu=True)
    model, hidden = accelerator.prepare(models[1], optimizer(models[1], "cagrad", 0.1))
    assert not hasattr(hidden, "backward")
    plain.step(models[0].losses(batch()))
    info = gradsurgery.backward(hidden, model.losses(batch()))
    hidden.step()
    assert info.gramian is not None
    torch.testing.assert_close(flat(list(models[1].parameters())), flat(list(models[0].parameters())))


def test_backward_says_where_there_is_nothing_inside() -> None:
    model = Toy()
    with pytest.raises(TypeError, match="There is no MTLOptimizer in this SGD"):
        gradsurgery.backward(torch.optim.SGD(model.parameters(), 0.1), model.losses(batch()))
    opt = optimizer(model)
    assert isinstance(gradsurgery.backward(opt, model.losses(batch())), gradsurgery.StepInfo)
    assert isinstance(opt, MTLOptimizer)
