"""Steps on many ranks: a model of their time and traffic, checked against steps that were measured on a few.

    python -m benchmarks.scaling [--tasks 3] [--rounds 9] [--out NAME] [--only check model]

The check counts, on 1, 2 and 4 gloo ranks of this machine, the elements that every collective of a step is given, and
times the step beside the model's forecast, which knows the step of one rank and single collectives of two. The model
then goes to 1024 ranks and 70 billion parameters, on hardware that is not at hand: what it assumes is listed with its
tables and in ``docs/scaling.png``.

    step        = forward + passes x backward + surgery + exposed communication
    a collective = rounds x latency + bytes on the wire / bandwidth, bytes by a ring: (W - 1) / W of what is given for a
                   reduce-scatter or all-gather, twice that for an all-reduce
    surgery      = T rows written once, 1 / W of them read twice and a direction written, at the memory's rate
    exposed      = what backwards do not hide: of DDP's all-reduce and of the last row, what is left after one backward,
                   and the last bucket at least; of other rows, what is left after the next task's; under fully_shard,
                   what is left after all passes, and a layer's share at least
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.record import machine, markdown, verdict, write
from gradsurgery import MTLOptimizer, distributed, kernels

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DEPTH, BATCH = 1024, 6, 32
RANKS = (1, 2, 4)
ROADS = (
    *("plain DDP", "sequential", "rows all-reduced", "combine", "representation"),
    *("plain FSDP2", "sequential, FSDP2", "representation, FSDP2"),
)


@dataclass(frozen=True)
class Rates:
    """What a machine does.

    Attributes:
        multiply: floating-point operations a second of one rank, forward and backward.
        memory: bytes a second of its memory.
        link: bytes a second that a rank sends while it receives as many.
        latency: seconds of each round of a collective.
        tree: whether collectives take log2(W) rounds, or W - 1 by a ring.
        hides: whether communication and a backward run side by side.
        element: bytes of a gradient's element.
    """

    multiply: float
    memory: float
    link: float
    latency: float
    tree: bool
    hides: bool
    element: int


# Data sheet of an H100 SXM (989 TFLOP/s in bf16, 3.35 TB/s) with a link of 400 Gb/s a GPU, at the shares of them that
# are commonly reached.
CLUSTER = Rates(0.4 * 989e12, 0.8 * 3.35e12, 0.8 * 50e9, 15e-6, tree=True, hides=True, element=2)
# Color, line, and the plain step that a road is compared with.
STYLE = {
    "sequential": ("#0072B2", "-", "plain DDP"),
    "rows all-reduced": ("#D55E00", "--", "plain DDP"),
    "combine": ("#CC79A7", "-", "plain DDP"),
    "representation": ("#E69F00", "-", "plain DDP"),
    "sequential, FSDP2": ("#009E73", "-", "plain FSDP2"),
    "representation, FSDP2": ("#E69F00", ":", "plain FSDP2"),
}
# Of what is measured here, bytes alone are counted by a rate: float32's four.
HERE = Rates(1.0, 1.0, 1.0, 0.0, tree=False, hides=False, element=4)
TOKENS, LAYERS, BUCKET = 4096, 48, 25e6
PARAMETERS = {"25 M": 25e6, "1 B": 1e9, "7 B": 7e9, "70 B": 70e9}
WORLDS = (1, 8, 64, 256, 1024)


def collective(kind: str, n: float, W: int, rates: Rates) -> tuple[float, float]:
    """Bytes that a rank puts on the wire for n elements, and seconds."""
    if W == 1:
        return 0.0, 0.0
    times = 2 if kind == "sum" else 1
    wire = times * n * rates.element * (W - 1) / W
    rounds = times * (math.log2(W) if rates.tree else W - 1)
    return wire, rounds * rates.latency + wire / rates.link


def forecast(
    road: str, d: float, T: int, W: int, rates: Rates, *, forward: float, backward: float
) -> tuple[float, float]:
    """Seconds of a step on each rank, and bytes that it puts on the wire.

    Args:
        road: one of `ROADS`.
        d: shared parameters; heads are left out.
        T: tasks.
        W: ranks.
        rates: of the machine.
        forward, backward: seconds of one pass on a rank's own part of the batch.
    """
    wire = {kind: collective(kind, d, W, rates)[0] for kind in ("scatter", "gather", "sum")}
    cost = {kind: collective(kind, d, W, rates)[1] for kind in ("scatter", "gather", "sum")}
    hidden = backward if rates.hides else 0.0
    last = min(1.0, BUCKET / (d * rates.element))
    averaged, scattered = (max(cost[kind] - hidden, cost[kind] * last) for kind in ("sum", "scatter"))
    rows = (T - 1) * max(cost["scatter"] - hidden, 0.0) + scattered
    write = 2 * T * d * rates.element / rates.memory
    solve = (2 * T + 1) * d / W * rates.element / rates.memory
    match road:
        case "plain DDP":
            return forward + backward + averaged, wire["sum"]
        case "sequential":
            return forward + T * backward + write + solve + rows + cost["gather"], T * wire["scatter"] + wire["gather"]
        case "rows all-reduced":
            summed = (T - 1) * max(cost["sum"] - hidden, 0.0) + averaged
            return forward + T * backward + write + solve * W + summed, T * wire["sum"]
        case "combine":
            measured = forward + T * backward + write + solve + rows
            return measured + backward + averaged, T * wire["scatter"] + wire["sum"]
        case "representation":
            return forward + backward + averaged, wire["sum"]
        case "plain FSDP2" | "sequential, FSDP2" | "representation, FSDP2":
            passes = T if road == "sequential, FSDP2" else 1
            compute = forward + passes * backward
            moved = wire["gather"] + passes * (wire["gather"] + wire["scatter"])
            taken = cost["gather"] + passes * (cost["gather"] + cost["scatter"])
            surgery = write / W + solve if passes > 1 else 0.0
            shown = max(taken - compute, taken / LAYERS) if rates.hides else taken
            return compute + surgery + shown, moved
        case _:
            raise ValueError(f"There is no road {road!r}.")


def on_a_cluster(T: int) -> list[dict[str, Any]]:
    """Forecasts for every size, number of ranks and road."""
    rows = []
    for name, d in PARAMETERS.items():
        forward = 2 * d * TOKENS / CLUSTER.multiply
        for W in WORLDS:
            for road in ROADS:
                # A replica of a model and its rows must fit on a rank.
                fits = "FSDP2" in road or (T + 8) * d * CLUSTER.element < 70e9
                if fits:
                    seconds, wire = forecast(road, d, T, W, CLUSTER, forward=forward, backward=2 * forward)
                    rows.append({"parameters": name, "ranks": W, "road": road, "seconds": seconds, "bytes": wire})
    return rows


# What is measured on gloo ranks of this machine.


class Model(nn.Module):
    """A trunk of wide layers, and a head of one output for each task."""

    def __init__(self, T: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(T)])

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [(head(z) - t).square().mean() for t, head in enumerate(self.heads)]


def counted(calls: dict[str, int]) -> None:
    """From now on, elements that collectives are given are added up by kind."""

    def watch(kind: str, function: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            calls[kind] = calls.get(kind, 0) + tensors[which].numel()
            return function(*tensors, **options)

        return call

    dist.all_reduce = watch("sum", dist.all_reduce, 0)
    distributed._REDUCE_SCATTER = watch("scatter", distributed._REDUCE_SCATTER, 1)
    distributed._ALL_GATHER = watch("gather", distributed._ALL_GATHER, 0)


def timed(call: Callable[[], object], rounds: int) -> float:
    """Median seconds, all ranks together."""
    found = []
    for _ in range(rounds + 2):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found[2:])


def rank(world: int, T: int, rounds: int, folder: Path, number: int) -> None:
    """One rank's measurements; rank 0 writes them down."""
    torch.set_num_threads(1)
    calls: dict[str, int] = {}
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
        counted(calls)
    model = Model(T)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    opt = MTLOptimizer(
        torch.optim.SGD(model.parameters(), 1e-3), "cagrad", model.trunk.parameters(), engine="sequential"
    )
    plain = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number))

    def surgery() -> None:
        opt.zero_grad()
        opt.step(wrapped(x))

    def ordinary() -> None:
        plain.zero_grad()
        torch.stack(wrapped(x)).sum().backward()
        plain.step()

    surgery()
    calls.clear()
    surgery()
    step = dict(calls)
    found: dict[str, Any] = {"elements": step, "d": sum(p.numel() for p in model.trunk.parameters())}
    found |= {"sequential": timed(surgery, rounds), "plain DDP": timed(ordinary, rounds)}
    found |= solving(T, found["d"], rounds) if world == 1 else links(found["d"], rounds)
    if number == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        os._exit(0)


