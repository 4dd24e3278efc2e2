"""Everything: prices of a step, memory, agreement, solvers, and kernels where there is CUDA; then the pictures.

    python -m benchmarks --out NAME [--quick] [--compiled] [--libmtl PATH] [--only overhead memory]

Results go to ``benchmarks/results/NAME-overhead.json``, ``NAME-memory.json`` and so on.
"""

import argparse
import subprocess
import sys

import torch

from benchmarks import agreement, memory, overhead
from benchmarks.pictures import pictures
from benchmarks.problems import MODELS
from benchmarks.record import RESULTS, write

PARTS = ("overhead", "memory", "agreement", "solvers", "kernels")
QUICK = {
    "overhead": {"models": ["mlp64", "mlp1024"], "tasks": [2, 3], "rounds": 3},
    "memory": {"models": ["mlp2048"], "tasks": [2]},
    "agreement": {"models": ["mlp1024"], "steps": 5},
    "solvers": ["--tasks", "2", "3", "--rounds", "1", "--cold", "3"],
    "kernels": ["--columns", "1000000", "--tasks", "3"],
}


def one(part: str, args: argparse.Namespace) -> None:
    """Runs a part, prints its report and keeps its result."""
    device, quick = torch.device(args.device), QUICK[part] if args.quick else None
    name = f"{args.out}-{part}"
    if part in ("solvers", "kernels"):
        # A process of its own: the solvers are measured on one thread.
        options = [*(quick or []), "--out", name]
        command = [sys.executable, "-m", f"benchmarks.{part}", *options]
        subprocess.run(command, check=True, cwd=RESULTS.parent.parent)
        return
    chosen = quick if isinstance(quick, dict) else {}
    if part == "overhead":
        grid = {"models": list(MODELS), "tasks": None, "only": None} | chosen
        module, content = overhead, overhead.run(argparse.Namespace(**(vars(args) | grid)), name)
    elif part == "memory":
        grid = {"models": list(memory.GRID), "tasks": None} | chosen
        module, content = memory, memory.run(**grid, method=args.method, device=device)
    else:
        grid = {"models": ["resnet18", "mlp1024"], "methods": agreement.METHODS, "steps": 20} | chosen
        module, content = agreement, agreement.run(**grid, device=device)
    write(name, content)
    print(module.report(content), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    overhead.arguments(parser)
    parser.add_argument("--out", required=True, metavar="NAME", help="what names of result files begin with")
    parser.add_argument("--quick", action="store_true", help="small models and few tasks")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    for part in args.only:
        if part == "kernels" and torch.device(args.device).type != "cuda":
            continue
        print(f"\n## {part}\n", flush=True)
        one(part, args)
    print("\n", *(f"docs/{path.name}" for path in pictures(args.out)))


if __name__ == "__main__":
    main()
