"""One suite over every architecture: shapes, who owns which parameter, gradients, copies, precision, compilation."""

import copy
import doctest
import importlib
import pickle
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Pooled, ids, losses, make, maps
from torch import nn

from gradsurgery import MTLOptimizer, architectures
from gradsurgery.architectures import (
    CGC,
    Architecture,
    DSelectK,
    MMoE,
    PerTask,
    build,
    list_architectures,
)
from gradsurgery.architectures.dselect_k import SelectorGate
from gradsurgery.architectures.flow import data_flow, draw_flow, label
from gradsurgery.architectures.gates import Gate

NAMES = [*list_architectures(), "task_graph"]
CASES = [(name, family) for name in NAMES for family in FAMILIES if name != "segnet_mtan" or family == "maps"]
cases = pytest.mark.parametrize(("name", "family"), CASES)
names = pytest.mark.parametrize("name", NAMES)


def reached(model: Architecture, x: Any) -> dict[int, set[str]]:
    """By parameter, the tasks that autograd finds it under."""
    found: dict[int, set[str]] = {id(p): set() for p in model.parameters()}
    for task, loss in losses(model, x).items():
        wanted = list(model.parameters())
        for p, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True), strict=True):
            if g is not None:
                found[id(p)].add(task)
    return found


@cases
def test_every_task_has_its_prediction(name: str, family: str) -> None:
    model, x = make(name, family)
    outputs = model(x)
    assert tuple(outputs) == model.tasks
    assert all(len(y) == len(x) and y.isfinite().all() for y in outputs.values())


@cases
def test_parameters_belong_to_the_tasks_that_reach_them(name: str, family: str) -> None:
    model, x = make(name, family)
    found = reached(model, x)
    for task in model.tasks:
        assert set(ids(model.task_parameters(task))) == {p for p, tasks in found.items() if tasks == {task}}
    assert set(ids(model.shared_parameters())) == {p for p, tasks in found.items() if len(tasks) > 1}
    parts = ids(model.shared_parameters()) + [i for task in model.tasks for i in ids(model.task_parameters(task))]
    assert sorted(parts) == sorted(ids(model.parameters()))


@cases
def test_forward_is_decode_of_representation(name: str, family: str) -> None:
    model, x = make(name, family)
    model.eval()
    whole, z = model(x), model.representation(x)
    for task, y in model.decode(z).items():
        torch.testing.assert_close(y, whole[task], rtol=0, atol=0)
    some = model.tasks[-1:]
    assert tuple(model.decode(z, some)) == tuple(model(x, some)) == some
    torch.testing.assert_close(model(x, some)[some[0]], whole[some[0]])


@cases
def test_an_input_for_each_task_or_for_some(name: str, family: str) -> None:
    model, x = make(name, family)
    model.eval()
    whole = model(x)
    a, b = model.tasks[:2]
    both = model(PerTask({b: x[:1], a: x}))
    assert list(both) == [b, a]
    torch.testing.assert_close(both[a], whole[a], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[b], whole[b][:1], rtol=1e-4, atol=1e-5)
    if name != "task_graph":
        assert list(model({b: x})) == [b]
        with pytest.raises(ValueError, match=r"Unknown tasks \['none'\]"):
            model({"none": x})


@cases
@pytest.mark.parametrize("method", ["ew", "pcgrad"])
def test_every_parameter_learns(name: str, family: str, method: str) -> None:
    model, x = make(name, family)
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), method, model.shared_parameters(), seed=0)
    random = torch.get_rng_state()
    expected = torch.autograd.grad(sum(losses(model, x).values()), list(model.parameters()))  # pyright: ignore
    torch.set_rng_state(random)
    opt.backward(losses(model, x))
    for (where, p), g in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None, where
        if method == "ew":
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6, msg=where)


@cases
def test_the_optimizer_finds_the_same_shared_parameters(name: str, family: str) -> None:
    model, x = make(name, family)
    found = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda")
    told = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda", model.shared_parameters())
    torch.manual_seed(1)
    one = found.backward(losses(model, x))
    torch.manual_seed(1)
    other = told.backward(losses(model, x))
    torch.testing.assert_close(one.gramian, other.gramian)


@names
def test_surgery_at_the_representation(name: str) -> None:
    model, x = make(name)
    opt = MTLOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), "upgrad", model.shared_parameters(), engine="representation"
    )
    random = torch.get_rng_state()
    z = model.representation(x)
    outputs = model.decode(z)
    info = opt.backward({t: y.square().mean() for t, y in outputs.items()}, representation=z)
    weights = info.weights
    assert weights is not None
    torch.set_rng_state(random)
    shared = list(model.shared_parameters())
    total = sum(w * y.square().mean() for w, y in zip(weights[0], model(x).values(), strict=True))
    expected = torch.autograd.grad(total, shared)  # pyright: ignore[reportArgumentType]
    for p, g in zip(shared, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None for p in model.parameters())


@cases
def test_one_task_alone(name: str, family: str) -> None:
    if name == "esmm":
        pytest.skip("ESMM has two tasks by nature")
    model, x = make(name, family, {"only": 2})
    outputs = model(x)
    assert list(outputs) == ["only"]
    loss = outputs["only"].sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@names
