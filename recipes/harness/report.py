"""What a run shows and leaves: progress bar, table, CSV, TensorBoard."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from torch.utils.tensorboard.writer import SummaryWriter

from gradsurgery.recipes.harness.benchmark import Benchmark, Metric, Row
from gradsurgery.recipes.harness.metrics import delta_m

Board = SummaryWriter


def open_console() -> Console:
    """Standard output; where that is no terminal, wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


class Progress:
    """A live bar with the mean losses of the epoch, and a line an epoch; without a console, silent."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._task = TaskID(0)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=console is None,
            refresh_per_second=4,
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, name: str, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> None:
        """A bar of its own for a run that stands at `epoch` and `step`."""
        self._name, self._epochs = name, epochs
        done = epoch * steps_per_epoch + step
        self._task = self._bar.add_task(self._label(epoch), total=epochs * steps_per_epoch, completed=done, losses="")

    def step(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        text = " ".join(f"{name} [bold]{value:.3f}[/]" for name, value in losses.items())
        self._bar.update(self._task, description=self._label(epoch), completed=step, losses=text)

    def epoch(self, row: Mapping[str, float], benchmark: Benchmark) -> None:
        if self._console is None:
            return
        parts = []
        for name, task in benchmark.tasks.items():
            values = " ".join(f"{m.name} {_format(m, row[f'{name}/{m.name}'])}" for m in task.metrics[:1])
            parts.append(f"{name}: loss {row[f'loss/{name}']:.3f}, {values}")
        line = f"{self._name} epoch {row['epoch']:.0f}/{self._epochs}  {'  '.join(parts)}"
        self._console.print(line, highlight=False, markup=False)

    def _label(self, epoch: int) -> str:
        return f"[bold]{self._name}[/] epoch {min(epoch + 1, self._epochs)}/{self._epochs}"


SILENT = Progress(None)


def relative(values: Mapping[str, float], baseline: Mapping[str, float], columns: Mapping[str, Metric]) -> float:
    """Delta-m over the metrics that both rows have and where the baseline is not zero."""
    keys = [key for key in columns if key in values and baseline.get(key)]
    return delta_m(values, baseline, {key: columns[key].higher_is_better for key in keys})


def table(rows: Sequence[Row], columns: Mapping[str, Metric], baseline: Row) -> Table:
    """Metrics, Delta-m against `baseline` and seconds a step of every row; the best trained value is bold."""
    out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("", no_wrap=True)
    task = ""
    for key, metric in columns.items():
        head = "" if key.split("/")[0] == task else (task := key.split("/")[0])
        arrow = "↑" if metric.higher_is_better else "↓"
        out.add_column(f"{head}\n{metric.name}\n{metric.unit} {arrow}", justify="right", no_wrap=True)
    out.add_column(f"Δm vs\n{baseline.name}\n% ↓", justify="right", no_wrap=True)
    out.add_column("\ns/step", justify="right", no_wrap=True)
    trained = [row for row in rows if row.seconds_per_step is not None]
    for row in rows:
        cells = [_cell(row, key, metric, trained) for key, metric in columns.items()]
        change = "0.00" if row is baseline else f"{relative(row.values, baseline.values, columns):+.2f}"
        seconds = "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}"
        out.add_row(row.name, *cells, change, seconds, style="" if row in trained else "dim")
    return out


def _cell(row: Row, key: str, metric: Metric, trained: Sequence[Row]) -> str:
    if key not in row.values:
        return "-"
    text = _format(metric, row.values[key])
    best = (max if metric.higher_is_better else min)([r.values[key] for r in trained if key in r.values], default=None)
    return f"[bold]{text}[/]" if row in trained and len(trained) > 1 and row.values[key] == best else text


def _format(metric: Metric, value: float) -> str:
    return f"{value:.{metric.digits}f}"


def write_table(rows: Sequence[Row], columns: Mapping[str, Metric], baseline: Row, path: Path) -> None:
    """The table as CSV, unrounded."""
    lines = [
        {"name": row.name}
        | {key: row.values.get(key, float("nan")) for key in columns}
        | {f"delta_m vs {baseline.name}": relative(row.values, baseline.values, columns)}
        | {"seconds_per_step": float("nan") if row.seconds_per_step is None else row.seconds_per_step}
        for row in rows
    ]
    write_csv(lines, path)


def write_csv(rows: Sequence[Mapping[str, float | str]], path: Path) -> None:
    """All rows at once, whole or not at all; a column that a row lacks stays empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def write_history(history: Sequence[Mapping[str, float]], trace: Sequence[Mapping[str, float]], folder: Path) -> None:
    """`epochs.csv` and `steps.csv`, from the record that is in the checkpoint: no row twice, none missing."""
    if history:
        write_csv(history, folder / "epochs.csv")
        write_csv(trace, folder / "steps.csv")


def open_board(folder: Path, step: int) -> Board:
    """A TensorBoard log; what an interrupted run had logged beyond `step` is hidden, since it will be logged anew."""
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def log_step(board: Board, row: Mapping[str, float]) -> None:
    for key, value in row.items():
        if key != "step":
            board.add_scalar(f"step/{key}", value, int(row["step"]))


def log_epoch(board: Board, row: Mapping[str, float]) -> None:
    for key, value in row.items():
        if key not in ("step", "epoch"):
            board.add_scalar(f"epoch/{key}", value, int(row["step"]))
    board.flush()
