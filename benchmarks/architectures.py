"""What each architecture costs: parameters, operations, seconds and memory of a training step, relative to HPS.

    python -m benchmarks.architectures [--tasks 3] [--rounds 9] [--libmtl PATH] [--out NAME]
    python -m benchmarks.architectures --draw    # docs/architectures/*.png, the data flow of each

Every one has ResNet-18 for an encoder (SegNetMTAN its SegNet), T heads of one linear map after pooling, and steps on
the same 16 images of 64 x 64 with the sum of the losses, so that the method costs nothing. Experts are 3 of MMoE, 4 of
DSelect-k, and 1 shared and 1 a task of CGC and PLE, each a whole encoder as LibMTL has it. Operations are those of a
forward pass, as `torch.utils.flop_counter` counts them. Rounds interleave all, in an order drawn anew each time. Memory
is the peak of the process over two steps beyond what it was before the model was made, in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import libmtl
from benchmarks.contenders import Step
from benchmarks.memory import child, peak
from benchmarks.overhead import timed
from benchmarks.pictures import DOCS
from benchmarks.record import commit, in_words, machine, markdown, write
from gradsurgery.architectures import Architecture, Stages, build, list_architectures, segnet_head, split_stages
from gradsurgery.architectures.flow import draw_flow

CLASSES, WIDTH, BATCH, SIZE = 10, 512, 16, 64
OPTIONS: dict[str, dict[str, Any]] = {"dselect_k": {"num_experts": 4}, "ple": {"stem": 0}}
# LibMTL's module, class and what it is made with.
PEER: dict[str, tuple[str, dict[str, Any]]] = {
    "hps": ("HPS", {}),
    "cross_stitch": ("Cross_stitch", {}),
    "mmoe": ("MMoE", {"num_experts": [3]}),
    "cgc": ("CGC", {"num_experts": [1, 1, 1, 1]}),
    "ple": ("PLE", {"num_experts": [1, 1, 1, 1]}),
    "mtan": ("MTAN", {}),
    "dselect_k": ("DSelect_k", {"num_experts": [4], "num_nonzeros": 2, "kgamma": 1.0}),
    "ltb": ("LTB", {}),
}


def names(T: int) -> list[str]:
    return [f"task{t}" for t in range(T)]


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))


def ours(name: str, T: int) -> Architecture:
    """From `gradsurgery.architectures`."""
    from torchvision.models import resnet18

    tasks = names(T)
    if name == "segnet_mtan":
        pooled = {task: nn.Sequential(segnet_head(CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for task in tasks}
        return build(name, None, pooled)
    heads = {task: head() for task in (("ctr", "cvr") if name == "esmm" else tasks)}
    return build(name, lambda: split_stages(resnet18()), heads, **OPTIONS.get(name, {}))


def theirs(checkout: Path, name: str, T: int) -> nn.Module:
    """LibMTL's, from a checkout."""
    module, options = PEER[name]
    encoder = libmtl.module(checkout, "model.resnet").resnet18
    cls = getattr(libmtl.module(checkout, f"architecture.{module}"), module)
    options = {"img_size": [3, SIZE, SIZE], **options}
    heads = nn.ModuleDict({task: head() for task in names(T)})
    model = cls(names(T), encoder, heads, False, False, torch.device("cpu"), **options)
    model.epoch, model.epochs = 10, 100
    return model


def step_of(model: nn.Module, x: Tensor) -> Step:
    """Forward, the sum of the tasks' losses backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    target = torch.zeros(len(x), dtype=torch.int64)

    def loss(y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(y, target) if y.shape[1] > 1 else y.square().mean()

    def take() -> None:
        optimizer.zero_grad()
        torch.stack([loss(y) for y in model(x).values()]).sum().backward()
        optimizer.step()

    return Step(take)


def batch() -> Tensor:
    return torch.randn(BATCH, 3, SIZE, SIZE)


def flops(model: nn.Module, x: Tensor) -> int:
    """Of a forward pass, with gradients, which one of LibMTL's takes within it."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def makers(T: int, checkout: Path | None) -> dict[str, Callable[[], nn.Module]]:
    """By name; LibMTL's with its own before."""
    found: dict[str, Callable[[], nn.Module]] = {name: lambda n=name: ours(n, T) for name in list_architectures()}
    if checkout is not None:
        found |= {f"libmtl {name}": lambda n=name: theirs(checkout, n, T) for name in PEER}
    return found


