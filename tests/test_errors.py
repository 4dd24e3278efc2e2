"""Bad input gets an error that says what, why and what to do, before anything is changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, batch
from torch import Tensor, nn

from gradsurgery import MTLOptimizer, get_method


def snapshot(model: Toy, opt: MTLOptimizer) -> tuple[Any, ...]:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return gradients, copy.deepcopy(opt.state_dict()), [p.clone() for p in model.parameters()], opt.info


def assert_unchanged(before: tuple[Any, ...], model: Toy, opt: MTLOptimizer) -> None:
    after = snapshot(model, opt)
    for old, new in zip(before[0] + before[2], after[0] + after[2], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert before[1]["param_groups"][0]["mtl"] == after[1]["param_groups"][0]["mtl"]
    assert before[3] is after[3]


BAD_LOSSES: dict[str, tuple[Callable[[Toy, Tensor], Any], type[Exception], str]] = {
    "vector loss": (lambda m, x: [m(x)[0].flatten(), *m.losses(x)[1:]], ValueError, r"task '0' has shape \(8,\).*mean"),
    "no graph": (lambda m, x: [m.losses(x)[0].detach(), *m.losses(x)[1:]], ValueError, r"task '0' has no graph.*None"),
    "a number": (lambda m, x: [1.5, *m.losses(x)[1:]], TypeError, r"task '0' is a float"),
    "integers": (lambda m, x: [torch.tensor(3), *m.losses(x)[1:]], ValueError, r"int64.*floating"),
    "no losses": (lambda m, x: [], ValueError, "No losses"),
    "all absent": (lambda m, x: [None, None, None], ValueError, "absent from this batch; skip"),
    "summed": (lambda m, x: sum(m.losses(x)), ValueError, r"one tensor of shape \(\).*a loss a task"),
    "matrix": (lambda m, x: torch.stack(m.losses(x))[None], ValueError, r"shape \(1, 3\)"),
    "fewer": (lambda m, x: m.losses(x)[:2], ValueError, r"tasks of this optimizer are \['0', '1', '2'\].*\['0', '1'\]"),
    "more": (lambda m, x: [*m.losses(x), m.losses(x)[0]], ValueError, "make a new MTLOptimizer"),
    "other names": (lambda m, x: dict(zip("abc", m.losses(x), strict=True)), ValueError, "tasks of this optimizer"),
    "text": (lambda m, x: "losses", TypeError, "got str"),
    "another device": (
        lambda m, x: [*m.losses(x)[:2], torch.ones((), device="meta", requires_grad=True) * 2],
        ValueError,
        r"different devices \('0' on cpu.*'2' on meta",
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
@pytest.mark.parametrize("method", ["famo", "nash_mtl"])
@pytest.mark.parametrize("road", ["backward", "step", "closure", "accumulate"])
def test_bad_losses_change_nothing(case: str, method: str, road: str) -> None:
    make, error, message = BAD_LOSSES[case]
    model, x = Toy(), batch()
    opt = MTLOptimizer(torch.optim.AdamW(model.parameters(), 0.1), method, model.trunk.parameters())
    opt.step(model.losses(x))
    before = snapshot(model, opt)
    if road == "closure" and case in ("summed", "text", "matrix"):
        return  # to a closure, those are the results of an ordinary backward
    with pytest.raises(error, match=message):
        if road == "accumulate":
            with opt.accumulate():
                opt.backward(make(model, x))
        elif road == "closure":
            opt.step(lambda: make(model, x))
        else:
            getattr(opt, road)(make(model, x))
    assert_unchanged(before, model, opt)


def test_losses_and_parameters_on_different_devices() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "cagrad", model.trunk.parameters())
    with pytest.raises(ValueError, match="losses sit on meta and the shared parameters on cpu"):
        opt.backward([torch.ones((), device="meta", requires_grad=True) * 2 for _ in range(3)])
    assert all(p.grad is None for p in model.parameters())


BAD_ARGUMENTS: dict[str, tuple[Callable[[Toy], Any], type[Exception], str]] = {
    "method": (lambda m: {"method": "cagard"}, ValueError, "no method named 'cagard'. Did you mean 'cagrad'"),
    "hyperparameter": (
        lambda m: {"method": "cagrad", "calpha": 1},
        ValueError,
        "no hyperparameter 'calpha'.*Known: c",
    ),
    "value": (lambda m: {"c": -1}, ValueError, "finite and >= 0"),
    "preference": (
        lambda m: {"method": "pcgrad", "preference": [1, 2]},
        ValueError,
        "no place.*cagrad.*upgrad",
    ),
    "preference sign": (lambda m: {"preference": [1, 0, 1]}, ValueError, "positive"),
    "engine": (lambda m: {"engine": "sequental"}, ValueError, "no engine named.*Did you mean 'sequential'"),
    "engine type": (lambda m: {"engine": 3}, TypeError, "name or an Engine"),
    "blocks": (lambda m: {"blocks": "layer"}, ValueError, "'model', 'tensor', 'module'"),
    "flat blocks": (lambda m: {"blocks": list(m.trunk.parameters())}, ValueError, "flat list of tensors"),
    "heads": (lambda m: {"heads": "none"}, ValueError, "'unweighted', 'weighted'"),
    "update_every": (lambda m: {"update_every": 0}, ValueError, "1 or more"),
    "update_every and blocks": (lambda m: {"update_every": 2, "blocks": "tensor"}, ValueError, "one weight a task"),
    "exhausted generator": (lambda m: {"shared_params": iter(())}, ValueError, "shared_params is empty"),
    "no tensors": (lambda m: {"shared_params": [1]}, TypeError, "got int"),
    "strangers": (lambda m: {"shared_params": [nn.Parameter(torch.ones(2))]}, ValueError, "not in the base optimizer"),
    "nameless modules": (lambda m: {"blocks": "module"}, ValueError, "named_parameters"),
    "method instance with hparams": (lambda m: {"method": get_method("cagrad").cls(), "c": 1}, ValueError, "c go to"),
    "no method": (lambda m: {"method": 7}, TypeError, "name, a Method or a function"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    make, error, message = BAD_ARGUMENTS[case]
    model = Toy()
    options = {"shared_params": model.trunk.parameters(), **make(model)}
    with pytest.raises(error, match=message):
        MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), **options)


def test_a_named_stranger_is_named() -> None:
    model, other = Toy(), Toy()
    with pytest.raises(ValueError, match=r"4 of 4 .* the first: 0.weight \(6, 4\)"):
        MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), shared_params=other.trunk.named_parameters())


def test_no_shared_parameter_is_found() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.heads.parameters(), 0.1), "cagrad")
    with pytest.raises(ValueError, match="No parameter of the base optimizer is reached by more than one of the 3"):
        opt.step(model.losses(batch()))


def test_shared_parameters_cannot_be_found_without_every_task() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "cagrad")
    with pytest.raises(ValueError, match="first batch, in which '1' is absent. Pass shared_params"):
        opt.step([model.losses(batch())[0], None, model.losses(batch())[2]])
    opt.step(model.losses(batch()))


def test_everything_frozen() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "cagrad", model.trunk.parameters())
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match="Every shared parameter is frozen"):
        opt.step(model.losses(batch()))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda p: [p[:3]], "1 shared parameters are in no block"),
        (lambda p: [p[:3], p[2:]], "in two blocks"),
    ],
)
def test_blocks_that_do_not_partition(blocks: Callable[[list[Tensor]], Any], message: str) -> None:
    model = Toy()
    params = list(model.trunk.parameters())
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "cagrad", params, blocks=blocks(params))
    with pytest.raises(ValueError, match=message):
        opt.step(model.losses(batch()))


def test_a_preference_of_the_wrong_length() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "upgrad", model.trunk.parameters(), preference=[1, 2])
    with pytest.raises(ValueError, match="2 entries for 3 tasks"):
        opt.step(model.losses(batch()))
    assert all(p.grad is None for p in model.parameters())


def test_a_function_that_returns_the_wrong_shape() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), lambda G: G, model.trunk.parameters())
    with pytest.raises(ValueError, match=r"weights of shape \(1, 3\).*got \(1, 3, 3\)"):
        opt.step(model.losses(batch()))


def test_misuse_of_accumulate() -> None:
    model = Toy()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "cagrad", model.trunk.parameters())
    with opt.accumulate():
        with pytest.raises(RuntimeError, match=r"step\(\) inside accumulate"):
            opt.step(model.losses(batch()))
        with pytest.raises(RuntimeError, match="not reentrant"), opt.accumulate():
            pass
        opt.backward(model.losses(batch()))
    opt.step()
    with pytest.raises(ValueError, match="losses and a closure"):
        opt.step(model.losses(batch()), closure=lambda: None)


def test_complex_parameters_are_refused() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    opt = MTLOptimizer(torch.optim.SGD([p], 0.1), "cagrad", [p])
    with pytest.raises(ValueError, match="complex"):
        opt.step([p.abs().sum(), p.abs().prod()])
