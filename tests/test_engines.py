"""Every engine against plain autograd: over a zoo of models, over methods, and over what the wrapper can do."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from engine_zoo import ZOO, Case, Hub, Net, Wired, mse
from models import (
    Toy,
    batch,
    flat,
    jacobian,
    optimizer,
    own_random_state,  # noqa: F401  (an autouse fixture)
    samples,
    trunk_gradient,
)
from torch import Tensor, nn

from gradsurgery import MTLOptimizer, StepInfo, aggregate, functional, get_method, list_methods
from gradsurgery.engines import Batched, Gramian, Representation
from gradsurgery.stats import Needs

ROADS = ["sequential", "batched", "gramian"]
VMAPPED = ["batched", "gramian"]
TRACKED = list_methods(needs=Needs.TRACKED)
CROSS = list_methods(needs=Needs.CROSS)


def rows(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """(T, n) float64: one `torch.autograd.grad` a task, 0 where a task does not reach an input."""

    def row(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss.reshape(()), inputs, retain_graph=True, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, inputs, strict=True)]
        return flat(dense).double()

    return torch.stack([row(loss) for loss in losses])


def written(params: Sequence[Tensor]) -> Tensor:
    """What stands in ``.grad``, 0 where it is None."""
    return flat([torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in params]).double()


def assert_near(got: Tensor, expected: Tensor, scale: Tensor | float, tolerance: float) -> None:
    error = (got - expected).norm()
    assert error <= tolerance * torch.as_tensor(scale), f"off by {float(error):.1e} of {float(scale):.1e}"


def assert_gradients(params: Sequence[Tensor], expected: Tensor, J: Tensor, tolerance: float) -> None:
    """Each parameter's gradient, by the size of the task gradients there; rounding is as large as it is anywhere."""
    sizes = [p.numel() for p in params]
    everywhere = J.norm(dim=1).max()
    for p, u, block in zip(params, expected.split(sizes), J.split(sizes, dim=1), strict=True):
        assert_near(written([p]), u, block.norm(dim=1).max() + 0.01 * everywhere, tolerance)


def assert_gramian(G: Tensor, J: Tensor, tolerance: float) -> None:
    size = J.norm(dim=1)
    assert G.shape == (1, len(J), len(J))
    assert ((G[0] - J @ J.T).abs() <= tolerance * size[:, None] * size).all()


def as_list(losses: Any) -> list[Tensor]:
    return list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)


def z_rows(losses: Sequence[Tensor], z: Sequence[Tensor], reduce: str = "none") -> Tensor:
    """(T, n) float64: dL_t/dz, flattened, or summed over the batch first."""

    def row(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss.reshape(()), z, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, z, strict=True)]
        return flat([g.sum(dim=0) if reduce == "sum" else g for g in filled]).double()

    return torch.stack([row(loss) for loss in losses])


def assert_representation(info: StepInfo, losses: Sequence[Tensor], z: Any, tolerance: float) -> None:
    """The Gramian is that of z, up to a factor (a hook on z may have scaled it), and the weights are its."""
    z = (z,) if isinstance(z, Tensor) else z
    if any(len(z_rows([a.sum()], z)[0].nonzero()) > a.numel() for a in z):
        return  # one is made of another
    R = z_rows(losses, z)
    G, expected = info.gramian / info.gramian.norm(), R @ R.T / (R @ R.T).norm()
    assert_gramian(G * (R @ R.T).norm(), R, 10 * tolerance)
    assert_near(info.weights[0], functional.upgrad(expected), info.weights.norm(), 10 * tolerance)


def take(
    opt: MTLOptimizer, case: Case, net: Net, twin: Net, step: int, n: int, *, pass_representation: bool = False
) -> StepInfo:
    """A backward of ``net`` under upgrad, checked against plain autograd on ``twin``; the next step's parameters."""
    twin.load_state_dict(net.state_dict())
    inputs = case.batch(n, step)
    torch.manual_seed(step)
    losses = as_list(twin(*inputs))
    J, own = rows(losses, twin.shared()), rows(losses, twin.task_specific())
    opt.zero_grad()
    torch.manual_seed(step)
    given = net(*inputs)
    options = {"representation": net.representation} if pass_representation else {}
    info = opt.backward(given, **options)
    if info.engine == "representation":
        u = info.weights[0] @ J
        assert_representation(info, losses, twin.representation, case.tolerance)
    else:
        u = aggregate(J, "upgrad")
        assert_gramian(info.gramian, J, case.tolerance)
        assert_near(info.weights[0], functional.upgrad(J @ J.T), info.weights.norm(), 10 * case.tolerance)
    assert_gradients(net.shared(), u, J, case.tolerance)
    assert_gradients(net.task_specific(), own.sum(dim=0), own, case.tolerance)
    for p, grad in zip(net.shared(), J.abs().sum(dim=0).split([p.numel() for p in net.shared()]), strict=True):
        assert p.grad is not None or not grad.any()
    torch.testing.assert_close(info.losses, torch.stack([loss.detach().reshape(()) for loss in losses]).double())
    for mine, once in zip(net.buffers(), twin.buffers(), strict=True):  # one forward has touched them
        torch.testing.assert_close(mine, once)
    opt.step()
    return info


def sgd(net: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr)


