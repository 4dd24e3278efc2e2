"""The NYUv2 recipe: losses, augmentation, the loader's errors, and the commands a user types."""

import csv
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradsurgery.architectures import HPS, SegNetMTAN
from gradsurgery.recipes import nyuv2, nyuv2_models
from gradsurgery.recipes.harness import RecipeError, checkpoint, dense, evaluate
from gradsurgery.recipes.harness.compare import Options
from gradsurgery.recipes.harness.metrics import delta_m
from gradsurgery.recipes.nyuv2_published import published
from gradsurgery.recipes.rooms import CLASSES, render_rooms

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--rooms", "24", "5", "--size", "24", "32", "--batch-size", "4", "--threads", "1"]
SHAPES = {"image": (6, 8, 3), "label": (6, 8), "depth": (6, 8, 1), "normal": (6, 8, 3)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the rooms of TINY rendered."""
    folder = tmp_path_factory.mktemp("data")
    nyuv2.render(nyuv2.Args(cache=folder, rooms=(24, 5), size=(24, 32)))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Random arrays in the layout of NYUv2, float64, two views a split."""
    generator = np.random.default_rng(0)
    root = tmp_path / "nyuv2"
    for split in ("train", "val"):
        for name, shape in SHAPES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                values = generator.integers(-1, 13, shape) if name == "label" else generator.random(shape)
                np.save(root / split / name / f"{i}.npy", values.astype(np.float64))
    return root


def load(root: Path, split: str = "train") -> dense.DenseFolder:
    return dense.DenseFolder(root, split, dense.TASKS, len(CLASSES))


def test_losses_are_the_protocols() -> None:
    torch.manual_seed(0)
    logits, label = torch.randn(2, 13, 4, 5), torch.randint(-1, 13, (2, 4, 5))
    expected = F.nll_loss(F.log_softmax(logits, 1), label, ignore_index=-1)
    torch.testing.assert_close(dense.segmentation_loss(logits, label), expected)
    mask = (torch.rand(2, 1, 4, 5) > 0.4).float()
    guess, depth = torch.randn(2, 1, 4, 5), (torch.rand(2, 1, 4, 5) + 1) * mask
    torch.testing.assert_close(dense.depth_loss(guess, depth), ((guess - depth).abs() * mask).sum() / mask.sum())
    guess, normal = torch.randn(2, 3, 4, 5), F.normalize(torch.randn(2, 3, 4, 5), dim=1) * mask
    unit = guess / guess.norm(dim=1, keepdim=True)
    torch.testing.assert_close(dense.normal_loss(guess, normal), 1 - (unit * normal * mask).sum() / mask.sum())


@pytest.mark.parametrize(
    ("loss", "channels", "target"),
    [
        (dense.segmentation_loss, 13, torch.full((2, 4, 5), -1)),
        (dense.depth_loss, 1, torch.zeros(2, 1, 4, 5)),
        (dense.normal_loss, 3, torch.zeros(2, 3, 4, 5)),
    ],
)
def test_a_batch_without_a_valid_pixel_has_no_loss(
    loss: Callable[[Tensor, Tensor], Tensor], channels: int, target: Tensor
) -> None:
    prediction = torch.randn(2, channels, 4, 5, requires_grad=True)
    value = loss(prediction, target)
    value.backward()
    assert value.item() == 0
    assert prediction.grad is not None and torch.equal(prediction.grad, torch.zeros_like(prediction))


class Chosen:
    """A generator that draws a given scale, corner and mirror image."""

    def __init__(self, scale: int, top: int, left: int, flip: bool) -> None:
        self.draws, self.flip = iter((scale, top, left)), flip

    def integers(self, high: int) -> int:
        draw = next(self.draws)
        assert draw < high
        return draw

    def random(self) -> float:
        return 0.0 if self.flip else 0.9


def plane(normal: np.ndarray, height: int = 24, width: int = 36, focal: float = 30.0) -> tuple[Tensor, Tensor]:
    """Depth and normal map of the plane normal . X = -2, seen by a centred pinhole camera."""
    v, u = np.mgrid[:height, :width]
    rays = np.stack([(u - (width - 1) / 2) / focal, (v - (height - 1) / 2) / focal, np.ones((height, width))])
    depth = -2 / np.einsum("c,chw->hw", normal, rays)
    assert (depth > 0).all()
    return torch.tensor(depth[None]), torch.tensor(normal)[:, None, None].expand(3, height, width)


def augment(depth: Tensor, normal: Tensor, draws: Chosen) -> tuple[Tensor, Tensor]:
    label = torch.zeros(depth.shape[-2:], dtype=torch.int64)
    targets = {"segmentation": label, "depth": depth.float(), "normal": normal.float()}
    _, out = dense.scale_crop_flip((torch.zeros(3, *depth.shape[-2:]), targets), draws)  # type: ignore[arg-type]
    return out["depth"], out["normal"]


def test_the_mirror_image_is_a_plane_with_the_mirrored_normal() -> None:
    normal = np.array([0.48, -0.36, -0.8])
    depth, normals = augment(*plane(normal), Chosen(0, 0, 0, True))
    mirrored_depth, mirrored_normals = plane(normal * [-1, 1, 1])
    torch.testing.assert_close(depth, mirrored_depth.float())
    torch.testing.assert_close(normals, mirrored_normals.float())


def test_scaled_pixels_back_project_to_the_same_lateral_place() -> None:
    """Times the scale in pixels, divided by it in depth: (u - c) d / f stays, and so does the normal map."""
    depth, normals = plane(np.array([0.48, -0.36, -0.8]))
    zoomed, same = augment(depth, normals, Chosen(1, 2, 3, False))
    torch.testing.assert_close(same, normals.float())
    for row, column in ((0, 0), (7, 20), (23, 35)):
        source = 2 + row * 20 // 24, 3 + column * 30 // 36
        assert zoomed[0, row, column] == pytest.approx(depth[0, source[0], source[1]].item() / 1.2, rel=1e-6)
        assert (column + 0.5) * zoomed[0, row, column] == pytest.approx(
            (column + 0.5) / 1.2 * depth[0, source[0], source[1]].item(), rel=1e-6
        )


def test_augmentation_keeps_labels_and_images_together() -> None:
    ramp = torch.arange(24 * 36).reshape(24, 36) % 13
    image = ramp.float().expand(3, -1, -1)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        out, targets = dense.scale_crop_flip((image, {"segmentation": ramp}), generator)
        assert out.shape == image.shape and targets["segmentation"].dtype == torch.int64
        assert set(targets["segmentation"].unique().tolist()) <= set(range(13))
    flipped, targets = dense.scale_crop_flip((image, {"segmentation": ramp}), Chosen(0, 0, 0, True))  # type: ignore[arg-type]
    torch.testing.assert_close(flipped[0], ramp.float().flip(-1))
    assert torch.equal(targets["segmentation"], ramp.flip(-1))


def test_both_widths_of_floats_are_read_alike(data: Path) -> None:
    wide = load(data)[1]
    for path in data.rglob("*.npy"):
        np.save(path, np.load(path).astype(np.float32))
    image, targets = load(data)[1]
    assert image.dtype == torch.float32 and image.shape == (3, 6, 8)
    assert targets["segmentation"].dtype == torch.int64 and targets["segmentation"].min() == -1
    assert targets["depth"].shape == (1, 6, 8) and targets["normal"].shape == (3, 6, 8)
    torch.testing.assert_close((image, targets), wide)


def truncate(root: Path) -> None:
    path = root / "train/depth/1.npy"
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no root": (shutil.rmtree, "nyuv2 is missing: expected"),
    "no field": (lambda root: shutil.rmtree(root / "train/normal"), "train/normal is missing: expected"),
    "no files": (lambda root: [p.unlink() for p in (root / "train/image").iterdir()], "image has no .npy file"),
    "a file less": (lambda root: (root / "train/label/1.npy").unlink(), "label/1.npy is missing: expected"),
    "a file more": (lambda root: np.save(root / "train/label/2.npy", np.zeros((6, 8))), "label has 3 .npy files"),
    "truncated": (truncate, "depth/1.npy is damaged"),
    "empty": (lambda root: (root / "train/depth/0.npy").write_bytes(b""), "depth/0.npy is damaged"),
    "no array": (lambda root: (root / "train/depth/0.npy").write_text("<html>"), "depth/0.npy is damaged"),
    "channels first": (
        lambda root: np.save(root / "train/normal/0.npy", np.zeros((3, 6, 8))),
        r"normal/0.npy is float64 of shape \(3, 6, 8\): expected .* shape \(6, 8, 3\)",
    ),
    "another size": (
        lambda root: np.save(root / "train/label/1.npy", np.zeros((6, 9))),
        r"label/1.npy is float64 of shape \(6, 9\): expected .* shape \(6, 8\)",
    ),
    "bytes": (
        lambda root: np.save(root / "train/image/0.npy", np.zeros((6, 8, 3), np.uint8)),
        "image/0.npy is uint8 .*: expected a float32 or float64 array",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_what_was_expected(data: Path, case: str) -> None:
    spoil, message = DAMAGE[case]
    spoil(data)
    with pytest.raises(RecipeError, match=message):
        load(data)


def test_a_label_out_of_range_is_named(data: Path) -> None:
    np.save(data / "train/label/1.npy", np.full((6, 8), 40.0))
    with pytest.raises(RecipeError, match=r"label/1.npy has labels 40 to 40: expected -1 \(ignored\) to 12"):
        load(data)[1]


def test_real_data_gets_the_protocol(data: Path) -> None:
    benchmark = nyuv2.make_benchmark(nyuv2.Args(data=data))
    assert (benchmark.epochs, benchmark.batch_size, benchmark.test_batch_size, benchmark.last) == (200, 2, 2, 10)
    optimizer = benchmark.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.Adam) and benchmark.scheduler is not None
    scheduler = benchmark.scheduler(optimizer)
    optimizer.step()
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(199):
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1e-4] * 100 + [5e-5] * 100
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert benchmark.augment is dense.scale_crop_flip
    assert [row.name for row in benchmark.published] == [
        "STL (published)", "ew (published)", "ew (LibMTL)", "cagrad (published)", "cagrad (LibMTL)",
    ]  # fmt: skip
    assert all(set(row.values) == set(benchmark.columns) for row in benchmark.published)


