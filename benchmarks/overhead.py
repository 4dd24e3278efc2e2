"""Seconds a training step, beside a plain loop and the physical floor, as ratios within one run.

    python -m benchmarks.overhead [--models mlp resnet18 vit] [--tasks 2 3 10] [--rounds 15] [--out NAME]

Contenders, each with its own copy of the model and of SGD, all stepping on the same batch:

plain              sum of the losses, one backward
floor              T bare `torch.autograd.grad` calls, gradients summed: what any exact method pays at least
gradsurgery        `MTLOptimizer`, method ``--method``
torchjd vmap       TorchJD's `mtl_backward` on the shared features, all rows at once
torchjd sequential the same, one row at a time

Rounds interleave the contenders in an order drawn anew each time, so that neither a drift of the machine's speed nor
the heap that one leaves behind favours another; ratios are taken round by round, and medians are reported with
quartiles. The first two rounds warm up and are dropped.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery import MTLOptimizer

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
WARM_UP = 2
# Ratios to the floor that must hold: the first engine is one copy and two products above it.
BOUNDS = {"mlp": 1.12, "resnet18": 1.05, "vit": 1.05}


def mlp() -> tuple[nn.Module, Tensor, int]:
    """Three layers of 1024, batch 256: 3.1 M shared parameters, few of them reused, so rows weigh most here."""
    layers = [m for _ in range(3) for m in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(256, 1024), 1024


def resnet18() -> tuple[nn.Module, Tensor, int]:
    """torchvision's ResNet-18 on 16 images of 64 x 64: 11.2 M shared parameters."""
    from torchvision.models import resnet18

    trunk = resnet18(weights=None)
    trunk.fc = nn.Identity()
    return trunk, torch.randn(16, 3, 64, 64), 512


def vit() -> tuple[nn.Module, Tensor, int]:
    """Six transformer layers of width 192 on 16 images of 32 x 32 in 4 x 4 patches: 2.7 M shared parameters."""
    from torchvision.models import VisionTransformer

    trunk = VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=CLASSES
    )
    trunk.heads = nn.Identity()
    return trunk, torch.randn(16, 3, 32, 32), 192


MODELS = {"mlp": mlp, "resnet18": resnet18, "vit": vit}


class Problem:
    """A trunk, T linear heads, a batch, and one cross-entropy a task."""

    def __init__(self, model: str, tasks: int, device: torch.device):
        torch.manual_seed(0)
        trunk, x, width = MODELS[model]()
        self.trunk = trunk.to(device)
        self.heads = nn.ModuleList([nn.Linear(width, CLASSES) for _ in range(tasks)]).to(device)
        self.x = x.to(device)
        self.y = torch.randint(CLASSES, (tasks, len(x)), device=device)
        self.params = [*self.trunk.parameters(), *self.heads.parameters()]
        self.base = torch.optim.SGD(self.params, lr=1e-4)

    def losses(self) -> tuple[Tensor, list[Tensor]]:
        """Shared features and the losses."""
        z = self.trunk(self.x)
        return z, [nn.functional.cross_entropy(h(z), y) for h, y in zip(self.heads, self.y, strict=True)]


def plain(problem: Problem, method: str) -> Callable[[], object]:
    def step() -> None:
        problem.base.zero_grad()
        torch.stack(problem.losses()[1]).sum().backward()
        problem.base.step()

    return step