def of_ours(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Warnings other than torch's about an operator that its vmap loops over."""
    return [str(w.message) for w in caught if "performance drop" not in str(w.message)]


# One of each kind, where the whole zoo would take long.
SMALL = ["mlp", "tied weights", "resnet blocks", "gru", "cdist", "attention per task on two stages", "seven tasks"]


# Models with an operator that vmap has no rule for and loops over: right, and no gain for `batched`.
LOOPED = [
    "bilinear",
    "embedding bag",
    "embedding bag, max",
    "weighted embedding bag",
    "multi-head attention",
    "scaled dot product attention",
    "weight norm",
    "vision transformer",
]


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, engine: str) -> None:
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    told: list[str] = []
    for step, n in enumerate((6, 4)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            info = take(opt, case, net, twin, step, n)
        told += of_ours(caught)
        assert info.engine == ("sequential" if told else engine)
        assert len(told) <= 1
        assert all(engine in text for text in told)
        fails = not case.vmap or (engine == "batched" and name in LOOPED)
        assert case.vmap is None or bool(told) == (engine in VMAPPED and fails), told


@pytest.mark.parametrize("name", SMALL)
def test_auto(name: str) -> None:
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, n in enumerate((6, 4)):
            take(opt, case, net, twin, step, n)


def test_the_zoo_has_conflicts() -> None:
    """Else the direction would be the plain sum, and the weights 1."""
    conflicts = 0
    for case in (case for case in ZOO.values() if case.dtype == torch.float64):
        net = case.make()
        J = rows(as_list(net(*case.batch(6, 0))), net.shared())
        conflicts += bool((J @ J.T < 0).any())
    assert conflicts > len(ZOO) / 2


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("name", SMALL)
def test_chunks_of_tasks(name: str, size: int) -> None:
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=Batched(chunk_size=size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        infos = [take(opt, case, net, twin, step, n) for step, n in enumerate((5, 5, 3))]
    if case.vmap:
        assert {info.engine for info in infos} == {"batched"}


def test_a_chunk_holds_a_task_at_least() -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size"):
            Batched(chunk_size=size)


def test_engines_by_name() -> None:
    net = ZOO["mlp"].make()
    with pytest.raises(ValueError, match="engine"):
        MTLOptimizer(sgd(net), "upgrad", net.shared(), engine="gramain")
    with pytest.raises(ValueError, match="reduce"):
        Representation(reduce="mean")
    for engine in (*ROADS, "representation"):
        assert engine in repr(MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine))


# Falling back.


@pytest.mark.parametrize("engine", VMAPPED)
@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.vmap is False])
def test_the_fallback_is_told_of_once(name: str, engine: str) -> None:
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    with pytest.warns(UserWarning, match=engine) as record:
        assert take(opt, case, net, twin, 0, 6).engine == "sequential"
    (text,) = of_ours(list(record))
    assert "sequential" in text
    for step in (1, 2):  # any warning is an error here
        assert take(opt, case, net, twin, step, 4).engine == "sequential"


