"""From losses to ``.grad``: the sequential engine and the wrapper's roads against plain autograd."""

import collections
import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import Toy, batch, flat, independent, jacobian, optimizer, samples, trunk_gradient
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery import Absent, MTLOptimizer, aggregate, get_method, kernels, list_methods
from gradsurgery.engines import layout
from gradsurgery.kernels import flat as flat_kernels
from gradsurgery.stats import Needs

COLUMN_METHODS = list_methods(needs=Needs.COLUMNS)
# Per-coordinate draws are the engine's own: their law is tested on a matrix.
DRAWN_BY_COLUMN = [n for n in COLUMN_METHODS if get_method(n).randomized]


@pytest.fixture(autouse=True)
def as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here gradients are copied one by one as they come; elsewhere models are so small that all are copied at once."""
    monkeypatch.setattr(layout, "LARGE", 1)


@pytest.mark.parametrize("name", [n for n in list_methods() if n not in DRAWN_BY_COLUMN])
def test_trunk_gradient_is_the_aggregate_of_the_jacobian(name: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name, seed=5)
    info = opt.backward(model.losses(x), **samples(model, name, x))
    losses = torch.stack(model.losses(x)).detach()
    extra = independent(name, jacobian(model, x.roll(1, 1)), jacobian(model, 1 - x))
    generator = torch.Generator().manual_seed(5)
    expected = aggregate(jacobian(model, x), name, losses=losses, generator=generator, **extra)
    torch.testing.assert_close(trunk_gradient(model), expected)
    torch.testing.assert_close(info.losses, losses)
    if info.gramian is not None:
        J = jacobian(model, x)
        torch.testing.assert_close(info.gramian[0], J @ J.T)
        torch.testing.assert_close(info.cosines[0], torch.nn.functional.cosine_similarity(J[:, None], J[None], dim=-1))
        assert int(info.conflicts) == sum(bool(J[i] @ J[j] < 0) for i in range(3) for j in range(i))


@pytest.mark.parametrize("heads", ["weighted", "unweighted", None])
@pytest.mark.parametrize("name", list_methods())
def test_head_policy(name: str, heads: str | None) -> None:
    model, x = Toy(), batch()
    if heads == "weighted" and name in COLUMN_METHODS:
        with pytest.raises(ValueError, match="has no weights"):
            optimizer(model, name, heads=heads)
        return
    opt = optimizer(model, name, heads=heads, seed=1)
    info = opt.backward(model.losses(x), **samples(model, name, x))
    policy = heads or get_method(name).heads
    for t, head in enumerate(model.heads):
        raw = flat(torch.autograd.grad(model.losses(x)[t], list(head.parameters())))
        factor = info.weights[0, t] if policy == "weighted" else 1.0
        if name == "db_mtl" and policy == "weighted":  # its heads take the gradients of log-losses
            factor = 1 / info.losses[t]
        torch.testing.assert_close(flat([p.grad for p in head.parameters()]), factor * raw)


@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad", "mgda", "cagrad", "upgrad", "dualproj", "conicgrad", "epo"])
def test_info_tells_how_well_the_weights_are_solved_for(name: str) -> None:
    model, x = Toy(tasks=2), batch()
    opt = optimizer(model, name)
    assert opt.backward(model.losses(x)).residual <= 1e-8
    first = model.losses(x)[0]
    opt.zero_grad()
    info = opt.backward([model.losses(x)[0], -first + 20])  # exactly opposed: no bargain, and nothing to gain
    assert (info.residual > 1e-8) == (name in ("nash_mtl", "fairgrad"))
    gradient = trunk_gradient(model)
    assert gradient.isfinite().all()
    if name != "epo":  # whose losses differ: it balances them
        assert gradient.norm() <= 1e-9 * jacobian(model, x)[0].norm()


@pytest.mark.parametrize("blocks", ["model", "tensor", "module", "lists"])
def test_blocks(blocks: str) -> None:
    model, x = Toy(), batch()
    params = list(model.trunk.parameters())
    groups = {
        "model": [params],
        "tensor": [[p] for p in params],
        "module": [params[:2], params[2:]],
        "lists": [[params[3], params[0]], [params[1], params[2]]],
    }[blocks]
    option = groups if blocks == "lists" else blocks
    opt = optimizer(model, "upgrad", shared_params=list(model.trunk.named_parameters()), blocks=option)
    info = opt.backward(model.losses(x))
    assert info.weights.shape == (len(groups), 3)
    for b, group in enumerate(groups):
        J = torch.stack([flat(torch.autograd.grad(model.losses(x)[t], group)) for t in range(3)])
        torch.testing.assert_close(flat([p.grad for p in group]), aggregate(J, "upgrad"))
        torch.testing.assert_close(info.gramian[b], J @ J.T)


def test_shared_parameters_are_found() -> None:
    model, x = Toy(), batch()
    opt, found = optimizer(model, shared_params=None), copy.deepcopy(model)
    given = optimizer(found)
    opt.backward(model.losses(x))
    given.backward(found.losses(x))
    for p, q in zip(model.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("form", ["list", "tuple", "dict", "stack", "unstacked vector", "closure"])
def test_every_form_of_losses(form: str) -> None:
    model, x = Toy(), batch()
    expected = aggregate(jacobian(model, x), "cagrad")

    def make() -> object:
        losses = model.losses(x)
        return {
            "list": lambda: losses,
            "tuple": lambda: tuple(losses),
            "dict": lambda: {f"t{t}": loss for t, loss in enumerate(losses)},
            "stack": lambda: torch.stack(losses),
            "unstacked vector": lambda: torch.cat([loss[None] for loss in losses]),
            "closure": lambda: model.losses(x),
        }[form]()

    opt = optimizer(model)
    opt.step(make if form == "closure" else make())
    torch.testing.assert_close(trunk_gradient(model), expected)
    assert opt.info.tasks == (("t0", "t1", "t2") if form == "dict" else ("0", "1", "2"))


def test_a_stacked_loss_stays_out_of_the_other_heads() -> None:
    """A backward through the stack would send zeros down every head, and 0 * inf = NaN with them."""
    model, x = Toy(tasks=2), batch()

    class Inf(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # pyright: ignore
            return g * float("inf")

    z = model.trunk(x)
    losses = torch.stack([model.heads[0](z).mean(), Inf.apply(model.heads[1](z)).mean()])
    opt = optimizer(model, "ew", heads="unweighted")
    opt.backward(losses)
    assert flat([p.grad for p in model.heads[0].parameters()]).isfinite().all()


@pytest.mark.parametrize("name", list_methods())
def test_backward_accumulates(name: str) -> None:
    model, x = Toy(), batch()
    fresh = copy.deepcopy(model)
    optimizer(fresh, name, seed=0).backward(fresh.losses(x), **samples(fresh, name, x))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer(model, name, seed=0).backward(model.losses(x), **samples(model, name, x))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad + 1)


def test_gradients_are_nobody_elses_memory() -> None:
    """In-place work on ``.grad`` (clipping) must not reach the engine's rows, the graph, or another gradient."""
    model, x = Toy(), batch()
    scale = nn.Parameter(torch.tensor(2.0).double())
    twin = nn.Parameter(torch.tensor(3.0).double())
    opt = MTLOptimizer(torch.optim.SGD([*model.parameters(), scale, twin], 0.0), "cagrad", model.trunk.parameters())
    for _ in range(2):
        opt.zero_grad()
        losses = model.losses(x)
        losses[0] = losses[0] + scale + twin
        opt.backward(losses)
        assert scale.grad.item() == twin.grad.item() == 1.0
        torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "cagrad"))
        scale.grad.mul_(7)
        assert twin.grad.item() == 1.0
        for p in model.parameters():
            p.grad.fill_(float("nan"))


