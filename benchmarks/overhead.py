"""Seconds a training step, beside a plain loop, the physical floor and the peers, as ratios within one run.

    python -m benchmarks.overhead [--models mlp64 vit] [--tasks 2 3] [--only auto floor] [--rounds 9] [--seconds 60]
        [--method upgrad] [--compiled] [--libmtl PATH] [--out NAME]

A result file is written cell by cell, and a cell that is in it already is not measured again: delete it to start anew.

Contenders (`benchmarks.contenders`) have their own copies of the model and of SGD, and all step on the same batch.
Rounds interleave them in an order drawn anew each time, so that neither a drift of the machine's speed nor the heap
that one leaves behind favours another; ratios are taken round by round, and medians are reported with quartiles. Three
steps of each warm up. Of a cell whose rounds are long, as many are taken as fit into ``--seconds``,
and three at the least.

A cell has a process of its own, whose heap no other cell has seen. A price is that of whole steps that last 20 ms or
more together, after one that is not timed: the caches hold what another contender left there, and training is a step
after a step of one's own. The clock is that of `torch.utils.benchmark`, which waits for an accelerator.

Of `floor` and `sequential` the operators' own time is kept as well, by `torch.profiler`: what a missed bound is
made of. Rows are written by ``copy_``, and read by ``bmm`` or ``mm`` (the Gramian) and ``mv`` (the weighted sum); the
floor adds up by ``add_``.
"""

import argparse
import copy
import gc
import math
import multiprocessing
import os
import statistics
import sys
import time
import timeit
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import profile, record_function
from torch.utils import benchmark

from benchmarks.contenders import METHODS, DeclinedError, Make, Step, contenders, prepare
from benchmarks.problems import MODELS, Problem
from benchmarks.record import commit, machine, markdown, read, verdict, write

LEAST_ROUNDS = 3
# Seconds of steps in one price.
SPAN = 0.02
# Tasks up to which `every 10` is measured: its rows are one T x d more in memory.
MOST_FOR_TEN = 10
FLOOR_BOUNDS = {"vit": 1.03, "resnet18": 1.03, "mlp1024": 1.08}
TORCHJD = ("torchjd vmap", "torchjd sequential")
PROFILED = ("floor", "sequential")
# Steps under the profiler.
SHOTS = 5
# What is in no operator: Python, and memory that is asked for or given back.
REST = "the rest"
# Of a step of the floor: what an operator must differ by to be told.
TOLD = 0.005


