"""The loop. One run is (benchmark, method, seed) -> a folder with checkpoint, CSV, TensorBoard log and pictures.

An interrupted run goes on from its checkpoint as if nothing had happened: the order and the augmentation of the data
are functions of (seed, epoch, index), and everything else that changes is in the checkpoint. On one kind of CPU the
weights come out the same bit for bit; on CUDA as far as its operators do, some of which add in no fixed order.
"""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gradsurgery import MTLOptimizer, StepInfo, get_method
from gradsurgery.recipes.harness import checkpoint, report
from gradsurgery.recipes.harness.benchmark import Benchmark, RecipeError
from gradsurgery.recipes.harness.data import check_parts, steps_per_epoch, train_batches
from gradsurgery.recipes.harness.evaluate import evaluate
from gradsurgery.recipes.harness.processes import ALONE, Part
from gradsurgery.stats import Needs

Batch = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Surgery:
    """What is handed to `MTLOptimizer` beside the base optimizer."""

    method: str
    hparams: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "auto"
    blocks: Literal["model", "tensor", "module"] = "model"
    heads: Literal["unweighted", "weighted"] | None = None
    update_every: int = 1

    def wrap(self, base: torch.optim.Optimizer, shared: Any, seed: int, part: Part = ALONE) -> MTLOptimizer:
        return MTLOptimizer(
            base,
            method=self.method,
            shared_params=shared,
            engine=self.engine,
            blocks=self.blocks,
            heads=self.heads,
            update_every=self.update_every,
            seed=seed,
            process_group=None if part.size == 1 else dist.group.WORLD,
            **self.hparams,
        )


@dataclass
class Run:
    """How far a run has come, apart from its tensors; all plain values."""

    name: str
    folder: Path
    epoch: int = 0
    """epochs finished"""
    step: int = 0
    """steps done in the epoch under way"""
    seconds: float = 0.0
    """spent on those steps"""
    losses: dict[str, float] = field(default_factory=dict)
    """sums over those steps"""
    history: list[dict[str, float]] = field(default_factory=list)
    """a row an epoch"""
    trace: list[dict[str, float]] = field(default_factory=list)
    """a row every `log_every` steps: losses, weights, cosines"""


@dataclass(frozen=True)
class _Parts:
    model: nn.Module
    optimizer: MTLOptimizer
    scheduler: LRScheduler | None
    part: Part


class Interrupted(Exception):
    """The run was asked to stop, and its checkpoint is written."""

    def __init__(self, run: Run, benchmark: Benchmark) -> None:
        self.folder = run.folder
        super().__init__(
            f"stopped {run.name} in epoch {run.epoch + 1} of {benchmark.epochs} after step {run.step} of "
            f"{steps_per_epoch(benchmark)}; {_checkpoint_in(run.folder)} holds everything."
        )


