"""The two-task toy of CAGrad, Nash-MTL and FAMO: who reaches the Pareto front, from where, clipped and unclipped.

    python -m gradsurgery.recipes.toy --method ew cagrad famo

The setting of Nash-MTL (first loss times 0.1, five starts, 35 000 steps of Adam at 1e-3), seed 0. Of 40 methods, nine
reach the front from all five starts: `aligned_mtl`, `epo`, `fairgrad`, `famo`, `gradnorm`, `imtl`, `imtl_g`, `mgda`,
`nash_mtl`. With the direction clipped to norm 1 before Adam, 18 do: `config`, `conicgrad`, `db_mtl`, `dualproj`,
`gradvac`, `moco`, `modo`, `ntkmtl`, `pcgrad` and `upgrad` join, `imtl` leaves. `ew` reaches it from four starts,
clipped from three. They took 25 CPU minutes on a thread each of an AMD EPYC shared with other work, torch 2.14.1: 10 to
270 s a method. `pivrg` was left out: without baselines it is `fairgrad`, and takes longer.

A run has reached the front when it stays within 1 % of it, by the additive epsilon indicator on the losses, until the
end (`Front.distance`); toy.csv has the length of the shortest convex combination of gradients beside it. All runs of a
method go side by side in float64 (`Bundle`); each is what `MTLOptimizer` makes of it alone, but that the optimizer
draws `graddrop`'s random numbers for padding too. The losses fall below zero, where methods made for positive ones
count them as 1e-8: the table says which. FAMO gets its paper's lower bounds, and methods that go by epochs one every
25 steps.

Sources: Liu et al., NeurIPS 2021, https://arxiv.org/abs/2110.14048; Navon et al., ICML 2022,
https://arxiv.org/abs/2202.01017; Liu et al., NeurIPS 2023, https://arxiv.org/abs/2306.03792; and their code.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gradsurgery import get_method, list_methods
from gradsurgery.recipes.harness.benchmark import RecipeError
from gradsurgery.recipes.harness.compare import command, free_folder, parse_hparams
from gradsurgery.recipes.harness.pictures import LINES, new_figure
from gradsurgery.recipes.harness.report import open_console, write_csv
from gradsurgery.registry import (
    BaseMethod,
    ColumnMethod,
    EpochMethod,
    Method,
    ObservingMethod,
    State,
    TrackedMethod,
    build_method,
)
from gradsurgery.stats import Needs, Stats

TOLERANCE = 0.01
"""how far from the front counts as on it, in parts of what each loss spans along it"""
LOWEST = -21.0
"""FAMO's lower bound of both losses before they are scaled; their infimum is -20"""
SIGN = np.array([1.0, -1.0])
WINDOW = 25
"""steps that the methods which go by epochs take for one, as Nash-MTL's port of DWA does"""