def test_the_constant_prediction_against_numpy(cache: Path) -> None:
    benchmark = nyuv2.make_benchmark(nyuv2.Args(cache=cache, rooms=(24, 5), size=(24, 32)))
    assert benchmark.floor is not None and isinstance(benchmark.train, dense.DenseFolder)
    out = benchmark.floor()(torch.zeros(2, 3, 24, 32))
    fields = {
        name: np.stack([np.load(benchmark.train.folder / name / f"{i}.npy") for i in range(24)]) for name in SHAPES
    }
    label, depth, normal = fields["label"], fields["depth"][..., 0], fields["normal"]
    assert out["segmentation"][0, :, 0, 0].argmax() == np.bincount(label[label >= 0].astype(int)).argmax()
    assert out["depth"][1, 0, 3, 4] == pytest.approx(depth[depth != 0].mean(), rel=1e-5)
    mean = normal.reshape(-1, 3).sum(0)
    np.testing.assert_allclose(out["normal"][1, :, 3, 4], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)
    assert 0 < evaluate(benchmark, benchmark.floor())["segmentation/PAcc"] < 100


def test_libmtls_protocol(data: Path) -> None:
    args = nyuv2.Args(data=data, protocol="deeplab", arch="ple", options=Options(method=("ew", "upgrad", "uw")))
    benchmark = nyuv2.make_benchmark(args)
    assert (benchmark.epochs, benchmark.batch_size, benchmark.last, benchmark.augment) == (200, 4, 0, None)
    assert benchmark.drop_last
    optimizer = benchmark.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-4, 1e-5)
    assert benchmark.settings["encoder"] == "resnet50 (pretrained)"
    # Equal weights on HPS come first: Delta-m is taken against them.
    assert [row.name for row in benchmark.published] == ["hps ew (LibMTL)", "ew (LibMTL)", "uw (LibMTL)"]
    assert benchmark.published[0].values["segmentation/mIoU"] == 54.10
    assert benchmark.settings["arch"] == "ple stem=0"
    assert nyuv2.make_benchmark(replace(args, arch="hps")).batch_size == 8
    # Rows are found by whatever spelling the optimizer takes, and say where surgery was.
    args = replace(args, arch="hps", options=Options(method=("MGDA", "Nash-MTL")))
    names = [row.name for row in nyuv2.make_benchmark(args).published]
    assert names == ["ew (LibMTL)", "mgda (LibMTL, at the representation)", "nash_mtl (LibMTL)"]