def solving(T: int, d: int, rounds: int) -> dict[str, float]:
    """Seconds of inner products and a direction of whole rows, of which each of several ranks takes a share."""
    J, w = torch.randn(T, d), torch.full((1, T), 0.3, dtype=torch.float64)
    return {"solve": timed(lambda: (kernels.gramian(J, [0, d]), kernels.combine(w, J, [0, d])), rounds)}


def links(d: int, rounds: int) -> dict[str, float]:
    """Seconds of single collectives of few and of d elements."""
    found = {}
    for name, n in (("few", 1024), ("many", d)):
        given = torch.ones(n)
        own = torch.empty(n // dist.get_world_size())
        found[f"scatter {name}"] = timed(lambda g=given, o=own: distributed._REDUCE_SCATTER(o, g), rounds)
        found[f"gather {name}"] = timed(lambda g=given, o=own: distributed._ALL_GATHER(g, o), rounds)
        found[f"sum {name}"] = timed(lambda g=given: dist.all_reduce(g), rounds)
    return found


def measured(world: int, T: int, rounds: int) -> dict[str, Any]:
    """What rank 0 of so many found."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, "-m", "benchmarks.scaling", "--rank", str(world), str(T), str(rounds), folder]
        ranks = [subprocess.Popen([*words, str(n)], cwd=ROOT, env=environment) for n in range(world)]
        if any(process.wait(600) for process in ranks):
            raise RuntimeError(f"A rank of {world} failed; its own words are above.")
        return json.loads((Path(folder) / f"{world}.json").read_text())


def check(T: int, rounds: int) -> dict[str, Any]:
    """Measurements, and forecasts from those of one rank and the links of two."""
    found = {str(world): measured(world, T, rounds) for world in RANKS}
    one, two, cores = found["1"], found["2"], os.cpu_count() or 1
    # Collectives of each road, by kind.
    roads = {"plain DDP": {"sum": 1}, "sequential": {"scatter": T, "gather": 1}}
    rows = []
    for world in RANKS:
        for road, kinds in roads.items():
            seconds = one[road] - (one["solve"] * (1 - 1 / world) if road == "sequential" else 0.0)
            for kind, times in kinds.items():
                # Ranks in a ring: rounds and bytes on the wire, from those of two.
                latency = two[f"{kind} few"] * (world - 1)
                moved = (two[f"{kind} many"] - two[f"{kind} few"]) * 2 * (world - 1) / world
                seconds += times * (latency + moved) if world > 1 else 0.0
            # Ranks beyond the cores take turns, and a core that moves bytes does not compute.
            seconds *= max(1.0, world / cores)
            wire = forecast(road, one["d"], T, world, HERE, forward=0.0, backward=0.0)[1]
            rows.append(
                {"ranks": world, "road": road, "measured": found[str(world)][road], "forecast": seconds, "bytes": wire}
            )
    return {"measured": found, "rows": rows, "cores": cores}


def on_the_wire(elements: Mapping[str, int], W: int, element: int = 4) -> float:
    """Bytes of a rank, by a ring, of the elements that collectives work on."""
    once = elements.get("scatter", 0) + elements.get("gather", 0)
    return element * (W - 1) / W * (once + 2 * elements.get("sum", 0))


def report(content: Mapping[str, Any]) -> str:
    """Tables, with what they assume."""
    T, lines = content["tasks"], []
    if "check" in content:
        found = content["check"]
        lines += [f"Measured on this machine ({found['cores']} cores, gloo, one thread a rank), T = {T}:", ""]
        header = ("ranks", "road", "measured, ms", "forecast, ms", "ratio", "counted, MB", "forecast, MB")
        rows = []
        for row in found["rows"]:
            elements = found["measured"][str(row["ranks"])]["elements"] if row["road"] == "sequential" else None
            counted = "-" if elements is None else f"{on_the_wire(elements, row['ranks']) / 1e6:.2f}"
            times = (f"{1e3 * row['measured']:.1f}", f"{1e3 * row['forecast']:.1f}")
            ratio = f"{row['measured'] / row['forecast']:.2f}"
            rows.append((str(row["ranks"]), row["road"], *times, ratio, counted, f"{row['bytes'] / 1e6:.2f}"))
        lines += [markdown(header, rows), ""]
        worst = max(abs(math.log(row["measured"] / row["forecast"])) for row in found["rows"])
        lines += [verdict("measured / forecast, farthest from 1, as a factor", math.exp(worst), 1.5), ""]
    if "model" in content:
        lines += [f"Forecast, T = {T}. Assumed:", *(f"- {a}" for a in assumptions()), ""]
        header = ("parameters", "ranks", *ROADS)
        cells: dict[tuple[str, int], dict[str, str]] = {}
        for row in content["model"]:
            text = f"{row['seconds']:.3g} s, {row['bytes'] / 1e9:.3g} GB"
            cells.setdefault((row["parameters"], row["ranks"]), {})[row["road"]] = text
        lines.append(
            markdown(header, [(d, str(W), *(row.get(road, "-") for road in ROADS)) for (d, W), row in cells.items()])
        )
    return "\n".join(lines)


def assumptions() -> list[str]:
    """In words."""
    c = CLUSTER
    return [
        f"GPUs of {c.multiply / 1e12:.0f} TFLOP/s and {c.memory / 1e12:.2f} TB/s: shares of a data sheet, not measured",
        f"links of {c.link / 1e9:.0f} GB/s each way, all alike, {1e6 * c.latency:.0f} us a round and log2(W) rounds",
        f"a forward of 2 d operations a token and a backward of twice that, {TOKENS} tokens a rank, in bf16",
        "every parameter is shared, and heads cost nothing (for `representation` they are all that is passed T times)",
        "one backward hides one collective as long as it is, and no rank waits for a slower one",
        f"buckets of {BUCKET / 1e6:.0f} MB of gradients and of rows, {LAYERS} layers under fully_shard",
        "a replica with its rows and Adam's state has 70 GB; where it does not fit, nothing is said",
    ]


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Forecast steps as multiples of a plain one, against the number of ranks, a panel a size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    axes = figure.subplots(1, len(PARAMETERS), sharey=True)
    for ax, name in zip(axes, PARAMETERS, strict=True):
        rows = [row for row in content["model"] if row["parameters"] == name and row["ranks"] > 1]
        for road, (color, line, base) in STYLE.items():
            mine = {row["ranks"]: row["seconds"] for row in rows if row["road"] == road}
            plain = {row["ranks"]: row["seconds"] for row in rows if row["road"] == base}
            if mine:
                ax.plot([*mine], [mine[W] / plain[W] for W in mine], line, color=color, marker="o", ms=3, label=road)
        ax.axhline(1, color="#999999", lw=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(WORLDS[1:], [str(W) for W in WORLDS[1:]])
        ax.set_title(f"{name} parameters", fontsize=10)
        ax.set_xlabel("ranks")
    axes[0].set_ylabel("a step / a plain step of the wrapper")
    axes[0].set_ylim(0, None)
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), frameon=False)
    text = "Forecast, not measured, T = {}: {}.".format(content["tasks"], "; ".join(assumptions()))
    figure.supxlabel(textwrap.fill(text, 190), fontsize=7, color="#555555")
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        world, T, rounds, folder, number = sys.argv[2:]
        rank(int(world), int(T), int(rounds), Path(folder), int(number))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=("check", "model"), default=["check", "model"])
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    content: dict[str, Any] = {"machine": machine(torch.device("cpu")), "tasks": args.tasks}
    if "check" in args.only:
        content["check"] = check(args.tasks, args.rounds)
    if "model" in args.only:
        content["model"] = on_a_cluster(args.tasks)
    if args.out:
        write(args.out, content)
        if "model" in content:
            draw(content, ROOT / "docs" / "scaling.png")
    print(report(content))


if __name__ == "__main__":
    main()
