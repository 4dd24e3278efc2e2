"""The toy recipe: its losses, its front, the road on which all runs go at once, and the command as a user types it."""

import csv
import dataclasses
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from gradsurgery import MTLOptimizer, aggregate, get_method, list_methods
from gradsurgery.recipes import toy
from gradsurgery.recipes.harness.benchmark import RecipeError
from gradsurgery.registry import BaseMethod, ColumnMethod, EpochMethod, Method, ObservingMethod, State, build_method
from gradsurgery.stats import Needs, Stats

ROOT = Path(__file__).resolve().parent.parent
STARTS = np.array([*toy.VARIANTS["nash"].starts.values()])


def scalar_losses(variant: toy.Variant, point: Tensor) -> list[Tensor]:
    """The two losses at one point (2,), straight from the papers' code, for autograd.

    A tie passes the gradient, whatever `torch.clamp` does with it in this version.
    """
    x, y = point
    up, down = (torch.where(side >= 0, side, 0.0) for side in (torch.tanh(y / 2), torch.tanh(-y / 2)))
    f1 = torch.clamp((0.5 * (-x - 7) - torch.tanh(-y)).abs(), min=5e-6).log() + 6
    f2 = torch.clamp((0.5 * (-x + 3) + torch.tanh(-y) + 2).abs(), min=5e-6).log() + 6
    q1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    q2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    first = variant.scale[0] * (up * f1 + down * q1)
    if variant.quartic:
        first = first**3 * first.abs()
    return [first, variant.scale[1] * (up * f2 + down * q2)]


def points() -> np.ndarray:
    random = np.random.default_rng(0).uniform(-10, 10, size=(40, 2))
    # Ties of the maxima, and the bottoms of the two valleys.
    special = [(0, 0), (3, 0), (-7 + 2 * math.tanh(4), 4), (7 - 2 * math.tanh(4), 4), (-5, 20), (5, 20)]
    return np.concatenate([random, STARTS, np.array(special, dtype=float)])