def memory(name: str, args: argparse.Namespace) -> float | None:
    """MiB, from a process of its own; None where that failed."""
    options = ["--child", name, "--tasks", str(args.tasks)] + (["--libmtl", str(args.libmtl)] if args.libmtl else [])
    try:
        return child("benchmarks.architectures", *options)
    except subprocess.CalledProcessError:
        return None


def above(make: Callable[[], nn.Module]) -> float:
    """MiB of two steps' peak beyond what the process held before the model was made."""
    cpu = torch.device("cpu")
    x = batch()
    # What a first step imports and allocates for good.
    step_of(build("hps", nn.Conv2d(3, WIDTH, 1), {"a": head()}), x[:1, :, :8, :8]).take()
    before = peak(Step(lambda: None), cpu)
    step = step_of(make(), x)
    step.take()
    return (peak(step, cpu) - before) / 2**20


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all."""
    torch.manual_seed(0)
    x, steps, results, declined = batch(), {}, {}, {}
    for name, make in makers(args.tasks, args.libmtl).items():
        try:
            model = make()
            steps[name] = step_of(model, x)
            steps[name].take()
            operations = flops(model, x)
        except Exception as error:
            declined[name] = in_words(error)
            continue
        count = sum(p.numel() for p in model.parameters())
        results[name] = {"parameters": count, "flops": operations, "seconds": []}
    rng = np.random.default_rng(0)
    for _ in range(args.rounds):
        for name in rng.permutation(list(results)):
            results[name]["seconds"].append(timed(steps[name], 1))
    del steps
    for name, result in results.items():
        result["mib"] = memory(name, args)
    about = machine(torch.device("cpu")) | ({"libmtl": commit(args.libmtl)} if args.libmtl else {})
    return {"machine": about, "tasks": args.tasks, "rounds": args.rounds, "results": results, "declined": declined}


def report(content: Mapping[str, Any]) -> str:
    """The table, and who could not run and why."""
    results = content["results"]
    base = results["hps"]

    def price(r: Mapping[str, Any]) -> float:
        return statistics.median(a / b for a, b in zip(r["seconds"], base["seconds"], strict=True))

    rows = [
        [
            name,
            f"{r['parameters'] / 1e6:.2f}",
            f"{r['parameters'] / base['parameters']:.2f}",
            f"{r['flops'] / base['flops']:.2f}",
            f"{1e3 * statistics.median(r['seconds']):.0f}",
            f"{price(r):.2f}",
            "-" if r["mib"] is None else f"{r['mib']:.0f}",
        ]
        for name, r in results.items()
    ]
    header = ["architecture", "M parameters", "x HPS", "FLOPs, x HPS", "step, ms", "x HPS", "step, MiB"]
    lines = [f"- {name}: {why}" for name, why in content["declined"].items()]
    return "\n\n".join([str(content["machine"]), markdown(header, rows), *(["\n".join(lines)] if lines else [])])


def draw(folder: Path = DOCS / "architectures") -> list[Path]:
    """Every architecture's data flow, of two tasks on a stem and two stages of two blocks."""

    def stages() -> Stages:
        stem, *later = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in ((3, 4), (4, 6), (6, 8))
        ]
        return Stages([stem, *(nn.Sequential(down, _Residual(down[0].out_channels)) for down in later)])

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in list_architectures():
        tasks = ("ctr", "cvr") if name == "esmm" else ("depth", "normal")
        heads = {task: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)) for task in tasks}
        options: dict[str, Any] = {"stem": 1} if name in ("mmoe", "cgc", "dselect_k") else {}
        if name == "segnet_mtan":
            heads, options = {task: segnet_head(1, 2) for task in tasks}, {"widths": (2, 3, 4)}
        model = build(name, None if name == "segnet_mtan" else stages, heads, **options)
        drawn.append(draw_flow(model, torch.randn(2, 3, 32, 32), folder / f"{name}.png"))
    return drawn


class _Residual(nn.Module):
    """h + f(h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--libmtl", type=Path, metavar="PATH", help="a checkout of LibMTL")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    parser.add_argument("--draw", action="store_true", help="pictures for architectures/README.md, and nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        print(*draw())
        return
    if args.child:
        print(json.dumps(above(makers(args.tasks, args.libmtl)[args.child])))
        return
    content = run(args)
    if args.out:
        write(args.out, content)
    print(report(content))


if __name__ == "__main__":
    main()
