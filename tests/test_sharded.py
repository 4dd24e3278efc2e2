"""Training under `fully_shard`, sharded and replicated, equals training in one process on the whole batch."""

import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import launch
from test_distributed import CASES, METHODS, Net, assert_refused, check, losses_of, optimizer, parts_of, train
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradsurgery import Absent, MTLOptimizer
from gradsurgery.engines import Batched, Gramian
from gradsurgery.losses import read_losses

pytestmark = pytest.mark.xdist_group("ranks")

NAMES = [
    *("cagrad", "pcgrad", "nash_mtl", "upgrad", "famo", "uw", "ew", "moco", "graddrop", "mgda", "trimmed_mean"),
    *("excess_mtl", "seed of rank 0", "independent", "blocks", "two blocks", "schedule", "schedule, weighted"),
    *("weighted", "representation", "representation, weighted", "representation, summed", "measure_on", "accumulate"),
    *("accumulate, columns", "scaler", "clipped", "combine", "combine, losses", "combine, schedule", "cleared"),
    *("combine, representation", "stand-ins", "stand-ins, columns", "stand-ins, losses", "stand-ins, schedule"),
    *("stand-ins, representation", "stand-ins, combine"),
]
# Under each kind of sharding; the first has all of them.
KINDS = {
    "sharded": NAMES,
    "kept": ["cagrad", "stand-ins", "cleared", "graddrop", "representation", "schedule", "combine"],
    "hybrid": ["cagrad", "nash_mtl", "graddrop", "moco", "uw", "representation", "blocks", "combine", "stand-ins"],
    "whole": ["cagrad", "uw", "stand-ins"],
    "replicated": ["cagrad", "graddrop", "uw", "representation", "combine"],
}