@pytest.mark.parametrize("name", toy.VARIANTS)
def test_losses_and_gradients_are_those_of_autograd(name: toy.Name) -> None:
    variant = toy.VARIANTS[name]
    losses, jacobian = toy.variant_losses(variant, points())
    for point, loss, rows in zip(points(), losses, jacobian, strict=True):
        leaf = torch.tensor(point, requires_grad=True)
        wanted = scalar_losses(variant, leaf)
        gradients = [torch.autograd.grad(one, leaf, retain_graph=True)[0].numpy() for one in wanted]
        np.testing.assert_allclose(loss, [one.item() for one in wanted], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rows, gradients, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    smooth = points()[:40]
    _, jacobian = toy.toy(smooth)
    for k, step in enumerate(np.eye(2) * 1e-6):
        slope = (toy.toy(smooth + step)[0] - toy.toy(smooth - step)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[..., k], slope, rtol=1e-4, atol=1e-6)


def test_the_front_is_where_weighted_sums_are_least() -> None:
    front = toy.Front()
    for w in (0.05, 0.3, 0.5, 0.8, 0.95):
        weights = np.array([w, 1 - w])

        def objective(point: np.ndarray, weights: np.ndarray = weights) -> float:
            return float(toy.toy(point)[0] @ weights)

        found = [minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
                 for start in [(-4.0, -5.0), (4.0, -5.0), (0.0, -9.0)]]  # fmt: skip
        best = min(found, key=lambda result: result.fun).x
        nearest = front.points[np.abs(front.points[:, 0] - best[0]).argmin()]
        assert np.abs(best - nearest).max() < 0.004  # half the distance of the front's points, and a little
        assert front.distance(best) < 1e-6


def test_nothing_dominates_the_front_and_it_bends_as_stated() -> None:
    front = toy.Front()
    x, y = np.meshgrid(np.linspace(-12, 12, 481), np.linspace(-12, 12, 481))
    losses, _ = toy.toy(np.stack([x, y], axis=-1).reshape(-1, 2))
    order = front.losses[::-1]  # the first loss rises
    best = np.interp(losses[:, 0], order[:, 0], order[:, 1], left=np.inf, right=order[-1, 1])
    assert (losses[:, 1] >= best - 1e-4)[losses[:, 0] >= order[0, 0]].all()
    assert losses.min(0) == pytest.approx(front.losses.min(0), abs=1e-3)
    assert front.points[1000] == pytest.approx([0, -8.3551], abs=1e-4)
    assert front.points[[0, -1], 1] == pytest.approx(-8.4345, abs=1e-4)
    assert np.abs(front.points[:, 1] + 8.3552).max() < 0.08  # the line that the papers draw


def test_distance_is_the_additive_epsilon() -> None:
    front, somewhere = toy.Front(), points()
    scaled, along = toy.toy(somewhere)[0] / front.span, front.losses / front.span
    brute = (scaled[:, None] - along).max(-1).min(-1)
    np.testing.assert_allclose(front.distance(somewhere), np.maximum(brute, 0), atol=1e-3)
    assert front.distance(front.points).max() < 1e-9
    assert np.isnan(front.distance(np.array([np.nan, 0.0])))
    assert front.distance(np.array([9.0, -8.0])) > toy.TOLERANCE  # beyond the end


def walk_alone(method: BaseMethod, start: np.ndarray, clip: float, steps: int) -> np.ndarray:
    """One run through the public optimizer and torch's Adam."""
    variant = toy.VARIANTS["nash"]
    if isinstance(method, ColumnMethod):  # the optimizer also draws for the columns that pad its rows
        return walk_columns(method, start, clip, steps)
    point = torch.nn.Parameter(torch.tensor(start))
    opt = MTLOptimizer(torch.optim.Adam([point], 1e-3), method, shared_params=[point], seed=3)
    for _ in range(steps):
        opt.zero_grad()
        cross = Needs.CROSS in method.needs
        others = [scalar_losses(variant, point) for _ in range(2)] if cross else None
        opt.backward(scalar_losses(variant, point), independent=others)
        torch.nn.utils.clip_grad_norm_([point], clip)
        opt.step()
        if isinstance(method, ObservingMethod):
            opt.observe(scalar_losses(variant, point))
    return point.detach().numpy()


def walk_columns(method: ColumnMethod, start: np.ndarray, clip: float, steps: int) -> np.ndarray:
    point = torch.nn.Parameter(torch.tensor(start))
    adam, generator = torch.optim.Adam([point], 1e-3), torch.Generator().manual_seed(3)
    for _ in range(steps):
        losses = scalar_losses(toy.VARIANTS["nash"], point)
        rows = torch.stack([torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses])
        point.grad = method.direction(rows, {}, generator)
        torch.nn.utils.clip_grad_norm_([point], clip)
        adam.step()
    return point.detach().numpy()


@pytest.mark.parametrize("name", list_methods())
def test_runs_side_by_side_are_runs_alone(name: str) -> None:
    """Every registered method runs here exactly as through `MTLOptimizer`, or is refused with a reason."""
    method = toy.prepare(toy.Args(method=(name,)), toy.VARIANTS["nash"])[name]
    if isinstance(method, str):
        assert len(method) > 10
        return
    steps = 27  # more than an epoch of those that go by epochs
    limits = np.array([math.inf, 0.5, math.inf])
    # A start where the losses are positive, the tie, and one where both losses are negative.
    starts = np.array([STARTS[0], STARTS[1], (1.0, -5.0)])
    way = toy.descend(toy.Bundle(method, 3, seed=3), starts, limits, toy.VARIANTS["nash"], steps=steps, lr=1e-3)
    for run in range(3):
        alone = walk_alone(method, starts[run], limits[run], steps)
        np.testing.assert_allclose(way[-1, run], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ew", "cagrad", "nash_mtl", "mgda", "pcgrad"])
def test_runs_are_those_of_a_naive_loop(name: str) -> None:
    variant, steps = toy.VARIANTS["nash"], 200
    starts = STARTS[[0, 3]]
    method = build_method(name, {})
    way = toy.descend(toy.Bundle(method, 2, seed=0), starts, np.full(2, 0.5), variant, steps=steps, lr=1e-3)
    for run, start in enumerate(starts):
        point = torch.nn.Parameter(torch.tensor(start))
        adam, generator = torch.optim.Adam([point], 1e-3), torch.Generator().manual_seed(0)
        for _ in range(steps):
            losses = scalar_losses(variant, point)
            rows = torch.stack([torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses])
            point.grad = aggregate(rows, name, losses=torch.stack(losses).detach(), generator=generator)
            torch.nn.utils.clip_grad_norm_([point], 0.5)
            adam.step()
        np.testing.assert_allclose(way[-1, run], point.detach().numpy(), rtol=0, atol=1e-9)


def test_one_lost_run_leaves_the_others_alone() -> None:
    variant = toy.VARIANTS["nash"]
    for name in ("nash_mtl", "famo", "graddrop"):
        bundle = toy.Bundle(build_method(name, {}), 2, seed=0)
        starts = np.array([(np.nan, 1.0), (9.0, -1.0)])
        way = toy.descend(bundle, starts, np.array([math.inf, 1.0]), variant, steps=20, lr=1e-3)
        alone = toy.descend(
            toy.Bundle(build_method(name, {}), 1, seed=0), starts[1:], np.ones(1), variant, steps=20, lr=1e-3
        )
        assert np.isnan(way[-1, 0]).all()
        np.testing.assert_allclose(way[:, 1], alone[:, 0], atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Stubborn(Method):
    """A method yet to come that fails on its first step."""

    needs: ClassVar[Needs] = Needs.LOSSES

    def init(self, T: int, blocks: int, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: torch.Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        raise LookupError("it wants three tasks")


@dataclasses.dataclass(frozen=True)
class Odd(BaseMethod):
    """Neither of the two kinds that the toy knows."""

    needs: ClassVar[Needs] = Needs.LOSSES

    def init(self, T: int, blocks: int, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_what_cannot_run_is_named_with_its_reason(tmp_path: Path) -> None:
    args, variant = toy.Args(steps=3, out=tmp_path), toy.VARIANTS["nash"]
    methods: Mapping[str, Any] = {"stubborn": Stubborn(), "other": "it needs more", "ew": build_method("ew", {})}
    console = toy.open_console()
    results = toy.run_methods(args, variant, methods, tmp_path, console)
    toy.save_pictures(results, args, variant, tmp_path)
    rows = read_rows(tmp_path / "toy.csv")
    assert [(row["method"], row["note"], row["reached"]) for row in rows[:2]] == [
        ("stubborn", "cannot run here: LookupError: it wants three tasks", ""),
        ("other", "cannot run here: it needs more", ""),
    ]
    assert len(rows) == 2 + 10
    assert not toy.refusal(Stubborn()) and toy.refusal(Odd()) == "it is neither a Method nor a ColumnMethod"
    with console.capture() as text:
        console.print(toy.table(results, variant))
    assert "stubborn*" in text.get()


def test_methods_get_what_the_papers_give_them() -> None:
    nash, dibs = toy.VARIANTS["nash"], toy.VARIANTS["dibs"]
    assert toy.preset("famo", nash) == {"min_losses": pytest.approx((-2.1, -21)), "weight_decay": 0.0}
    assert toy.preset("famo", dibs)["min_losses"] == (-(21**4), -21)
    assert toy.preset("cagrad", toy.VARIANTS["cagrad"]) == {"c": 0.5, "rescale": 2, "scale": "mean"}
    for name in list_methods():
        assert ("window" in toy.preset(name, nash)) == issubclass(get_method(name).cls, EpochMethod)


def test_remarks_name_the_methods_that_are_blind_below_zero() -> None:
    for name in ("si", "gls", "uw_so", "igb", "stch"):
        method = toy.prepare(toy.Args(method=(name,)), toy.VARIANTS["nash"])[name]
        assert isinstance(method, Method) and "blind" in toy.remark(name)
        state = method.init(2, 1, dtype=torch.float64, device=torch.device("cpu"))
        both = [method.weights(Stats(torch.tensor(v).double()), state, None)[0] for v in ([-1.0, -9.0], [-5.0, -2.0])]
        assert torch.equal(*both)
    assert not toy.remark("ew") and not toy.remark("famo") and not toy.remark("cagrad")


def test_known_ends() -> None:
    """Close to the front all go there; MGDA stays where it started on a Pareto-stationary point."""
    variant, front = toy.VARIANTS["nash"], toy.Front()
    starts = np.array([(2.0, -3.0), (-1.0, -4.0)])
    for name in ("ew", "nash_mtl", "upgrad"):
        bundle = toy.Bundle(build_method(name, {}), 2, seed=0)
        way = toy.descend(bundle, starts, np.full(2, math.inf), variant, steps=600, lr=1e-2)
        runs = toy.judge(way, [("A", math.inf), ("B", math.inf)], variant, front)
        assert all(run.steps is not None and 0 < run.steps < 600 for run in runs)
    bundle = toy.Bundle(build_method("mgda", {}), 1, seed=0)
    way = toy.descend(bundle, front.points[None, 700], np.ones(1), variant, steps=50, lr=1e-3)
    (run,) = toy.judge(way, [("A", 1.0)], variant, front)
    assert run.steps == 0 and run.min_norm < 1e-3
    np.testing.assert_allclose(run.way[-1], front.points[700], atol=0.05)


def test_the_command(tmp_path: Path) -> None:
    words = ["--method", "pcgrad", "Nash_MTL", "rlw", "graddrop", "si", "--steps", "60", "--seed", "5"]
    line = [sys.executable, "-m", "gradsurgery.recipes.toy", *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 methods" in done.stdout and "si*" in done.stdout and "blind" in done.stdout
    rows = read_rows(tmp_path / "out/toy.csv")
    assert [row["method"] for row in rows[::10]] == ["pcgrad", "nash_mtl", "rlw", "graddrop", "si"]
    assert [(row["start"], row["clip"]) for row in rows[:10]] == [(s, c) for c in ("", "1.0") for s in "ABCDE"]
    for row in rows:
        assert row["reached"] == "0" and row["steps"] == "" and float(row["seconds"]) > 0 and row["seed"] == "5"
        end = np.array([float(row["x"]), float(row["y"])])
        losses = toy.variant_losses(toy.VARIANTS["nash"], end)[0]
        np.testing.assert_allclose([float(row["loss1"]), float(row["loss2"])], losses)
        assert float(row["distance"]) == pytest.approx(float(toy.Front().distance(end)))
    for name in ("toy.png", "toy-clipped.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_seed_decides() -> None:
    def run(seed: int) -> list[np.ndarray]:
        args, front = toy.Args(method=("rlw", "graddrop", "gradvac"), steps=30, seed=seed), toy.Front()
        methods = toy.prepare(args, toy.VARIANTS["nash"])
        results = [toy.run_method(name, method, args, front, lambda: None) for name, method in methods.items()]
        return [one.way for result in results for one in result.runs]

    first, again, other = run(1), run(1), run(2)
    assert len(first) == 30 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_results_are_never_written_over(tmp_path: Path) -> None:
    assert toy.free_folder(tmp_path / "new") == tmp_path / "new"
    for name in ("new", "new-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy.csv").touch()
    assert toy.free_folder(tmp_path / "new") == tmp_path / "new-3"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (toy.Args(method=("cagard",)), "Did you mean 'cagrad'"),
        (toy.Args(method=("cagrad",), hparam=("k=1",)), "no hyperparameter 'k'"),
        (toy.Args(method=("cagrad",), hparam=("c=-1",)), "must be finite and >= 0"),
        (toy.Args(steps=0), "--steps 0: expected 1 or more"),
        (toy.Args(lr=-1.0), "--lr -1: expected a positive"),
        (toy.Args(clip=0.0), "--clip 0: expected a positive"),
        (toy.Args(out=Path(__file__)), "is a file"),
    ],
)
def test_mistakes_end_in_a_sentence(args: toy.Args, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        toy.compare(args)


def test_an_unknown_method_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["toy", "--method", "cagard"])
    with pytest.raises(SystemExit, match="2"):
        toy.main()
    assert capsys.readouterr().err.startswith("error: There is no method named 'cagard'. Did you mean 'cagrad'")


def test_an_interruption_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = toy.run_method

    def stop_at_mgda(name: str, *others: Any) -> toy.Result:
        if name == "mgda":
            raise KeyboardInterrupt
        return whole(name, *others)

    monkeypatch.setattr(toy, "run_method", stop_at_mgda)
    results = toy.compare(toy.Args(method=("ew", "mgda"), steps=2, out=tmp_path))
    assert [result.method for result in results] == ["ew"] and len(read_rows(tmp_path / "toy.csv")) == 10
    with pytest.raises(RecipeError, match="interrupted"):
        toy.compare(toy.Args(method=("mgda",), steps=2, out=tmp_path / "other"))
