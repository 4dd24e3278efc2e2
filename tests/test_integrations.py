"""Trainers of other libraries: they train as the plain loop does, and their recipes run as a user types them."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from models import Toy, batch, flat, own_random_state  # noqa: F401  (an autouse fixture)
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from gradsurgery import MTLOptimizer
from gradsurgery.integrations.huggingface import MultiTaskTrainer
from gradsurgery.integrations.lightning import MultiTaskModule, combine

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.xdist_group("integrations"),
]
ROOT = Path(__file__).resolve().parent.parent
N = 32


def values(model: nn.Module) -> Tensor:
    return flat([p.detach() for p in model.parameters()])


def data(dtype: torch.dtype = torch.float64) -> Tensor:
    return batch(N, dtype=dtype)


# Lightning


class Module(MultiTaskModule):
    """`Toy`, with whatever scheduler."""

    def __init__(self, method: str = "cagrad", schedule: Any = None, **options: Any):
        mine = ("automatic", "accumulate", "clip", "interval", "monitor")
        super().__init__(**{key: options.pop(key) for key in mine if key in options})
        self.toy = Toy()
        self._method, self._schedule, self._options = method, schedule, options

    def task_losses(self, batch: list[Tensor], batch_idx: int) -> Any:
        return dict(zip("abc", self.toy.losses(batch[0].double()), strict=True))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", torch.stack(self.toy.losses(batch[0].double())).sum())

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.toy.parameters(), 0.05, momentum=0.9)
        opt = MTLOptimizer(base, self._method, self.toy.trunk.parameters(), seed=1, **self._options)
        if self._schedule is None:
            return opt
        return {"optimizer": opt, "lr_scheduler": self._schedule(opt)}


def trainer_of(epochs: int = 2, **options: Any) -> lightning.Trainer:
    options.setdefault("enable_checkpointing", False)
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(module: lightning.LightningModule, size: int = 8, epochs: int = 2, **options: Any) -> lightning.Trainer:
    trainer = trainer_of(epochs, **options)
    trainer.fit(module, DataLoader(TensorDataset(data()), size), DataLoader(TensorDataset(data()), 16))
    return trainer


def plain(method: str = "cagrad", size: int = 8, epochs: int = 2, schedule: Any = None, **options: Any) -> Toy:
    """The same loop by hand."""
    model = Toy()
    clip, interval = options.pop("clip", None), options.pop("interval", "epoch")
    base = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    opt = MTLOptimizer(base, method, model.trunk.parameters(), seed=1, **options)
    scheduler = None if schedule is None else schedule(opt)
    for _ in range(epochs):
        for x in data().split(size):
            opt.zero_grad()
            opt.backward(dict(zip("abc", model.losses(x), strict=True)))
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            if scheduler is not None and interval == "step":
                scheduler.step()
        opt.epoch_end()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(sum(torch.stack(model.losses(x)).sum().item() for x in data().split(16)) / (N // 16))
        elif scheduler is not None and interval == "epoch":
            scheduler.step()
    return model


@pytest.mark.parametrize("method", ["cagrad", "nash_mtl", "pcgrad", "famo", "graddrop", "moco", "dwa"])
def test_manual_road_trains_as_the_plain_loop(method: str) -> None:
    module = Module(method)
    fit(module)
    torch.testing.assert_close(values(module.toy), values(plain(method)), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["cagrad", "uw"])
def test_automatic_road_trains_as_the_weighted_loop(method: str) -> None:
    module = Module(method, automatic=True)
    fit(module)
    torch.testing.assert_close(values(module.toy), values(plain(method, heads="weighted")), rtol=1e-7, atol=1e-9)


def test_automatic_road_of_any_module_is_one_line() -> None:
    class Any_(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return combine(self, self.toy.losses(batch[0].double()))

        def configure_optimizers(self) -> Any:
            return MTLOptimizer(torch.optim.SGD(self.parameters(), 0.05, momentum=0.9), "cagrad")

    module = Any_()
    fit(module, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert module.toy.trunk[0].weight.isfinite().all()


def test_micro_batches_and_clipping_are_those_of_a_large_batch() -> None:
    module = Module(accumulate=2, clip=0.3)
    fit(module, size=4)
    torch.testing.assert_close(values(module.toy), values(plain(size=8, clip=0.3)), rtol=1e-9, atol=1e-12)


def test_what_an_epoch_leaves_of_a_large_batch_is_a_step_too() -> None:
    """Eight batches of four, by three: three, three and two."""
    module = Module(accumulate=3)
    trainer = fit(module, size=4, epochs=1)
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("schedule", "interval"),
    [
        (lambda opt: StepLR(opt, 1, 0.5), "epoch"),
        (lambda opt: CosineAnnealingLR(opt, 20), "step"),
        (lambda opt: ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.9), "epoch"),
    ],
    ids=["epochs", "steps", "plateau"],
)
def test_schedulers_step_as_under_automatic_optimisation(schedule: Any, interval: str) -> None:
    module = Module(schedule=schedule, interval=interval, monitor="val")
    trainer = fit(module, epochs=3, num_sanity_val_steps=0)
    expected = plain(epochs=3, schedule=schedule, interval=interval)
    torch.testing.assert_close(values(module.toy), values(expected), rtol=1e-9, atol=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.05


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Module("nash_mtl", update_every=3)
    fit(whole, epochs=4)
    first = Module("nash_mtl", update_every=3)
    trainer = fit(first, epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Module("nash_mtl", update_every=3)
    trainer_of(4).fit(second, DataLoader(TensorDataset(data()), 8), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(values(second.toy), values(whole.toy), rtol=0, atol=0)


def test_bf16_autocast_trains() -> None:
    class Single(Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy(dtype=torch.float32)

        def task_losses(self, batch: list[Tensor], batch_idx: int) -> Any:
            return self.toy.losses(batch[0].float())

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.task_losses(batch, batch_idx)

    module = Single()
    before = values(module.toy).clone()
    fit(module, precision="bf16-mixed")
    assert values(module.toy).isfinite().all() and (values(module.toy) - before).abs().max() > 1e-3


def test_a_step_logs_losses_and_weights() -> None:
    trainer = fit(Module())
    assert {"train/loss/a", "train/weight/c", "val"} <= set(trainer.callback_metrics)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be"):
        Module(accumulate=0)
    with pytest.raises(ValueError, match="clip must be"):
        Module(clip=-1.0)
    with pytest.raises(ValueError, match="interval must be"):
        Module(interval="batch")
    with pytest.raises(ValueError, match="the trainer accumulates, clips and steps"):
        Module(automatic=True, clip=1.0)


def test_a_metric_that_nothing_logs_is_told_of() -> None:
    with pytest.raises(RuntimeError, match="which nothing has logged"):
        fit(Module(schedule=ReduceLROnPlateau, monitor="loss"))


def test_several_optimizers_are_refused() -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), torch.optim.SGD(self.toy.heads.parameters(), 0.1)]

    with pytest.raises(TypeError, match="returned 2 optimizers"):
        fit(Two())


# Hugging Face


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": data(torch.float32)[index]}


class ToyTrainer(MultiTaskTrainer):
    def compute_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        outputs = model(inputs["x"])
        targets = [(-1) ** t * inputs["x"][:, :1] * (t + 1) for t in range(3)]
        return {
            "abc"[t]: ((t + 1) * (y - target)).square().mean()
            for t, (y, target) in enumerate(zip(outputs, targets, strict=True))
        }, outputs


class PlainTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return torch.stack(model.losses(inputs["x"])).sum()


def arguments_of(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "seed": 3,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **options | changes)


def trained(kind: type[Trainer], folder: Path, size: int = 8, accumulate: int = 1, **options: Any) -> Toy:
    model = Toy(dtype=torch.float32)
    arguments = arguments_of(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, max_grad_norm=0.5
    )
    kind(model=model, args=arguments, train_dataset=Samples(), **options).train()
    return model


def shared(model: Toy) -> Any:
    return model.trunk.parameters()


def test_trainer_with_ew_trains_as_the_plain_trainer(tmp_path: Path) -> None:
    ours = trained(ToyTrainer, tmp_path, method="ew", shared=shared)
    torch.testing.assert_close(values(ours), values(trained(PlainTrainer, tmp_path)), rtol=1e-5, atol=1e-6)


def test_trainer_sums_task_gradients_of_micro_batches(tmp_path: Path) -> None:
    whole = trained(ToyTrainer, tmp_path, size=8, method="cagrad", shared=shared)
    parts = trained(ToyTrainer, tmp_path, size=4, accumulate=2, method="cagrad", shared=shared)
    torch.testing.assert_close(values(parts), values(whole), rtol=1e-4, atol=1e-6)
    ew = trained(ToyTrainer, tmp_path, size=8, method="ew", shared=shared)
    assert (values(whole) - values(ew)).abs().max() > 1e-3


def test_trainer_on_the_automatic_road_weighs_heads_too(tmp_path: Path) -> None:
    combined = trained(ToyTrainer, tmp_path, method="cagrad", shared=shared, automatic=True)
    weighted = trained(ToyTrainer, tmp_path, method="cagrad", shared=shared, surgery={"heads": "weighted"})
    torch.testing.assert_close(values(combined), values(weighted), rtol=1e-4, atol=1e-6)


def test_trainer_takes_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = Toy(dtype=torch.float32)
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda", model.trunk.parameters())
    trainer = ToyTrainer(model=model, args=arguments_of(tmp_path), train_dataset=Samples(), optimizers=(opt, None))
    assert trainer.create_optimizer() is opt


# The recipes, as typed


def started(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def recipe(name: str, *words: str, processes: int = 1) -> str:
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = started(*start, "-m", f"gradsurgery.recipes.{name}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Asserts that a recipe's command ends with a usage error that says so."""

    def check(name: str, *words: str, said: str) -> None:
        module = importlib.import_module(f"gradsurgery.recipes.{name}")
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as end:
            module.main()
        told = capsys.readouterr().err
        assert end.value.code == 2 and said in told and "Traceback" not in told

    return check