def _named(name: str, keys: tuple[str, ...], others: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
    return independent(name, *(dict(zip(keys, losses, strict=True)) for losses in others)) if others else {}


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("form", ["none", "missing key", "stand-in"])
def test_an_absent_task_drops_out_and_its_state_waits(name: str, form: str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, name, seed=2)
    keys = ("a", "b", "c")
    others = samples(model, name, x).get("independent", ())
    opt.backward(dict(zip(keys, model.losses(x), strict=True)), **_named(name, keys, others))
    before = {k: v.clone() for k, v in opt._surgery.rule._state.items()}
    opt.zero_grad()
    partial = dict(zip(keys, model.losses(x), strict=True))
    forms = {"none": {"b": None}, "stand-in": {"b": Absent(model(x)[1])}, "missing key": {}}
    partial = {"a": partial["a"], **forms[form], "c": partial["c"]}
    others = samples(model, name, x).get("independent", ())
    info = opt.backward(partial, **_named(name, keys, [[a, None, c] for a, _, c in others]))
    assert info.weights is None if name in COLUMN_METHODS else info.weights[0, 1] == 0
    assert info.losses[1].isnan()
    assert all(p.grad is None for p in model.heads[1].parameters())
    for key, tensor in opt._surgery.rule._state.items():
        for axis in opt._surgery.rule.method.task_axes_of(key, tensor):
            assert torch.equal(tensor.select(axis, 1), before[key].select(axis, 1)), key
    needs = get_method(name).needs
    if not needs & (Needs.LOSSES | Needs.CROSS | Needs.TRACKED) and not get_method(name).randomized:
        J = jacobian(model, x)[[0, 2]]
        torch.testing.assert_close(trunk_gradient(model), aggregate(J, name))
    if info.gramian is not None:
        assert not info.gramian[0, 1].any()
        assert info.gramian[0, 0, 2] != 0


def test_a_stand_in_is_no_loss() -> None:
    model, x = Toy(), batch()
    outputs = model(x)
    zero = Absent(outputs[0], outputs[1]).loss()
    zero.backward()
    reached = [*model.trunk.parameters(), *model.heads[0].parameters(), *model.heads[1].parameters()]
    assert zero.item() == 0 and not any(p.grad.any() for p in reached)
    for wrong in ((), (1.0,), (outputs[0], None)):
        with pytest.raises(TypeError, match="pass those, as tensors"):
            Absent(*wrong)
    with pytest.raises(TypeError):
        Absent(outputs[0]) / 2
    with pytest.raises(ValueError, match="stand in for task '1' have no graph"):
        optimizer(model, "cagrad").backward([model.losses(x)[0], Absent(outputs[1].detach()), None])
    with pytest.raises(ValueError, match="Every task .* is absent"):
        optimizer(model, "cagrad").backward([Absent(o) for o in outputs])


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("blocks", ["model", "tensor"])
def test_accumulated_micro_batches_equal_the_batch(name: str, heads: str, blocks: str) -> None:
    if heads == "weighted" and name in COLUMN_METHODS:
        pytest.skip("has no weights")
    model, x = Toy(), batch(12)
    whole = copy.deepcopy(model)
    reference = optimizer(whole, name, heads=heads, blocks=blocks, seed=0)
    reference.backward(whole.losses(x), **samples(whole, name, x))
    opt = optimizer(model, name, heads=heads, blocks=blocks, seed=0)
    with opt.accumulate():
        for piece in x.split(4):
            held = opt.backward([loss / 3 for loss in model.losses(piece)], **samples(model, name, piece, 1 / 3))
            assert held.weights is None
            assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(opt.info.losses, reference.info.losses)
    if name in COLUMN_METHODS:
        assert opt.info.weights is None
    else:
        torch.testing.assert_close(opt.info.weights, reference.info.weights)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_accumulation_over_tasks_that_come_and_go() -> None:
    model, x = Toy(), batch(8)
    J = torch.stack([jacobian(model, x)[0], jacobian(model, x[:4])[1], torch.zeros(72).double()])
    opt = optimizer(model, "ew", heads="unweighted")
    with opt.accumulate():
        first, second = model.losses(x[:4]), model.losses(x[4:])
        opt.backward([first[0] / 2, first[1], None])
        opt.backward([second[0] / 2, None, None])
    torch.testing.assert_close(trunk_gradient(model), J.sum(dim=0))
    assert opt.info.losses.isnan().tolist() == [False, False, True]


def test_an_error_inside_accumulate_drops_the_rows() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model)
    with pytest.raises(KeyError), opt.accumulate():
        opt.backward(model.losses(x))
        raise KeyError
    assert all(p.grad is None for p in model.parameters())
    opt.backward(model.losses(x))
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "cagrad"))


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_update_every_takes_one_backward_in_between(heads: str) -> None:
    model = Toy()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    opt = optimizer(model, "nash_mtl", engine="sequential", update_every=3, heads=heads)
    engines, counts, weights = [], [], []
    for step in range(6):
        opt.zero_grad()
        x, passes = batch(seed=step), 0
        z = model.trunk(x)
        z.register_hook(count)
        losses = [head(z).square().mean() * (t + 1) for t, head in enumerate(model.heads)]
        info = opt.backward(losses)
        engines.append(info.engine), counts.append(passes), weights.append(info.weights)
        z = model.trunk(x)
        losses = [head(z).square().mean() * (t + 1) for t, head in enumerate(model.heads)]
        summed = sum(w * loss for w, loss in zip(info.weights[0], losses, strict=True))
        expected = torch.autograd.grad(summed, list(model.trunk.parameters()))
        torch.testing.assert_close(trunk_gradient(model), flat(expected))
        for p in model.trunk.parameters():
            p.data += 0.05 * torch.randn_like(p)
    assert engines == ["sequential", "weighted", "weighted"] * 2
    between = 1 if heads == "weighted" else 2  # the second stops at the trunk's output: it reaches heads alone
    assert counts[0] == counts[3] == 3
    assert max(counts[1:3] + counts[4:]) <= between
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_update_every_solves_early_for_a_task_that_is_back() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", update_every=5)
    opt.backward([None, *model.losses(x)[1:]])
    assert opt.backward(model.losses(x)).engine == "sequential"
    assert (opt.info.weights > 0).all()
    assert opt.backward(model.losses(x)).engine == "weighted"


