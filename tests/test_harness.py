"""The harness on its own: metrics against naive NumPy, the order of the data, checkpoints, one's own data."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanSquaredError

from gradsurgery import list_methods
from gradsurgery.architectures import HPS
from gradsurgery.recipes.harness import (
    Benchmark,
    Metric,
    Options,
    RecipeError,
    Surgery,
    Task,
    checkpoint,
    compare,
    data,
    metrics,
    train,
)
from gradsurgery.recipes.harness.evaluate import reported
from gradsurgery.recipes.harness.processes import Part

PUBLISHED = """
STL      38.30 63.76 .6754 .2780 25.01 19.21 30.14 57.20 69.15  0.00
LS       39.29 65.33 .5493 .2263 28.15 23.96 22.09 47.50 61.08  5.59
SI       38.45 64.27 .5354 .2201 27.60 23.37 22.53 48.57 62.32  4.39
RLW      37.17 63.77 .5759 .2410 28.27 24.18 22.26 47.05 60.62  7.78
DWA      39.11 65.31 .5510 .2285 27.61 23.18 24.17 50.18 62.39  3.57
UW       36.87 63.17 .5446 .2260 27.04 22.61 23.54 49.05 63.65  4.05
MGDA     30.47 59.90 .6070 .2555 24.88 19.45 29.18 56.88 69.36  1.38
PCGrad   38.06 64.64 .5550 .2325 27.41 22.80 23.86 49.83 63.14  3.97
CAGrad   39.79 65.49 .5486 .2250 26.31 21.58 25.61 52.36 65.58  0.20
Nash     40.13 65.93 .5261 .2171 25.26 20.08 28.40 55.47 68.15 -4.04
FAMO     38.88 64.90 .5474 .2194 25.06 19.57 29.21 56.61 68.98 -4.10
FairGrad 39.74 66.01 .5377 .2236 24.84 19.60 29.26 56.58 69.16 -4.66
"""
COLUMNS = ("mIoU", "PAcc", "abs", "rel", "mean", "median", "<11.25", "<22.5", "<30")
HIGHER = dict(zip(COLUMNS, (True, True, False, False, False, False, True, True, True), strict=True))


def test_delta_m_of_published_rows() -> None:
    rows = {name: [float(v) for v in values] for name, *values in map(str.split, PUBLISHED.strip().splitlines())}
    baseline = dict(zip(COLUMNS, rows["STL"], strict=False))
    for name, (*values, published) in rows.items():
        ours = metrics.delta_m(dict(zip(COLUMNS, values, strict=True)), baseline, HIGHER)
        assert ours == pytest.approx(published, abs=0.02), name


def batches(channels: int) -> list[tuple[Tensor, Tensor]]:
    """Three batches of predictions and targets, a third of the pixels invalid; of the last, all."""
    generator = torch.Generator().manual_seed(channels)
    out = []
    for n in (2, 2, 1):
        prediction = torch.randn(n, channels, 5, 7, generator=generator)
        target = torch.randn(n, channels, 5, 7, generator=generator)
        target = F.normalize(target, dim=1) if channels == 3 else target.abs() + 0.5
        out.append((prediction, target * (torch.rand(n, 1, 5, 7, generator=generator) > 0.33)))
    out[-1][1].zero_()
    return out


def test_depth_errors_against_numpy() -> None:
    meter, expected = metrics.DepthError(), []
    for prediction, target in batches(1):
        meter.update(prediction, target)
        p, t = prediction.numpy().ravel(), target.numpy().ravel()
        if (t != 0).any():
            error = [(abs(a - b), abs(a - b) / b) for a, b in zip(p, t, strict=True) if b != 0]
            expected.append(np.mean(error, axis=0))
    values = meter.compute()
    np.testing.assert_allclose([values["abs"], values["rel"]], np.mean(expected, axis=0), rtol=1e-5)


def test_normal_angles_against_numpy() -> None:
    meter, expected = metrics.NormalAngles(), []
    for prediction, target in batches(3):
        meter.update(prediction, target)
        p, t = (x.numpy().transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64) for x in (prediction, target))
        angles = [
            np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a), -1, 1)))
            for a, b in zip(p, t, strict=True)
            if b.sum() != 0
        ]
        if angles:
            below = [np.mean(np.array(angles) < limit) for limit in (11.25, 22.5, 30)]
            expected.append([np.mean(angles), np.median(angles), *below])
    values = meter.compute()
    np.testing.assert_allclose([float(v) for v in values.values()], np.mean(expected, axis=0), rtol=1e-4)


def test_errors_over_all_pixels_against_numpy() -> None:
    depth, normal = metrics.DepthError("pixels"), metrics.NormalAngles("pixels")
    errors, angles = [], []
    for (p, t), (q, n) in zip(batches(1), batches(3), strict=True):
        depth.update(p, t)
        normal.update(q, n)
        errors += [(abs(a - b), abs(a - b) / b) for a, b in zip(p.flatten(), t.flatten(), strict=True) if b != 0]
        rows = (x.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() for x in (q, n))
        pairs = [(a / np.linalg.norm(a), b) for a, b in zip(*rows, strict=True) if b.sum() != 0]
        angles += [np.degrees(np.arccos(np.clip(a @ b, -1, 1))) for a, b in pairs]
    np.testing.assert_allclose(list(depth.compute().values()), np.mean(errors, axis=0), rtol=1e-5)
    below = [np.mean(np.array(angles) < limit) for limit in (11.25, 22.5, 30)]
    expected = [np.mean(angles), np.median(angles), *below]
    np.testing.assert_allclose([float(v) for v in normal.compute().values()], expected, rtol=1e-4)


def test_the_best_epoch_is_reported_where_a_protocol_asks_for_it() -> None:
    history = [{"sine/mse": sine, "square/mse": square} for sine, square in ((1.0, 1.0), (0.4, 0.9), (0.3, 1.2))]
    assert reported(replace(waves(), last=0), history) == history[1]
    assert reported(replace(waves(), last=2), history)["sine/mse"] == pytest.approx(0.35)


def test_each_task_counts_the_same_for_the_best_epoch() -> None:
    benchmark = waves()
    several = replace(benchmark.tasks["square"], metrics=(Metric("mse"), Metric("a"), Metric("b")))
    benchmark = replace(benchmark, last=0, tasks={"sine": benchmark.tasks["sine"], "square": several})
    one_task = {"sine/mse": 0.4, "square/mse": 1.0, "square/a": 1.0, "square/b": 1.0}
    most_metrics = {"sine/mse": 1.0, "square/mse": 0.7, "square/a": 0.7, "square/b": 0.7}
    assert reported(benchmark, [dict.fromkeys(one_task, 1.0), most_metrics, one_task]) == one_task


def test_a_smaller_last_batch_may_be_dropped() -> None:
    benchmark = replace(waves(), batch_size=7, augment=None)
    full, rest = divmod(len(benchmark.train), 7)  # pyright: ignore[reportArgumentType]
    assert rest
    for dropped in (False, True):
        some = replace(benchmark, drop_last=dropped)
        found = data.train_batches(some, seed=0, epoch=0, start=1, device=torch.device("cpu"), workers=0)
        sizes = [len(x) for (x, _), _ in found]
        assert sizes == [7] * (full - 1) + ([] if dropped else [rest])
        assert data.steps_per_epoch(some) == len(sizes) + 1


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_batch_make_it_up(size: int) -> None:
    benchmark = replace(waves(), batch_size=7, augment=None)
    options = {"seed": 0, "epoch": 0, "start": 0, "device": torch.device("cpu"), "workers": 0}
    whole = list(data.train_batches(benchmark, **options))  # pyright: ignore[reportArgumentType]
    parts = [list(data.train_batches(benchmark, **options, part=Part(r, size))) for r in range(size)]  # pyright: ignore
    for ((x, _), one), *shares in zip(whole, *parts, strict=True):
        assert one == 1
        assert sorted(torch.cat([y for (y, _), _ in shares]).flatten().tolist()) == sorted(x.flatten().tolist())
        # Means of the parts, times their factors, have the mean of the whole for theirs.
        mean = torch.stack([factor * y.mean() for (y, _), factor in shares]).mean()
        torch.testing.assert_close(mean, x.mean())


def test_a_batch_too_small_for_its_parts_is_refused() -> None:
    data.check_parts(waves(), Part(0, 4))
    with pytest.raises(RecipeError, match="8 processes share each batch, and there is one of 4 samples"):
        data.check_parts(waves(), Part(0, 8))


def test_schedules_inside_a_model_hear_of_every_epoch(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    benchmark = replace(waves(), epochs=2, each_epoch=lambda model, epoch, epochs: heard.append((epoch, epochs)))
    train(benchmark, Surgery("ew"), tmp_path / "run")
    assert heard == [(0, 2), (1, 2)]


def test_segmentation_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    meter, confusion = metrics.segmentation_meter(13), np.zeros((13, 13))
    for n in (2, 2, 1):
        logits = torch.randn(n, 13, 6, 8, generator=generator)
        label = torch.randint(-1, 13, (n, 6, 8), generator=generator)
        meter.update(logits, label)
        for guess, truth in zip(logits.argmax(1).flatten().tolist(), label.flatten().tolist(), strict=True):
            if truth >= 0:
                confusion[truth, guess] += 1
    hit = confusion.diagonal()
    values = meter.compute()
    np.testing.assert_allclose(values["PAcc"], hit.sum() / confusion.sum(), rtol=1e-6)
    np.testing.assert_allclose(values["mIoU"], (hit / (confusion.sum(0) + confusion.sum(1) - hit)).mean(), rtol=1e-6)


def test_an_epoch_is_a_permutation_and_starts_anywhere() -> None:
    whole = list(data.epoch_batches(10, 4, seed=3, epoch=2))
    assert sorted(index for batch in whole for _, index in batch) == list(range(10))
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert list(data.epoch_batches(10, 4, seed=3, epoch=2, start=1)) == whole[1:]
    assert list(data.epoch_batches(10, 4, seed=3, epoch=3)) != whole
    assert list(data.epoch_batches(10, 4, seed=4, epoch=2)) != whole
    assert list(data.epoch_batches(10, 4, seed=3, epoch=2, draw=1)) != whole


class Waves(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """One's own data: x in [-1, 1], its sine and its square."""

    def __init__(self, count: int) -> None:
        self.x = torch.linspace(-1, 1, count)[:, None]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.x[index]
        return x, {"sine": torch.sin(3 * x), "square": x**2}


