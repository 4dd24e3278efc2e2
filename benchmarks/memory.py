"""Peak memory of a training step above a plain one's, in multiples of the shared parameters' size.

    python -m benchmarks.memory [--models mlp2048 resnet18] [--tasks 2 3 10] [--out NAME]

On the CPU each contender has a process of its own, in which malloc returns what is freed, and the peak is VmHWM over
two steps after the contender's first ones (an engine's first step compares it with plain passes), less that over two
plain steps of the same process before; what a contender imports, it has imported on a small model by then. On CUDA it
is `torch.cuda.max_memory_allocated`. The contender's kept rows count; a plain step's own gradients don't.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, DeclinedError, Step, prepare
from benchmarks.problems import MODELS, Problem
from benchmarks.record import RESULTS, machine, markdown, verdict, write

NAMES = (
    "sequential", "batched", "gramian", "representation", "torchjd vmap", "torchjd sequential", "torchjd autogram"
)  # fmt: skip
GRID = {"mlp2048": (2, 3, 10, 40), "resnet18": (2, 3, 10)}
# Bytes. TorchJD holds about 2 T + 1 sets of gradients.
ROOM = 8 << 30
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def peak(step: Step, device: torch.device) -> int:
    """Bytes over two steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step.take()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else high_water()


def high_water() -> int:
    """Bytes of VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def above(model: str, tasks: int, name: str, method: str, device: torch.device) -> dict[str, Any]:
    """Multiples of the shared parameters, of one contender in this process; or why it declined."""
    try:
        prepare(name, CONTENDERS[name], Problem("mlp64", 2, device), method)
        problem = Problem(model, tasks, device)
        base = peak(prepare("plain", CONTENDERS["plain"], problem, method), device)
        step = prepare(name, CONTENDERS[name], problem, method)
        more = peak(step, device) - base
    except DeclinedError as error:
        return {"declined": str(error)}
    return {"multiples": more / sum(p.numel() * p.element_size() for p in problem.shared)}


def apart(model: str, tasks: int, name: str, method: str, device: torch.device) -> dict[str, Any]:
    """`above` in a process of its own."""
    options = ["--child", name, "--models", model, "--tasks", str(tasks), "--method", method, "--device", str(device)]
    try:
        return child("benchmarks.memory", *options)
    except subprocess.CalledProcessError as error:
        return {"declined": f"its process ended with {error.returncode}"}


def child(module: str, *options: str) -> Any:
    """What a module's command prints last, as JSON, from a process in which malloc returns what is freed.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", module, *options]
    environment, folder = os.environ | MALLOC, RESULTS.parent.parent
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def fits(model: str, tasks: int) -> bool:
    """Whether TorchJD's 2 T + 1 sets of gradients do."""
    trunk = MODELS[model].make()[0]
    return (2 * tasks + 1) * sum(4 * p.numel() for p in trunk.parameters()) < ROOM


def largest(model: str) -> float:
    """Share of the largest shared parameter in all."""
    sizes = [p.numel() for p in MODELS[model].make()[0].parameters()]
    return max(sizes) / sum(sizes)


def run(models: Sequence[str], tasks: Sequence[int] | None, method: str, device: torch.device) -> dict[str, Any]:
    """Measures the grid."""
    results = []
    for model in models:
        for T in tasks or GRID[model]:
            if not fits(model, T):
                continue
            found = {name: apart(model, T, name, method, device) for name in NAMES}
            multiples = {name: f["multiples"] for name, f in found.items() if "multiples" in f}
            declined = {name: f["declined"] for name, f in found.items() if "declined" in f}
            cell = {"model": model, "tasks": T, "multiples": multiples, "declined": declined, "layer": largest(model)}
            results.append(cell)
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return {"machine": machine(device), "method": method, "results": results}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: multiples of the shared parameters above plain."""
    rows = [
        [r["model"], str(r["tasks"]), *(f"{r['multiples'][n]:.2f}" if n in r["multiples"] else "-" for n in NAMES)]
        for r in results
    ]
    return markdown(["model", "T", *NAMES], rows)


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """sequential: T rows and one set more; gramian: T rows of the largest layer, and one set."""
    lines = []
    for r in results:
        T = r["tasks"]
        for name, bound in (("sequential", T + 1.0), ("gramian", T * r["layer"] + 1.0)):
            if name in r["multiples"]:
                what = f"{r['model']} T={T}: {name}, multiples of the parameters"
                lines.append(verdict(what, r["multiples"][name], bound))
    return lines


def report(content: Mapping[str, Any]) -> str:
    """Table, reasons and verdicts."""
    results = content["results"]
    declined = [f"- {n} ({r['model']} T={r['tasks']}): {w}" for r in results for n, w in r["declined"].items()]
    parts = [str(content["machine"]), table(results), *(["\n".join(declined)] if declined else [])]
    return "\n\n".join([*parts, "\n".join(verdicts(results))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(GRID))
    parser.add_argument("--tasks", nargs="+", type=int)
    parser.add_argument("--method", default="upgrad")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.child:
        print(json.dumps(above(args.models[0], args.tasks[0], args.child, args.method, device)))
        return
    content = run(args.models, args.tasks, args.method, device)
    if args.out:
        write(args.out, content)
    print(report(content))


if __name__ == "__main__":
    main()
