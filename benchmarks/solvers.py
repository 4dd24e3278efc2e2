"""Microseconds that the weights of one given float64 Gramian take, beside TorchJD and cvxpy, on one thread.

    python -m benchmarks.solvers [--tasks 2 3 10 40] [--rounds 5] [--seconds 0.05] [--cold 30] [--out NAME]

ours       the solver (PCGrad: the function, its orders drawn beforehand)
torchjd    the ``gramian_weighting`` of TorchJD's aggregator with its defaults, on the same Gramian. MGDA's stop after
           100 rounds, PCGrad's draw their orders inside. Its NashMTL takes matrices only and needs ecos: left out.
           FairGrad it has not.
cvxpy      the convex problem by CLARABEL, with a factor of the Gramian as parameter: compiled once, outside the time

The matrices are Gaussian rows less half of their mean, so that most pairs conflict; every contender goes through the
same ones. Hot: each contender in blocks of its own (`torch.utils.benchmark.Timer.blocked_autorange`), one a round, the
rounds of all contenders in turns; median and least over the rounds. Cold: single calls, each after a sweep over 32 MiB
that leaves no cache as it was, so that code and data come from memory; the median. A training step finds the caches
somewhere between the two. All are seconds of CPU time, which are those of the clock on a core of one's own: what other
programs take of a shared one does not count. ``floor`` is what the cheapest torch call, G @ G, takes likewise.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torchjd import aggregation

from benchmarks.record import machine, write
from gradsurgery.methods.pcgrad import draw_orders, pcgrad
from gradsurgery.solvers import cagrad_multipliers, dual_cone, dual_projection, fair, min_norm, nash

C = 0.4
ALPHA = 2.0
MATRICES = 8
SWEEP = 32 * 2**20
Weights = Callable[[Tensor], object]


def gramians(T: int, count: int) -> list[Tensor]:
    rows = torch.randn(count, T, 2 * T + 3, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    J = rows - 0.5 * rows.mean(dim=1, keepdim=True)
    return list(J @ J.mT)


def ours(T: int) -> dict[str, Weights]:
    ones = torch.ones(T, dtype=torch.float64)
    mean = ones / T
    orders = draw_orders(T, torch.Generator().manual_seed(0), torch.device("cpu"))
    return {
        "upgrad": lambda G: dual_cone(G, mean),
        "dualproj": lambda G: dual_projection(G, mean),
        "mgda": min_norm,
        "nash_mtl": lambda G: nash(G, ones),
        "fairgrad": lambda G: fair(G, ones, ALPHA),
        "cagrad": lambda G: cagrad_multipliers(G, mean, C),
        "pcgrad": lambda G: pcgrad(G, orders),
    }


def torchjd() -> dict[str, Weights]:
    return {
        "upgrad": aggregation.UPGrad().gramian_weighting,
        "dualproj": aggregation.DualProj().gramian_weighting,
        "mgda": aggregation.MGDA().gramian_weighting,
        "cagrad": aggregation.CAGrad(c=C).gramian_weighting,
        "pcgrad": aggregation.PCGrad().gramian_weighting,
    }


def cvxpy(T: int) -> dict[str, Weights]:
    factor, reach, bound = cp.Parameter((T, T)), cp.Parameter((T, T)), cp.Parameter(T)
    gain, w = cp.Parameter(T), cp.Variable(T)
    square = cp.sum_squares(factor.T @ w)
    simplex = [w >= 0, cp.sum(w) == 1]
    cone = cp.Problem(cp.Minimize(square), [w >= bound])
    least = cp.Problem(cp.Minimize(square), simplex)
    bargain = cp.Problem(cp.Minimize(square / 2 - cp.sum(cp.log(w))))
    fairest = cp.Problem(cp.Minimize(square / 2 - cp.sum(cp.power(w, 1 - 1 / ALPHA)) / (1 - 1 / ALPHA)))
    averse = cp.Problem(cp.Minimize(gain @ w + cp.norm(reach.T @ w)), simplex)

    def solve(problem: cp.Problem, G: Tensor) -> None:
        array = G.numpy()
        factor.value, gain.value = np.linalg.cholesky(array), array.mean(axis=0)
        reach.value = C * np.sqrt(array.mean()) * factor.value
        problem.solve(solver=cp.CLARABEL)

    def dualproj(G: Tensor) -> None:
        bound.value = np.full(T, 1 / T)
        solve(cone, G)

    def upgrad(G: Tensor) -> None:
        for unit in np.eye(T):
            bound.value = unit
            solve(cone, G)

    return {
        "upgrad": upgrad,
        "dualproj": dualproj,
        "mgda": lambda G: solve(least, G),
        "nash_mtl": lambda G: solve(bargain, G),
        "fairgrad": lambda G: solve(fairest, G),
        "cagrad": lambda G: solve(averse, G),
    }


def measure(T: int, rounds: int, seconds: float, cold: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds by method, contender and kind: ``hot`` (median), ``least`` and ``cold``."""
    contenders = {"ours": ours(T) | {"floor": lambda G: G @ G}, "torchjd": torchjd(), "cvxpy": cvxpy(T)}
    matrices = gramians(T, MATRICES)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for method in contenders["ours"]:
        runs = {name: weights[method] for name, weights in contenders.items() if method in weights}
        blocks: dict[str, list[float]] = {name: [] for name in runs}
        for weights in runs.values():
            # The first call compiles cvxpy's problem, and imports what is imported late.
            weights(matrices[0])
        for _ in range(rounds):
            for name, weights in runs.items():
                scope = {"weights": weights, "matrices": matrices}
                # All matrices in one statement, so that no contender sees but the easiest.
                timer = Timer("for G in matrices: weights(G)", timer=time.process_time, globals=scope)
                block = timer.blocked_autorange(min_run_time=seconds) if name != "cvxpy" else timer.timeit(1)
                blocks[name].append(block.median / len(matrices))
        results[method] = {
            name: {
                "hot": 1e6 * statistics.median(times),
                "least": 1e6 * min(times),
                "cold": 1e6 * statistics.median(cold_seconds(runs[name], matrices, cold)),
            }
            for name, times in blocks.items()
        }
    return results


def cold_seconds(weights: Weights, matrices: list[Tensor], calls: int) -> list[float]:
    sweep, seconds = np.ones(SWEEP // 8), []
    for call in range(calls):
        sweep += 1
        start = time.process_time()
        weights(matrices[call % len(matrices)])
        seconds.append(time.process_time() - start)
    return seconds


def table(results: list[dict]) -> str:
    lines = [
        "| method | T | ours, us: hot | least | cold | TorchJD: hot | cold | cvxpy: hot |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = [("ours", "hot"), ("ours", "least"), ("ours", "cold"), ("torchjd", "hot"), ("torchjd", "cold")]
    for r in results:
        for method, found in r["microseconds"].items():
            cells = [f"{found[n][kind]:.0f}" if n in found else "-" for n, kind in [*columns, ("cvxpy", "hot")]]
            lines.append(f"| {method} | {r['tasks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 3, 10, 40])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="least length of one contender's block")
    parser.add_argument("--cold", type=int, default=30, help="calls with cold caches")
    parser.add_argument("--out", help="name of a result file in benchmarks/results; none is written without it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [{"tasks": T, "microseconds": measure(T, args.rounds, args.seconds, args.cold)} for T in args.tasks]
    content = {"machine": machine(torch.device("cpu")) | {"cvxpy": cp.__version__}, "results": results}
    if args.out:
        write(args.out, content)
    print(f"{content['machine']}\n\n{table(results)}")


if __name__ == "__main__":
    main()