def waves() -> Benchmark:
    """All that one's own benchmark takes; dropout makes it depend on torch's global generator."""
    task = Task(F.mse_loss, MeanSquaredError, (Metric("mse", digits=4),))
    return Benchmark(
        name="waves",
        tasks={"sine": task, "square": task},
        train=Waves(60),
        test=Waves(33),
        model=lambda tasks: HPS(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Dropout(0.05)), {task: nn.Linear(32, 1) for task in tasks}
        ),
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
        augment=lambda sample, generator: (sample[0] + 1e-3 * generator.standard_normal(), sample[1]),
        epochs=3,
        batch_size=8,
        test_batch_size=16,
        settings={"width": 32},
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder / "checkpoint.pt")["model"]


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(weights(one).values(), weights(other).values(), strict=True):
        assert torch.equal(a, b)
    for name in ("epochs.csv", "steps.csv"):
        assert rows(one / name) == rows(other / name)


def test_ones_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = compare(waves(), Options(method=("ew", "pcgrad"), out=tmp_path / "out", device="cpu", single_task=True))
    assert [row.name for row in table] == ["single tasks", "ew", "pcgrad"]
    shown = capsys.readouterr().out
    assert "sine" in shown and "Δm" in shown and "pcgrad epoch 3/3" in shown
    assert [row["epoch"] for row in rows(tmp_path / "out/pcgrad-seed0/epochs.csv")] == ["1", "2", "3"]
    assert len(rows(tmp_path / "out/pcgrad-seed0/steps.csv")) == 24
    assert all((tmp_path / "out" / name).exists() for name in ("table.csv", "curves.png", "ew-seed0/weights.png"))
    first = [row["loss/sine"] for row in rows(tmp_path / "out/ew-seed0/epochs.csv")]
    assert float(first[-1]) < float(first[0])


