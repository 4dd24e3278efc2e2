"""Overlaid digits: two handwritten digits on one canvas, the upper-left and the lower-right one as two tasks.

    python -m gradsurgery.recipes.digits --method cagrad

Test accuracy in percent, left and right digit, n=1 (seed 0), after 6 epochs: most frequent digit 8.6 / 7.7, two
single-task networks 94.7 / 95.7, `cagrad` 92.1 / 94.6 (Delta-m +1.95). The three runs, imports and pictures took 50
seconds on one thread of an AMD EPYC with torch 2.15.0; a step of `cagrad`, 0.025 s.

The pictures are real: scikit-learn's 1797 digits of 8 x 8 (the test part of UCI's "Optical Recognition of Handwritten
Digits"), overlaid as in MultiMNIST (Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", NeurIPS 2017,
https://arxiv.org/abs/1710.09829; as a two-task benchmark in Sener and Koltun, NeurIPS 2018,
https://arxiv.org/abs/1810.04650). No image is in both training and test pairs. Delta-m is taken against two single-task
runs of the same network from the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from gradsurgery.architectures import HPS
from gradsurgery.recipes.harness.benchmark import Benchmark, Metric, Predictor, Sample, Task
from gradsurgery.recipes.harness.compare import Options, command, compare
from gradsurgery.recipes.harness.pictures import new_figure
from gradsurgery.recipes.harness.report import open_console, write_csv

TASKS = ("left", "right")
SIDE, SHIFT = 8, 2
"""of a digit, and how far right and down of the left digit the right one lies; both in pixels"""
CANVAS = SIDE + SHIFT
TEST_IMAGES = 400


@dataclass(frozen=True)
class Args:
    """Train and compare methods on pairs of overlaid digits."""

    options: Annotated[Options, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Options(method=("cagrad",), single_task=True, threads=1)
    )
    pairs: tuple[int, int] = (6000, 1000)
    """training and test pairs"""
    epochs: int = 6
    """passes over the training pairs"""
    batch_size: int = 64
    """of training; test batches are of 500"""
    lr: float = 2e-3
    """Adam's learning rate, with a cosine to 0"""


class Pairs(Dataset[Sample]):
    """(canvas (1, 10, 10) in [0, 1], {"left": digit, "right": digit}) of two images drawn at random."""

    def __init__(self, images: np.ndarray, digits: np.ndarray, count: int, generator: np.random.Generator) -> None:
        left, right = generator.integers(len(images), size=(2, count))
        canvas = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.float32)
        canvas[:, 0, :SIDE, :SIDE] = images[left]
        canvas[:, 0, SHIFT:, SHIFT:] = np.maximum(canvas[:, 0, SHIFT:, SHIFT:], images[right])
        self.canvas = torch.from_numpy(canvas)
        self.digits = {task: torch.from_numpy(digits[i]) for task, i in zip(TASKS, (left, right), strict=True)}

    def __len__(self) -> int:
        return len(self.canvas)

    def __getitem__(self, index: int) -> Sample:
        return self.canvas[index], {task: digits[index] for task, digits in self.digits.items()}


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """All images (n, 8, 8) float32 in [0, 1], and their digits (n,) int64."""
    bunch: Any = load_digits()
    return (bunch["images"] / 16).astype(np.float32), bunch["target"].astype(np.int64)


def load_pairs(train: int, test: int, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Training and test pairs, of images which only that side has."""
    generator = np.random.default_rng(seed)
    images, digits = load_images()
    order = generator.permutation(len(images))
    parts = order[TEST_IMAGES:], order[:TEST_IMAGES]
    first, second = (
        Pairs(images[part], digits[part], count, generator) for part, count in zip(parts, (train, test), strict=True)
    )
    return first, second


def lenet(side: int, features: int) -> nn.Sequential:
    """Images (B, 1, side, side) -> (B, features)."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * (side // 2) ** 2, features),
        nn.ReLU(),
    )


def build_model(tasks: Sequence[str]) -> HPS:
    """A LeNet for 10 x 10 canvases, a hidden layer and a classifier for each task."""
    encoder = lenet(CANVAS, 96)
    return HPS(encoder, {task: nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)) for task in tasks})


def most_frequent(data: Pairs) -> Predictor:
    """The most frequent digit of the training pairs, whatever the canvas."""
    logits = {task: F.one_hot(torch.bincount(digits).argmax(), 10).float() for task, digits in data.digits.items()}
    return lambda x: {task: row.to(x.device).expand(len(x), 10) for task, row in logits.items()}


def save_pictures(data: Pairs, predict: Predictor, path: Path, title: str) -> None:
    """Sixteen test canvases with predicted and true digits; what is wrong is red."""
    count = min(16, len(data))
    with torch.no_grad():
        guesses = {task: y.argmax(1).cpu() for task, y in predict(data.canvas[:count]).items()}
    figure = new_figure(9.6, 3.4)
    axes = figure.subplots(2, 8).ravel()
    for ax in axes:
        ax.axis("off")
    for i, ax in enumerate(axes[:count]):
        ax.imshow(data.canvas[i, 0], cmap="gray_r")
        truth = [int(data.digits[task][i]) for task in guesses]
        guess = [int(guesses[task][i]) for task in guesses]
        text = f"{' '.join(map(str, guess))}  (truth {' '.join(map(str, truth))})"
        ax.set_title(text, fontsize=9, color="black" if guess == truth else "#d62728")
    figure.suptitle(f"{title}: predicted {' and '.join(guesses)} digit", fontsize=11)
    figure.savefig(path, dpi=120)


def report_accuracies(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """`results.csv`, a row a method, and the same as a table; ``accuracy/<task>`` is in percent."""
    write_csv(rows, out / "results.csv")
    table = Table("", *(f"{task}, %" for task in TASKS), "mean, %", title="test accuracy")
    for row in rows:
        values = [row[f"accuracy/{task}"] for task in TASKS]
        table.add_row(row["method"], *(f"{value:.2f}" for value in (*values, float(np.mean(values)))))
    open_console().print(table)
    print(f"Results, pictures and checkpoints are in {out}/")


def make_benchmark(args: Args) -> Benchmark:
    train, test = load_pairs(*args.pairs)
    accuracy = Metric("accuracy", "%", True, 100)

    def meter() -> MulticlassAccuracy:
        return MulticlassAccuracy(10, average="micro")

    return Benchmark(
        name="digits",
        description=f"overlaid digits, {len(train)} + {len(test)} pairs",
        tasks={task: Task(F.cross_entropy, meter, (accuracy,)) for task in TASKS},
        train=train,
        test=test,
        model=build_model,
        shared=HPS.shared_parameters,
        optimizer=lambda parameters: Adam(parameters, args.lr),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, args.epochs),
        epochs=args.epochs,
        batch_size=args.batch_size,
        test_batch_size=500,
        floor=lambda: most_frequent(train),
        pictures=lambda predict, folder, title: save_pictures(test, predict, folder / "predictions.png", title),
        settings={
            "pairs": list(args.pairs),
            "optimizer": f"Adam {args.lr:g}",
            "schedule": f"cosine to 0 over {args.epochs} epochs",
        },
    )


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.digits", description=__doc__)
    command(lambda: compare(make_benchmark(args), args.options))


if __name__ == "__main__":
    main()
