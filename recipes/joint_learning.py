"""Joint learning with Lightning: every sample has one task, and a batch mixes the tasks as they come.

    python -m gradsurgery.recipes.joint_learning --method ew cagrad

Test accuracy in percent after 30 epochs, n=1 (seed 0), upright digit / sideways / parity: `ew` 96.4 / 95.6 / 92.1,
`cagrad` 93.8 / 91.1 / 95.5, where always the most frequent class gives about 10 / 10 / 50. Both runs took 63 seconds on
two threads of an AMD EPYC with torch 2.14.1 and lightning 2.6.6.

The setting of CLArena's `JointLearning` (https://github.com/pengxiang-wang/continual-learning-arena): one backbone, a
linear head for each task with classes of its own, the mean cross-entropy of each task that a batch has, optimizer and
scheduler given as functions that wait for their parameters, a CSV row and a bar chart of the tasks' test accuracies.
Loss weights and gradient methods are what it lacks. The pictures are scikit-learn's 1797 digits of 8 x 8 (the test part
of UCI's "Optical Recognition of Handwritten Digits"): which digit an upright one is, which one a digit is that lies on
its side, and whether a mirrored one is even. Each task has images of its own, and less of them than the one before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from gradsurgery import MTLOptimizer
from gradsurgery.architectures import TaskHeads
from gradsurgery.integrations.lightning import MultiTaskModule
from gradsurgery.recipes.digits import SIDE, lenet, load_images
from gradsurgery.recipes.harness.benchmark import RecipeError
from gradsurgery.recipes.harness.compare import command, free_folder
from gradsurgery.recipes.harness.pictures import new_figure
from gradsurgery.recipes.harness.report import open_console, write_csv

CLASSES = {"digit": 10, "sideways": 10, "parity": 2}
SHARES = {"digit": 0.5, "sideways": 0.3, "parity": 0.2}
"""of the images; of each task's, a quarter is for testing"""

Batch = tuple[Tensor, Tensor, Tensor]
"""images (B, 1, 8, 8) in [0, 1], targets (B,) and the position (B,) of each sample's task"""


@dataclass(frozen=True)
class Args:
    """Train one network on tasks that have samples of their own, and compare methods."""

    method: tuple[str, ...] = ("ew", "cagrad")
    """methods to compare, each trained in turn from the same seed; `gradsurgery.list_methods()` names them all"""
    epochs: int = 30
    """passes over the training samples of all tasks"""
    batch_size: int = 32
    """samples of any tasks; where one has none in a batch, its loss is absent"""
    lr: float = 0.05
    """of SGD with momentum 0.9, with a cosine to 0"""
    automatic: bool = False
    """let Lightning's automatic optimisation pass the combined loss backward"""
    seed: int = 0
    """decides the split, the initial weights and the order of the data"""
    out: Path = Path("runs/joint_learning")
    """folder of the results; one with results is never written over: without `--resume` a new one beside it is taken"""
    resume: bool = False
    """continue each method in `out` from its last epoch"""


class JointLearning(MultiTaskModule):
    """One backbone and heads that samples are routed to.

    Args:
        model: the backbone with its heads.
        optimizer: named parameters -> the base optimizer.
        scheduler: optimizer -> its scheduler, stepped after each epoch; None: a constant rate.
        method: of the surgery on the backbone.
        automatic: see `MultiTaskModule`.
        **surgery: further arguments of `MTLOptimizer`.
    """

    def __init__(
        self,
        model: TaskHeads,
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        method: str = "cagrad",
        automatic: bool = False,
        **surgery: Any,
    ) -> None:
        super().__init__(automatic=automatic)
        self.model = model
        self._optimizer, self._scheduler, self._method, self._options = optimizer, scheduler, method, surgery
        self.accuracy = nn.ModuleDict({t: MulticlassAccuracy(CLASSES[t], average="micro") for t in model.tasks})

    def task_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        x, y, ids = batch
        routed = self.model.route(x, ids)
        targets = routed.targets(y)
        return {t: F.cross_entropy(routed[t], targets[t]) if t in routed else None for t in self.model.tasks}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        x, y, ids = batch
        routed = self.model.route(x, ids)
        targets = routed.targets(y)
        for t, logits in routed.items():
            target = targets[t]
            self.accuracy[t].update(logits, target)  # pyright: ignore[reportCallIssue]
            options: dict[str, Any] = {"on_epoch": True, "add_dataloader_idx": False, "batch_size": len(target)}
            self.log(f"{stage}/accuracy/{t}", self.accuracy[t], **options)  # pyright: ignore[reportArgumentType]
            self.log(f"{stage}/loss/{t}", F.cross_entropy(logits, target), **options)

    def configure_optimizers(self) -> Any:
        base = self._optimizer(self.named_parameters())
        shared = self.model.shared_parameters()
        opt = MTLOptimizer(base, self._method, shared, **self._options)
        if self._scheduler is None:
            return opt
        return {"optimizer": opt, "lr_scheduler": self._scheduler(opt)}