class Stop(Exception):
    pass


def stopping_after(benchmark: Benchmark, calls: int) -> Benchmark:
    """The same benchmark, whose loss raises at that call."""
    left = [calls]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return F.mse_loss(prediction, target)

    return replace(benchmark, tasks=benchmark.tasks | {"sine": replace(benchmark.tasks["sine"], loss=loss)})  # type: ignore[operator]


@pytest.mark.parametrize("method", ["famo", "nash_mtl", "dwa", "modo", "moco"])
@pytest.mark.parametrize("calls", [3, 8, 13])
def test_a_stopped_run_resumes_exactly(tmp_path: Path, method: str, calls: int) -> None:
    surgery = Surgery(method, update_every=2 if method in ("famo", "nash_mtl") else 1)
    train(waves(), surgery, tmp_path / "whole", seed=5)
    with pytest.raises(Stop):
        train(stopping_after(waves(), calls), surgery, tmp_path / "parts", seed=5, checkpoint_every=2)
    run, _ = train(waves(), surgery, tmp_path / "parts", seed=5, resume=True)
    assert run.epoch == 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_augmentation_does_not_depend_on_workers(tmp_path: Path) -> None:
    train(waves(), Surgery("ew"), tmp_path / "none", seed=1)
    train(waves(), Surgery("ew"), tmp_path / "two", seed=1, workers=2)
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_results_are_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(waves(), epochs=1)
    options = Options(method=("ew",), out=tmp_path / "out", device="cpu")
    compare(one, options)
    before = (tmp_path / "out/ew-seed0/checkpoint.pt").read_bytes()
    compare(one, options)
    assert "holds results already" in capsys.readouterr().out
    assert (tmp_path / "out-2/ew-seed0/checkpoint.pt").exists()
    assert (tmp_path / "out/ew-seed0/checkpoint.pt").read_bytes() == before
    with pytest.raises(RecipeError, match="holds a run already"):
        train(one, Surgery("ew"), tmp_path / "out/ew-seed0")