def test_parameters_that_no_loss_reaches_keep_no_gradient() -> None:
    model, x = Toy(), batch()
    unused = nn.Parameter(torch.ones(3).double())
    opt = MTLOptimizer(
        torch.optim.AdamW([*model.parameters(), unused], 0.1), "cagrad", [*model.trunk.parameters(), unused]
    )
    opt.step(model.losses(x))
    assert unused.grad is None
    assert torch.equal(unused, torch.ones(3).double())


def test_parameters_outside_the_base_optimizer_get_their_gradient_too() -> None:
    """As under ``loss.backward()``: the heads may have an optimizer of their own."""
    model, x = Toy(), batch()
    opt = MTLOptimizer(torch.optim.SGD(model.trunk.parameters(), 0.1), "cagrad", model.trunk.parameters())
    opt.backward(model.losses(x))
    for t, head in enumerate(model.heads):
        raw = torch.autograd.grad(model.losses(x)[t], list(head.parameters()))
        torch.testing.assert_close(flat([p.grad for p in head.parameters()]), flat(raw))


def test_freezing_and_unfreezing() -> None:
    model = Toy()
    opt = optimizer(model, "cagrad")
    frozen = list(model.trunk[0].parameters())
    for freeze in (False, True, False):
        for p in frozen:
            p.requires_grad_(not freeze)
        opt.zero_grad()
        x = batch(seed=int(freeze))
        opt.backward(model.losses(x))
        assert all((p.grad is None) == freeze for p in frozen)
        active = [p for p in model.trunk.parameters() if p.requires_grad]
        J = torch.stack([flat(torch.autograd.grad(model.losses(x)[t], active)) for t in range(3)])
        torch.testing.assert_close(trunk_gradient(model), aggregate(J, "cagrad"))


