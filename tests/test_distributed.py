"""Training on several ranks equals training in one process on the whole batch."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from models import flat
from ranks import launch
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from gradsurgery import Absent, MTLOptimizer, compile_backward
from gradsurgery.distributed import is_sharded
from gradsurgery.engines import Representation, layout

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, SAMPLES = 5, 24


class Net(nn.Module):
    """A shared trunk, three heads whose targets disagree, and a parameter that no loss reaches."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(3)])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        self.to(dtype)

    def forward(self, x: Tensor, tasks: tuple[int, ...] = (0, 1, 2)) -> dict[int, Tensor]:
        z = self.trunk(x)
        return {t: self.heads[t](z).squeeze(-1) for t in tasks}


def data(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x.to(dtype), torch.stack([2 * x[:, 0], -3 * x[:, 0] + 0.2 * x[:, 1], 0.3 * x[:, 2]]).to(dtype)


def losses_of(outputs: dict[int, Tensor], y: Tensor) -> list[Tensor | None]:
    """Three means; None for a task without outputs."""
    return [(outputs[t] - y[t]).square().mean() if t in outputs else None for t in range(3)]


def losses_here(model: nn.Module, part: tuple[Tensor, Tensor], tasks: tuple[int, ...]) -> list[Tensor | None]:
    return losses_of(model(part[0], tasks), part[1])


def losses_standing_in(model: nn.Module, part: tuple[Tensor, Tensor], tasks: tuple[int, ...]) -> list[Tensor | Absent]:
    """Every head runs, and some have no loss."""
    outputs = model(part[0])
    losses = losses_of(outputs, part[1])
    return [loss if t in tasks else Absent(outputs[t]) for t, loss in enumerate(losses)]  # pyright: ignore


# What each case adds to the plain run of a method: options of the optimizer, and how a step is taken.
CASES: dict[str, dict[str, Any]] = {
    name: {"method": name}
    for name in ("cagrad", "nash_mtl", "upgrad", "famo", "uw", "ew", "moco", "graddrop", "mgda", "gradnorm", "dwa")
}
CASES |= {
    "pcgrad": {"method": "pcgrad", "seed": 5},
    "seed of rank 0": {"method": "pcgrad"},
    "trimmed_mean": {"method": "trimmed_mean"},
    "excess_mtl": {"method": "excess_mtl"},
    "independent": {"method": "sdmgrad"},
    "blocks": {"method": "cagrad", "blocks": "tensor"},
    "two blocks": {"method": "upgrad", "blocks": "halves"},
    "schedule": {"method": "cagrad", "update_every": 3},
    "schedule, weighted": {"method": "cagrad", "update_every": 2, "heads": "weighted"},
    "schedule, conflicts": {"method": "cagrad", "update_every": 4, "resolve_on_conflict": True},
    "weighted": {"method": "upgrad", "heads": "weighted"},
    "batched": {"method": "cagrad", "engine": "batched"},
    "representation": {"method": "cagrad", "engine": "representation"},
    "representation, weighted": {"method": "upgrad", "engine": "representation", "heads": "weighted"},
    "representation, summed": {"method": "cagrad", "engine": "summed"},
    "measure_on": {"method": "cagrad", "measure_on": "last"},
    "accumulate": {"method": "cagrad", "step": "accumulate"},
    "accumulate, columns": {"method": "graddrop", "step": "accumulate"},
    "absent": {"method": "cagrad", "step": "absent"},
    "absent, columns": {"method": "graddrop", "step": "absent"},
    "absent, losses": {"method": "ew", "heads": "weighted", "step": "absent"},
    "stand-ins": {"method": "cagrad", "step": "stand-ins"},
    "stand-ins, columns": {"method": "graddrop", "step": "stand-ins"},
    "stand-ins, losses": {"method": "ew", "heads": "weighted", "step": "stand-ins"},
    "stand-ins, schedule": {"method": "nash_mtl", "update_every": 2, "step": "stand-ins"},
    "stand-ins, representation": {"method": "cagrad", "engine": "representation", "step": "stand-ins"},
    "stand-ins, combine": {"method": "upgrad", "step": "stand-ins somewhere", "call": "combine"},
    "absent, representation": {"method": "cagrad", "engine": "representation", "step": "absent"},
    "nothing here": {"method": "cagrad", "step": "nothing"},
    "nothing here, losses": {"method": "uw", "step": "nothing"},
    "no wrapper": {"method": "cagrad", "wrap": "group"},
    "no wrapper, losses": {"method": "ew", "wrap": "group"},
    "unused": {"method": "cagrad", "wrap": "unused", "step": "absent"},
    "unused, losses": {"method": "ew", "wrap": "unused", "step": "absent"},
    "no_sync": {"method": "cagrad", "step": "no_sync"},
    "no_sync, losses": {"method": "uw", "step": "no_sync"},
    "past the wrapper": {"method": "cagrad", "step": "past"},
    "past the wrapper, losses": {"method": "ew", "step": "past"},
    "scaler": {"method": "nash_mtl", "step": "scaler"},
    "clipped": {"method": "cagrad", "step": "clip"},
    "cleared": {"method": "cagrad", "step": "cleared"},
    "combine": {"method": "cagrad", "step": "combine"},
    "combine, losses": {"method": "famo", "step": "combine"},
    "combine, schedule": {"method": "nash_mtl", "update_every": 2, "step": "combine"},
    "combine, representation": {"method": "upgrad", "engine": "representation", "step": "combine"},
    "combine, absent": {"method": "cagrad", "step": "absent", "call": "combine"},
    "combine, nothing here": {"method": "cagrad", "step": "nothing", "call": "combine"},
    "bucket views": {"method": "cagrad", "wrap": "views"},
    "bucket views, losses": {"method": "uw", "wrap": "views"},
    "hooked": {"method": "cagrad", "step": "hooked"},
    "buckets": {"method": "cagrad", "wrap": "buckets"},
    "buckets, blocks": {"method": "upgrad", "wrap": "buckets", "blocks": "tensor"},
    "buckets, two blocks": {"method": "cagrad", "wrap": "buckets", "blocks": "halves"},
    "buckets, absent": {"method": "nash_mtl", "wrap": "buckets", "step": "absent"},
    "buckets, nothing here": {"method": "cagrad", "wrap": "buckets", "step": "nothing"},
    "buckets, batched": {"method": "cagrad", "wrap": "buckets", "engine": "batched"},
    "composable": {"method": "cagrad", "wrap": "composable"},
    "composable, losses": {"method": "uw", "wrap": "composable"},
}
# One of each kind. Four processes on two cores take long over a case: they take these, and the roads that differ.
METHODS = ["cagrad", "pcgrad", "nash_mtl", "upgrad", "famo", "uw", "moco", "graddrop"]
OF_FOUR = [
    *(*METHODS, "two blocks", "representation", "accumulate", "absent", "nothing here", "no wrapper"),
    *("no_sync, losses", "combine", "buckets, two blocks", "buckets, absent"),
]
# Tasks of each rank in its n-th step, where some are absent.
ABSENT: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "absent": lambda rank, step: (0, 1, 2) if step == 0 else (0, 2) if (rank + step) % 2 else (1, 2),
    "nothing": lambda rank, step: () if step and rank == 1 else (0, 1, 2),
    "stand-ins somewhere": lambda rank, step: [(0, 1, 2), (0, 1 + rank % 2), (0, 2) if rank else (1, 2)][min(step, 2)],
    # In the third step one is absent everywhere.
    "stand-ins": lambda rank, step: [(0, 1, 2), (0, 1 + rank % 2), (1, 2), (0, 1) if rank else (0, 2), (0, 2)][step],
}


