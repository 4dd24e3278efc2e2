"""How near cheaper measurements come to the weights of full gradients, over a short training.

    python -m benchmarks.agreement [--models resnet18 mlp1024] [--methods cagrad mgda] [--steps 20] [--out NAME]

The full method moves the model; on each step's batch, drawn anew with labels of a fixed random teacher, the others find
their weights beside it: ``measure_on`` the trunk's last block, and engine ``representation`` with gradients whole
("none") or summed over the batch ("sum"). Each keeps its own state. Compared are directions of weight vectors, by
cosine, and weights that are scaled to sum to 1, by the largest difference (1 is a task's whole weight).
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import MODELS, Problem
from benchmarks.record import in_words, machine, markdown, write
from gradsurgery import MTLOptimizer
from gradsurgery.engines import Representation

METHODS = ("cagrad", "mgda", "nash_mtl", "upgrad", "gradnorm")
APPROXIMATIONS = ("last block", "representation none", "representation sum")
TASKS, RATE = 3, 1e-2


def optimizers(problem: Problem, method: str) -> tuple[dict[str, MTLOptimizer], dict[str, str]]:
    """The full method's and the others', and who was refused why."""
    options: dict[str, dict[str, Any]] = {
        "full": {"engine": "sequential"},
        "last block": {"engine": "sequential", "measure_on": problem.last},
        "representation none": {"engine": Representation()},
        "representation sum": {"engine": Representation("sum")},
    }
    made = {name: optimizer(problem, method, chosen) for name, chosen in options.items()}
    refused = {name: in_words(opt) for name, opt in made.items() if isinstance(opt, ValueError)}
    return {name: opt for name, opt in made.items() if isinstance(opt, MTLOptimizer)}, refused


def optimizer(problem: Problem, method: str, options: Mapping[str, Any]) -> MTLOptimizer | ValueError:
    """One, or its refusal."""
    base = torch.optim.SGD(problem.params, lr=RATE)
    try:
        return MTLOptimizer(base, method, problem.shared, seed=0, **options)
    except ValueError as error:
        return error


def measure(model: str, method: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Cosines and largest differences, by approximation and step."""
    problem = Problem(model, TASKS, device)
    made, refused = optimizers(problem, method)
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(problem.x[0].numel(), TASKS * MODELS[model].outputs, generator=generator)
    found: dict[str, dict[str, list[float]]] = {n: {"cosine": [], "difference": []} for n in made if n != "full"}
    for _ in range(steps):
        x = torch.randn(problem.x.shape, generator=generator)
        y = (x.flatten(1) @ teacher).unflatten(1, (TASKS, -1)).argmax(dim=2).T
        problem.x, problem.y = x.to(device), y.to(device)
        # The full method comes last, since it moves the model.
        weights = {name: weigh(made[name], problem, move=name == "full") for name in [*found, "full"]}
        for name, kept in found.items():
            cosine, difference = compare(weights[name], weights["full"])
            kept["cosine"].append(cosine)
            kept["difference"].append(difference)
    return {"model": model, "method": method, "agreement": found, "declined": refused}


def weigh(opt: MTLOptimizer, problem: Problem, *, move: bool) -> Tensor:
    """The weights (T,) of a step."""
    opt.zero_grad()
    weights = opt.backward(problem.losses()[1]).weights
    assert weights is not None
    if move:
        opt.step()
    return weights[0].clone()


def compare(weights: Tensor, full: Tensor) -> tuple[float, float]:
    """Cosine, and the largest difference of weights that sum to 1."""
    cosine = torch.nn.functional.cosine_similarity(weights, full, dim=0)
    return float(cosine), float((weights / weights.sum() - full / full.sum()).abs().max())


def run(models: Sequence[str], methods: Sequence[str], steps: int, device: torch.device) -> dict[str, Any]:
    """Measures all pairs."""
    results = [measure(model, method, steps, device) for model in models for method in methods]
    return {"machine": machine(device), "tasks": TASKS, "steps": steps, "results": results}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: median and least cosine, and the largest difference."""
    rows = []
    for r in results:
        cells = []
        for name in APPROXIMATIONS:
            kept = r["agreement"].get(name)
            if kept is None:
                cells.append("-")
            else:
                cosines, worst = kept["cosine"], max(kept["difference"])
                cells.append(f"{statistics.median(cosines):.3f}, {min(cosines):.3f}, {worst:.2f}")
        rows.append([r["model"], r["method"], *cells])
    return markdown(["model", "method", *APPROXIMATIONS], rows)


def report(content: Mapping[str, Any]) -> str:
    """Table and reasons."""
    declined = [f"- {n} ({r['method']}): {w}" for r in content["results"] for n, w in r["declined"].items()]
    legend = "Cosine to the full weights, median and least; largest difference of weights that sum to 1."
    return "\n\n".join([str(content["machine"]), legend, table(content["results"]), "\n".join(declined)]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet18", "mlp1024"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    content = run(args.models, args.methods, args.steps, torch.device(args.device))
    if args.out:
        write(args.out, content)
    print(report(content))


if __name__ == "__main__":
    main()
