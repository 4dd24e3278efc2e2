"""Runs cases on several gloo ranks, each a process, and brings back what each of them returned."""

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent


def launch(world: int, module: str, cases: list[str], timeout: int = 400) -> dict[str, list[Any]]:
    """By case, what ``module.case(name, rank, world)`` returned on each rank, or the text of its exception.

    Args:
        world: ranks.
        module: of the tests, by name.
        cases: their names, which run one after the other in one group.
        timeout: seconds for all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-W", "ignore", str(TESTS / "ranks.py"), str(world), module, folder, *cases]
        ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
        try:
            for rank in ranks:
                rank.wait(timeout)
        finally:
            for rank in ranks:
                rank.kill()
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {case: [results.get(case, "did not come to it") for results in found] for case in cases}


def main(world: int, module: str, folder: str, *cases_and_rank: str) -> None:
    *cases, rank = cases_and_rank
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=world, timeout=timedelta(seconds=40))
    run, results = importlib.import_module(module).case, {}
    for name in cases:
        try:
            results[name] = run(name, int(rank), world)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        torch.save(results, Path(folder) / f"{rank}.pt")
    # Left without ceremony: the others may have failed.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
