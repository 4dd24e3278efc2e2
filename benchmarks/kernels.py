"""The passes over flat gradients, as shares of what a plain copy of the same bytes reaches.

    python -m benchmarks.kernels [--columns 1000000 10000000 100000000] [--tasks 2 3 10 40] [--out NAME]

copy       ``target.copy_(J)``, which reads and writes: its bandwidth counts J twice. Gramian and combine move T d and
           (T + 1) d elements
gramian    `gradsurgery.kernels.gramian` of J (T, d), one block
combine    `gradsurgery.kernels.combine` of J with one set of weights
surgery    on CUDA: Gramian, UPGrad's weights and combine of T = 3 rows as long as ResNet-50's parameters, as a share of
           a whole step of `MTLOptimizer` with it (batch 32, 224 x 224, float32, SGD)

Medians of repeated calls: on CUDA by `triton.testing.do_bench`, which empties the L2 cache before each, elsewhere by
`torch.utils.benchmark`. Where J and a copy of it do not fit into memory, a size is left out.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from benchmarks.record import machine, write
from gradsurgery import MTLOptimizer, kernels
from gradsurgery.solvers import dual_cone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Of the memory that is there, for J and its copy.
SHARE = 0.7


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of one call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=300, return_mode="median") / 1e3
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def memory(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(T: int, d: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any] | None:
    """Seconds, and bandwidths in bytes a second; None where there is no room."""
    size = T * d * dtype.itemsize
    if 2 * size > SHARE * memory(device):
        return None
    # Padded as an optimizer's rows are.
    J = torch.randn(T, -(-d // 32) * 32, device=device, dtype=dtype)
    weights = torch.rand(1, T, dtype=torch.float64, device=device)
    bounds, target = [0, J.shape[1]], torch.empty_like(J)
    times = {
        "copy": seconds(lambda: target.copy_(J), device),
        "gramian": seconds(lambda: kernels.gramian(J, bounds), device),
        "combine": seconds(lambda: kernels.combine(weights, J, bounds), device),
    }
    moved = {"copy": 2 * size, "gramian": size, "combine": size + size // T}
    bandwidths = {name: moved[name] / time for name, time in times.items()}
    return {"tasks": T, "columns": d, "seconds": times, "bandwidths": bandwidths}


def surgery(device: torch.device) -> dict[str, float]:
    """Seconds of a step of ResNet-50 with three heads, and of what of it is surgery after the backward passes."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    trunk = resnet50(weights=None)
    trunk.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    trunk = trunk.to(device)
    heads = nn.ModuleList(nn.Linear(2048, 10) for _ in range(3)).to(device)
    base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-4)
    opt = MTLOptimizer(base, "upgrad", trunk.parameters())
    x = torch.randn(32, 3, 224, 224, device=device)

    def step() -> None:
        opt.zero_grad()
        z = trunk(x)
        opt.step([head(z).square().mean() for head in heads])

    d = sum(-(-p.numel() // 32) * 32 for p in trunk.parameters())
    J = torch.randn(3, d, device=device)
    mean = torch.full((3,), 1 / 3, dtype=torch.float64, device=device)

    def operate() -> Tensor:
        weights, _ = dual_cone(kernels.gramian(J, [0, d]), mean)
        return kernels.combine(weights, J, [0, d])

    return {"step": seconds(step, device), "surgery": seconds(operate, device)}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: bandwidths, and those of the kernels as shares of the copy's."""
    lines = [
        "| T | d | copy, GB/s | Gramian, us | share | combine, us | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        time, speed = r["seconds"], r["bandwidths"]
        cells = [f"{1e6 * time[name]:.0f} | {speed[name] / speed['copy']:.0%}" for name in ("gramian", "combine")]
        lines.append(f"| {r['tasks']} | {r['columns']:.0e} | {speed['copy'] / 1e9:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", type=int, default=[10**6, 10**7, 10**8])
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 3, 10, 40])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("There is no CUDA device: these are the torch bodies on the CPU, not the kernels.\n")
    measured = [measure(T, d, DTYPES[args.dtype], device) for T in args.tasks for d in args.columns]
    results = [r for r in measured if r is not None]
    content: dict[str, Any] = {"machine": machine(device), "dtype": args.dtype, "results": results}
    print(f"{content['machine']}\n\n{table(results)}")
    if device.type == "cuda":
        share = content["surgery"] = surgery(device)
        whole, part = 1e3 * share["step"], 1e3 * share["surgery"]
        print(f"\nSurgery of a ResNet-50 step, T = 3: {part:.2f} ms of {whole:.1f} ({part / whole:.1%})")
    if args.out:
        write(args.out, content)


if __name__ == "__main__":
    main()