def measure(
    model: str, tasks: int, method: str, makers: Mapping[str, Make], rounds: int, limit: float, device: torch.device
) -> dict[str, Any]:
    """One cell: seconds a step by contender and round, what ran, and who declined and why.

    Args:
        limit: seconds after which no further round is begun, once there are three.
    """
    steps, declined = ready(Problem(model, tasks, device), method, makers)
    numbers = {name: steps_a_price(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    start = time.monotonic()
    for round_ in range(rounds):
        for name in rng.permutation(list(steps)):
            seconds[name].append(timed(steps[name], numbers[name]))
        if round_ >= LEAST_ROUNDS - 1 and time.monotonic() - start > limit:
            break
    engines = {name: engine for name, step in steps.items() if (engine := step.engine())}
    operators = {name: by_operator(steps[name]) for name in PROFILED} if set(PROFILED) <= steps.keys() else {}
    cell = {"model": model, "tasks": tasks, "seconds": seconds, "engines": engines, "declined": declined}
    return cell | {"operators": operators}


def apart(names: Sequence[str], model: str, tasks: int, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` of contenders by name, in a process of its own.

    Raises:
        RuntimeError: that failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, names, model, tasks, args))
    process.start()
    # Else this process waits for itself where that one ends without a word.
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"The process of {model}, T={tasks} ended with {process.exitcode}.") from None
    finally:
        process.join()


def _send(to: Connection, names: Sequence[str], model: str, tasks: int, args: argparse.Namespace) -> None:
    makers = contenders(compile=args.compiled, checkout=args.libmtl)
    wanted = {name: makers[name] for name in names}
    to.send(measure(model, tasks, args.method, wanted, args.rounds, args.seconds, torch.device(args.device)))


def ready(problem: Problem, method: str, makers: Mapping[str, Make]) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps of those that take the problem, and the reasons of those that don't."""
    steps, declined = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = prepare(name, make, copy.deepcopy(problem), method)
        except DeclinedError as error:
            declined[name] = str(error)
        # What a refusal left behind holds gradients.
        gc.collect()
    return steps, declined


def steps_a_price(step: Step) -> int:
    """As many as last `SPAN` or longer."""
    return math.ceil(SPAN / timed(step, 1))


def timed(step: Step, number: int) -> float:
    """Seconds a step, of so many, after one of each kind that is not timed."""
    timer = timeit.Timer("step()", timer=benchmark.timer, globals={"step": step.take})
    timer.timeit(len(step.shares))
    if len(step.shares) == 1:
        return timer.timeit(number) / number
    return sum(share * timer.timeit(1) for _ in range(number) for share in step.shares) / number


def by_operator(step: Step) -> dict[str, float]:
    """Seconds a step of each operator's own, the median of `SHOTS`."""
    # Else each profile tells of itself.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    step.take()
    shots: list[Counter[str]] = []
    for _ in range(SHOTS):
        with profile() as profiler, record_function(REST):
            step.take()
        events = profiler.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        shots.append(Counter())
        for event in events:
            # An optimizer's range is no operator.
            key = REST if event.key.startswith("Optimizer.") else event.key
            shots[-1][key] += 1e-6 * (event.self_device_time_total if on_device else event.self_cpu_time_total)
    return {key: statistics.median(shot[key] for shot in shots) for key in shots[0]}


def summary(seconds: Mapping[str, list[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles (25, 50, 75 %) of the ratio to contender ``to``, by contender."""
    base = np.array(seconds[to])
    return {name: tuple(np.percentile(np.array(s) / base, [25, 50, 75]).tolist()) for name, s in seconds.items()}


def ratio(cell: Mapping[str, Any], name: str, to: str) -> float | None:
    """The median over rounds; None where one of them was not measured."""
    seconds = cell["seconds"]
    return summary({n: seconds[n] for n in (name, to)}, to)[name][1] if {name, to} <= seconds.keys() else None


def better(cell: Mapping[str, Any], names: Iterable[str], to: str) -> float | None:
    """The median ratio to ``to`` of the cheapest of those that were measured."""
    found = [r for name in names if (r := ratio(cell, name, to)) is not None]
    return min(found, default=None)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: medians with quartiles, in multiples of plain; "-" where a contender declined or was left out."""
    names = list(dict.fromkeys(name for r in results for name in [*r["seconds"], *r["declined"]] if name != "plain"))
    rows = []
    for r in results:
        to_plain = summary(r["seconds"], "plain")
        cells = [_cell(to_plain.get(name), r["engines"].get(name, "") if name == "auto" else "") for name in names]
        rows.append([r["model"], str(r["tasks"]), f"{1e3 * statistics.median(r['seconds']['plain']):.3g}", *cells])
    return markdown(["model", "T", "plain, ms", *names], rows)


def _cell(quartiles: tuple[float, float, float] | None, engine: str) -> str:
    if quartiles is None:
        return "-"
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f}-{high:.2f})" + (f" {engine}" if engine else "")


def reasons(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who declined what, and why; cells with the same reason side by side."""
    cells: dict[tuple[str, str], list[str]] = {}
    for r in results:
        for name, why in r["declined"].items():
            cells.setdefault((name, why), []).append(f"{r['model']} T={r['tasks']}")
    return [f"- {name} ({', '.join(where)}): {why}" for (name, why), where in cells.items()]


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every bound that was measured, held or missed."""
    return [line for r in results for line in of_cell(r)] + over_the_grid(results)


def of_cell(r: Mapping[str, Any]) -> list[str]:
    """Of one cell."""
    model, T = r["model"], r["tasks"]
    least = [("sequential", "batched", 2.0), ("sequential", "compiled", 2.0)] if (model, T) == ("mlp64", 8) else []
    most = [("sequential", "floor", FLOOR_BOUNDS[model])] if model in FLOOR_BOUNDS else []
    if (model, T) == ("mlp2048", 10):
        most.append(("gramian", "floor", 0.4))
    if (model, T) == ("resnet18", 3):
        most.append(("last block", "plain", 1.6))
    lines = []
    for name, to, bound in [*most, *least]:
        if (found := ratio(r, name, to)) is not None:
            lines.append(verdict(f"{model} T={T}: {name} / {to}", found, bound, least=(name, to, bound) in least))
            if (name, to) == ("sequential", "floor") and found > bound and r.get("operators"):
                lines.append(f"       per cent of the floor, by operator: {why(r['operators'])}")
    found, heads = ratio(r, "representation", "plain"), ratio(r, "plain plus heads", "plain")
    if model != "mlp64" and found is not None and heads is not None:
        # What heads cost is the tasks' own.
        lines.append(verdict(f"{model} T={T}: representation less the heads / plain", found - (heads - 1), 1.15))
    return lines


def why(operators: Mapping[str, Mapping[str, float]]) -> str:
    """What `sequential` spends more than the floor on each operator, or less."""
    floor, ours = operators["floor"], operators["sequential"]
    more = {key: 100 * (ours.get(key, 0.0) - floor.get(key, 0.0)) / sum(floor.values()) for key in {**floor, **ours}}
    told = sorted((key for key in more if abs(more[key]) >= 100 * TOLD), key=lambda key: -more[key])
    return ", ".join(f"{key} {more[key]:+.1f}" for key in told)


def over_the_grid(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """`auto` beside the peers."""
    lines = []
    peers = {"TorchJD's better mode": TORCHJD, "LibMTL": ("libmtl",)}
    bounds = {"TorchJD's better mode": 1.3, "LibMTL": 1.5}
    for peer, names in peers.items():
        ratios = [(f"{r['model']} T={r['tasks']}", x) for r in results if (x := better(r, names, "auto")) is not None]
        if not ratios:
            continue
        if peer != "LibMTL":
            cell, worst = min(ratios, key=lambda entry: entry[1])
            lines.append(verdict(f"{peer} / auto, least, at {cell}", worst, 1.0, least=True))
        mean = statistics.geometric_mean(x for _, x in ratios)
        lines.append(verdict(f"{peer} / auto, geometric mean of {len(ratios)}", mean, bounds[peer], least=True))
    with_autogram = [x for r in results if (x := better(r, (*TORCHJD, "torchjd autogram"), "auto")) is not None]
    if any("torchjd autogram" in r["seconds"] for r in results) and with_autogram:
        mean = statistics.geometric_mean(with_autogram)
        lines.append(f"       with autogram among TorchJD's: {mean:.3g}, least {min(with_autogram):.3g}")
    return lines


def run(args: argparse.Namespace, name: str | None = None) -> dict[str, Any]:
    """Measures what a result file lacks of the grid, and reports cell by cell on the way."""
    device = torch.device(args.device)
    names = list(contenders(compile=args.compiled, checkout=args.libmtl))
    if args.only:
        names = [name for name in names if name in {"plain", *args.only}]
    about = machine(device) | ({"libmtl": commit(args.libmtl)} if args.libmtl else {})
    kept = (read(name) if name else None) or {}
    if kept.get("method", args.method) != args.method:
        raise SystemExit(f"{name}.json holds prices of {kept['method']}: choose another --out, or delete it.")
    results = kept.get("results", [])
    content = {"machine": about, "method": args.method, "rounds": args.rounds, "results": results}
    for model in args.models:
        for tasks in args.tasks or MODELS[model].tasks:
            if any((r["model"], r["tasks"]) == (model, tasks) for r in results):
                continue
            wanted = [n for n in names if tasks <= MOST_FOR_TEN or n != "every 10"]
            start = time.monotonic()
            cell = apart(wanted, model, tasks, args)
            results.append(cell | {"commit": about["commit"]})
            if name:
                write(name, content)
            line = table(results[-1:]).splitlines()[-1]
            rounds = len(results[-1]["seconds"]["plain"])
            print(f"{line} {rounds} rounds, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return content


def report(content: Mapping[str, Any]) -> str:
    """Table, reasons and verdicts."""
    results = content["results"]
    declined = reasons(results)
    parts = [str(content["machine"]), table(results)]
    parts += ["Not timed:\n" + "\n".join(declined)] if declined else []
    return "\n\n".join([*parts, "\n".join(verdicts(results) or ["No bound was measured."])])


def arguments(parser: argparse.ArgumentParser) -> None:
    """What says which grid to measure."""
    parser.add_argument("--method", choices=METHODS, default="upgrad")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="a cell, beyond which three rounds do")
    parser.add_argument("--compiled", action="store_true", help="the compiled road, too: a minute of compiling")
    parser.add_argument("--libmtl", type=Path, metavar="PATH", help="a checkout of LibMTL")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, help="the same for all models; else each model's own")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="these beside plain")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    content = run(args, args.out)
    print(report(content))


if __name__ == "__main__":
    main()