def floor(problem: Problem, method: str) -> Callable[[], object]:
    def step() -> None:
        problem.base.zero_grad()
        _, losses = problem.losses()
        for loss in losses:
            gradients = torch.autograd.grad(
                loss, problem.params, retain_graph=loss is not losses[-1], allow_unused=True
            )
            for p, g in zip(problem.params, gradients, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
            # Else two sets of gradients are alive at once, and the floor is not the least that can be had.
            del gradients
        problem.base.step()

    return step


def gradsurgery(problem: Problem, method: str) -> Callable[[], object]:
    opt = MTLOptimizer(problem.base, method, problem.trunk.parameters())

    def step() -> None:
        opt.zero_grad()
        opt.step(problem.losses()[1])

    return step


def torchjd(chunk: int | None) -> Callable[[Problem, str], Callable[[], object]]:
    def make(problem: Problem, method: str) -> Callable[[], object]:
        from torchjd import aggregation
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = {"upgrad": aggregation.UPGrad, "mgda": aggregation.MGDA, "pcgrad": aggregation.PCGrad}[method]()
        shared = list(problem.trunk.parameters())

        def step() -> None:
            problem.base.zero_grad()
            z, losses = problem.losses()
            mtl_backward(losses, z, parallel_chunk_size=chunk)
            jac_to_grad(shared, aggregator)
            problem.base.step()

        return step

    return make


CONTENDERS: dict[str, Callable[[Problem, str], Callable[[], object]]] = {
    "plain": plain,
    "floor": floor,
    "gradsurgery": gradsurgery,
    "torchjd vmap": torchjd(None),
    "torchjd sequential": torchjd(1),
}


def measure(model: str, tasks: int, method: str, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step, by contender and round."""
    problem = Problem(model, tasks, device)
    steps = {name: make(copy.deepcopy(problem), method) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for round_ in range(rounds + WARM_UP):
        for name in rng.permutation(list(steps)):
            elapsed = timed(steps[name], device)
            if round_ >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summary(seconds: dict[str, list[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Quartiles (25, 50, 75 %) of the ratio to contender ``to``, by contender."""
    base = np.array(seconds[to])
    return {name: tuple(np.percentile(np.array(s) / base, [25, 50, 75]).tolist()) for name, s in seconds.items()}


def machine(device: torch.device) -> dict[str, object]:
    """What a number depends on."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchjd": version("torchjd"),
        "commit": commit.stdout.strip(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def table(results: list[dict]) -> str:
    """Markdown: medians, as ratios to plain, and ours to the floor."""
    lines = [
        "| model | T | plain, ms | floor | gradsurgery | TorchJD, vmap | TorchJD, sequential | gradsurgery / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        to_plain = summary(r["seconds"], "plain")
        to_floor = summary(r["seconds"], "floor")
        cells = [f"{to_plain[name][1]:.2f}" for name in list(CONTENDERS)[1:]]
        ours = f"**{to_floor['gradsurgery'][1]:.3f}**"
        milliseconds = f"{1e3 * statistics.median(r['seconds']['plain']):.0f}"
        lines.append(f"| {r['model']} | {r['tasks']} | {milliseconds} | {' | '.join(cells)} | {ours} |")
    return "\n".join(lines)


def verdicts(results: list[dict]) -> list[str]:
    """The bounds held for this engine that were missed."""
    missed = []
    for r in results:
        cell = f"{r['model']} T={r['tasks']}"
        to_floor = summary(r["seconds"], "floor")
        if to_floor["gradsurgery"][1] > BOUNDS[r["model"]]:
            missed.append(f"{cell}: {to_floor['gradsurgery'][1]:.3f} x floor, over {BOUNDS[r['model']]}")
        peer = min(to_floor["torchjd vmap"][1], to_floor["torchjd sequential"][1])
        if to_floor["gradsurgery"][1] > peer:
            missed.append(f"{cell}: slower than TorchJD ({to_floor['gradsurgery'][1]:.3f} against {peer:.3f} x floor)")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 3, 10])
    parser.add_argument("--method", choices=["upgrad", "mgda", "pcgrad"], default="upgrad")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    device = torch.device(args.device)
    results = []
    for model in args.models:
        for tasks in args.tasks:
            seconds = measure(model, tasks, args.method, args.rounds, device)
            results.append({"model": model, "tasks": tasks, "seconds": seconds})
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    content = {"machine": machine(device), "method": args.method, "rounds": args.rounds, "results": results}
    if args.out:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.out}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{content['machine']}\n\n{table(results)}\n")
    for line in verdicts(results) or ["All bounds hold."]:
        print(line)


if __name__ == "__main__":
    main()