def train(
    benchmark: Benchmark,
    surgery: Surgery,
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    checkpoint_every: int = 100,
    log_every: int = 1,
    workers: int = 0,
    name: str | None = None,
    progress: report.Progress = report.SILENT,
    part: Part = ALONE,
) -> tuple[Run, nn.Module]:
    """Train one method on a benchmark; return its record and the trained model.

    Several processes train one model on their parts of each batch, and end where one of them would on the whole, but
    for what a layer learns of its own part (batch norm).

    Args:
        folder: the run's own folder, new or empty unless `resume`.
        resume: go on from the folder's checkpoint if it has one.
        checkpoint_every, log_every: in steps; a checkpoint is also written after every epoch.
        progress: where the losses are shown while it trains.
        part: this process among those that train the model.

    Raises:
        RecipeError: the folder holds a run already, or one with other settings.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    device = torch.device(device)
    check_parts(benchmark, part)
    parts = _build(benchmark, surgery, seed, device, part)
    run = Run(name or surgery.method, folder)
    settings = _settings(benchmark, surgery, seed)
    if found := _checkpoint_in(folder):
        if not resume:
            raise RecipeError(f"{folder} holds a run already: resume it, or choose another folder.")
        _restore(run, parts, settings, found, benchmark)

    def save() -> None:
        _save(run, parts, settings, folder)

    if part.first:
        folder.mkdir(parents=True, exist_ok=True)
        report.write_history(run.history, run.trace, folder)
    steps_before = run.epoch * steps_per_epoch(benchmark) + run.step
    board = report.open_board(folder, steps_before) if part.first else None
    with _stop_requests(part) as stop, board or contextlib.nullcontext():
        progress.start(run.name, run.epoch, run.step, benchmark.epochs, steps_per_epoch(benchmark))
        while run.epoch < benchmark.epochs:
            if benchmark.each_epoch is not None:
                benchmark.each_epoch(parts.model, run.epoch, benchmark.epochs)
            # Methods that learn from independent batches get orders of their own for them.
            draws = 3 if Needs.CROSS in get_method(surgery.method).needs else 1
            batches = [
                train_batches(
                    benchmark,
                    seed=seed,
                    draw=draw,
                    epoch=run.epoch,
                    start=run.step,
                    device=device,
                    workers=workers,
                    part=part,
                )
                for draw in range(draws)
            ]
            for since, (batch, *independent) in enumerate(zip(*batches, strict=True), start=1):
                _step(run, parts, benchmark, batch, independent, log_every, board, progress)
                stopping = stop()
                if stopping or since % checkpoint_every == 0:
                    save()
                if stopping:
                    raise Interrupted(run, benchmark)
            save()
            _finish_epoch(run, parts, benchmark, device, workers, stop)
            save()
            if board is not None:
                report.write_history(run.history, run.trace, folder)
                report.log_epoch(board, run.history[-1])
            progress.epoch(run.history[-1], benchmark)
    return run, parts.model


def _build(benchmark: Benchmark, surgery: Surgery, seed: int, device: torch.device, part: Part) -> _Parts:
    checkpoint.seed_everything(seed)
    model = benchmark.model(tuple(benchmark.tasks)).to(device)
    names = {id(p): name for name, p in model.named_parameters()}
    shared = None if benchmark.shared is None else [(names[id(p)], p) for p in benchmark.shared(model)]
    optimizer = surgery.wrap(benchmark.optimizer(model.named_parameters()), shared, seed, part)
    if part.size > 1:
        # The same weights from the same seed, and dropout of each one's own.
        torch.manual_seed(seed * part.size + part.rank)
    return _Parts(model, optimizer, benchmark.scheduler and benchmark.scheduler(optimizer), part)


def _step(
    run: Run,
    parts: _Parts,
    benchmark: Benchmark,
    batch: tuple[Batch, float],
    independent: list[tuple[Batch, float]],
    log_every: int,
    board: report.Board | None,
    progress: report.Progress,
) -> None:
    started = time.perf_counter()
    parts.model.train()
    parts.optimizer.zero_grad()
    losses = _losses(parts.model, benchmark, *batch)
    others = [_losses(parts.model, benchmark, *other) for other in independent]
    parts.optimizer.step(losses, independent=others or None)
    info = parts.optimizer.info
    assert info is not None
    # Of the whole batch, whoever has which part of it.
    values = dict(zip(losses, info.losses.tolist(), strict=True))
    run.step += 1
    run.seconds += time.perf_counter() - started
    run.losses = {name: run.losses.get(name, 0.0) + value for name, value in values.items()}
    step = run.epoch * steps_per_epoch(benchmark) + run.step
    if step % log_every == 0:
        row = {"step": step, **{f"loss/{name}": value for name, value in values.items()}, **_trace(info, list(losses))}
        run.trace.append(row)
        if board is not None:
            report.log_step(board, row)
    progress.step(run.epoch, step, {name: total / run.step for name, total in run.losses.items()})


def _losses(model: nn.Module, benchmark: Benchmark, batch: Batch, factor: float) -> dict[str, Tensor]:
    x, targets = batch
    predictions = model(x)
    losses = {name: task.loss(predictions[name], targets[name]) for name, task in benchmark.tasks.items()}
    return losses if factor == 1 else {name: factor * loss for name, loss in losses.items()}


def _trace(info: StepInfo | None, tasks: list[str]) -> dict[str, float]:
    """Weights and cosines by task, averaged over the blocks; what the method did not measure is left out."""
    if info is None:
        return {}
    row: dict[str, float] = {}
    if info.weights is not None:
        weights: Tensor = info.weights.mean(0)
        row |= {f"weight/{name}": value for name, value in zip(tasks, weights.tolist(), strict=True)}
    if info.cosines is not None:
        cosines = info.cosines.mean(0).tolist()
        pairs = combinations(range(len(tasks)), 2)
        row |= {f"cosine/{tasks[i]}, {tasks[j]}": cosines[i][j] for i, j in pairs}
    return row


def _finish_epoch(
    run: Run, parts: _Parts, benchmark: Benchmark, device: torch.device, workers: int, stop: Callable[[], bool]
) -> None:
    def stop_if_asked() -> None:
        if stop():
            raise Interrupted(run, benchmark)

    steps = steps_per_epoch(benchmark)
    if parts.part.size > 1:
        # What layers have learned of their inputs differs: that of process 0, for all.
        for buffer in parts.model.buffers():
            dist.broadcast(buffer, src=0)
    # Of several processes, one must not leave the others to wait for its metrics.
    each_batch = stop_if_asked if parts.part.size == 1 else (lambda: None)
    metrics = evaluate(benchmark, parts.model, device=device, workers=workers, each_batch=each_batch, part=parts.part)
    row = {"epoch": run.epoch + 1, "step": (run.epoch + 1) * steps, "lr": parts.optimizer.param_groups[0]["lr"]}
    row |= {f"loss/{name}": total / steps for name, total in run.losses.items()}
    run.history.append(row | metrics | {"seconds_per_step": run.seconds / steps})
    parts.optimizer.epoch_end()
    if parts.scheduler is not None:
        parts.scheduler.step()
    run.epoch, run.step, run.seconds, run.losses = run.epoch + 1, 0, 0.0, {}


def _settings(benchmark: Benchmark, surgery: Surgery, seed: int) -> dict[str, Any]:
    chosen = asdict(surgery) | {"hparams": dict(surgery.hparams), "seed": seed, "batch_size": benchmark.batch_size}
    return chosen | {"benchmark": benchmark.name, "tasks": list(benchmark.tasks)} | dict(benchmark.settings)


def _record(run: Run, parts: _Parts, settings: dict[str, Any]) -> dict[str, Any]:
    """What is plain in a run's state, and the same in all processes."""
    progress = {key: value for key, value in vars(run).items() if key not in ("name", "folder")}
    return {"settings": settings, "scheduler": parts.scheduler and parts.scheduler.state_dict(), "run": progress}


