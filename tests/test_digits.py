"""The digits recipe, as a user runs it."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from gradsurgery.recipes import digits

ROOT = Path(__file__).resolve().parent.parent


def test_pairs_are_real_digits_overlaid() -> None:
    train, test = digits.load_pairs(200, 100)
    images = (load_digits()["images"] / 16).astype(np.float32)
    canvas, targets = train[7]
    assert canvas.shape == (1, 10, 10) and set(targets) == {"left", "right"}
    assert canvas.min() >= 0 and canvas.max() <= 1
    # What only the left digit covers is that digit's own: it tells which image it was.
    corner = canvas[0, : digits.SHIFT, : digits.SIDE].numpy()
    assert any(np.array_equal(image[: digits.SHIFT], corner) for image in images)
    assert len(train) == 200 and len(test) == 100


def test_no_image_is_on_both_sides() -> None:
    train, test = digits.load_pairs(3000, 1000)
    strips = [{row.tobytes() for row in part.canvas[:, 0, : digits.SHIFT, :8].numpy()} for part in (train, test)]
    corners = [
        {row.tobytes() for row in part.canvas[:, 0, -digits.SHIFT :, digits.SHIFT :].numpy()} for part in (train, test)
    ]
    # Two rows of eight pixels are seldom the same in two images; a leak would make nearly all of them common.
    assert len(strips[0] & strips[1]) < 0.3 * len(strips[1])
    assert len(corners[0] & corners[1]) < 0.3 * len(corners[1])


def test_the_model_learns_both_digits() -> None:
    torch.manual_seed(0)
    model = digits.build_model(digits.TASKS)
    assert {task: tuple(y.shape) for task, y in model(torch.zeros(3, 1, 10, 10)).items()} == {
        "left": (3, 10),
        "right": (3, 10),
    }


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gradsurgery.recipes.digits", "--method", "cagrad", "--epochs", "2"]
    command += ["--pairs", "1500", "300", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [" ".join(line.split()[:2]) for line in done.stdout.splitlines() if line.startswith((" const", " single"))]
    assert names == ["constant prediction", "single tasks"]
    with (tmp_path / "out/table.csv").open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert list(table) == ["constant prediction", "single tasks", "cagrad"]
    for task in digits.TASKS:
        floor, alone, ours = (float(table[name][f"{task}/accuracy"]) for name in table)
        assert floor < 20 and alone > 40 and ours > 40
    for run in ("single-task-left", "single-task-right", "cagrad"):
        assert (tmp_path / f"out/{run}-seed0/predictions.png").exists()
