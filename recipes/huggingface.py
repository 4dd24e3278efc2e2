"""A small vision transformer with two heads, trained by Hugging Face's `Trainer` on overlaid digits.

    python -m gradsurgery.recipes.huggingface --method ew cagrad

Test accuracy in percent after 6 epochs, n=1 (seed 0), left / right digit: `ew` 85.0 / 84.0, `cagrad` 86.4 / 85.4. Both
runs took 70 seconds on two threads of an AMD EPYC with torch 2.14.1 and transformers 5.24.0. (The convolutional network
of the digits recipe, twice as large and with a prior for images, gets beyond 92.)

Data and tasks are those of `gradsurgery.recipes.digits`: two handwritten digits on one canvas. The network is
transformers' `ViTModel` on patches of 2 x 2 pixels, from random weights; what is trained on it is a subclass of
`gradsurgery.integrations.huggingface.MultiTaskTrainer` with nothing in it but the losses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTModel, set_seed

from gradsurgery.integrations.huggingface import MultiTaskTrainer
from gradsurgery.recipes.digits import CANVAS, TASKS, Pairs, load_pairs, report_accuracies, save_pictures
from gradsurgery.recipes.harness.benchmark import RecipeError, Sample
from gradsurgery.recipes.harness.compare import command, free_folder


@dataclass(frozen=True)
class Args:
    """Train a transformer on two digits at once, and compare methods."""

    method: tuple[str, ...] = ("ew", "cagrad")
    """methods to compare, each trained in turn from the same seed; `gradsurgery.list_methods()` names them all"""
    pairs: tuple[int, int] = (6000, 1000)
    """training and test pairs"""
    epochs: int = 6
    """passes over the training pairs"""
    batch_size: int = 64
    """pairs a micro-batch"""
    accumulate: int = 1
    """micro-batches a step"""
    lr: float = 2e-3
    """AdamW's learning rate, with a cosine to 0 and one epoch of warm-up"""
    automatic: bool = False
    """let the Trainer pass the combined loss backward"""
    seed: int = 0
    """decides the initial weights and the order of the data"""
    out: Path = Path("runs/huggingface")
    """folder of the results; one with results is never written over: without `--resume` a new one beside it is taken"""
    resume: bool = False
    """continue each method in `out` from its last checkpoint"""


class TwoHeads(nn.Module):
    """Canvases (B, 1, 10, 10) -> {task: logits (B, 10)}."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=CANVAS,
            patch_size=2,
            num_channels=1,
        )
        self.encoder = ViTModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(48, 10) for task in TASKS})

    def forward(self, canvas: Tensor) -> dict[str, Tensor]:
        z = self.encoder(canvas).last_hidden_state[:, 0]
        return {task: head(z) for task, head in self.heads.items()}


class DigitsTrainer(MultiTaskTrainer):
    """The losses of both digits."""

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor | None], Any]:
        logits = model(inputs["canvas"])
        return {task: F.cross_entropy(logits[task], inputs[task]) for task in TASKS}, logits


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """{"canvas": (B, 1, 10, 10), "left": (B,), "right": (B,)}."""
    targets = {task: torch.stack([target[task] for _, target in samples]) for task in TASKS}
    return {"canvas": torch.stack([canvas for canvas, _ in samples]), **targets}


def accuracies(found: EvalPrediction) -> dict[str, float]:
    """Accuracy of each task, in percent."""
    pairs = zip(TASKS, found.predictions, found.label_ids, strict=True)  # pyright: ignore[reportArgumentType]
    return {f"accuracy/{task}": float(100 * (logits.argmax(-1) == target).mean()) for task, logits, target in pairs}


def make_trainer(args: Args, method: str, folder: Path, train: Pairs, test: Pairs) -> DigitsTrainer:
    """The trainer of one method, from the seed."""
    set_seed(args.seed)
    steps = -(-args.pairs[0] // (args.batch_size * args.accumulate))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=500,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps,
        logging_steps=50,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        label_names=list(TASKS),
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    return DigitsTrainer(
        model=TwoHeads(),
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        compute_metrics=accuracies,
        method=method,
        shared=lambda model: model.encoder.parameters(),
        surgery={"seed": args.seed},
        automatic=args.automatic,
    )


def run(args: Args) -> list[dict[str, Any]]:
    """Trains every method; returns a row of test metrics for each."""
    if min(*args.pairs, args.epochs, args.batch_size, args.accumulate) < 1 or not args.lr > 0:
        raise RecipeError("--pairs, --epochs, --batch-size, --accumulate and --lr must be above 0.")
    out = args.out if args.resume else free_folder(args.out)
    train, test = load_pairs(*args.pairs)
    rows = []
    for method in args.method:
        folder = out / f"{method}-seed{args.seed}"
        try:
            trainer = make_trainer(args, method, folder, train, test)
            trainer.create_optimizer()
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error)) from error
        trainer.train(resume_from_checkpoint=args.resume and any(folder.glob("checkpoint-*")))
        found = trainer.evaluate()
        rows.append({"method": method, **{f"accuracy/{task}": found[f"eval_accuracy/{task}"] for task in TASKS}})
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
        model, device = trainer.model, trainer.args.device
        assert model is not None
        model.eval()
        title = f"{method}, Trainer on {len(train)} pairs"
        save_pictures(test, lambda x, m=model, d=device: m(x.to(d)), folder / "predictions.png", title)
    report_accuracies(rows, out)
    return rows


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.huggingface", description=__doc__)
    command(lambda: run(args))


if __name__ == "__main__":
    main()