def table(folder: Path) -> list[str]:
    return (folder / "results.csv").read_text().splitlines()


def test_joint_learning_runs_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = recipe("joint_learning", "--method", "cagrad", "--epochs", "3", "--out", str(out))
    assert "test accuracy" in text
    assert {"accuracy.png", "results.csv", "cagrad-seed0"} <= {path.name for path in out.iterdir()}
    rows = table(out)
    assert rows[0].startswith("method,average_accuracy,test_on_task_digit,test_on_task_sideways,test_on_task_parity")
    # Beyond chance, which is 10, 10 and 50.
    assert float(rows[1].split(",")[2]) > 40
    again = recipe("joint_learning", "--method", "cagrad", "--epochs", "3", "--out", str(out), "--resume")
    assert table(out) == rows, again


def test_joint_learning_says_what_is_wrong(refused: Callable[..., None]) -> None:
    refused("joint_learning", "--method", "cagrat", said="cagrad")


def test_huggingface_runs_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--method", "cagrad", "--pairs", "1500", "300", "--out", str(out))
    recipe("huggingface", *words, "--epochs", "2")
    folder = out / "cagrad-seed0"
    assert (folder / "predictions.png").exists() and (out / "results.csv").exists()
    rows = json.loads((folder / "log.json").read_text())
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[1] < losses[0]
    recipe("huggingface", *words, "--epochs", "3", "--resume")
    rows = json.loads((folder / "log.json").read_text())
    assert [row["epoch"] for row in rows if "eval_loss" in row][:3] == [1, 2, 3]