def test_parameters_added_later_are_found() -> None:
    model, x = Toy(), batch()
    first, second = model.trunk[0], model.trunk[2]
    base = torch.optim.SGD([*first.parameters(), *model.heads.parameters()], 0.0)
    opt = MTLOptimizer(base, "cagrad")
    opt.backward(model.losses(x))
    opt.add_param_group({"params": list(second.parameters())})
    opt.zero_grad()
    model.zero_grad()
    opt.backward(model.losses(x))
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "cagrad"))


def test_memory_formats_and_mixed_dtypes() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    trunk = trunk.to(memory_format=torch.channels_last)
    trunk[2].bias.data = trunk[2].bias.data.clone()
    heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    losses: Callable[[], list[Tensor]] = lambda: [head(trunk(x)).square().mean() for head in heads]
    base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 0.0)
    opt = MTLOptimizer(base, "upgrad", trunk.parameters())
    opt.backward(losses())
    J = torch.stack([flat(torch.autograd.grad(loss, list(trunk.parameters()))) for loss in losses()])
    torch.testing.assert_close(flat([p.grad for p in trunk.parameters()]), aggregate(J, "upgrad"), rtol=1e-4, atol=1e-6)
    assert trunk[0].weight.grad.stride() == trunk[0].weight.stride()
    half = Toy(dtype=torch.float32)
    half.trunk[0].to(torch.bfloat16)
    opt = optimizer(half, "cagrad")

    def mixed() -> list[Tensor]:
        z = half.trunk[1:](half.trunk[0](batch(dtype=torch.bfloat16)).float())
        return [head(z).square().mean() for head in half.heads]

    opt.backward(mixed())
    assert [p.grad.dtype for p in half.trunk.parameters()] == [p.dtype for p in half.trunk.parameters()]


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, sparse=True)
    heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])
    opt = MTLOptimizer(torch.optim.SGD([*table.parameters(), *heads.parameters()], 0.0), "cagrad", table.parameters())
    z = table(torch.tensor([1, 3]))
    opt.backward([head(z).square().mean() for head in heads])
    assert table.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [1, 3]