def load_tasks(seed: int) -> dict[str, tuple[TensorDataset, TensorDataset]]:
    """task -> training and test samples, as `Batch` has them."""
    images, digits = map(torch.from_numpy, load_images())
    images = images[:, None]
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "digit": lambda x: x,
        "sideways": lambda x: x.rot90(1, (-2, -1)),
        "parity": lambda x: x.flip(-1),
    }
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    ends = (np.cumsum([0, *SHARES.values()]) * len(order)).round().astype(int)
    tasks = {}
    for n, (task, classes) in enumerate(CLASSES.items()):
        mine = order[ends[n] : ends[n + 1]]
        cut = len(mine) // 4
        targets = digits if classes == 10 else digits % 2
        test, train = (
            TensorDataset(views[task](images[part]), targets[part], torch.full((len(part),), n))
            for part in (mine[:cut], mine[cut:])
        )
        tasks[task] = train, test
    return tasks


def build(args: Args, method: str) -> JointLearning:
    """The module of a method, from the seed."""
    lightning.seed_everything(args.seed, verbose=False)
    model = TaskHeads(lenet(SIDE, 64), {task: nn.Linear(64, classes) for task, classes in CLASSES.items()})
    return JointLearning(
        model,
        partial(SGD, lr=args.lr, momentum=0.9),
        partial(CosineAnnealingLR, T_max=args.epochs),
        method=method,
        automatic=args.automatic,
        seed=args.seed,
    )


def fit(args: Args, method: str, folder: Path) -> dict[str, float]:
    """Test metrics of a method, trained or gone on with in its folder."""
    tasks = load_tasks(args.seed)
    mixed = ConcatDataset([train for train, _ in tasks.values()])
    order = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(mixed, args.batch_size, shuffle=True, generator=order)
    tests = [DataLoader(test, 256) for _, test in tasks.values()]
    last = folder / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[ModelCheckpoint(folder, save_last=True, save_top_k=0), TQDMProgressBar(refresh_rate=10)],
        log_every_n_steps=10,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = build(args, method)
    trainer.fit(module, loader, tests, ckpt_path=last if args.resume and last.exists() else None)
    # One mapping a test set.
    return {key: value for found in trainer.test(module, tests, verbose=False) for key, value in found.items()}


def report(results: Mapping[str, Mapping[str, float]], folder: Path, tasks: Mapping[str, int] = CLASSES) -> None:
    """`results.csv`, a row a method, and `accuracy.png`."""
    rows = []
    for method, found in results.items():
        accuracy = {task: 100 * found[f"test/accuracy/{task}"] for task in tasks}
        rows.append(
            {"method": method, "average_accuracy": float(np.mean([*accuracy.values()]))}
            | {f"test_on_task_{task}": value for task, value in accuracy.items()}
            | {f"test_loss_on_task_{task}": found[f"test/loss/{task}"] for task in tasks}
        )
    write_csv(rows, folder / "results.csv")
    table = Table("", "average", *tasks, title="test accuracy, %")
    for row in rows:
        table.add_row(row["method"], *(f"{row[key]:.2f}" for key in list(row)[1 : 2 + len(tasks)]))
    open_console().print(table)
    figure = new_figure(7.2, 3.6)
    ax = figure.subplots()
    width = 0.8 / len(rows)
    for n, row in enumerate(rows):
        values = [row["average_accuracy"], *(row[f"test_on_task_{task}"] for task in tasks)]
        at = np.arange(len(values)) + (n - (len(rows) - 1) / 2) * width
        bars = ax.bar(at, values, width * 0.92, label=row["method"])
        ax.bar_label(bars, fmt="%.1f", fontsize=8)
    ax.set_xticks(range(1 + len(tasks)), ["average", *tasks])
    ax.set_ylabel("test accuracy, %")
    ax.set_ylim(0, 105)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rows), frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure.savefig(folder / "accuracy.png", dpi=120)


def run(args: Args) -> dict[str, dict[str, float]]:
    """Trains every method; returns their test metrics."""
    if min(args.epochs, args.batch_size) < 1 or not args.lr > 0:
        raise RecipeError("--epochs, --batch-size and --lr must be above 0.")
    out = args.out if args.resume else free_folder(args.out)
    results = {}
    try:
        # Whatever is wrong with one of them shows before the first is trained.
        for method in args.method:
            build(args, method).configure_optimizers()
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    for method in args.method:
        results[method] = fit(args, method, out / f"{method}-seed{args.seed}")
    report(results, out)
    print(f"Results, learning curves and checkpoints are in {out}/")
    return results


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.joint_learning", description=__doc__)
    command(lambda: run(args))


if __name__ == "__main__":
    main()