def test_construction_runs_nothing(name: str) -> None:
    model, _ = make(name)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(not m.num_batches_tracked for m in norms)


@names
def test_evaluation_is_deterministic_and_copies_agree(name: str) -> None:
    model, x = make(name)
    sum(losses(model, x).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    model.eval()
    first = model(x)
    torch.manual_seed(5)
    fresh, _ = make(name)
    fresh.load_state_dict(model.state_dict(), strict=True)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh.eval()):
        for task, y in twin(x).items():
            torch.testing.assert_close(y, first[task], rtol=0, atol=0)


@cases
def test_half_precision_and_double(name: str, family: str) -> None:
    model, x = make(name, family)
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(losses(model, x).values())
    total.backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    outputs = model.double()(x.double())
    assert all(y.dtype == torch.float64 for y in outputs.values())


@names
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(name: str, training: bool) -> None:
    model, x = make(name, **({"widths": (2, 3)} if name == "segnet_mtan" else {}))
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    found = compiled(x)
    for task, y in found.items():
        if name not in ("ltb", "adashare") or not training:
            torch.testing.assert_close(y, expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "family"), [c for c in CASES if c[0] in ("mmoe", "cgc", "ple", "dselect_k")])
def test_gates_are_on_the_simplex(name: str, family: str) -> None:
    options = {"stem": 0 if family == "vectors" else 1} if name != "dselect_k" else {"num_experts": 4}
    model, x = make(name, family, **options)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    found = [
        module(torch.randn(7, module.linear.in_features)) for module in model.modules() if isinstance(module, Gate)
    ]
    found += [m(torch.randn(7, m.bits.in_features)) for m in model.modules() if isinstance(m, SelectorGate)]
    if isinstance(model, MMoE | CGC | DSelectK):
        found += [model.gate_weights(model.representation(x), task) for task in model.tasks]
    assert len(found) >= 3
    for weights in found:
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


@names
def test_nothing_stays_behind_on_another_device(name: str) -> None:
    model, x = make(name)
    outputs = model.to("meta")(x.to("meta"))
    assert all(y.is_meta for y in outputs.values())


def test_names_and_options_are_checked() -> None:
    assert type(build("Cross-Stitch", maps, {"a": Pooled(8, 1, 1)})).__name__ == "CrossStitch"
    with pytest.raises(ValueError, match="did you mean 'mmoe'"):
        build("mmoee", maps, {"a": Pooled(8, 1, 1)})
    with pytest.raises(ValueError, match=r"MMoE has no option 'experts': it has \['num_experts'"):
        build("mmoe", maps, {"a": Pooled(8, 1, 1)}, experts=2)
    with pytest.raises(ValueError, match="encoder of its own"):
        build("segnet_mtan", maps, {"a": Pooled(8, 1, 1)})
    with pytest.raises(ValueError, match="needs an encoder"):
        build("hps", None, {"a": Pooled(8, 1, 1)})
    for name in list_architectures():
        with pytest.raises(ValueError, match="`decoders` is empty|has the towers"):
            build(name, None if name == "segnet_mtan" else maps, {})


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(architectures.__path__)])
def test_docstring_examples(module: str) -> None:
    assert not doctest.testmod(importlib.import_module(f"gradsurgery.architectures.{module}")).failed


@names
def test_the_flow_is_what_feeds_what(name: str, tmp_path: Path) -> None:
    model, x = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flow = data_flow(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fed = {b for _, b in flow.edges}
    assert set(flow.parts) - fed <= {"x", *(part for part in flow.parts if "gate" in part)}
    assert all(flow.parts[task] == task and task in fed for task in model.tasks)
    # From the input, every part can be reached that has no choice of its own to make.
    reached, ahead = {"x"}, ["x"]
    while ahead:
        part = ahead.pop()
        new = {b for a, b in flow.edges if a == part} - reached
        reached |= new
        ahead += new
    assert reached == set(flow.parts)
    assert draw_flow(model, x, tmp_path / "flow.png").stat().st_size > 2000


def test_the_flow_of_cross_stitch() -> None:
    model, x = make("cross_stitch", tasks={"a": 1, "b": 1})
    flow = data_flow(model, x)
    across = {("networks.0.stages.1", "networks.1.stages.2"), ("networks.1.stages.2", "decoders.a")}
    assert across <= flow.edges
    # The stem is not stitched.
    assert ("networks.0.stages.0", "networks.1.stages.1") not in flow.edges
    assert flow.parts["decoders.a"] == "a" and flow.parts["networks.0.stages.0"] is None
    assert label("networks.0.stages.1") == "network 0 stage 1" and label("encoder.stages.1.1") == "stage 1 1"


def test_the_readme_of_the_zoo() -> None:
    text = (Path(__file__).parent.parent / "architectures" / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    for name in list_architectures():
        assert f"**`{name}`**" in text and f"docs/architectures/{name}.png" in text
        assert (Path(__file__).parent.parent / "docs" / "architectures" / f"{name}.png").exists()
