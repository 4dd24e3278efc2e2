"""Under `torch.compile`: compiled models under the engines, methods and kernels in one graph, and the compiled road."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, batch, optimizer
from torch import Tensor, nn

from gradsurgery import MTLOptimizer, aggregate, compile_backward, get_method, kernels, list_methods
from gradsurgery.stats import Needs

OFF_ROAD = Needs.CROSS | Needs.TRACKED
ROAD = [name for name in list_methods() if not get_method(name).needs & OFF_ROAD]
INDUCTOR = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

Losses = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module", autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Waves(nn.Module):
    """The kind of model whose compiled backward writes over what its forward saved."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.3):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(2)])
        self.dropout = dropout
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = torch.sigmoid(self.trunk[1](torch.sin(self.trunk[0](x))))
        z = nn.functional.dropout(z, self.dropout, self.training)
        return [head(z) for head in self.heads]


class Small(nn.Module):
    """A trunk of one layer, with running statistics, and three heads."""

    def __init__(self, dtype: torch.dtype = torch.float64, norm: bool = False, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(3)])
        self.dropout = dropout
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = nn.functional.dropout(self.norm(self.trunk(x)).tanh(), self.dropout, self.training)
        return [head(z) for head in self.heads]


def plain_losses(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [((t + 1) * (y - (-1) ** t * x[:, :1])).square().mean() for t, y in enumerate(model(x))]


class Pair:
    """One model on the eager road and its copy on the compiled one."""

    def __init__(self, model: nn.Module, method: object = "cagrad", losses: Losses = plain_losses, **options: Any):
        backend, shared = options.pop("backend", "eager"), options.pop("shared", lambda m: list(m.trunk.parameters()))
        self.models = (model, copy.deepcopy(model))
        self.losses = losses
        self.opts = [
            MTLOptimizer(torch.optim.SGD(m.parameters(), lr=0.05), method, shared(m), seed=3, **options)  # pyright: ignore
            for m in self.models
        ]
        self.step = compile_backward(self.opts[1], self.models[1], losses, backend=backend)

    def run(self, *args: Any, tolerance: float = 1e-10) -> None:
        """One step of both, which agree in what they leave."""
        eager, compiled = self.opts
        seed = torch.get_rng_state()
        infos = [eager.backward(self.losses(self.models[0], *args))]
        after = torch.get_rng_state()
        torch.set_rng_state(seed)
        infos.append(self.step(*args))
        assert torch.equal(after, torch.get_rng_state())
        assert infos[1] is compiled.info and infos[1].engine == "compiled" and infos[1].tasks == infos[0].tasks
        close = {"rtol": tolerance, "atol": tolerance}
        for name in ("weights", "losses", "residual"):
            torch.testing.assert_close(getattr(infos[1], name), getattr(infos[0], name), equal_nan=True, **close)
        self.agree(**close)
        for opt in self.opts:
            opt.step()
            opt.zero_grad()
        torch.testing.assert_close(compiled._surgery.rule._state, eager._surgery.rule._state, equal_nan=True, **close)

    def agree(self, **close: float) -> None:
        for p, q in zip(*(m.parameters() for m in self.models), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, equal_nan=True, **close)
                assert q.grad.stride() == p.grad.stride()
        for b, c in zip(*(m.buffers() for m in self.models), strict=True):
            torch.testing.assert_close(c, b, **close)


# Compiled models


@pytest.mark.parametrize("method", ["cagrad", "famo"])
def test_a_compiled_model_trains_with_the_eager_numbers(method: str) -> None:
    eager = Waves()
    model = copy.deepcopy(eager)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(model, backend=INDUCTOR if method == "cagrad" else "aot_eager")
        opts = [
            MTLOptimizer(torch.optim.Adam(m.parameters(), 0.01), method, m.trunk.parameters()) for m in (eager, model)
        ]
        for i in range(3):
            for opt, forward in zip(opts, (eager, compiled), strict=True):
                torch.manual_seed(i)
                opt.zero_grad()
                opt.step(plain_losses(forward, batch(seed=i)))
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-10)


def spent() -> tuple[nn.Module, Any]:
    """A compiled model whose backward torch has compiled for one pass."""
    torch.compiler.reset()
    model = Waves()
    compiled = torch.compile(model, backend="aot_eager")
    torch.stack(plain_losses(compiled, batch())).sum().backward()
    model.zero_grad()
    return model, compiled


def test_donated_buffers_are_explained_before_anything_changes() -> None:
    model, compiled = spent()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "gradnorm", model.trunk.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"donated_buffer = False before the model is compiled") as caught:
        opt.backward(plain_losses(compiled, batch()))
    assert "donated buffers" in str(caught.value.__cause__)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert opt.info is None and opt._surgery.rule._steps == 0
    opt.backward(plain_losses(model, batch()))


def test_without_donated_buffers_any_number_of_passes() -> None:
    with torch._functorch.config.patch(donated_buffer=False):
        model, compiled = spent()
        opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda", model.trunk.parameters())
        opt.backward(plain_losses(compiled, batch()))