def _checkpoint_in(folder: Path) -> Path | None:
    """What one process has written there, or several."""
    names = ("checkpoint.pt", "checkpoint", "checkpoint.old")
    return next((path for name in names if (path := folder / name).exists()), None)


def _save(run: Run, parts: _Parts, settings: dict[str, Any], folder: Path) -> None:
    record = _record(run, parts, settings)
    together, single = folder / "checkpoint", folder / "checkpoint.pt"
    if parts.part.size == 1:
        tensors = {"model": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}
        checkpoint.save({**record, **tensors, "random": checkpoint.random_state()}, single)
        # A run that several processes began.
        shutil.rmtree(together, ignore_errors=True)
        return
    checkpoint.save_together(parts.model, parts.optimizer, record, together, parts.part)
    if parts.part.first:
        single.unlink(missing_ok=True)


def _restore(run: Run, parts: _Parts, settings: dict[str, Any], path: Path, benchmark: Benchmark) -> None:
    together = path.suffix != ".pt"
    if together:
        state = checkpoint.load_together(parts.model, parts.optimizer, path, parts.part)
    else:
        state = checkpoint.load(path)
    saved = state["settings"]
    changed = [
        f"{key} was {saved.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(saved.keys() | settings.keys())
        if saved.get(key) != settings.get(key)
    ]
    if state["run"]["epoch"] > benchmark.epochs:
        changed.append(f"{state['run']['epoch']} epochs are done, more than the {benchmark.epochs} asked for")
    if changed:
        raise RecipeError(
            f"{path.parent} cannot be resumed with other settings ({'; '.join(changed)}). "
            f"Give the settings it was started with, or choose another --out."
        )
    if not together:
        parts.model.load_state_dict(state["model"])
        parts.optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_random_state(state["random"])
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(state["scheduler"])
    for key, value in state["run"].items():
        setattr(run, key, value)


@contextmanager
def _stop_requests(part: Part) -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are taken at the end of a step, a second one at once; outside the main thread, not at all.
    What comes to one of several processes is taken by all."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: part.any(bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