ACCELERATED = ("--method", "nash_mtl", "--pairs", "1500", "300")


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("accelerate") / "out"
    recipe("accelerate_loop", *ACCELERATED, "--epochs", "3", "--out", str(out))
    return out


def test_accelerate_loop_learns(accelerated: Path) -> None:
    head, row = table(accelerated)
    assert head == "method,accuracy/left,accuracy/right"
    assert min(map(float, row.split(",")[1:])) > 40
    assert (accelerated / "nash_mtl-seed0" / "predictions.png").exists()


def test_accelerate_loop_on_two_processes_trains_as_on_one(accelerated: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    recipe("accelerate_loop", *ACCELERATED, "--epochs", "3", "--out", str(out), processes=2)
    one, two = (torch.load(folder / "nash_mtl-seed0/state/optimizer.bin") for folder in (accelerated, out))
    # Adam's second moments, over all steps; their weights drift apart by rounding, which Adam makes the most of.
    for mine, theirs in zip(one["state"].values(), two["state"].values(), strict=True):
        assert (mine["exp_avg_sq"] - theirs["exp_avg_sq"]).norm() < 0.2 * mine["exp_avg_sq"].norm()
    for mine, theirs in zip(table(accelerated)[1].split(",")[1:], table(out)[1].split(",")[1:], strict=True):
        assert abs(float(mine) - float(theirs)) < 4


def test_accelerate_loop_goes_on_after_an_interruption(accelerated: Path, tmp_path: Path) -> None:
    """Killed as soon as the first epoch's state is written."""
    out = tmp_path / "out"
    words = [*ACCELERATED, "--epochs", "3", "--out", str(out)]
    program = (
        "import os, sys, accelerate\n"
        "save = accelerate.Accelerator.save_state\n"
        "accelerate.Accelerator.save_state = lambda *args: (save(*args), os._exit(9))\n"
        f"sys.argv = ['x', *{words}]\n"
        "from gradsurgery.recipes.accelerate_loop import main\n"
        "main()\n"
    )
    assert started("-c", program).returncode == 9
    text = recipe("accelerate_loop", *words, "--resume")
    assert "epoch 2 of 3" in text and "epoch 1 of 3" not in text
    assert table(out) == table(accelerated)


def test_accelerate_loop_says_what_is_wrong(refused: Callable[..., None]) -> None:
    refused("accelerate_loop", "--method", "cagrat", said="cagrad")
    refused("accelerate_loop", "--lr", "0", said="above 0")