def test_one_backward_needs_no_care_with_donated_buffers() -> None:
    model, compiled = spent()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "ew")
    opt.backward(plain_losses(compiled, batch()))


# Methods and kernels in one graph


@pytest.mark.parametrize("name", ["cagrad", "graddrop", "moco", "sdmgrad"])
def test_aggregate_is_one_graph(name: str) -> None:
    J = torch.randn(3, 7, dtype=torch.float64)
    samples = (J.roll(1, 1), J.roll(2, 1)) if Needs.CROSS in get_method(name).needs else None

    def whole(J: Tensor) -> Tensor:
        return aggregate(J, name, independent=samples, blocks=[3, 4])

    torch.manual_seed(0)
    expected = whole(J)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(whole, fullgraph=True, backend="eager")(J), expected)


def test_kernels_are_one_graph() -> None:
    width = 2 * kernels.flat.CHUNK + 5
    J, w = torch.randn(3, width), torch.rand(2, 3, dtype=torch.float64)

    def both(J: Tensor, w: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        bounds = [0, 7, width]
        return kernels.gramian(J, bounds), kernels.gramian(J, bounds, other), kernels.combine(w, J, bounds)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(J, w, -J), both(J, w, -J))


# The compiled road


@pytest.mark.parametrize("name", ROAD)
def test_every_method_on_the_compiled_road(name: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    pair = Pair(Small(), name, backend=backend)
    for i in range(2):
        pair.run(batch(seed=i))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_float32(backend: str) -> None:
    pair = Pair(Waves(torch.float32, dropout=0.0), "cagrad", backend=backend)
    for i in range(3):
        pair.run(batch(seed=i, dtype=torch.float32), tolerance=1e-6)


def test_batch_norm_and_dropout() -> None:
    pair = Pair(Small(norm=True, dropout=0.4))
    for i in range(3):
        pair.run(batch(seed=i))
    assert pair.models[1].norm.num_batches_tracked == 3
    for model in pair.models:
        model.eval()
    pair.run(batch(seed=4))


def named_losses(model: nn.Module, x: Tensor, y: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    outputs = dict(zip("abc", model(x), strict=True))
    return {t: None if y[t] is None else (out[:, 0] - y[t]).square().mean() for t, out in outputs.items()}


@pytest.mark.parametrize("name", ["gradnorm", "graddrop", "dwa"])
def test_absent_tasks_of_a_dict(name: str) -> None:
    pair = Pair(Small(), name, named_losses)
    x = batch()
    y: dict[str, Tensor | None] = {"a": x[:, 0], "b": -x[:, 0], "c": x[:, 1]}
    for targets in (y, {**y, "b": None}, y, {**y, "b": None}):
        pair.run(x, targets)
    assert len(pair.step._programs) == 2


@pytest.mark.parametrize("blocks", ["tensor", "model"])
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_blocks_and_heads(blocks: str, heads: str) -> None:
    pair = Pair(Small(), "mgda", blocks=blocks, heads=heads)
    for i in range(2):
        pair.run(batch(seed=i))


def test_schedule_and_average() -> None:
    pair = Pair(Small(), "mgda", update_every=2, average=0.5, shared=lambda m: None)
    for i in range(5):
        pair.run(batch(seed=i))
    assert pair.opts[1]._surgery.rule._steps == 5


def test_it_accumulates() -> None:
    pair = Pair(Small(), "pcgrad")
    for m in pair.models:
        for p in m.parameters():
            p.grad = torch.ones_like(p)
    pair.run(batch())


def test_other_batch_sizes() -> None:
    pair = Pair(Small(), "cagrad")
    for n in (8, 5, 3, 8):
        pair.run(batch(n))


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, MTLOptimizer, Any]:
        model = Small(norm=True)
        opt = optimizer(model, "rlw", lr=0.1, seed=1, average=0.5)  # pyright: ignore[reportArgumentType]
        return model, opt, compile_backward(opt, model, plain_losses, backend="eager")

    def train(opt: MTLOptimizer, step: Any, seeds: range) -> None:
        for i in seeds:
            opt.zero_grad()
            step(batch(seed=i))
            opt.step()

    model, opt, step = start()
    train(opt, step, range(2))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(opt, step, range(2, 4))
    other, resumed, again = start()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed, again, range(2, 4))
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())
    # Into an optimizer that has compiled already.
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    train(opt, step, range(2, 4))
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())


def test_numbers_that_are_not_finite_poison_no_state() -> None:
    pair = Pair(Small(), "gradnorm")
    pair.run(batch())
    state = copy.deepcopy(pair.opts[1]._surgery.rule._state)
    pair.step(torch.full((8, 4), torch.nan, dtype=torch.float64))
    assert pair.opts[1].info is not None and pair.opts[1].info.weights is not None
    assert pair.opts[1].info.weights.isnan().all()
    torch.testing.assert_close(pair.opts[1]._surgery.rule._state, state, rtol=0, atol=0)