def test_a_plain_function_as_method() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, lambda G: 1 / G.diagonal(dim1=-2, dim2=-1).sqrt())
    opt.backward(model.losses(x))
    J = jacobian(model, x)
    torch.testing.assert_close(trunk_gradient(model), (J / J.norm(dim=1, keepdim=True)).sum(dim=0))
    assert "lambda" in repr(opt)


def test_observe_reaches_famo() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "famo", lr=0.01)
    opt.step(model.losses(x))
    before = opt._surgery.rule._state["logits"].clone()
    with torch.inference_mode():
        opt.observe(model.losses(x))
    assert not torch.equal(before, opt._surgery.rule._state["logits"])
    unmoved = optimizer(model, "cagrad")
    unmoved.step(model.losses(x))
    unmoved.observe([1.0 * loss for loss in model.losses(x)])


def test_a_nonfinite_loss_shows_in_the_gradient_and_not_in_the_state() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "famo")
    opt.backward(model.losses(x))
    before = {k: v.clone() for k, v in opt._surgery.rule._state.items()}
    opt.zero_grad()
    opt.backward([loss * (float("nan") if t == 1 else 1) for t, loss in enumerate(model.losses(x))])
    assert trunk_gradient(model).isnan().all()
    assert all(torch.equal(before[k], v) for k, v in opt._surgery.rule._state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 100, flat_kernels.CHUNK, 2 * flat_kernels.CHUNK + 77])
@pytest.mark.parametrize("tasks", [3, flat_kernels.MANY + 1])
def test_kernels(dtype: torch.dtype, d: int, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_kernels, "LONG", flat_kernels.CHUNK)
    J = torch.randn(tasks, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds = [0, d // 3, d // 3, d]
    G = kernels.gramian(J, bounds)
    w = torch.rand(3, tasks, generator=torch.Generator().manual_seed(1)).double()
    u = kernels.combine(w, J, bounds)
    cross = kernels.gramian(J, bounds, -J.flip(0))
    assert u.dtype == dtype
    for b, (start, stop) in enumerate(itertools.pairwise(bounds)):
        piece = J[:, start:stop].double()
        size = piece.norm(dim=1)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert ((G[b] - piece @ piece.T).abs() <= tolerance * size[:, None] * size + 1e-30).all()
        scale = size[:, None] * size.flip(0)
        assert ((cross[b] + piece @ piece.flip(0).T).abs() <= tolerance * scale + 1e-30).all()
        # Half precision is rounded once, at the end.
        rtol, atol = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-8, 1e-6)}[dtype]
        torch.testing.assert_close(u[start:stop].double(), w[b] @ piece, rtol=rtol, atol=atol)
    same = kernels.combine(w[:1].expand(3, tasks), J, bounds)
    torch.testing.assert_close(kernels.combine(w[:1], J, bounds), same)