def test_what_was_not_typed_suits_what_was(data: Path) -> None:
    """An encoder or weights of the protocol's are left where they do not go with what was asked for."""
    args = nyuv2.Args(data=data, protocol="deeplab")
    for changed, encoder in (
        ({"arch": "segnet_mtan"}, "segnet"),
        ({"encoder": "small", "arch": "hps"}, "small"),
        ({"encoder": "resnet18"}, "resnet18 (pretrained)"),
    ):
        assert nyuv2.make_benchmark(replace(args, **changed)).settings["encoder"] == encoder


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"epochs": -1}])
def test_numbers_that_would_be_taken_for_none_are_refused(data: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"--{name.replace('_', '-')} .*above 0"):
        nyuv2.make_benchmark(nyuv2.Args(data=data, **wrong))


def test_the_protocol_on_rendered_rooms(cache: Path) -> None:
    """SegNet halves 72 x 96 five times, 72 not without a rest; a task alone is a SegNet without attention."""
    benchmark = nyuv2.make_benchmark(nyuv2.Args(cache=cache, rooms=(24, 5), size=(72, 96), protocol="mtan"))
    model = benchmark.model(tuple(benchmark.tasks))
    assert isinstance(model, SegNetMTAN)
    x = torch.zeros(1, 3, 72, 96)
    with torch.no_grad():
        assert {tuple(y.shape[-2:]) for y in model.eval()(x).values()} == {(72, 96)}
        alone = benchmark.model(("depth",))
        assert isinstance(alone, HPS) and alone.eval()(x)["depth"].shape == (1, 1, 72, 96)


