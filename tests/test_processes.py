"""A recipe that `torchrun` starts in several processes: the same run, in parts."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import flat
from ranks import launch
from test_harness import Stop, rows, stopping_after, waves
from torch import Tensor, nn

from gradsurgery.architectures import HPS
from gradsurgery.recipes import nyuv2
from gradsurgery.recipes.harness import Benchmark, RecipeError, Surgery, train
from gradsurgery.recipes.harness.evaluate import evaluate
from gradsurgery.recipes.harness.processes import ALONE, Part, started

pytestmark = pytest.mark.xdist_group("ranks")

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("famo", "moco", "sdmgrad")


def still_waves() -> Benchmark:
    """Without dropout, whose draws are each process's own."""

    def model(tasks: Any) -> nn.Module:
        return HPS(nn.Sequential(nn.Linear(1, 32), nn.Tanh()), {task: nn.Linear(32, 1) for task in tasks})

    return replace(waves(), model=model)


def run(method: str, folder: Path, part: Part = ALONE, *, calls: int | None = None, resume: bool = False) -> Any:
    """Weights and history of a run, or of what an exception at that call of a loss left."""
    benchmark = still_waves() if calls is None else stopping_after(still_waves(), calls)
    try:
        record, model = train(benchmark, Surgery(method), folder, part=part, resume=resume, checkpoint_every=1)
    except Stop:
        return None
    return flat([p.detach() for p in model.parameters()]), record.history


def case(name: str, rank: int, world: int) -> Any:
    """What a process does: ``kind method folder``."""
    kind, method, folder = name.split(" ", 2)
    part = Part(rank, world)
    if kind == "stop":
        return run(method, Path(folder), part, calls=23)
    return run(method, Path(folder), part, resume=kind == "resume")


def assert_same(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for row, other in zip(found[1], expected[1], strict=True):
        for key in row.keys() - {"seconds_per_step"}:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    """Whole runs of two processes, stopped ones, and one that a single process began."""
    assert run("nash_mtl", folder / "begun", calls=23) is None
    names = [f"run {method} {folder / method}" for method in METHODS]
    names += [f"stop {method} {folder / f'{method} stopped'}" for method in METHODS]
    return launch(2, "test_processes", [*names, f"resume nash_mtl {folder / 'begun'}"])


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return {method: run(method, folder / f"{method} alone") for method in (*METHODS, "nash_mtl")}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_does(
    method: str, folder: Path, two: dict[str, list[Any]], alone: dict[str, Any]
) -> None:
    first, second = two[f"run {method} {folder / method}"]
    assert isinstance(first, tuple), first
    assert torch.equal(first[0], second[0])
    assert_same(first, alone[method])
    names = {path.name for path in (folder / method).iterdir()}
    assert names == {"checkpoint", "epochs.csv", "steps.csv", "tensorboard"}
    for name in ("epochs.csv", "steps.csv"):
        pairs = zip(rows(folder / method / name), rows(folder / f"{method} alone" / name), strict=True)
        for row, other in pairs:
            expected = {key: pytest.approx(float(value), rel=1e-3, abs=1e-5) for key, value in other.items()}
            assert {key: float(value) for key, value in row.items()} == expected


def test_stopped_runs_go_on_in_any_number_of_processes(
    folder: Path, two: dict[str, list[Any]], alone: dict[str, Any]
) -> None:
    for method in METHODS:
        assert two[f"stop {method} {folder / f'{method} stopped'}"] == [None, None]
        shutil.copytree(folder / f"{method} stopped", folder / f"{method} by four")
    names = {method: f"resume {method} {folder / f'{method} by four'}" for method in METHODS}
    by_four = launch(4, "test_processes", list(names.values()))
    for method in METHODS:
        found = by_four[names[method]][0]
        assert isinstance(found, tuple), found
        assert_same(found, alone[method])
        by_one = run(method, folder / f"{method} stopped", resume=True)
        assert_same(by_one, alone[method])
        there = {path.name for path in (folder / f"{method} stopped").iterdir()}
        assert "checkpoint.pt" in there and "checkpoint" not in there


def test_one_process_begins_and_two_go_on(folder: Path, two: dict[str, list[Any]], alone: dict[str, Any]) -> None:
    found = two[f"resume nash_mtl {folder / 'begun'}"][0]
    assert isinstance(found, tuple), found
    assert_same(found, alone["nash_mtl"])


def test_a_damaged_checkpoint_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(RecipeError, match="cannot be read"):
        run("cagrad", tmp_path / "run", resume=True)


def test_nyuv2_runs_under_torchrun(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    words = ["-m", "gradsurgery.recipes.nyuv2", "--rooms", "12", "5", "--size", "24", "32", "--batch-size", "4"]
    words += ["--epochs", "2", "--method", "cagrad", "--cache", str(cache), "--out", str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*torchrun, *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes, each on" in done.stdout
    # Nothing twice.
    assert done.stdout.count("cagrad epoch 2/2  segmentation") == 1
    assert done.stdout.count("test metrics after 2 epochs") == 1
    names = {path.name for path in (out / "cagrad-seed0").iterdir()}
    assert {"checkpoint", "epochs.csv", "steps.csv", "predictions.png", "weights.png"} <= names
    # Metrics are those of the whole test set, whoever passed which part of it.
    benchmark = nyuv2.make_benchmark(nyuv2.Args(rooms=(12, 5), size=(24, 32), batch_size=4, epochs=2, cache=cache))
    assert benchmark.floor is not None
    expected = evaluate(benchmark, benchmark.floor())
    with (out / "table.csv").open(newline="") as file:
        constant = next(row for row in csv.DictReader(file) if row["name"] == "constant prediction")
    assert {key: float(constant[key]) for key in expected} == pytest.approx(expected, rel=1e-5)


def test_processes_on_one_named_device_are_refused() -> None:
    os.environ |= {"WORLD_SIZE": "2"}
    try:
        with pytest.raises(RecipeError, match="--device cuda gives each its own"), started(torch.device("cuda", 1)):
            pass
    finally:
        del os.environ["WORLD_SIZE"]