Name = Literal["nash", "cagrad", "famo", "aligned", "sdmgrad", "dibs"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Variant:
    """The toy as one paper's code runs it; Adam throughout."""

    starts: Mapping[str, Point]
    steps: int
    scale: Point = (1.0, 1.0)
    """factors of the two losses"""
    lr: float = 1e-3
    noise: float = 0.0
    """standard deviation of what is added to every entry of the gradients"""
    quartic: bool = False
    """the first loss becomes L^3 |L|"""
    hparams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FIVE = {"A": (-8.5, 7.5), "B": (0.0, 0.0), "C": (9.0, 9.0), "D": (-7.5, -0.5), "E": (9.0, -1.0)}
THREE = {"A": (-8.5, 7.5), "B": (-8.5, -5.0), "C": (9.0, 9.0)}
VARIANTS: dict[Name, Variant] = {
    "nash": Variant(FIVE, 35_000, scale=(0.1, 1.0)),
    "cagrad": Variant(THREE, 100_000, hparams={"cagrad": {"c": 0.5, "rescale": 2, "scale": "mean"}}),
    "famo": Variant(FIVE, 50_000, scale=(0.1, 1.0)),
    "aligned": Variant(FIVE, 35_000, scale=(0.5, 0.5)),
    "sdmgrad": Variant(THREE, 70_000, lr=2e-3, noise=0.2),
    "dibs": Variant({**FIVE, "B": (0.1, 0.1)}, 35_000, quartic=True),
}


@dataclass(frozen=True)
class Args:
    """Run methods on the two-task toy from all of its starting points, clipped and unclipped."""

    method: tuple[str, ...] = ()
    """methods to run; none: all of `gradsurgery.list_methods()`"""
    variant: Name = "nash"
    """whose starting points, scales and steps"""
    steps: int | None = None
    """None: the variant's"""
    lr: float | None = None
    """Adam's learning rate; None: the variant's"""
    clip: float = 1.0
    """norm to which the clipped runs cut the direction before Adam takes it"""
    hparam: tuple[str, ...] = ()
    """method hyperparameters: `c=0.4` for every method of the run that has a c, `cagrad.c=0.4` for that one"""
    seed: int = 0
    """of the methods that draw random numbers, and of a variant's noise"""
    threads: int = 1
    """CPU threads of torch"""
    out: Path | None = None
    """folder of the results; None: runs/toy. A folder with results is left alone: a new one beside it is taken"""


def toy(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two losses (..., 2) of points (..., 2), and their gradients (..., 2, 2), a row a loss; float64.

    With up = max(tanh(y / 2), 0), down = max(tanh(-y / 2), 0) and a sign of +1 for the first loss, -1 for the second:
    up (ln max(|-x / 2 - sign (3.5 - tanh y)|, 5e-6) + 6) + down (((x - 7 sign)^2 + (y + 8)^2 / 10) / 10 - 20). Where a
    maximum ties, the gradient passes, as it did in the papers' runs: at y = 0, start B, both sides pull. (`torch.clamp`
    of torch 2.14 lets nothing through there, and B would never move.)

    Source: the toy of the CAGrad and Nash-MTL repositories.
    """
    x, y = points[..., :1], points[..., 1:]
    side, bend = np.tanh(y / 2), np.tanh(y)
    slope = (1 - side * side) / 2
    inner = -x / 2 - SIGN * (3.5 - bend)
    size = np.abs(inner)
    valley = np.log(np.maximum(size, 5e-6)) + 6
    pull = np.where(size >= 5e-6, 1, 0) / np.where(size >= 5e-6, inner, 1)
    off, height = x - 7 * SIGN, y + 8
    bowl = (off * off + 0.1 * height * height) / 10 - 20
    up, down = np.maximum(side, 0), np.maximum(-side, 0)
    jacobian = np.empty((*bowl.shape, 2))
    jacobian[..., 0] = down * off / 5 - up * pull / 2
    jacobian[..., 1] = up * SIGN * (1 - bend * bend) * pull + down * height / 50
    jacobian[..., 1] += slope * ((side >= 0) * valley - (side <= 0) * bowl)
    return up * valley + down * bowl, jacobian


def variant_losses(variant: Variant, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`toy` as the variant scales and bends it."""
    losses, jacobian = toy(points)
    losses *= variant.scale
    jacobian *= np.asarray(variant.scale)[:, None]
    if variant.quartic:
        first = np.abs(losses[..., 0])
        jacobian[..., 0, :] *= 4 * first[..., None] ** 3
        losses[..., 0] *= first**3
    return losses, jacobian


class Front:
    """The Pareto front between the two bowls: for x in [-7, 7] the y at which the gradients are opposite.

    It bends from y = -8.3551 at x = 0 to -8.4345 at the ends; the papers draw the straight line y = -8.3552.
    """

    def __init__(self, count: int = 2001) -> None:
        x = np.linspace(-7, 7, count)
        low, high = np.full(count, -9.0), np.full(count, -8.0)
        for _ in range(60):
            y = (low + high) / 2
            above = np.linalg.det(toy(np.stack([x, y], axis=1))[1]) < 0
            low, high = np.where(above, low, y), np.where(above, y, high)
        self.points = np.stack([x, (low + high) / 2], axis=1)
        self.losses = toy(self.points)[0]
        self.span = np.ptp(self.losses, axis=0)
        """what each loss spans along the front"""

    def distance(self, points: np.ndarray) -> np.ndarray:
        """How far points (..., 2) are from it, in parts of what each loss spans.

        The additive epsilon indicator (Zitzler et al., IEEE Trans. Evol. Comput. 2003): the least number by which both
        losses would have to fall to be no worse than some point of the front. It judges the losses and not the place,
        and it is 0 on the front alone, where Pareto stationarity holds in local traps too.
        """
        first, second = np.moveaxis(toy(points)[0] / self.span, -1, 0)
        # From its right end on, the front's first loss rises and its second falls.
        along = (self.losses / self.span)[::-1]
        order = along[:, 0] - along[:, 1]
        gaps = [
            loss - np.interp(first - second, order, column)
            for loss, column in zip((first, second), along.T, strict=True)
        ]
        return np.maximum(np.maximum(*gaps), 0.0)


class Bundle:
    """One method on R independent runs at once, each with a state of its own.

    A method that sees the Gramian alone takes every run for a block; the others are mapped over the runs, and traced
    once, since `torch.vmap` itself costs more than their arithmetic. Either way all runs see the random numbers that
    each would see alone. A run whose numbers are not finite is lost by itself.
    """

    def __init__(self, method: BaseMethod, runs: int, seed: int) -> None:
        self.method = method
        self.blocks = method.needs in (Needs.GRAMIAN, Needs.CROSS) and not isinstance(method, ObservingMethod)
        state = method.init(2, runs if self.blocks else 1, dtype=torch.float64, device=torch.device("cpu"))
        if not self.blocks:
            state = {key: value.expand(runs, *value.shape).clone() for key, value in state.items()}
        self.state: State = state
        self._generator = torch.Generator()
        self._weigh = self._weigh_alone
        ones = torch.ones(runs, 2, dtype=torch.float64)
        rows = torch.eye(2, dtype=torch.float64).repeat(runs, 1, 1)
        if isinstance(method, ColumnMethod):
            self._direct = _over_runs(self._direct_alone, rows, state)
        elif isinstance(method, TrackedMethod):
            self._tracked = torch.zeros_like(rows)
            self._follow = _over_runs(self._follow_alone, ones, rows, self._tracked, state)
        elif not self.blocks:
            self._weigh = _over_runs(self._weigh_alone, ones, rows.unsqueeze(1), state)
        if isinstance(method, ObservingMethod):
            self._watch = _over_runs(method.observe, ones, state)
        self._generator.manual_seed(seed)  # tracing has drawn from it

    def _weigh_alone(self, losses: Tensor, gramian: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(self.method, Method)
        # The toy has one batch, which stands for the independent ones, too.
        return self.method.weights(Stats(losses, gramian, gramian), state, self._generator)[:2]

    def _follow_alone(
        self, losses: Tensor, jacobian: Tensor, tracked: Tensor, state: State
    ) -> tuple[Tensor, Tensor, State]:
        assert isinstance(self.method, TrackedMethod)
        tracked, measured = self.method.track(jacobian, tracked, losses, state)
        stats = Stats(losses, (measured @ measured.mT).unsqueeze(0))
        w, state, _ = self.method.weights(stats, state, self._generator)
        return (w @ (measured if self.method.acts_on == "measured" else jacobian))[0], tracked, state

    def _direct_alone(self, jacobian: Tensor, state: State) -> Tensor:
        assert isinstance(self.method, ColumnMethod)
        return self.method.direction(jacobian, state, self._generator)

    def direction(self, losses: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
        """What takes the gradients' place (R, 2), for losses (R, 2) and gradients (R, 2, 2)."""
        finite = np.isfinite(losses.sum(-1) + jacobian.sum((-2, -1)))
        if not finite.all():
            losses = np.where(finite[:, None], losses, 1.0)
            jacobian = np.where(finite[:, None, None], jacobian, np.eye(2))
        if isinstance(self.method, ColumnMethod):
            direction = self._direct(torch.from_numpy(jacobian), self.state).numpy()
        elif isinstance(self.method, TrackedMethod):
            seen = torch.from_numpy(losses), torch.from_numpy(jacobian)
            followed, self._tracked, self.state = self._follow(*seen, self._tracked, self.state)
            direction = followed.numpy()
        else:
            w = self._weights(losses, jacobian @ jacobian.mT)
            direction = (w.numpy().reshape(-1, 1, 2) @ jacobian)[:, 0]
        return direction if finite.all() else np.where(finite[:, None], direction, np.nan)

    def _weights(self, losses: np.ndarray, gramian: np.ndarray) -> Tensor:
        G = torch.from_numpy(gramian)
        if self.blocks:
            # No run's losses are those of all blocks, and such a method must not ask for any.
            w, self.state = self._weigh(G.new_full((2,), torch.nan), G, self.state)
        else:
            w, self.state = self._weigh(torch.from_numpy(losses), G.unsqueeze(1), self.state)
        return w

    def observe(self, losses: np.ndarray) -> None:
        """Tells a method that wants to know what its step led to."""
        if isinstance(self.method, ObservingMethod):
            self.state = self._watch(torch.from_numpy(losses), self.state)


def _over_runs(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """`function` of one run as a function of all, recorded on an example as plain tensor operations."""
    return make_fx(lambda *args: torch.vmap(function, randomness="same")(*args))(*example)


class Adam:
    """`torch.optim.Adam` with its defaults, without a tenth of a millisecond a step around twenty numbers."""

    def __init__(self, lr: float) -> None:
        self.lr, self.step = lr, 0
        self.mean = self.square = np.zeros(())

    def move(self, gradient: np.ndarray) -> np.ndarray:
        """The change of the points."""
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient * gradient
        size = np.sqrt(self.square / (1 - 0.999**self.step)) + 1e-8
        return -self.lr / (1 - 0.9**self.step) * self.mean / size


@torch.no_grad()
def descend(
    bundle: Bundle,
    starts: np.ndarray,
    limits: np.ndarray,
    variant: Variant,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    tick: Callable[[int], object] = lambda step: None,
) -> np.ndarray:
    """The way (steps + 1, R, 2) of R runs from `starts` (R, 2) by Adam, directions cut to norms `limits` (R,)."""
    adam, noise = Adam(lr), np.random.default_rng(seed)
    way = np.empty((steps + 1, *starts.shape))
    way[0] = starts
    losses, jacobian = variant_losses(variant, starts)
    for step in range(1, steps + 1):
        if variant.noise:
            jacobian += variant.noise * noise.standard_normal((2, 2))
        direction = bundle.direction(losses, jacobian)
        length = np.sqrt((direction * direction).sum(-1, keepdims=True))
        way[step] = way[step - 1] + adam.move(direction * np.minimum(limits[:, None] / (length + 1e-6), 1))
        losses, jacobian = variant_losses(variant, way[step])
        bundle.observe(losses)
        tick(step)
    return way


@dataclass(frozen=True)
class Run:
    """One method from one start, clipped or not."""

    start: str
    clip: float
    """infinite where not clipped"""
    way: np.ndarray
    """(n, 2), thinned for the picture; both ends are kept"""
    steps: int | None
    """after how many it was on the front, to stay; None: it is not there at the end"""
    losses: np.ndarray
    """(2,) at the end, as the variant scales them"""
    distance: float
    min_norm: float
    """length of the shortest convex combination of the unscaled losses' gradients at the end: 0 is Pareto stationary"""


@dataclass(frozen=True)
class Result:
    """One method: its runs, or why there are none."""

    method: str
    runs: Sequence[Run] = ()
    seconds: float = 0.0
    """of all runs together, which go side by side"""
    note: str = ""


def judge(way: np.ndarray, labels: Sequence[tuple[str, float]], variant: Variant, front: Front) -> list[Run]:
    """The runs that took the way (steps + 1, R, 2); labels are their starts and clipping norms."""
    distance, losses = front.distance(way), variant_losses(variant, way[-1])[0]
    picks = np.unique(np.linspace(0, len(way) - 1, min(len(way), 1500)).round().astype(int))
    runs = []
    for r, (start, clip) in enumerate(labels):
        off = np.flatnonzero(~(distance[:, r] <= TOLERANCE))
        since = int(off[-1]) + 1 if len(off) else 0
        runs.append(
            Run(
                start=start,
                clip=clip,
                way=way[picks, r],
                steps=since if since < len(way) else None,
                losses=losses[r],
                distance=distance[-1, r],
                min_norm=shortest(toy(way[-1, r])[1]),
            )
        )
    return runs


def shortest(jacobian: np.ndarray) -> float:
    """Length of the shortest convex combination of two gradients (2, 2), Desideri's closed form; NaN for NaN."""
    first, second = jacobian
    apart = first - second
    t = np.clip((first @ apart) / max(apart @ apart, 1e-300), 0, 1)
    return float(np.linalg.norm(first - t * apart))


def preset(name: str, variant: Variant) -> dict[str, Any]:
    """The hyperparameters that the toy gives to a method: lower bounds, the length of an epoch, the paper's own."""
    info = get_method(name)
    bounds = tuple(scale * LOWEST for scale in variant.scale)
    if variant.quartic:
        bounds = (-(bounds[0] ** 4), bounds[1])
    chosen: dict[str, Any] = {key: bounds for key in ("min_losses", "ideal") if key in info.hparams}
    if issubclass(info.cls, EpochMethod):
        chosen["window"] = WINDOW
    if info.name == "famo":
        chosen["weight_decay"] = 0.0
    return chosen | dict(variant.hparams.get(info.name, {}))


def remark(name: str) -> str:
    """What a method makes of losses below zero, where that leaves little of it."""
    module = vars(sys.modules[get_method(name).cls.__module__])
    if "positive" in module and Needs.LOSSES in get_method(name).needs:
        return "counts losses under 1e-8 as 1e-8: where both are negative it is blind to them"
    if name == "imtl":
        return "a negative loss drives its learned scale up without end"
    return ""


def prepare(args: Args, variant: Variant) -> dict[str, BaseMethod | str]:
    """Method name -> the method, or why it cannot run here.

    Raises:
        RecipeError: an unknown method, or a hyperparameter that its method refuses.
    """
    try:
        infos = {info.name: info for info in map(get_method, args.method or list_methods())}
    except ValueError as error:
        raise RecipeError(str(error)) from error
    known = {name: set(info.hparams) for name, info in infos.items()}
    methods: dict[str, BaseMethod | str] = {}
    for name in infos:
        wanted = parse_hparams(args.hparam, name, known)
        try:
            method = build_method(name, preset(name, variant) | wanted)
            methods[name] = refusal(method) or method
        except (ValueError, TypeError) as error:
            if wanted:
                raise RecipeError(str(error)) from error
            methods[name] = _sentence(error)
    return methods


def refusal(method: BaseMethod) -> str:
    """Why a method cannot run on what the toy measures, losses and gradients of one batch; empty if it can."""
    if not isinstance(method, (Method, ColumnMethod)):
        return "it is neither a Method nor a ColumnMethod"
    return ""


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def run_methods(
    args: Args, variant: Variant, methods: Mapping[str, BaseMethod | str], out: Path, console: Console
) -> list[Result]:
    """Every method in turn, as far as nobody interrupts; toy.csv grows with each.

    Raises:
        RecipeError: interrupted before the first was through.
    """
    results: list[Result] = []
    steps, front = args.steps or variant.steps, Front()
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=len(methods) * steps)
        try:
            for n, (name, method) in enumerate(methods.items()):
                bar.update(task, description=name, completed=n * steps)
                results.append(run_method(name, method, args, front, lambda: bar.advance(task, 100)))
                write_csv(list(csv_rows(results, args)), out / "toy.csv")
            bar.update(task, completed=len(methods) * steps)
        except KeyboardInterrupt as stopped:
            if not results:
                raise RecipeError("interrupted before the first method was through.") from stopped
            console.print(f"interrupted: {len(methods) - len(results)} methods are missing.", highlight=False)
    return results


def run_method(name: str, method: BaseMethod | str, args: Args, front: Front, tick: Callable[[], object]) -> Result:
    """One method from all starts, unclipped and clipped, side by side; `tick` is called every 100 steps."""
    if isinstance(method, str):
        return Result(name, note=f"cannot run here: {method}")
    variant = VARIANTS[args.variant]
    labels = [(start, clip) for clip in (float("inf"), args.clip) for start in variant.starts]
    began = time.perf_counter()
    try:
        way = descend(
            Bundle(method, len(labels), args.seed),
            np.array([variant.starts[start] for start, _ in labels]),
            np.array([clip for _, clip in labels]),
            variant,
            steps=args.steps or variant.steps,
            lr=args.lr or variant.lr,
            seed=args.seed,
            tick=lambda step: tick() if step % 100 == 0 else None,
        )
    # Whatever a method raises, one yet to come too, is its line in the table, and the others go on.
    except Exception as error:
        return Result(name, note=f"cannot run here: {_sentence(error)}")
    return Result(name, judge(way, labels, variant, front), time.perf_counter() - began, remark(name))


def csv_rows(results: Sequence[Result], args: Args) -> Iterator[dict[str, float | str]]:
    """A row a method, start and clipping; a method that cannot run has one, with its note."""
    for result in results:
        common = {"method": result.method, "variant": args.variant, "seed": args.seed, "note": result.note}
        if not result.runs:
            yield common
        for run in result.runs:
            (x0, y0), (x, y) = VARIANTS[args.variant].starts[run.start], run.way[-1].tolist()
            yield {
                **common,
                "start": run.start,
                "x0": x0,
                "y0": y0,
                "clip": "" if np.isinf(run.clip) else run.clip,
                "reached": int(run.steps is not None),
                "steps": "" if run.steps is None else run.steps,
                "x": x,
                "y": y,
                "loss1": float(run.losses[0]),
                "loss2": float(run.losses[1]),
                "distance": run.distance,
                "min_norm": run.min_norm,
                "seconds": result.seconds,
            }


def table(results: Sequence[Result], variant: Variant) -> Table:
    """Steps to the front of every method, start and clipping; where it was not reached, how far off the end is."""
    out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("", no_wrap=True)
    for kind in ("free", "clip"):
        for start in variant.starts:
            out.add_column(f"{kind}\n{start}", justify="right", no_wrap=True)
    out.add_column("\nseconds", justify="right", no_wrap=True)
    for result in results:
        name = f"{result.method}*" if result.note else result.method
        seconds = f"{result.seconds:.0f}" if result.runs else ""
        cells = [cell(run) for run in result.runs] or ["-"] * 2 * len(variant.starts)
        out.add_row(name, *cells, seconds)
    return out


def cell(run: Run) -> str:
    """Steps to the front, else in brackets the distance from it."""
    if run.steps is not None:
        return f"{run.steps / 1000:.1f}k"
    return f"[dim]({run.distance:.2f})[/]" if np.isfinite(run.distance) else "[red]nan[/]"


def picture(results: Sequence[Result], variant: Variant, front: Front, clip: float, title: str) -> Figure:
    """A panel a method: its ways over the contours of the summed losses."""
    wide = min(len(results), 6)
    tall = -(-len(results) // wide)
    size = 2.0 if len(results) > 3 else 3.6
    figure = new_figure(max(size * wide, 5.4), (size + 0.17) * tall + 0.75)
    axes = figure.subplots(tall, wide, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, result in zip(axes, results, strict=False):
        panel(ax, result, front, clip, size / 2)
    for ax in axes[len(results) :]:
        ax.axis("off")
    colours = dict(zip(variant.starts, LINES, strict=False))
    handles = [Line2D([], [], color=colour, label=f"from {start}") for start, colour in colours.items()]
    mark: dict[str, Any] = {"color": "grey", "linestyle": ""}
    handles += [
        Line2D([], [], color="black", linewidth=3.5, label="Pareto front"),
        Line2D([], [], marker="o", markersize=4, label="start", **mark),
        Line2D([], [], marker="*", markersize=10, markeredgecolor="white", label="end, on it", **mark),
        Line2D([], [], marker="*", markersize=10, markeredgecolor="#d00000", label="end, off it", **mark),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles) if wide > 3 else 5, fontsize=9, frameon=False
    )
    figure.suptitle(title, fontsize=11)
    return figure


def panel(ax: Axes, result: Result, front: Front, clip: float, zoom: float) -> None:
    side = np.linspace(-10.5, 10.5, 85)
    heights = toy(np.stack(np.meshgrid(side, side), axis=-1))[0].sum(-1)
    # Each shade covers as much of the panel: evenly spaced levels would hide the valleys of the upper half.
    levels = np.quantile(heights, np.linspace(0, 1, 13))
    ax.contourf(side, side, heights, levels=levels, colors=[str(grey) for grey in np.linspace(0.72, 0.99, 12)])
    ax.contour(side, side, heights, levels=levels, colors="0.6", linewidths=0.3, linestyles="solid")
    ax.plot(*front.points.T, color="black", linewidth=3.5 * zoom, solid_capstyle="round")
    runs = [run for run in result.runs if run.clip == clip]
    for run, colour in zip(runs, LINES, strict=False):
        ax.plot(*run.way.T, color=colour, linewidth=1.2 * zoom)
        ax.plot(*run.way[0], color=colour, marker="o", markersize=3.5 * zoom)
        edge = "white" if run.steps is not None else "#d00000"
        ax.plot(*run.way[-1], color=colour, marker="*", markersize=9 * zoom, markeredgecolor=edge, markeredgewidth=0.6)
    reached = sum(run.steps is not None for run in runs)
    ax.set_title(f"{result.method}: {reached} of {len(runs)}" if runs else f"{result.method}: cannot run", fontsize=9)
    ax.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), aspect="equal", xticks=(-7, 0, 7), yticks=(-8, 0, 8))
    ax.tick_params(labelsize=7)


def save_pictures(results: Sequence[Result], args: Args, variant: Variant, out: Path) -> None:
    for clip, name in ((float("inf"), "toy.png"), (args.clip, "toy-clipped.png")):
        how = "no clipping" if np.isinf(clip) else f"directions clipped to norm {clip:g}"
        title = (
            f"Two-task toy ({args.variant}), {args.steps or variant.steps} steps of Adam, {how}: who reaches the front"
        )
        picture(results, variant, Front(), clip, title).savefig(out / name, dpi=90)


def check(args: Args) -> None:
    if args.steps is not None and args.steps < 1:
        raise RecipeError(f"--steps {args.steps}: expected 1 or more.")
    for name, value in (("lr", args.lr), ("clip", args.clip)):
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError(f"--{name} {value:g}: expected a positive, finite number.")


def compare(args: Args, console: Console | None = None) -> list[Result]:
    """Run what `args` asks for; print the table, write toy.csv and the pictures."""
    check(args)
    torch.set_num_threads(args.threads)
    variant, console = VARIANTS[args.variant], console or open_console()
    methods = prepare(args, variant)
    out = free_folder(args.out or Path("runs/toy"))
    out.mkdir(parents=True, exist_ok=True)
    starts = "  ".join(f"{name} ({x:g}, {y:g})" for name, (x, y) in variant.starts.items())
    console.print(
        f"toy, as in {args.variant}: {len(methods)} methods, {args.steps or variant.steps} steps, from {starts}\n"
        f"  torch {torch.__version__}, {torch.get_num_threads()} CPU threads; results in {out}/",
        highlight=False,
    )
    results = run_methods(args, variant, methods, out, console)
    save_pictures(results, args, variant, out)
    console.print(
        f"Steps to the Pareto front, to within {TOLERANCE:.0%} of what the losses span along it, free and clipped to "
        f"norm {args.clip:g}; in brackets, how far off a run ended that did not reach it",
        style="bold",
        highlight=False,
    )
    console.print(table(results, variant))
    for note in dict.fromkeys(result.note for result in results if result.note):
        names = ", ".join(result.method for result in results if result.note == note)
        console.print(f"* {names}: {note}", highlight=False, markup=False)
    console.print(f"Table and pictures are in {out}/", highlight=False)
    return results


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.toy", description=__doc__)
    command(lambda: compare(args))


if __name__ == "__main__":
    main()