def test_published_rows_have_their_delta_m() -> None:
    """Of the papers' tables, and of LibMTL's against its HPS with equal weights (there by task, not by metric)."""
    rows = published("mtan", "segnet_mtan", ("ew", "nash_mtl", "famo", "fairgrad"))
    columns = {f"{task}/{m.name}": m.higher_is_better for task, ms in nyuv2.METRICS.items() for m in ms}
    found = {row.name: delta_m(row.values, rows[0].values, columns) for row in rows}
    expected = {"ew": 5.59, "nash_mtl": -4.04, "famo": -4.10, "fairgrad": -4.66}
    assert {name: found[f"{name} (published)"] for name in expected} == pytest.approx(expected, abs=0.02)
    base, row = published("deeplab", "mtan", ("gls",))
    by_task = []
    for task, metrics in nyuv2.METRICS.items():
        higher = {f"{task}/{m.name}": m.higher_is_better for m in metrics}
        by_task.append(-delta_m(row.values, base.values, higher))
    assert np.mean(by_task) == pytest.approx(3.02, abs=0.01)


@pytest.mark.parametrize("arch", nyuv2_models.ARCHS)
def test_every_architecture_gives_full_size_maps(arch: nyuv2_models.Arch) -> None:
    size = (64, 96)
    choice = nyuv2_models.Choice(arch, nyuv2_models.default_encoder(arch, None), size, nyuv2.OUT_CHANNELS)
    model = nyuv2.build_model(choice).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, *size))
    shapes = {"segmentation": (1, 13, *size), "depth": (1, 1, *size), "normal": (1, 3, *size)}
    assert {task: tuple(y.shape) for task, y in out.items()} == shapes


@pytest.mark.parametrize("encoder", ["stages", "resnet18", "resnet50", "segnet"])
def test_every_encoder_gives_full_size_maps(encoder: nyuv2_models.EncoderName) -> None:
    choice = nyuv2_models.Choice("mmoe", encoder, (64, 96), {"depth": 1, "normal": 3}, options={"num_experts": 1})
    with torch.no_grad():
        assert nyuv2.build_model(choice).eval()(torch.zeros(1, 3, 64, 96))["depth"].shape == (1, 1, 64, 96)