def shard(net: Net, kind: str, world: int) -> Net:
    parts: list[Any] = [net] if kind == "whole" else [net.trunk, *net.heads, net]
    shape = (2, world // 2) if kind == "hybrid" else (world,)
    dims = {"hybrid": ("replicate", "shard"), "replicated": ("replicate",)}.get(kind)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
    for part in parts:
        if kind == "replicated":
            replicate(part, mesh=mesh)
        else:
            fully_shard(part, mesh=mesh, reshard_after_forward=kind != "kept")
    return net


def case(name: str, rank: int, world: int) -> Any:
    """One rank's part of a case."""
    if name in REFUSALS:
        return REFUSALS[name][0](rank, world)
    if name in MEASURES:
        return MEASURES[name](rank, world)
    kind, _, name = name.partition(": ")
    torch.manual_seed(7 + rank)
    net = shard(Net(), kind, world)
    return train(name, net, net, optimizer(net, net, CASES[name]), world, [rank])


def step(net: nn.Module, rank: int, world: int, method: str = "cagrad", tasks: int = 3, **options: Any) -> Any:
    shared = options.pop("shared_params", list(net.trunk.parameters()))  # pyright: ignore
    opt = MTLOptimizer(torch.optim.SGD(net.parameters(), 0.1), method, shared, **options)
    x, y = parts_of(0, world)[rank]
    losses = losses_of(net(x), y)
    try:
        for _ in range(2):
            opt.backward([loss if t < tasks else None for t, loss in enumerate(losses)])
            losses = losses_of(net(x), y)
            tasks = 3
    except (RuntimeError, ValueError) as error:
        return f"refused: {error}"
    return "not refused"


def partly(rank: int, world: int) -> Any:
    net = Net()
    fully_shard(net.trunk)
    return step(net, rank, world)


def absent(rank: int, world: int) -> Any:
    """On a rank; the others wait for it, as in any training, and are not asked."""
    net = shard(Net(), "sharded", world)
    opt = optimizer(net, net, {"method": "cagrad"})
    losses = losses_of(net(parts_of(0, world)[rank][0]), parts_of(0, world)[rank][1])
    opt.backward(losses)
    if rank == 1:
        losses[2] = None
    read = read_losses(losses, ("0", "1", "2"))
    try:
        opt._surgery.ranks().join(read)  # pyright: ignore[reportOptionalMemberAccess]
    except ValueError as error:
        return f"refused: {error}"
    return "refused: is absent on rank" if rank != 1 else "not refused"


def nothing(rank: int, world: int) -> Any:
    net = shard(Net(), "sharded", world)
    opt = optimizer(net, net, {"method": "ew"})
    outputs = net(parts_of(0, world)[rank][0])
    opt.backward(losses_of(outputs, parts_of(0, world)[rank][1]))
    try:
        opt.backward([Absent(output) for output in outputs.values()])
    except ValueError as error:
        return f"refused: {error}"
    return "not refused"


REFUSALS: dict[str, tuple[Any, str]] = {
    "partly sharded": (partly, "outside of fully_shard"),
    "absent": (absent, "is absent on rank"),
    "nothing": (nothing, "is absent on every rank"),
    "search": (
        lambda rank, world: step(shard(Net(), "sharded", world), rank, world, shared_params=None),
        "Pass shared_params",
    ),
    "batched": (
        lambda rank, world: step(shard(Net(), "sharded", world), rank, world, engine=Batched()),
        "by whole backward passes",
    ),
    "gramian": (
        lambda rank, world: step(shard(Net(), "sharded", world), rank, world, engine=Gramian()),
        "never holds the task gradients",
    ),
    "conflicts": (
        lambda rank, world: step(shard(Net(), "sharded", world), rank, world, update_every=2, resolve_on_conflict=True),
        "resolve_on_conflict compares whole gradients",
    ),
}


def checkpoint(rank: int, world: int) -> Any:
    """Two steps, a distributed checkpoint, two more; and the latter again from what it brought."""
    with tempfile.TemporaryDirectory() as made:
        folder = [made]
        dist.broadcast_object_list(folder)
        found = resume(rank, world, folder[0])
        dist.barrier()
        return found


def resume(rank: int, world: int, folder: str) -> list[Tensor]:

    def build() -> tuple[Net, MTLOptimizer]:
        net = shard(Net(), "sharded", world)
        return net, optimizer(net, net, {"method": "moco"}, seed=5)

    def steps(net: Net, opt: MTLOptimizer, numbers: range) -> None:
        for n in numbers:
            opt.zero_grad()
            x, y = parts_of(n, world)[rank]
            opt.step(losses_of(net(x), y))

    net, opt = build()
    steps(net, opt, range(2))
    model_state, state = get_state_dict(net, opt)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)
    steps(net, opt, range(2, 4))
    again, resumed = build()
    steps(again, resumed, range(7, 8))
    model_state, state = get_state_dict(again, resumed)
    content = {"model": model_state, "optimizer": state}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(again, resumed, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    steps(again, resumed, range(2, 4))
    return [torch.cat([p.full_tensor().reshape(-1) for p in n.parameters()]).detach() for n in (net, again)]  # pyright: ignore


def stale(rank: int, world: int) -> dict[str, list[int]]:
    """Warnings of each of three steps, by who clears gradients, and when."""
    found = {}
    for who in ("model", "optimizer", "optimizer, to zero", "model, before forward", "nobody, micro-batches"):
        net = shard(Net(), "kept", world)
        opt = optimizer(net, net, {"method": "cagrad"})
        counts = found[who] = []
        for n in range(3):
            x, y = parts_of(n, world)[rank]
            if who == "model, before forward":
                net.zero_grad()
            losses = losses_of(net(x), y)
            if who == "model":
                net.zero_grad()
            elif who.startswith("optimizer"):
                opt.zero_grad(set_to_none=who == "optimizer")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                opt.backward(losses)
                if who == "nobody, micro-batches":
                    opt.backward(losses_of(net(x), y))
            counts.append(sum("still there" in str(one.message) for one in caught))
            opt.step()
            if who == "nobody, micro-batches":
                opt.zero_grad()
    return found


MEASURES = {"checkpoint": checkpoint, "stale": stale}


def names(world: int) -> list[str]:
    return [f"{kind}: {name}" for kind, names in KINDS.items() for name in names if world > 2 or kind != "hybrid"]


def of_four() -> list[str]:
    """Those that are also taken on four ranks, which take long on two cores."""
    return [
        name for name in names(4) if name.startswith("hybrid") or name.partition(": ")[2] in (*METHODS, "ew", "scaler")
    ]


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    return launch(2, "test_sharded", [*names(2), *REFUSALS, *MEASURES])


@pytest.fixture(scope="module")
def four() -> dict[str, list[Any]]:
    return launch(4, "test_sharded", of_four())


@pytest.mark.parametrize("name", names(2))
def test_two_ranks_equal_one_process(name: str, two: dict[str, list[Any]]) -> None:
    check(two[name], name.partition(": ")[2], 2)


@pytest.mark.parametrize("name", of_four())
def test_four_ranks_equal_one_process(name: str, four: dict[str, list[Any]]) -> None:
    check(four[name], name.partition(": ")[2], 4)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_go_wrong_is_refused(name: str, two: dict[str, list[Any]]) -> None:
    assert_refused(two[name], REFUSALS[name][1])


def test_a_distributed_checkpoint_resumes_with_tracked_rows(two: dict[str, list[Any]]) -> None:
    for found in two["checkpoint"]:
        assert isinstance(found, list), found
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_gradients_that_nobody_cleared_are_told_of(two: dict[str, list[Any]]) -> None:
    for found in two["stale"]:
        assert isinstance(found, dict), found
        assert found.pop("model") == [0, 1, 1]
        assert all(counts == [0, 0, 0] for counts in found.values()), found