def test_a_frozen_parameter_is_noticed() -> None:
    pair = Pair(Small(), "cagrad")
    pair.run(batch())
    for m in pair.models:
        m.trunk.bias.requires_grad_(False)
    pair.run(batch(seed=1))
    assert pair.models[1].trunk.bias.grad is None


def test_channels_last_parameters_keep_their_order_and_draws() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(2)])

        def forward(self, x: Tensor) -> list[Tensor]:
            z = self.trunk(x.reshape(-1, 3, 4, 4)).mean(dim=(2, 3)).tanh()
            return [head(z) for head in self.heads]

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([(y - t).square().mean() for t, y in enumerate(model(x))])

    pair = Pair(Pictures().double(), "graddrop", losses)
    for i in range(2):
        pair.run(torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(i)))


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_every_gradient_has_memory_of_its_own(backend: str) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.ParameterList([torch.ones(4), torch.ones(4)])
            self.own = nn.ParameterList([torch.ones(4), torch.ones(4)])

    def losses(model: Any, x: Tensor) -> list[Tensor]:
        # The gradient of either parameter is the batch itself.
        return [((p + q) * x).sum() for p, q in (model.trunk, model.own)] + [(model.trunk[0] * x).sum()]

    model = Sums()
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "ew", model.trunk)
    step = compile_backward(opt, model, losses, backend=backend)
    x = torch.arange(4.0)
    step(x)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len({g.data_ptr() for g in [*gradients, x]}) == 5
    for g in gradients:
        g.zero_()
    assert torch.equal(x, torch.arange(4.0))


def test_two_roads_of_one_model_do_not_meet() -> None:
    first, second = Pair(Small(), "cagrad"), Pair(Toy(2), "ew", lambda m, x: m.losses(x))
    for i in range(2):
        first.run(batch(seed=i))
        second.run(batch(seed=i))


# Refusals


@pytest.mark.parametrize("name", [name for name in list_methods() if name not in ROAD])
def test_methods_that_cannot_take_it_say_so(name: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=rf"{name} learns from .* use opt.backward\(losses\)"):
        compile_backward(optimizer(model, name), model, plain_losses)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{"fullgraph": False}, {"mode": "reduce-overhead"}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    model = Small()
    with pytest.raises(ValueError, match=r"leave `fullgraph` out|CUDA graphs hand out memory"):
        compile_backward(optimizer(model), model, plain_losses, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="must be an MTLOptimizer; got SGD"):
        compile_backward(torch.optim.SGD(model.parameters()), model, plain_losses)  # pyright: ignore[reportArgumentType]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return float(gradients[0].sum().item()) * torch.ones_like(gradients[0])


def branching(model: nn.Module, x: Tensor) -> list[Tensor]:
    losses = plain_losses(model, x)
    return [loss * 2 for loss in losses] if losses[0] > 0.1 else losses


def printing(model: nn.Module, x: Tensor) -> list[Tensor]:
    losses = plain_losses(model, x)
    print(losses[0].item())
    return losses


def own_function(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [Double.apply(loss) for loss in plain_losses(model, x)]


@pytest.mark.parametrize("losses, reason", [(branching, "Data-dependent"), (printing, "builtin"), (own_function, "")])
def test_what_does_not_compile_is_named_and_changes_nothing(losses: Losses, reason: str) -> None:
    model = Small(norm=True)
    opt = optimizer(model, "gradnorm")  # pyright: ignore[reportArgumentType]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"do not compile into one graph.*{reason}.*chained") as caught:
        compile_backward(opt, model, losses, backend="eager")(batch())
    assert caught.value.__cause__ is not None
    assert all(p.grad is None for p in model.parameters()) and opt._surgery.rule._steps == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_absence_that_the_batch_does_not_show_is_an_error() -> None:
    model = Small()
    model.skip = False  # pyright: ignore[reportArgumentType]

    def losses(model: Any, x: Tensor) -> list[Tensor | None]:
        first, *others = plain_losses(model, x)
        return [None if model.skip else first, *others]

    opt = optimizer(model)  # pyright: ignore[reportArgumentType]
    step = compile_backward(opt, model, losses, backend="eager")
    step(batch())
    model.skip = True  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="present in a batch of this kind"):
        step(batch())


def test_it_cannot_hold_rows() -> None:
    model = Small()
    opt = optimizer(model)  # pyright: ignore[reportArgumentType]
    step = compile_backward(opt, model, plain_losses, backend="eager")
    with pytest.raises(RuntimeError, match=r"opt.backward\(losses\) inside it"), opt.accumulate():
        step(batch())


def test_draws_that_depend_on_tensors_are_refused() -> None:
    from gradsurgery.draws import Recorded

    with Recorded() as recorded:
        generator = torch.Generator().manual_seed(0)
        first = torch.rand(3, generator=generator)
        with pytest.raises(ValueError, match="multinomial, which depend on its tensors"):
            torch.multinomial(torch.ones(3), 1, generator=generator)
    assert torch.equal(recorded.draws[0](torch.Generator().manual_seed(0)), first)
