"""Several methods on one benchmark, each from the same seed: a run a method, then the table and the pictures."""

import ast
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from rich.console import Console

from gradsurgery import get_method
from gradsurgery.recipes.harness import pictures, report
from gradsurgery.recipes.harness.benchmark import Benchmark, RecipeError, Row
from gradsurgery.recipes.harness.data import steps_per_epoch
from gradsurgery.recipes.harness.evaluate import evaluate, reported
from gradsurgery.recipes.harness.processes import Part, started
from gradsurgery.recipes.harness.train import Interrupted, Run, Surgery, train
from gradsurgery.registry import MethodInfo


@dataclass(frozen=True)
class Options:
    """What every recipe's command line has."""

    method: tuple[str, ...] = ("ew", "cagrad")
    """methods to compare, each trained in turn from the same seed; `gradsurgery.list_methods()` names them all"""
    hparam: tuple[str, ...] = ()
    """method hyperparameters: `c=0.4` for every named method that has a c, `cagrad.c=0.4` for that one"""
    engine: str = "auto"
    """how gradients are measured"""
    blocks: Literal["model", "tensor", "module"] = "model"
    """surgery on all shared parameters at once, or tensor by tensor, or module by module"""
    heads: Literal["unweighted", "weighted"] | None = None
    """whether task-specific parameters see raw or weighted gradients; None: as the method's authors ran it"""
    update_every: int = 1
    """recompute the task weights every so many steps"""
    seed: int = 0
    """decides the initial weights, the order of the data and the augmentation"""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`...; `auto` takes CUDA where there is one"""
    threads: int | None = None
    """CPU threads of torch; None: as many as torch finds"""
    workers: int = 0
    """processes that load the training data"""
    out: Path | None = None
    """folder of the results; None: runs/<recipe>. A folder with results is never written over: without `--resume` a new
    one beside it is taken"""
    resume: bool = False
    """continue what was interrupted in `out`, exactly; finished runs are read, missing ones started"""
    checkpoint_every: int = 100
    """steps between checkpoints; one is also written after every epoch"""
    log_every: int = 1
    """steps between rows of steps.csv and TensorBoard"""
    single_task: bool = False
    """also train every task alone, and take those runs as the baseline of Delta-m"""


def compare(
    benchmark: Benchmark | Callable[[], Benchmark], options: Options, console: Console | None = None
) -> list[Row]:
    """Train every method of `options`, print the table, write table and pictures; return the table's rows.

    Args:
        benchmark: that, or what makes it; of several processes (`torchrun`), the first does so before the others.
    """
    with started(_device(options.device)) as (part, device):
        console = (console or report.open_console()) if part.first else Console(quiet=True)
        with part.in_turn():
            made = benchmark if isinstance(benchmark, Benchmark) else benchmark()
        return _compare(made, options, console, device, part)


def _compare(benchmark: Benchmark, options: Options, console: Console, device: torch.device, part: Part) -> list[Row]:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    surgeries = _surgeries(options)
    out = part.decide(_folder(options, benchmark, console) if part.first else None)
    assert out is not None
    _introduce(benchmark, device, out, console, part)
    floor = Row("constant prediction", _floor(benchmark, device, part))
    runs = _train_all(benchmark, options, surgeries, out, device, console, part)
    trained = [Row(name, reported(parts, run.history), _seconds(run)) for name, (parts, run) in runs.items()]
    rows = [row for row in (floor, *benchmark.published) if row.values]
    baseline = benchmark.published[0] if benchmark.published else trained[0]
    if options.single_task:
        alone = [row for row in trained if row.name.startswith("single-task ")]
        baseline = Row("single tasks", {key: value for row in alone for key, value in row.values.items()}, None)
        trained = [baseline, *(row for row in trained if row not in alone)]
    rows += trained
    columns = benchmark.columns
    over = {0: ", the best on the test set", 1: ""}.get(benchmark.last, f", mean of the last {benchmark.last} epochs")
    title = f"{benchmark.name}, {benchmark.description}: test metrics after {benchmark.epochs} epochs{over}"
    histories = {name: run.history for name, (_, run) in runs.items()}
    if part.first:
        report.write_table(rows, columns, baseline, out / "table.csv")
        pictures.curves(histories, floor.values, benchmark).savefig(out / "curves.png", dpi=120)
    console.print(title, style="bold", highlight=False)
    console.print(report.table(rows, columns, baseline))
    console.print(f"Tables, pictures, TensorBoard logs and checkpoints are in {out}/", highlight=False)
    return rows


def command(run: Callable[[], object]) -> None:
    """Run a recipe's main part; mistakes and interruptions end it with a sentence instead of a traceback."""
    try:
        run()
    except RecipeError as error:
        _exit(f"error: {error}", 2)
    except Interrupted as stopped:
        _exit(f"\n{stopped}\nContinue with:\n  {_resume_command(stopped.folder.parent)}", 130)
    except KeyboardInterrupt:
        _exit("\ninterrupted; what the last checkpoint holds can be continued with --resume.", 130)


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


def _resume_command(out: Path) -> str:
    """The command line that was typed, with `--out` and `--resume`."""
    words, kept = iter(word for word in sys.orig_argv[1:] if word != "-u"), ["python"]
    if "WORLD_SIZE" in os.environ:
        kept = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    for word in words:
        if word == "--out":
            next(words, None)
        elif word != "--resume" and not word.startswith("--out="):
            kept.append(word)
    return shlex.join([*kept, "--out", str(out), "--resume"])


def _device(name: str) -> torch.device:
    try:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"There is no device {name!r}: {str(error).splitlines()[0]}") from error


def _surgeries(options: Options) -> dict[str, Surgery]:
    """Run name -> what to train; the library itself judges names and hyperparameters, before anything is trained."""
    infos = method_infos(options)
    try:
        surgeries = {
            name: Surgery(
                name,
                parse_hparams(options.hparam, name, {other: set(i.hparams) for other, i in infos.items()}),
                options.engine,
                options.blocks,
                options.heads,
                options.update_every,
            )
            for name in infos
        }
        for surgery in surgeries.values():
            weight = torch.nn.Parameter(torch.zeros(1))
            surgery.wrap(torch.optim.SGD([weight], lr=0.1), [("weight", weight)], options.seed)
    except (ValueError, TypeError, LookupError) as error:
        raise RecipeError(str(error.args[0] if error.args else error)) from error
    return surgeries


def method_infos(options: Options) -> dict[str, MethodInfo]:
    """By name, the methods that were asked for, however they were spelled.

    Raises:
        RecipeError: an unknown one, or none.
    """
    if not options.method:
        raise RecipeError("--method needs at least one name; gradsurgery.list_methods() lists them.")
    try:
        return {info.name: info for info in map(get_method, options.method)}
    except ValueError as error:
        raise RecipeError(str(error)) from error


def parse_hparams(texts: Sequence[str], method: str, known: dict[str, set[str]]) -> dict[str, Any]:
    """`c=0.4` where the method has a c (or no named method has: the library then objects), or `cagrad.c=0.4`."""
    chosen = {}
    for text, (key, value) in zip(texts, _pairs("--hparam", texts, "c=0.4 or cagrad.c=0.4"), strict=True):
        owner, dot, name = key.rpartition(".")
        if dot and owner not in known:
            raise RecipeError(f"--hparam {text}: {owner!r} is not among the methods of this run ({', '.join(known)}).")
        mine = owner == method if dot else name in known[method] or not any(name in names for names in known.values())
        if mine:
            chosen[name] = value
    return chosen


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of an architecture, `num_experts=4`."""
    return dict(_pairs("--arch-option", texts, "num_experts=4"))


def _pairs(flag: str, texts: Sequence[str], example: str) -> Iterator[tuple[str, Any]]:
    """Names with their values, Python literals or else text."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"{flag} {text}: expected name=value, as in {example}.")
        try:
            yield key, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            yield key, value


def _folder(options: Options, benchmark: Benchmark, console: Console) -> Path:
    """`options.out`, or a new folder beside it where that holds results which are not to be resumed."""
    out = options.out or Path("runs") / benchmark.name
    new = free_folder(out)
    if options.resume and new == out:
        console.print(f"There is nothing to resume in {out}/: starting anew.", highlight=False)
    if options.resume or new == out:
        return out
    console.print(
        f"{out}/ holds results already and is left alone: this run goes to {new}/ (--resume would continue {out}/).",
        highlight=False,
    )
    return new


def free_folder(out: Path) -> Path:
    """`out`, or a new folder beside it where that holds results.

    Raises:
        RecipeError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out} is a file: expected a folder, or a path that is free.")
    if not (out.exists() and any(out.iterdir())):
        return out
    count = 2
    while (new := out.with_name(f"{out.name}-{count}")).exists():
        count += 1
    return new


def _introduce(benchmark: Benchmark, device: torch.device, out: Path, console: Console, part: Part) -> None:
    model = benchmark.model(tuple(benchmark.tasks))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    where = where if part.size == 1 else f"{part.size} processes, each on {where}"
    settings = ", ".join(f"{key} {value}" for key, value in benchmark.settings.items())
    console.print(
        f"{benchmark.name}: {benchmark.description}\n"
        f"  {settings}, batch {benchmark.batch_size}, {benchmark.epochs} epochs of {steps_per_epoch(benchmark)} steps, "
        f"{count:.2f} M parameters\n"
        f"  torch {torch.__version__}, {where}; results in {out}/",
        highlight=False,
    )


def _floor(benchmark: Benchmark, device: torch.device, part: Part) -> dict[str, float]:
    return evaluate(benchmark, benchmark.floor(), device=device, part=part) if benchmark.floor else {}


def _train_all(
    benchmark: Benchmark,
    options: Options,
    surgeries: dict[str, Surgery],
    out: Path,
    device: torch.device,
    console: Console,
    part: Part,
) -> dict[str, tuple[Benchmark, Run]]:
    jobs = [(name, benchmark, surgery) for name, surgery in surgeries.items()]
    if options.single_task:
        alone = [(f"single-task {task}", benchmark.only(task), Surgery("ew")) for task in benchmark.tasks]
        jobs = [*alone, *jobs]
    runs: dict[str, tuple[Benchmark, Run]] = {}
    with report.Progress(console) as progress:
        for name, task, surgery in jobs:
            run, model = train(
                task,
                surgery,
                out / f"{name.replace(' ', '-')}-seed{options.seed}",
                name=name,
                seed=options.seed,
                device=device,
                resume=options.resume,
                checkpoint_every=options.checkpoint_every,
                log_every=options.log_every,
                workers=options.workers,
                progress=progress,
                part=part,
            )
            title = f"{name} on {benchmark.name}, {benchmark.description}"
            if len(task.tasks) > 1 and part.first:
                pictures.weights_and_cosines(run.trace, run.folder / "weights.png", title)
            if benchmark.pictures is not None and part.first:
                model.eval()
                benchmark.pictures(lambda x, model=model: model(x.to(device)), run.folder, title)
            runs[name] = (task, run)
    return runs


def _seconds(run: Run) -> float:
    return float(np.mean([row["seconds_per_step"] for row in run.history]))