class Traffic(TorchDispatchMode):
    """Names of the operators that touch a tensor of at least ``size`` elements, or that copy."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.operators = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        out = func(*args, **(kwargs or {}))
        touched = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.numel() >= self.size for t in touched) or "copy_" in str(func):
            self.operators.append(func.overloadpacket.__name__)
        return out


# A copy for each parameter of so many elements, and one for the rest together: of four, one is above 1000.
@pytest.mark.parametrize(("large", "copies"), [(1 << 16, 1), (1000, 2), (1, 4)])
def test_every_float_of_j_is_written_once_and_read_twice(
    large: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "LARGE", large)
    model, x = Toy(width=64), batch()
    opt = optimizer(model, "cagrad", engine="sequential")
    opt.backward(model.losses(x))
    d = opt._surgery.layout.bounds[-1]
    losses, pointer = model.losses(x), opt._surgery.layout.rows(3).data_ptr()
    with Traffic(d) as traffic:
        opt.backward(losses)
    assert opt._surgery.layout.rows(3).data_ptr() == pointer
    shapes = {"view", "unsqueeze", "squeeze", "squeeze_"}
    views = {"slice", "select", "unbind", "t", "transpose", "as_strided", "alias", *shapes}
    moved = collections.Counter(name for name in traffic.operators if name not in views)
    # Written once; read by one product for the Gramian, and by one for the direction.
    assert moved == {"_foreach_copy_": 3 * copies, "mm": 2}


def test_gradients_of_a_pass_are_freed_as_they_come() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine="sequential")
    seen: list[list[weakref.ref[torch.UntypedStorage]]] = [[], [], []]
    alive: list[int] = []
    tasks = itertools.count()

    def look(gradient: Tensor) -> None:
        refs = seen[next(tasks) // len(params)]
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(gradient.untyped_storage()))

    params = list(model.trunk.parameters())
    for p in params:
        p.register_hook(look)
    opt.backward(model.losses(x))
    # The last task's stay: the direction is made in their memory.
    assert alive == [0, 0, 0, 0] * 2 + [0, 1, 2, 3]


def test_average_is_a_running_mean_of_the_weights() -> None:
    model = Toy()
    plain, smooth = optimizer(model, "nash_mtl"), optimizer(model, "nash_mtl", average=0.8)
    mean = None
    for step in range(4):
        raw = plain.backward(model.losses(batch(seed=step))).weights
        mean = raw if mean is None else 0.8 * mean + 0.2 * raw
        opt_info = smooth.backward(model.losses(batch(seed=step)))
        torch.testing.assert_close(opt_info.weights, mean)


def test_average_waits_for_an_absent_task_and_passes_over_a_bad_step() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", average=0.5)
    first = opt.backward(model.losses(x)).weights
    losses = model.losses(x)
    without = opt.backward([losses[0], None, losses[2]]).weights
    assert without[0, 1] == 0
    assert opt.backward([loss * float("nan") for loss in model.losses(x)]).weights.isnan().all()
    again = opt.backward(model.losses(x)).weights
    torch.testing.assert_close(again[0, 1], first[0, 1])


def test_average_resumes_and_is_checked() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", average=0.9)
    opt.backward(model.losses(x))
    twin = optimizer(model, "cagrad", average=0.9)
    twin.load_state_dict(opt.state_dict())
    other = batch(seed=3)
    assert torch.equal(opt.backward(model.losses(other)).weights, twin.backward(model.losses(other)).weights)
    with pytest.raises(ValueError, match="average"):
        optimizer(model, "cagrad").load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        optimizer(model, "cagrad", average=1.0)
    with pytest.raises(ValueError, match="has no weights"):
        optimizer(model, "trimmed_mean", average=0.5)