def optimizer(model: nn.Module, net: Net, options: dict[str, Any], **more: Any) -> MTLOptimizer:
    options = {key: value for key, value in options.items() if key not in ("step", "wrap", "call")}
    trunk = list(net.trunk.parameters())
    if options.get("blocks") == "halves":
        options["blocks"] = [trunk[:1], trunk[1:]]
    if options.get("measure_on") == "last":
        options["measure_on"] = list(net.trunk[2].parameters())
    if options.get("engine") == "summed":
        options["engine"] = Representation(reduce="sum")
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return MTLOptimizer(base, shared_params=trunk, **options, **more)


def parts_of(step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data(step)
    return [(x[r::world], y[:, r::world]) for r in range(world)]


def train(name: str, model: nn.Module, net: Net, opt: MTLOptimizer, world: int, ranks: list[int]) -> Tensor:
    """Some ranks' steps: one of them in a process of its own, or all of them in one."""
    kind = CASES[name].get("step", "plain")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if kind == "scaler" else None
    if kind == "hooked":
        net.trunk[0].weight.register_hook(lambda g: 2 * g)

    def together(losses: list[list[Any]]) -> list[Any]:
        """Of each task, the mean over the ranks that have it."""
        tasks = [[some for some in task if isinstance(some, Tensor)] for task in zip(*losses, strict=True)]
        return [torch.stack(some).mean() if some else first for some, first in zip(tasks, losses[0], strict=True)]

    def forward(parts: list[tuple[Tensor, Tensor]], step: int) -> list[Any]:
        if len(ranks) > 1 and kind not in ABSENT:
            x, y = (torch.cat(pieces, dim) for pieces, dim in zip(zip(*parts, strict=True), (0, 1), strict=True))
            return losses_of(model(x), y)
        there = ABSENT.get(kind, lambda rank, step: (0, 1, 2))
        call = model.module if kind == "past" and isinstance(model, DistributedDataParallel) else model
        found = losses_standing_in if kind.startswith("stand-ins") else losses_here
        return together([found(call, parts[r], there(r, step)) for r in ranks])

    for step in range(STEPS):
        opt.zero_grad()
        parts = parts_of(step, world)
        more = {}
        if name == "independent":
            more["independent"] = [forward(parts_of(50 + 2 * step + n, world), step) for n in (0, 1)]
        if kind == "accumulate":
            with opt.accumulate():
                for half in (slice(0, 3), slice(3, None)):
                    small = [(x[half], y[:, half]) for x, y in parts]
                    opt.backward([None if loss is None else loss / 2 for loss in forward(small, step)])
        elif kind == "no_sync":
            quiet = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
            with quiet:
                opt.backward(forward(parts_of(80 + step, world), step))
            opt.backward(forward(parts, step))
        elif "combine" in (kind, CASES[name].get("call")):
            opt.combine(forward(parts, step)).backward()
        elif kind == "cleared":
            losses = forward(parts, step)
            opt.zero_grad()
            opt.backward(losses)
        else:
            opt.backward(forward(parts, step), scaler=scaler, **more)
        if kind == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
    return flat([p.full_tensor() if is_sharded(p) else p.detach() for p in net.parameters()])  # pyright: ignore


def wrap(net: Net, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "group":
        return net, {"process_group": dist.group.WORLD}
    if kind == "composable":
        return replicate(net), {}
    options = {"unused": {"find_unused_parameters": True}, "views": {"gradient_as_bucket_view": True}}.get(kind, {})
    return DistributedDataParallel(net, **options), {}


def small_buckets() -> Any:
    """The trunk's row falls into more than one."""
    return mock.patch.object(layout, "BUCKET_BYTES", 256)


def case(name: str, rank: int, world: int) -> Any:
    """One rank's part of a case."""
    if name in REFUSALS:
        return REFUSALS[name][0](rank, world)
    if name in MEASURES:
        return MEASURES[name](rank, world)
    torch.manual_seed(7 + rank)
    net = Net()
    kind = CASES[name].get("wrap", "ddp")
    model, more = wrap(net, kind)
    with small_buckets() if kind == "buckets" else contextlib.nullcontext():
        return train(name, model, net, optimizer(model, net, CASES[name], **more), world, [rank])


def alone(name: str, world: int) -> Tensor:
    """The same in one process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = Net()
        return train(name, net, net, optimizer(net, net, CASES[name]), world, list(range(world)))


def plain_step(model: nn.Module, net: Net, rank: int, world: int, method: str = "cagrad", **options: Any) -> Any:
    """One step of one rank; what was refused, if it was."""
    opt = optimizer(model, net, {"method": method, **options})
    x, y = parts_of(0, world)[rank]
    try:
        opt.backward(losses_of(model(x), y))
    except (RuntimeError, ValueError) as error:
        return f"refused: {error}"
    return opt


def scaled(net: Net, factor: float) -> Net:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(factor)
    return net


def foreign(rank: int, world: int) -> Any:
    """A head that is in neither the base optimizer nor the wrapped model."""
    net, head = Net(), nn.Linear(1, 1)
    model = DistributedDataParallel(net)
    opt = optimizer(model, net, {"method": "cagrad"})
    x, y = parts_of(0, world)[rank]
    try:
        opt.backward([head(loss.reshape(1)).sum() for loss in losses_of(model(x), y) if loss is not None])
    except ValueError as error:
        return f"refused: {error}"
    return "not refused"


def compiled(rank: int, world: int) -> Any:
    net = Net()
    model = DistributedDataParallel(net)
    step = compile_backward(optimizer(model, net, {"method": "cagrad"}), model, lambda m, x, y: losses_of(m(x), y))
    try:
        step(*parts_of(0, world)[rank])
    except RuntimeError as error:
        return f"refused: {error}"
    return "not refused"


def fsdp1(rank: int, world: int) -> Any:
    net = Net()
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    return plain_step(model, net, rank, world)


def others(rank: int, world: int) -> Any:
    """A wrapper over rank 0 and another, and a group of all."""
    net = Net()
    alone = dist.new_group([rank], use_local_synchronization=True)
    model = DistributedDataParallel(net, process_group=alone)
    return plain_step(model, net, rank, world, process_group=dist.group.WORLD)


# By case: what is done, and words of the sentence that refuses it.
REFUSALS: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "static graph": (
        lambda rank, world: plain_step(DistributedDataParallel(net := Net(), static_graph=True), net, rank, world),
        "Leave static_graph out",
    ),
    "gramian engine": (
        lambda rank, world: plain_step(DistributedDataParallel(net := Net()), net, rank, world, engine="gramian"),
        "engine='gramian' never holds",
    ),
    "unwrapped": (lambda rank, world: plain_step(net := Net(), net, rank, world), "drift apart"),
    "unwrapped, losses": (lambda rank, world: plain_step(net := Net(), net, rank, world, "ew"), "drift apart"),
    "other parameters": (
        lambda rank, world: plain_step(
            net := scaled(Net(), 1 + rank / 10), net, rank, world, process_group=dist.group.WORLD
        ),
        "parameters of different values",
    ),
    "other methods": (
        lambda rank, world: plain_step(
            DistributedDataParallel(net := Net()), net, rank, world, ("cagrad", "mgda")[rank % 2]
        ),
        "differ in their tasks, their method",
    ),
    "foreign parameters": (foreign, "neither in the base optimizer nor in the wrapped model"),
    "compiled step": (compiled, "A compiled step takes the gradients of one process"),
    "FSDP1": (fsdp1, "fully_shard"),
    "another group": (others, "Two process groups claim"),
}


def traffic(rank: int, world: int) -> Any:
    """Elements that each kind of collective was given in one step."""
    net = Net()
    model = DistributedDataParallel(net)
    opt = plain_step(model, net, rank, world, "cagrad")
    x, y = parts_of(1, world)[rank]
    losses = losses_of(model(x), y)
    found = {"scatter": 0, "gather": 0, "sum": 0}
    ranks = opt._surgery.ranks()
    plain = {name: getattr(ranks, name) for name in found}

    def counted(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *others: Tensor) -> Any:
            found[name] += tensor.numel()
            return plain[name](tensor, *others)

        return call

    for name in found:
        setattr(ranks, name, counted(name))
    opt.backward(losses)
    return found, sum(p.numel() for p in net.trunk.parameters()), opt._surgery.layout.width


def overlap(rank: int, world: int) -> Any:
    """The order of a step's passes and of the buckets that are sent, by their first columns."""
    net = Net()
    model = DistributedDataParallel(net)
    with small_buckets():
        opt = plain_step(model, net, rank, world, engine="sequential")
        x, y = parts_of(1, world)[rank]
        losses, told = losses_of(model(x), y), []
        ranks, differentiate = opt._surgery.ranks(), torch.autograd.grad
        scatter = ranks.scatter

        def sent(values: Tensor, own: Tensor) -> Any:
            told.append(values.storage_offset() % opt._surgery.layout.width)
            return scatter(values, own)

        def differentiated(*args: Any, **kwargs: Any) -> Any:
            told.append("pass")
            found = differentiate(*args, **kwargs)
            told.append("passed")
            return found

        ranks.scatter = sent
        with mock.patch.object(torch.autograd, "grad", differentiated):
            opt.backward(losses)
    return told


def native(rank: int, world: int) -> Any:
    """Buckets that the wrapper averaged in steps of different kinds."""
    counts = {}
    for name, kind in (("ew", "plain"), ("uw", "plain"), ("cagrad", "plain"), ("ew", "past")):
        net, buckets = Net(), []
        model = DistributedDataParallel(net)

        def hook(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            state.append(1)
            work = dist.all_reduce(bucket.buffer().div_(world), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        model.register_comm_hook(buckets, hook)
        opt = optimizer(model, net, {"method": name, "heads": "weighted"})
        for step in range(3):
            opt.zero_grad()
            x, y = parts_of(step, world)[rank]
            opt.backward(losses_of((model.module if kind == "past" else model)(x), y))
        counts[f"{name}, {kind}"] = len(buckets)
    return counts


def alone_in_its_group(rank: int, world: int) -> Any:
    """Ranks that train models of their own say so, and do not wait for each other."""
    group = dist.new_group([rank], use_local_synchronization=True)
    net = scaled(Net(), 1.0 + rank)
    found = [plain_step(net, net, rank, world, process_group=group) for _ in range(1 + rank)]
    return [opt.info.weights for opt in found]


MEASURES: dict[str, Callable[[int, int], Any]] = {
    "traffic": traffic,
    "overlap": overlap,
    "native": native,
    "alone in its group": alone_in_its_group,
}


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    return launch(2, "test_distributed", [*CASES, *REFUSALS, *MEASURES])


@pytest.fixture(scope="module")
def four() -> dict[str, list[Any]]:
    return launch(4, "test_distributed", OF_FOUR)


def check(found: list[Any], name: str, world: int) -> None:
    for rank, values in enumerate(found):
        assert isinstance(values, Tensor), f"rank {rank}: {values}"
        assert torch.equal(values, found[0]), "the ranks have drifted apart"
    torch.testing.assert_close(found[0], alone(name, world), rtol=1e-5, atol=1e-5)


def assert_refused(answers: list[Any], words: str) -> None:
    for answer in answers:
        assert isinstance(answer, str) and answer.startswith("refused: "), answer
        assert words in answer, answer


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name: str, two: dict[str, list[Any]]) -> None:
    check(two[name], name, 2)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks_equal_one_process(name: str, four: dict[str, list[Any]]) -> None:
    check(four[name], name, 4)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_go_wrong_is_refused(name: str, two: dict[str, list[Any]]) -> None:
    assert_refused(two[name], REFUSALS[name][1])


def test_rows_cost_half_of_what_sums_of_them_would(two: dict[str, list[Any]]) -> None:
    """(T + 1) d, where all-reducing rows takes 2 T d (each is a reduce-scatter and an all-gather)."""
    for found, d, width in two["traffic"]:
        assert width - d < 32 * 2 * 7
        # Of rows, T are scattered; of the direction, each of two ranks gives its half; sums are of T x T numbers.
        assert found == {"scatter": 3 * width, "gather": width // 2, "sum": 9}


def test_buckets_leave_while_a_pass_is_on_its_way(two: dict[str, list[Any]]) -> None:
    """The last layer's columns first, as its gradients come."""
    for told in two["overlap"]:
        assert told == ["pass", 128, 64, 0, "passed"] * 3


def test_an_ordinary_backward_is_left_to_the_wrapper(two: dict[str, list[Any]]) -> None:
    """From the second step on: what was forward before the first was not seen."""
    for counts in two["native"]:
        assert counts["ew, plain"] >= 2 and counts["uw, plain"] >= 2
        assert counts["cagrad, plain"] == 0 and counts["ew, past"] == 0


def test_models_of_single_ranks_are_left_alone(two: dict[str, list[Any]]) -> None:
    assert [len(weights) for weights in two["alone in its group"]] == [1, 2]


def test_the_measure_can_fail() -> None:
    """One rank's half of the batch alone ends far from where the whole one does."""
    net = Net()
    half = train("cagrad", net, net, optimizer(net, net, CASES["cagrad"]), 2, [0])
    assert (half - alone("cagrad", 2)).abs().max() > 1e-2