def test_more_epochs_may_be_asked_for_but_no_other_settings(tmp_path: Path) -> None:
    train(replace(waves(), epochs=2), Surgery("cagrad"), tmp_path / "run")
    train(waves(), Surgery("cagrad"), tmp_path / "whole")
    train(waves(), Surgery("cagrad"), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for benchmark, surgery, words in (
        (waves(), Surgery("cagrad", {"c": 0.7}), "hparams was {}, now {'c': 0.7}"),
        (replace(waves(), batch_size=4), Surgery("cagrad"), "batch_size was 8, now 4"),
        (replace(waves(), settings={"width": 64}), Surgery("cagrad"), "width was 32, now 64"),
        (replace(waves(), epochs=1), Surgery("cagrad"), "3 epochs are done"),
    ):
        with pytest.raises(RecipeError, match="cannot be resumed") as error:
            train(benchmark, surgery, tmp_path / "run", resume=True)
        assert words in str(error.value)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(replace(waves(), epochs=1), Surgery("ew"), tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RecipeError, match=r"checkpoint\.pt cannot be read"):
        train(waves(), Surgery("ew"), tmp_path, resume=True)
    with pytest.raises(RecipeError, match="There is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save({"value": 1}, tmp_path / "checkpoint.pt")

    def fail(state: object, file: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"value": 2}, tmp_path / "checkpoint.pt")
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"value": 1}


def options_error(tmp_path: Path, **changes: object) -> str:
    with pytest.raises(RecipeError) as error:
        compare(waves(), Options(out=tmp_path, **changes))  # type: ignore[arg-type]
    return str(error.value)


def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "There is no method named 'cagrat'. Did you mean 'cagrad'" in options_error(out, method=("cagrat",))
    assert "no hyperparameter 'cc'" in options_error(out, method=("cagrad",), hparam=("cc=1",))
    assert "expected name=value" in options_error(out, hparam=("c",))
    assert "not among the methods" in options_error(out, hparam=("famo.beta=1",))
    assert "device" in options_error(out, device="abacus")
    assert "at least one name" in options_error(out, method=())
    assert not out.exists()
    out.touch()
    assert "is a file" in options_error(out)


def test_surgery_by_blocks(tmp_path: Path) -> None:
    for blocks in ("model", "tensor", "module"):
        benchmark = replace(waves(), epochs=1, shared=HPS.shared_parameters)
        run, _ = train(benchmark, Surgery("cagrad", blocks=blocks), tmp_path / blocks)
        assert {"weight/sine", "weight/square", "cosine/sine, square"} <= run.trace[-1].keys()


@pytest.mark.parametrize("method", list_methods())
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    run, model = train(replace(waves(), epochs=1), Surgery(method), tmp_path / method)
    assert run.epoch == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_methods_that_go_by_epochs_hear_of_them(tmp_path: Path) -> None:
    run, _ = train(waves(), Surgery("dwa"), tmp_path / "dwa")
    weights = [row["weight/sine"] for row in run.trace]
    steps = len(weights) // 3
    assert set(weights[: 2 * steps]) == {1.0}
    assert set(weights[2 * steps :]).isdisjoint({1.0})


def test_hparams_reach_the_methods_that_have_them(tmp_path: Path) -> None:
    options = Options(method=("ew", "CAGrad"), hparam=("c=0.7",), blocks="module", out=tmp_path / "out", device="cpu")
    compare(replace(waves(), epochs=1, shared=HPS.shared_parameters), options)
    saved = {n: checkpoint.load(tmp_path / f"out/{n}-seed0/checkpoint.pt")["settings"] for n in ("ew", "cagrad")}
    assert saved["ew"]["hparams"] == {} and saved["cagrad"]["hparams"] == {"c": 0.7}