@pytest.mark.parametrize("engine", [*VMAPPED, "auto"])
@pytest.mark.parametrize("first", ["nan", "one task", "zero"])
def test_a_first_step_that_proves_nothing(first: str, engine: str) -> None:
    """A comparison of NaN, of a single row (which vmap of cdist gets right) or of zeros licenses no later step."""
    case = ZOO["cdist"]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    losses = net(*case.batch(6, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if first == "one task":
            opt.backward([losses[0], None, None])
        else:
            opt.backward([(float("nan") if first == "nan" else 0) * loss for loss in losses])
        for step in range(2):
            take(opt, case, net, twin, step, 5)


@pytest.mark.parametrize("engine", VMAPPED)
def test_a_first_step_that_is_not_finite_is_no_reason_to_fall_back(engine: str) -> None:
    case = ZOO["mlp"]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    opt.backward([loss * (float("nan") if t == 1 else 1) for t, loss in enumerate(net(*case.batch(6, 7)))])
    assert opt.info.weights.isnan().all()
    assert take(opt, case, net, twin, 1, 5).engine == engine


@pytest.mark.parametrize("engine", ["batched", "auto"])
def test_fallback_inside_accumulate(engine: str) -> None:
    case = ZOO["cdist"]
    net = case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    for step in range(2):
        pieces = [case.batch(3, 10 * step + k) for k in range(2)]
        J = sum(rows(net(*piece), net.shared()) for piece in pieces)
        opt.zero_grad()
        with warnings.catch_warnings(), opt.accumulate():
            warnings.simplefilter("ignore")
            for piece in pieces:
                opt.backward(net(*piece))
        assert_gradients(net.shared(), aggregate(J, "upgrad"), J, 1e-9)


@pytest.mark.parametrize("engine", [*ROADS, "auto"])
def test_compiled_model(engine: str) -> None:
    case = ZOO["mlp"]
    net, twin = case.make(), case.make()
    trunk = torch.compile(net.trunk, backend="aot_eager")
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    for step in range(2):
        twin.load_state_dict(net.state_dict())
        inputs = case.batch(6, step)
        J = rows(twin(*inputs), twin.shared())
        opt.zero_grad()
        z = trunk(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            info = opt.backward(
                [s * mse(h(z), 3 * (-1) ** t) for t, (s, h) in enumerate(zip(net.scales, net.heads, strict=True))]
            )
        assert info.engine == engine or info.engine == "sequential" or engine == "auto"
        assert_gramian(info.gramian, J, 1e-9)
        assert_gradients(net.shared(), aggregate(J, "upgrad"), J, 1e-9)


# Methods.

METHODS = ["ew", "mgda", "cagrad", "pcgrad", "nash_mtl", "imtl_g", "gradnorm", "famo", "trimmed_mean"]


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, engine: str) -> None:
    model, plain = Toy(), Toy()
    opt = optimizer(model, name, lr=0.01, seed=3, engine=engine)
    reference = optimizer(plain, name, lr=0.01, seed=3, engine="sequential")
    for step in range(3):
        x = batch(seed=step)
        J, losses = jacobian(model, x), torch.stack(model.losses(x)).detach()
        opt.zero_grad(), reference.zero_grad()
        info, expected = opt.backward(model.losses(x)), reference.backward(plain.losses(x))
        if step == 0:
            u = aggregate(J, name, losses=losses, generator=torch.Generator().manual_seed(3))
            torch.testing.assert_close(trunk_gradient(model), u, rtol=1e-9, atol=1e-9)
        assert info.engine == ("weighted" if get_method(name).needs is Needs.LOSSES else engine)
        if info.weights is not None:
            torch.testing.assert_close(info.weights, expected.weights, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        if info.gramian is not None:
            torch.testing.assert_close(info.gramian[0], J @ J.T, rtol=1e-9, atol=1e-9)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9)
        opt.step(), reference.step()


@pytest.mark.parametrize("engine", ROADS)
def test_graddrop_keeps_the_entries_of_one_sign(engine: str) -> None:
    model, x = Toy(), batch()
    J = jacobian(model, x)
    opt = optimizer(model, "graddrop", engine=engine)
    opt.backward(model.losses(x))
    u = trunk_gradient(model)
    near = [torch.isclose(u, J.clamp(**sign).sum(dim=0), rtol=1e-9, atol=1e-9) for sign in ({"min": 0}, {"max": 0})]
    assert (near[0] | near[1]).all()
    assert near[0].any()
    assert near[1].any()


@pytest.mark.parametrize("name", [*TRACKED, *CROSS])
def test_rows_that_are_kept_or_crossed(name: str) -> None:
    """`gramian` refuses them at once, and `batched` has them right."""
    with pytest.raises(ValueError, match=r"(?s)gramian.*(sequential|batched)") as refusal:
        optimizer(Toy(), name, engine="gramian")
    assert name in str(refusal.value)
    with pytest.raises(ValueError, match="gramian"):
        optimizer(Toy(), name, engine=Gramian())
    model, plain = Toy(), Toy()
    opt = optimizer(model, name, lr=0.01, seed=3, engine="batched")
    reference = optimizer(plain, name, lr=0.01, seed=3, engine="sequential")
    for step in range(3):
        x = batch(seed=step)
        opt.zero_grad(), reference.zero_grad()
        opt.backward(model.losses(x), **samples(model, name, x))
        reference.backward(plain.losses(x), **samples(plain, name, x))
        torch.testing.assert_close(trunk_gradient(model), trunk_gradient(plain), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(opt.info.weights, reference.info.weights, rtol=1e-8, atol=1e-9)
        assert opt.info.engine == "batched"
        opt.step(), reference.step()


@pytest.mark.parametrize("engine", ROADS)
def test_a_function_of_gramians(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, lambda G: 1 / G.diagonal(dim1=-2, dim2=-1).sqrt(), engine=engine)
    opt.backward(model.losses(x))
    J = jacobian(model, x)
    torch.testing.assert_close(trunk_gradient(model), (J / J.norm(dim=1, keepdim=True)).sum(dim=0))


# What the wrapper can do.


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("blocks", ["tensor", "module", "lists"])
@pytest.mark.parametrize("name", ["upgrad", "trimmed_mean"])
def test_blocks(name: str, blocks: str, engine: str) -> None:
    model = Toy()
    params = list(model.trunk.parameters())
    groups = {
        "tensor": [[p] for p in params],
        "module": [params[:2], params[2:]],
        "lists": [[params[3], params[0]], [params[1], params[2]]],
    }[blocks]
    option = groups if blocks == "lists" else blocks
    opt = optimizer(model, name, shared_params=list(model.trunk.named_parameters()), blocks=option, engine=engine)
    for step in range(2):
        x = batch(seed=step)
        opt.zero_grad()
        info = opt.backward(model.losses(x))
        assert info.engine == engine
        for b, group in enumerate(groups):
            J = rows(model.losses(x), group)
            torch.testing.assert_close(written(group), aggregate(J, name), rtol=1e-9, atol=1e-9)
            if info.gramian is not None:
                torch.testing.assert_close(info.gramian[b], J @ J.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_blocks_across_tied_weights(engine: str) -> None:
    case = ZOO["tied weights"]
    net = case.make()
    a, b = net.trunk.a, net.trunk.b
    groups = [[a.bias, b.bias], [a.weight]]
    opt = MTLOptimizer(sgd(net, 0.0), "upgrad", net.shared(), blocks=groups, engine=engine)
    for step in range(2):
        x = case.batch(5, step)
        opt.zero_grad()
        opt.backward(net(*x))
        for k, group in enumerate(groups):
            J = rows(net(*x), group)
            torch.testing.assert_close(opt.info.gramian[k], J @ J.T, rtol=1e-9, atol=1e-9)
            assert_near(written(group), aggregate(J, "upgrad"), J.norm(dim=1).max(), 1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_shared_parameters_are_found(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", shared_params=None, engine=engine)
    opt.backward(model.losses(x))
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "upgrad"))


@pytest.mark.parametrize("engine", [*ROADS, "auto"])
def test_a_task_is_absent(engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine=engine)
    for step, present in enumerate(([0, 2], [0, 1, 2], [1], [1, 2])):
        x = batch(seed=step)
        J = jacobian(model, x)[present]
        opt.zero_grad()
        info = opt.backward([loss if t in present else None for t, loss in enumerate(model.losses(x))])
        torch.testing.assert_close(trunk_gradient(model), aggregate(J, "upgrad"), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(info.gramian[0][present][:, present], J @ J.T, rtol=1e-9, atol=1e-9)
        for t, head in enumerate(model.heads):
            assert (head.weight.grad is not None) == (t in present)
            assert bool(info.weights[0, t] == 0) == (t not in present)
            assert bool(info.losses[t].isnan()) == (t not in present)


@pytest.mark.parametrize("method", ["ew", "cagrad", "graddrop"])
@pytest.mark.parametrize("engine", ["auto", *ROADS, "representation"])
def test_the_last_pass_frees_the_graph(engine: str, method: str) -> None:
    """What a forward pass saved is not kept for as long as somebody holds the losses, once an engine is checked."""
    if method == "graddrop" and engine in ("gramian", "representation"):
        pytest.skip("the engine has no columns")
    model = Toy()
    opt = optimizer(model, method, engine=engine)
    for _ in range(3):
        losses = model.losses(batch())
        opt.backward(losses)
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("engine", ROADS)
def test_gradients_add_to_those_that_are_there(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine=engine)
    u = aggregate(jacobian(model, x), "upgrad")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for times in (1, 2, 3):
        opt.backward(model.losses(x))
        torch.testing.assert_close(trunk_gradient(model), 1 + times * u, rtol=1e-9, atol=1e-9)
        for t, head in enumerate(model.heads):
            raw = rows([model.losses(x)[t]], list(head.parameters()))[0]
            torch.testing.assert_close(written(list(head.parameters())), 1 + times * raw, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_gradients_are_nobody_elses_memory(engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine=engine)
    for step in range(3):
        opt.zero_grad()
        x = batch(seed=step)
        opt.backward(model.losses(x))
        torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "upgrad"))
        for p in model.parameters():
            p.grad.fill_(float("nan"))


@pytest.mark.parametrize("engine", ROADS)
def test_amp_scaler(engine: str) -> None:
    model = Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = optimizer(model, "gradnorm", engine=engine)
    plain = Toy()
    reference = optimizer(plain, "gradnorm", engine="sequential")
    for step in range(3):
        x = batch(seed=step)
        opt.zero_grad(), reference.zero_grad()
        info, expected = opt.backward(model.losses(x), scaler=scaler), reference.backward(plain.losses(x))
        torch.testing.assert_close(info.weights, expected.weights)
        torch.testing.assert_close(info.gramian, expected.gramian)
        torch.testing.assert_close(trunk_gradient(model), 1024 * trunk_gradient(plain), rtol=1e-9, atol=1e-7)
        scaler.step(opt)
        scaler.update()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("name", ["gradnorm", "nash_mtl", "famo"])
def test_a_loss_that_is_not_finite(name: str, engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name, engine=engine)
    opt.backward(model.losses(x))
    before = {key: value.clone() for key, value in opt._surgery.rule._state.items()}
    opt.zero_grad()
    info = opt.backward([loss * (float("nan") if t == 1 else 1) for t, loss in enumerate(model.losses(x))])
    assert info.weights.isnan().all()
    assert trunk_gradient(model).isnan().all()
    assert all(torch.equal(before[key], value) for key, value in opt._surgery.rule._state.items())
    opt.zero_grad()
    info = opt.backward(model.losses(x))
    assert info.weights.isfinite().all()
    torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ jacobian(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_heads(heads: str, engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", heads=heads, engine=engine)
    for step in range(2):
        x = batch(seed=step)
        opt.zero_grad()
        info = opt.backward(model.losses(x))
        for t, head in enumerate(model.heads):
            raw = rows([model.losses(x)[t]], list(head.parameters()))[0]
            factor = info.weights[0, t] if heads == "weighted" else 1.0
            torch.testing.assert_close(written(list(head.parameters())), factor * raw, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("form", ["dict", "tuple", "stack", "closure", "closure of a dict"])
def test_forms_of_losses(form: str, engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine=engine)
    for step in range(2):
        x = batch(seed=step)
        named: Callable[[], dict[str, Tensor]] = lambda x=x: {f"t{t}": loss for t, loss in enumerate(model.losses(x))}
        made: Any = {
            "dict": named,
            "tuple": lambda x=x: tuple(model.losses(x)),
            "stack": lambda x=x: torch.stack(model.losses(x)),
            "closure": lambda x=x: lambda: model.losses(x),
            "closure of a dict": lambda: named,  # noqa: B023
        }[form]()
        opt.zero_grad()
        opt.step(made)
        J = jacobian(model, x)
        torch.testing.assert_close(trunk_gradient(model), aggregate(J, "upgrad"), rtol=1e-9, atol=1e-9)
        assert opt.info.tasks == (("t0", "t1", "t2") if "dict" in form else ("0", "1", "2"))


@pytest.mark.parametrize("engine", ROADS)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_update_every(heads: str, engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "nash_mtl", update_every=3, heads=heads, engine=engine)
    ran = []
    for step in range(7):
        x = batch(seed=step)
        opt.zero_grad()
        info = opt.backward(model.losses(x))
        ran.append(info.engine)
        J = jacobian(model, x)
        torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        if step % 3 == 0:
            torch.testing.assert_close(trunk_gradient(model), aggregate(J, "nash_mtl"), rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            for p in model.trunk.parameters():
                p += 0.02 * torch.randn_like(p)
    assert ran == [engine, "weighted", "weighted"] * 2 + [engine]


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("resolve", [False, True])
def test_a_conflict_between_two_solves_asks_for_the_next(resolve: bool, engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", update_every=10, resolve_on_conflict=resolve, engine=engine)
    ran = []
    # Losses that are turned round make the direction run against everything that was measured.
    for sign in (1, 1, -1, 1, 1):
        opt.zero_grad()
        losses = [sign * loss for loss in model.losses(x)]
        ran.append(opt.backward(losses).engine)
        assert_near(trunk_gradient(model), sign * aggregate(jacobian(model, x), "upgrad"), 1.0, 1e-9)
    assert ran == [engine, "weighted", "weighted", engine if resolve else "weighted", "weighted"]


def test_gramian_asks_for_a_new_solve_or_says_that_it_cannot() -> None:
    model, x = Toy(), batch()
    optimizer(model, "upgrad", update_every=10, resolve_on_conflict=True, engine="sequential")  # the keyword is known
    try:
        opt = optimizer(model, "upgrad", update_every=10, resolve_on_conflict=True, engine="gramian")
    except ValueError as error:
        assert "resolve_on_conflict" in str(error)
        return
    ran = []
    for sign in (1, 1, -1, 1):
        opt.zero_grad()
        ran.append(opt.backward([sign * loss for loss in model.losses(x)]).engine)
    assert ran == ["gramian", "weighted", "weighted", "gramian"]


@pytest.mark.parametrize("name", ["upgrad", "trimmed_mean", "gradnorm"])
@pytest.mark.parametrize("blocks", ["model", "tensor"])
def test_batched_accumulates(name: str, blocks: str) -> None:
    model, whole = Toy(), Toy()
    opt = optimizer(model, name, blocks=blocks, engine="batched")
    reference = optimizer(whole, name, blocks=blocks, engine="sequential")
    for step in range(2):
        x = batch(12, seed=step)
        opt.zero_grad(), reference.zero_grad()
        reference.backward(whole.losses(x))
        with opt.accumulate():
            for piece in x.split(4):
                opt.backward([loss / 3 for loss in model.losses(piece)])
        assert opt.info.engine == "batched"
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9)


def test_gramian_refuses_to_accumulate() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "gradnorm", engine="gramian")
    opt.backward(model.losses(x))
    before = {key: value.clone() for key, value in opt._surgery.rule._state.items()}
    grads = [p.grad.clone() for p in model.parameters()]
    with pytest.raises((RuntimeError, ValueError), match=r"gramian|Gramian"), opt.accumulate():
        opt.backward(model.losses(x))
    assert all(torch.equal(before[key], value) for key, value in opt._surgery.rule._state.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    opt.zero_grad()
    info = opt.backward(model.losses(x))
    torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ jacobian(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_errors_change_nothing(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "gradnorm", engine=engine)
    for _ in range(2):
        before = {key: value.clone() for key, value in opt._surgery.rule._state.items()}
        opt.zero_grad()
        with pytest.raises(ValueError, match="no graph"):
            opt.backward([*model.losses(x)[:2], torch.ones(())])
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(before[key], value) for key, value in opt._surgery.rule._state.items() if key in before)
        info = opt.backward(model.losses(x))
        torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ jacobian(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_freezing_between_steps(engine: str) -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine=engine)
    for step, frozen in enumerate((False, True, False)):
        model.trunk[0].requires_grad_(not frozen)
        opt.zero_grad()
        x = batch(seed=step)
        opt.backward(model.losses(x))
        active = [p for p in model.trunk.parameters() if p.requires_grad]
        J = rows(model.losses(x), active)
        torch.testing.assert_close(trunk_gradient(model), aggregate(J, "upgrad"), rtol=1e-9, atol=1e-9)
        assert all((p.grad is None) == frozen for p in model.trunk[0].parameters())


@pytest.mark.parametrize("engine", ROADS)
def test_a_checkpoint_and_a_copy_go_on(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "gradnorm", engine=engine)
    for _ in range(2):
        opt.backward(model.losses(x))
    fresh = optimizer(model, "gradnorm", engine="sequential")
    fresh.load_state_dict(opt.state_dict())
    back = optimizer(model, "gradnorm", engine=engine)
    back.load_state_dict(fresh.state_dict())
    other_model, other = copy.deepcopy((model, opt))
    y = batch(seed=1)
    expected = opt.backward(model.losses(y)).weights
    for again in (fresh, back):
        torch.testing.assert_close(again.backward(model.losses(y)).weights, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.backward(other_model.losses(y)).weights, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_dtypes_side_by_side(engine: str) -> None:
    """A trunk half of which is kept in single precision."""
    net = Hub(
        Wired(lambda m, x: m.b(m.a(x.float()).tanh().double()), a=nn.Linear(4, 6), b=nn.Linear(6, 5).double()),
        (torch.randn(2, 4),),
    ).double()
    net.trunk.a.float()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)
    for step in range(2):
        x = batch(5, seed=step)
        J = rows(net(x), net.shared())
        opt.zero_grad()
        opt.backward(net(x))
        assert [p.grad.dtype for p in net.shared()] == [p.dtype for p in net.shared()]
        assert_gramian(opt.info.gramian, J, 1e-4)
        assert_gradients(net.shared(), aggregate(J, "upgrad"), J, 1e-4)


def memory(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that this leaves with the CPU's allocator, and the most that it held, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    held = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


def test_gramian_never_holds_the_jacobian() -> None:
    T, layers, width = 6, 12, 64
    torch.manual_seed(0)
    trunk = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)])
    net = Hub(trunk, (torch.randn(2, width),), (1.0,) * T)
    whole = T * sum(p.numel() for p in net.shared()) * 4
    needs = {}
    for engine in ("sequential", "gramian"):
        opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine=engine)

        def step(opt: MTLOptimizer = opt) -> None:
            opt.zero_grad()
            opt.backward(net(torch.randn(4, width)))

        net.zero_grad()
        kept, _ = memory(lambda step=step, opt=opt: (step(), opt.zero_grad()))  # the first step may compare
        needs[engine] = kept + memory(step)[1]
    assert needs["sequential"] > whole, "the yardstick is broken"
    # Of the T rows a layer's at a time, then the direction, which is one row.
    assert needs["gramian"] < 0.6 * whole, needs


# Gradients with respect to a representation.


class Seen(Net):
    """A trunk whose representations, of several shapes, go to heads that read one or more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.mix = nn.Linear(4, 6), nn.Conv1d(1, 2, 3), nn.Linear(6, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(8, 1), nn.Linear(13, 1)])
        self.double()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).tanh()
        return self.mix(h).tanh(), self.conv(h[:, None])

    def tasks(self, a: Tensor, b: Tensor) -> list[Tensor]:
        outputs = [a, b.flatten(1), torch.cat([a, b.flatten(1)], 1)]
        return [
            (t + 1) * mse(head(y), 3 * (-1) ** t) for t, (head, y) in enumerate(zip(self.heads, outputs, strict=True))
        ]

    def shared(self) -> list[nn.Parameter]:
        return [p for m in (self.first, self.conv, self.mix) for p in m.parameters()]


REDUCE = ["none", "sum"]


def z_engine(reduce: str) -> Any:
    return "representation" if reduce == "none" else Representation(reduce="sum")


def test_representation_where_one_task_has_more_samples() -> None:
    """Its gradient enters the trunk in two places, one of which is parameters that lie below the other."""
    case = ZOO["one task has more samples"]
    net, inputs = case.make(), case.batch(6, 0)
    J = rows(as_list(net(*inputs)), net.shared())
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine="representation")
    info = opt.backward(net(*inputs))
    assert info.engine == "representation"
    assert_gradients(net.shared(), info.weights[0] @ J, J, case.tolerance)


@pytest.mark.parametrize("engine", ["representation", "batched", "gramian"])
def test_memory_for_what_enters_the_trunk_is_used_again(engine: Any) -> None:
    model, kept = Toy(), []
    opt = optimizer(model, "upgrad", engine=engine)
    for step, n in enumerate((8, 8, 16, 5, 16)):
        x = batch(n, seed=step)
        z = model.trunk(x)
        outputs = [head(z) for head in model.heads]
        losses: list[Any] = [(t + 1) * mse(y, 3 * (-1) ** t) for t, y in enumerate(outputs)]
        # A task that is absent after others: its place still holds what it had before.
        given = [None if (step, t) == (3, 1) else loss for t, loss in enumerate(losses)]
        wanted = (
            z_rows(losses, [z], "none") if engine == "representation" else rows(losses, list(model.trunk.parameters()))
        )
        wanted[[t for t, loss in enumerate(given) if loss is None]] = 0
        opt.zero_grad()
        info = opt.backward(given)
        torch.testing.assert_close(info.gramian.sum(dim=0), wanted @ wanted.T, rtol=1e-9, atol=1e-12)
        assert len(opt._surgery.layout.spare) == 1
        kept.append(opt._surgery.layout.spare[0].data_ptr())
    assert kept[0] == kept[1] and kept[2] == kept[3] == kept[4]


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "found"])
@pytest.mark.parametrize("name", ["upgrad", "mgda", "cagrad", "nash_mtl", "imtl_g"])
def test_representation(name: str, form: str, heads: str, reduce: str) -> None:
    model = Toy()
    opt = optimizer(model, name, heads=heads, engine=z_engine(reduce))
    for step, n in enumerate((8, 5)):
        x = batch(n, seed=step)
        z = model.trunk(x)
        losses = [(t + 1) * mse(head(z), 3 * (-1) ** t) for t, head in enumerate(model.heads)]
        J, R = rows(losses, list(model.trunk.parameters())), z_rows(losses, [z], reduce)
        opt.zero_grad()
        given = {"tensor": {"representation": z}, "tuple": {"representation": (z,)}, "found": {}}[form]
        info = opt.backward(losses, **given)
        w = getattr(functional, name)(R @ R.T)
        assert info.engine == "representation"
        torch.testing.assert_close(info.gramian[0], R @ R.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(info.weights[0], w, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        losses = [(t + 1) * mse(head(model.trunk(x)), 3 * (-1) ** t) for t, head in enumerate(model.heads)]
        for t, head in enumerate(model.heads):
            raw = rows([losses[t]], list(head.parameters()))[0]
            factor = info.weights[0, t] if heads == "weighted" else 1.0
            torch.testing.assert_close(written(list(head.parameters())), factor * raw, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("found", [False, True])
def test_representations_of_several_shapes(found: bool, reduce: str) -> None:
    model = Seen()
    opt = MTLOptimizer(sgd(model), "upgrad", model.shared(), engine=z_engine(reduce))
    for step, n in enumerate((6, 4)):
        z = model.encode(batch(n, seed=step))
        losses = model.tasks(*z)
        J, R, own = rows(losses, model.shared()), z_rows(losses, z, reduce), rows(losses, model.task_specific())
        opt.zero_grad()
        info = opt.backward(losses, **({} if found else {"representation": list(z)}))
        torch.testing.assert_close(info.weights[0], functional.upgrad(R @ R.T), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(info.gramian[0], R @ R.T, rtol=1e-9, atol=1e-12)
        assert_gradients(model.shared(), info.weights[0] @ J, J, 1e-9)
        assert_gradients(model.task_specific(), own.sum(dim=0), own, 1e-9)
        opt.step()


def test_the_two_reductions_differ() -> None:
    """Else the tests above would not tell one from the other, nor either from full gradients."""
    model, x = Toy(), batch()
    z = model.trunk(x)
    losses = [(t + 1) * mse(head(z), 3 * (-1) ** t) for t, head in enumerate(model.heads)]
    J = rows(losses, list(model.trunk.parameters()))
    weights = [functional.upgrad(M @ M.T) for M in (J, z_rows(losses, [z], "none"), z_rows(losses, [z], "sum"))]
    assert all((a - b).norm() > 1e-3 for a, b in zip(weights, [*weights[1:], weights[0]], strict=True))


# Where a backward is not linear, pulling one sum back is not the sum of what every task would pull back.
LINEAR = [name for name in ZOO if "not linear" not in name and name != "backward with item"]
SPLIT = ["chunks of one output", "tasks leave at different depths", "attention per task on two stages"]
HUBS = [name for name in LINEAR if ZOO[name].hub and "resnet18" not in name]


@pytest.mark.parametrize("how", ["given", "found"])
@pytest.mark.parametrize("name", [*HUBS, *SPLIT])
def test_representation_zoo(name: str, how: str) -> None:
    """Whatever the weights, the trunk takes the weighted sum of the tasks' gradients, once."""
    if how == "found" and name == "one task":
        pytest.skip("nothing joins")
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared(), engine="representation")
    for step, n in enumerate((6, 4)):
        info = take(opt, case, net, twin, step, n, pass_representation=how == "given")
        assert info.engine == "representation"


@pytest.mark.parametrize("name", [name for name in SMALL if ZOO[name].hub])
def test_auto_goes_by_a_representation(name: str) -> None:
    case = ZOO[name]
    net, twin = case.make(), case.make()
    opt = MTLOptimizer(sgd(net), "upgrad", net.shared())
    for step, n in enumerate((6, 4)):
        assert take(opt, case, net, twin, step, n, pass_representation=True).engine == "representation"


def toy_losses(model: Toy, z: Tensor) -> list[Tensor]:
    return [(t + 1) * mse(head(z), 3 * (-1) ** t) for t, head in enumerate(model.heads)]


@pytest.mark.parametrize("options", [{"shared_params": None}, {"update_every": 2}, {"seed": 3}])
@pytest.mark.parametrize("form", ["list", "dict", "stack"])
def test_representation_with_other_options(form: str, options: dict[str, Any]) -> None:
    model = Toy()
    opt = optimizer(model, "mgda", engine="representation", **options)
    ran = []
    for step in range(4):
        z = model.trunk(batch(seed=step))
        losses = toy_losses(model, z)
        J, R = rows(losses, list(model.trunk.parameters())), z_rows(losses, [z])
        given: Any = losses
        if form == "dict":
            given = {f"t{t}": loss for t, loss in enumerate(losses)}
        if form == "stack":
            given = torch.stack(losses)
        opt.zero_grad()
        opt.step(given, representation=z)
        ran.append(opt.info.engine)
        torch.testing.assert_close(trunk_gradient(model), opt.info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        if ran[-1] == "representation":
            torch.testing.assert_close(opt.info.weights[0], functional.mgda(R @ R.T), rtol=1e-7, atol=1e-9)
    between = "weighted" if "update_every" in options else "representation"
    assert ran == ["representation", between] * 2


def test_representation_of_absent_tasks() -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine="representation")
    for step, present in enumerate(([0, 2], [0, 1, 2], [1])):
        z = model.trunk(batch(seed=step))
        losses = toy_losses(model, z)
        J, R = (rows(losses, inputs)[present] for inputs in (list(model.trunk.parameters()), [z]))
        opt.zero_grad()
        info = opt.backward([loss if t in present else None for t, loss in enumerate(losses)], representation=z)
        w = info.weights[0, present]
        torch.testing.assert_close(w, functional.upgrad(R @ R.T), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(trunk_gradient(model), w @ J, rtol=1e-9, atol=1e-9)
        assert all((head.weight.grad is not None) == (t in present) for t, head in enumerate(model.heads))


@pytest.mark.parametrize("reduce", REDUCE)
def test_representation_under_a_scaler_adds_to_gradients(reduce: str) -> None:
    model = Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = optimizer(model, "upgrad", engine=z_engine(reduce), heads="weighted")
    for step in range(2):
        z = model.trunk(batch(seed=step))
        losses = toy_losses(model, z)
        J, R = rows(losses, list(model.trunk.parameters())), z_rows(losses, [z], reduce)
        own = rows(losses, list(model.heads.parameters()))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        info = opt.backward(losses, representation=z, scaler=scaler)
        torch.testing.assert_close(info.gramian[0], R @ R.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(trunk_gradient(model), 1 + 1024 * info.weights[0] @ J, rtol=1e-9, atol=1e-7)
        expected = 1 + 1024 * info.weights[0] @ own
        torch.testing.assert_close(written(list(model.heads.parameters())), expected, rtol=1e-9, atol=1e-7)


def test_representation_of_a_loss_that_is_not_finite() -> None:
    model = Toy()
    opt = optimizer(model, "gradnorm", engine="representation")
    z = model.trunk(batch())
    opt.backward(toy_losses(model, z), representation=z)
    before = {key: value.clone() for key, value in opt._surgery.rule._state.items()}
    z = model.trunk(batch())
    losses = [loss * (float("nan") if t == 1 else 1) for t, loss in enumerate(toy_losses(model, z))]
    opt.zero_grad()
    assert opt.backward(losses, representation=z).weights.isnan().all()
    assert trunk_gradient(model).isnan().all()
    assert all(torch.equal(before[key], value) for key, value in opt._surgery.rule._state.items())


def test_a_task_that_only_moves_its_own_head() -> None:
    model = Toy()
    opt = optimizer(model, "upgrad", engine="representation")
    z = model.trunk(batch())
    losses = [*toy_losses(model, z)[:2], model.heads[2].weight.square().sum()]
    J = rows(losses, list(model.trunk.parameters()))
    info = opt.backward(losses, representation=z)
    torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.heads[2].weight.grad, 2 * model.heads[2].weight.detach())


def bypasses(model: Toy, x: Tensor) -> dict[str, tuple[list[Tensor], Any]]:
    first = model.trunk[1](model.trunk[0](x))
    z = model.trunk[2:](first)
    losses = toy_losses(model, z)
    beside = losses[2] + model.trunk[0].weight.square().sum()
    skipping = losses[2] + mse(first, 1)
    return {
        "parameter": ([*losses[:2], beside], z),
        "earlier layer": ([*losses[:2], skipping], z),
        "detached": (losses, z.detach()),
        "another forward's": (losses, model.trunk(x)),
        "one of two": ([*losses[:2], skipping], [z]),
        "a head's output": (losses, model.heads[0](z)),
    }


@pytest.mark.parametrize("engine", ["representation", "auto"])
@pytest.mark.parametrize("what", [*bypasses(Toy(), batch())])
def test_a_bypass_is_refused(what: str, engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "gradnorm", engine=engine)
    z = model.trunk(x)
    opt.backward(toy_losses(model, z), representation=z)
    opt.zero_grad()
    before = {key: value.clone() for key, value in opt._surgery.rule._state.items()}
    losses, z = bypasses(model, x)[what]
    with pytest.raises(ValueError, match="representation"):
        opt.backward(losses, representation=z)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in opt._surgery.rule._state.items())
    z = model.trunk(x)
    losses = toy_losses(model, z)
    J = rows(losses, list(model.trunk.parameters()))
    info = opt.backward(losses, representation=z)
    torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)


def test_a_bypass_is_named_so() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine="representation")
    losses, z = bypasses(model, x)["earlier layer"]
    with pytest.raises(ValueError, match="bypass"):
        opt.backward(losses, representation=z)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ROADS)
def test_a_representation_is_of_no_use_to_other_engines(engine: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine=engine)
    z = model.trunk(x)
    with pytest.raises(ValueError, match="representation"):
        opt.backward(toy_losses(model, z), representation=z)
    with pytest.raises(ValueError, match="representation"):
        opt.step(toy_losses(model, z), representation=z)
    assert all(p.grad is None for p in model.parameters())
    opt.backward(toy_losses(model, model.trunk(x)))


def test_a_representation_has_no_blocks() -> None:
    model, x = Toy(), batch()
    named, params = list(model.trunk.named_parameters()), list(model.trunk.parameters())
    for blocks in ("tensor", "module", [params[:2], params[2:]]):
        with pytest.raises(ValueError, match="blocks"):
            optimizer(model, "upgrad", shared_params=named, blocks=blocks, engine="representation")
    opt = optimizer(model, "upgrad", blocks="tensor", engine="auto")
    z = model.trunk(x)
    with pytest.raises(ValueError, match="blocks"):
        opt.backward(toy_losses(model, z), representation=z)
    assert all(p.grad is None for p in model.parameters())


# A Gramian that is measured on some of the shared parameters.


@pytest.mark.parametrize("engine", [*ROADS, "auto"])
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("name", ["upgrad", "mgda", "cagrad", "nash_mtl"])
def test_measure_on(name: str, heads: str, engine: str) -> None:
    model = Toy()
    last = list(model.trunk[2].parameters())
    opt = optimizer(model, name, heads=heads, engine=engine, measure_on=iter(last))
    for step in range(3):
        x = batch(seed=step)
        J, L = jacobian(model, x), rows(model.losses(x), last)
        opt.zero_grad()
        info = opt.backward(model.losses(x))
        torch.testing.assert_close(info.gramian[0], L @ L.T, rtol=1e-9, atol=1e-9)
        w = getattr(functional, name)(L @ L.T)
        torch.testing.assert_close(info.weights[0], w, rtol=1e-7, atol=1e-9)
        assert (w - getattr(functional, name)(J @ J.T)).norm() > 1e-3
        torch.testing.assert_close(trunk_gradient(model), info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        for t, head in enumerate(model.heads):
            raw = rows([model.losses(x)[t]], list(head.parameters()))[0]
            factor = info.weights[0, t] if heads == "weighted" else 1.0
            torch.testing.assert_close(written(list(head.parameters())), factor * raw, rtol=1e-9, atol=1e-9)
        assert engine in ("auto", info.engine)


def gradnorm_by_hand(weights: Tensor, adam: torch.optim.Optimizer, L: Tensor, losses: Tensor, first: Tensor) -> None:
    """One update of Chen et al., algorithm 1, on rows (T, n) of the layer W."""
    norms = L.norm(dim=1)
    rate = losses / first / (losses / first).mean()
    target = (weights.detach() * norms).mean() * rate**1.5
    (weights.grad,) = torch.autograd.grad((weights * norms - target).abs().sum(), weights)
    adam.step()
    with torch.no_grad():
        weights.clamp_(min=0)
        weights *= len(weights) / weights.sum()


@pytest.mark.parametrize("engine", [*ROADS, "auto"])
def test_gradnorm_on_the_last_layer(engine: str) -> None:
    model = Toy()
    last = [model.trunk[2].weight]
    opt = optimizer(model, "gradnorm", lr=0.01, engine=engine, measure_on=last)
    weights = nn.Parameter(torch.ones(3).double())
    adam, first = torch.optim.Adam([weights], 0.025), None
    for step in range(6):
        x = batch(seed=step)
        J, L, losses = jacobian(model, x), rows(model.losses(x), last), torch.stack(model.losses(x)).detach()
        first = losses if first is None else first
        opt.zero_grad()
        opt.step(model.losses(x))
        torch.testing.assert_close(opt.info.weights[0], weights.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(trunk_gradient(model), opt.info.weights[0] @ J, rtol=1e-9, atol=1e-9)
        gradnorm_by_hand(weights, adam, L, losses, first)
    assert (weights - 1).abs().max() > 0.05


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_measure_on_refuses_to_accumulate(engine: str) -> None:
    """The weighted pass would need the graphs of all micro-batches."""
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine=engine, measure_on=list(model.trunk[2].parameters()))
    with pytest.raises(RuntimeError, match="measure_on"), opt.accumulate():
        opt.backward(model.losses(x))


@pytest.mark.parametrize("engine", ROADS)
def test_measure_on_where_a_task_is_absent_or_elsewhere(engine: str) -> None:
    """A task that does not reach the parameters measured has a row of zeros there."""
    case = ZOO["tasks leave at different depths"]
    net = case.make()
    opt = MTLOptimizer(sgd(net), "mgda", net.shared(), engine=engine, measure_on=net.b.parameters())
    for step, present in enumerate(([1, 2], [0, 1, 2], [2])):
        x = case.batch(5, step)
        J, L = rows(net(*x), net.shared())[present], rows(net(*x), list(net.b.parameters()))[present]
        opt.zero_grad()
        info = opt.backward([loss if t in present else None for t, loss in enumerate(net(*x))])
        torch.testing.assert_close(info.gramian[0][present][:, present], L @ L.T, rtol=1e-9, atol=1e-12)
        assert_gradients(net.shared(), info.weights[0, present] @ J, J, 1e-9)


@pytest.mark.parametrize("engine", ROADS)
def test_measure_on_goes_on_between_solves_and_under_a_scaler(engine: str) -> None:
    model = Toy()
    last = list(model.trunk[2].parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    opt = optimizer(model, "nash_mtl", update_every=2, engine=engine, measure_on=last)
    for step in range(4):
        x = batch(seed=step)
        J, L = jacobian(model, x), rows(model.losses(x), last)
        opt.zero_grad()
        info = opt.backward(model.losses(x), scaler=scaler)
        assert info.engine == ("weighted" if step % 2 else engine)
        if step % 2 == 0:
            torch.testing.assert_close(info.gramian[0], L @ L.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(trunk_gradient(model), 64 * info.weights[0] @ J, rtol=1e-9, atol=1e-7)


def refusals() -> Mapping[str, Callable[[], Any]]:
    model = Toy()
    params = list(model.trunk.parameters())
    last = params[2:]
    return {
        "a head's": lambda: optimizer(model, "upgrad", measure_on=[model.heads[0].weight]),
        "a stranger": lambda: optimizer(model, "upgrad", measure_on=[nn.Parameter(torch.ones(2))]),
        "empty": lambda: optimizer(model, "upgrad", measure_on=[]),
        "an exhausted generator": lambda: optimizer(model, "upgrad", measure_on=iter(())),
        "columns": lambda: optimizer(model, "trimmed_mean", measure_on=last),
        **{name: lambda name=name: optimizer(model, name, measure_on=last) for name in TRACKED},
        "tensor blocks": lambda: optimizer(model, "upgrad", blocks="tensor", measure_on=last),
        "listed blocks": lambda: optimizer(model, "upgrad", blocks=[params[:2], last], measure_on=last),
    }


@pytest.mark.parametrize("what", [*refusals()])
def test_measure_on_refuses(what: str) -> None:
    model = Toy()
    optimizer(model, "upgrad", measure_on=model.trunk[2].parameters())  # the keyword itself is known
    with pytest.raises(ValueError, match="measure_on"):
        refusals()[what]()