def test_what_cannot_be_built_is_refused() -> None:
    def refused(message: str, arch: str, encoder: str, **options: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            nyuv2.build_model(
                nyuv2_models.Choice(arch, encoder, (64, 96), {"depth": 1, "normal": 3}, **options)  # type: ignore[arg-type]
            )

    refused(r"cuts its encoder into stages, and segnet .* has none", "ple", "segnet")
    refused("segnet_mtan is a SegNet", "segnet_mtan", "resnet50")
    refused("stages has no published weights", "hps", "stages", pretrained=True)
    refused("MMoE has no option 'k'", "mmoe", "small", options={"k": 2})
    refused("num_experts must be a whole number", "mmoe", "small", options={"num_experts": "many"})
    refused("not supported between", "dselect_k", "small", options={"gamma": "wide"})


def test_the_schedules_inside_architectures() -> None:
    ltb = nyuv2.build_model(nyuv2_models.Choice("ltb", "stages", (16, 16), {"a": 1, "b": 1}))
    nyuv2.anneal(ltb, 0, 200)
    assert ltb.temperature.isinf()
    nyuv2.anneal(ltb, 99, 200)
    assert float(ltb.temperature) == 1.0
    adashare = nyuv2.build_model(nyuv2_models.Choice("adashare", "stages", (16, 16), {"a": 1, "b": 1}))
    nyuv2.anneal(adashare, 2, 200)
    assert float(adashare.temperature) == pytest.approx(5 * 0.965**2)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradsurgery.recipes.nyuv2", *TINY, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def strike(process: subprocess.Popen[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Signal a run once it has written a checkpoint past its first epoch."""
    deadline = time.monotonic() + 120
    seen = None
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "epochs.csv").exists():
            now = (folder / "checkpoint.pt").stat().st_mtime_ns
            if seen is not None and now != seen:
                break
            seen = now
        time.sleep(0.002)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in csv.DictReader(file)]


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, cache: Path) -> None:
    common = ("--method", "famo", "--epochs", "8", "--cache", cache, "--checkpoint-every", "1")
    parts, whole = tmp_path / "parts/famo-seed0", tmp_path / "whole/famo-seed0"

    code, out = strike(start(*common, "--out", tmp_path / "parts"), parts, signal.SIGINT)
    assert code == 130 and "Continue with:" in out and "Traceback" not in out, out
    assert f"--out {tmp_path / 'parts'} --resume" in out
    interrupted = checkpoint.load(parts / "checkpoint.pt")["run"]

    code, _ = strike(start(*common, "--out", tmp_path / "parts", "--resume"), parts, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed = checkpoint.load(parts / "checkpoint.pt")["run"]
    assert 0 < interrupted["epoch"] < killed["epoch"] + 1 <= 8

    code, out = run(*common, "--out", tmp_path / "parts", "--resume")
    assert code == 0, out
    code, out = run(*common, "--out", tmp_path / "whole")
    assert code == 0, out
    ours, theirs = (checkpoint.load(folder / "checkpoint.pt") for folder in (parts, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours["model"].values(), theirs["model"].values(), strict=True))
    for name, count in (("epochs.csv", 8), ("steps.csv", 48)):
        assert rows(parts / name) == rows(whole / name)
        assert len(rows(parts / name)) == count


def test_the_demo(tmp_path: Path, cache: Path) -> None:
    code, out = run("--epochs", "2", "--cache", cache, "--out", tmp_path / "out")
    assert code == 0, out
    lines = [line.split()[0] for line in out.splitlines() if line.startswith((" constant", " ew", " cagrad"))]
    assert lines == ["constant", "ew", "cagrad"], out
    for words in ("mIoU", "PAcc", "abs", "rel", "median", "<11.25", "<22.5", "<30", "Δm vs", "s/step", "cosine to 0"):
        assert words in out
    for name in ("table.csv", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for name in ("epochs.csv", "steps.csv", "checkpoint.pt", "predictions.png", "weights.png"):
        assert (tmp_path / "out/cagrad-seed0" / name).stat().st_size > 0
    assert list((tmp_path / "out/cagrad-seed0/tensorboard").iterdir())
    assert "cosine/segmentation, depth" in rows(tmp_path / "out/cagrad-seed0/steps.csv")[0]


def test_real_data_and_its_mistakes_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = render_rooms(tmp_path / "nyuv2", train=3, val=2, height=24, width=32, dtype=np.float64)

    def main(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["nyuv2", "--device", "cpu", *map(str, arguments)])
        try:
            nyuv2.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    small = ("--encoder", "small", "--epochs", 2, "--method", "ew")
    code, out, _ = main("--data", root, "--out", tmp_path / "out", *small)
    assert code == 0
    assert "STL (published)" in out and "38.30" in out and "mean of the last 2 epochs" in out
    assert "lr halved every 100 epochs" in out and "batch 2" in out

    # Another architecture, by LibMTL's protocol, whose row and baseline stand beside it.
    options = ("--protocol", "deeplab", "--pretrained", "False", "--encoder", "stages", "--batch-size", 2)
    chosen = ("--arch", "mmoe", "--arch-option", "num_experts=2", "stem=1", "--epochs", 2, "--method", "ew")
    code, out, _ = main("--data", root, "--out", tmp_path / "mmoe", *options, *chosen)
    assert code == 0
    assert "hps ew (LibMTL)" in out and "53.02" in out and "the best on the test set" in out
    words = " ".join(out.split())
    assert "arch mmoe num_experts=2 stem=1" in words and "weight decay 1e-05" in words

    code, _, err = main("--data", root, "--arch", "ple", "--out", tmp_path / "ple", *small)
    assert code == 2 and "cuts its encoder into stages, and small" in err
    code, _, err = main("--data", tmp_path / "nowhere", *small)
    assert code == 2 and "nowhere is missing: expected" in err
    code, _, err = main("--data", root, "--out", tmp_path / "other", "--encoder", "small", "--method", "pcgrat")
    assert code == 2 and "There is no method named 'pcgrat'" in err
