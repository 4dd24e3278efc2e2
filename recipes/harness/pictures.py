"""Pictures with matplotlib's Agg backend; no pyplot, no global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.data import Dataset

from gradsurgery.recipes.harness.benchmark import Benchmark, Predictor, Sample
from gradsurgery.recipes.harness.data import size

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
INVALID = (0.75, 0.75, 0.75)
_LABELS = (
    "#8c564b", "#1f77b4", "#f0e9b2", "#e377c2", "#b08d57", "#d62728", "#9467bd",
    "#ffbb78", "#2ca02c", "#ff7f0e", "#303030", "#bcd3ea", "#17becf",
)  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def weights_and_cosines(trace: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Task weights, and cosines between task gradients where they were measured, over the steps."""
    kinds = [k for k in ("weight", "cosine") if any(key.startswith(k + "/") for row in trace for key in row)]
    if not kinds:
        return
    figure = new_figure(5.2 * len(kinds), 3.4)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for ax, kind in zip(axes, kinds, strict=True):
        keys = dict.fromkeys(key for row in trace for key in row if key.startswith(kind + "/"))
        for key, colour in zip(keys, _cycle(len(keys)), strict=True):
            points = np.array([(row["step"], row[key]) for row in trace if key in row])
            ax.plot(*points.T, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(points[:, 0], _smooth(points[:, 1]), color=colour, label=key.split("/", 1)[1])
        ax.set_xlabel("step")
        ax.set_title("task weights" if kind == "weight" else "cosine between task gradients", fontsize=10)
        if kind == "cosine":
            ax.axhline(0, color="black", linewidth=0.6)
            ax.set_ylim(-1.02, 1.02)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, title="running mean" if len(trace) > 1 else None, title_fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], floor: Mapping[str, float], benchmark: Benchmark
) -> Figure:
    """Every test metric over the epochs, a line a run; the constant prediction is dashed."""
    columns = benchmark.columns
    wide = min(len(columns), 5)
    tall = -(-len(columns) // wide)
    figure = new_figure(2.7 * wide, 2.3 * tall + 0.5)
    axes = figure.subplots(tall, wide, squeeze=False).ravel()
    for ax, (key, metric) in zip(axes, columns.items(), strict=False):
        for (name, history), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
            points = [(row["epoch"], row[key]) for row in history if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, marker=".", label=name)
        if key in floor:
            ax.axhline(floor[key], color="black", linestyle="--", linewidth=0.8, label="constant prediction")
        arrow = "higher is better" if metric.higher_is_better else "lower is better"
        ax.set_title(f"{key.replace('/', ' ')} [{metric.unit}]" if metric.unit else key.replace("/", " "), fontsize=9)
        ax.set_xlabel(f"epoch ({arrow})", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(alpha=0.3)
    for ax in axes[len(columns) :]:
        ax.axis("off")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    return figure


def dense(
    data: Dataset[Sample], predict: Predictor, classes: Sequence[str], path: Path, title: str, rows: int = 4
) -> None:
    """Images of the test set, and for each task the truth beside the prediction."""
    picks = np.linspace(0, size(data) - 1, min(rows, size(data))).round().astype(int).tolist()
    samples = [data[i] for i in picks]
    with torch.no_grad():
        predictions = {task: y.cpu() for task, y in predict(torch.stack([x for x, _ in samples])).items()}
    tasks = list(samples[0][1])
    height, width = samples[0][0].shape[-2:]
    columns = 1 + 2 * len(tasks)
    figure = new_figure(2.0 * columns, (2.0 * height / width + 0.06) * len(samples) + 1.5)
    axes: Any = figure.subplots(len(samples), columns, squeeze=False)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
    for row, (image, targets) in enumerate(samples):
        axes[row, 0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axes[row, 0].set_ylabel(f"test image {picks[row]}", fontsize=9)
        for k, task in enumerate(tasks):
            pair = axes[row, 1 + 2 * k : 3 + 2 * k]
            _show(pair, task, targets[task], predictions[task][row], classes, _deepest(samples))
    names = ["image", *(f"{task}\n{which}" for task in tasks for which in ("truth", "prediction"))]
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=10)
    if "depth" in tasks:
        k = tasks.index("depth")
        bar = figure.colorbar(
            axes[0, 1 + 2 * k].images[0], ax=axes[:, 1 + 2 * k : 3 + 2 * k], location="bottom", pad=0.02
        )
        bar.set_label("depth in metres", fontsize=9)
    patches = [Patch(facecolor=c, edgecolor="grey", label=n) for c, n in zip(_LABELS, classes, strict=False)]
    patches.append(Patch(facecolor=INVALID, edgecolor="grey", label="not measured"))
    figure.legend(handles=patches, loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)


def _show(
    pair: Sequence[Axes], task: str, truth: Tensor, guess: Tensor, classes: Sequence[str], deepest: float
) -> None:
    """One task of one image; pixels that were not measured are grey in the truth, and in that alone.

    Normals (x right, y down, z forward) are red to the right, green upwards, blue towards the camera.
    """
    style: dict[str, Any]
    if task == "segmentation":
        style = {"cmap": ListedColormap(_LABELS[: len(classes)]), "vmin": -0.5, "vmax": len(classes) - 0.5}
        maps, valid = (truth.numpy(), guess.argmax(0).numpy()), truth.numpy() >= 0
    elif task == "depth":
        style = {"cmap": "viridis_r", "vmin": 0.0, "vmax": deepest}
        maps, valid = (truth[0].numpy(), guess[0].numpy()), truth[0].numpy() != 0
    else:
        style = {}
        unit = F.normalize(torch.stack([truth, guess]), dim=1) * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        maps, valid = tuple(((n + 1) / 2).permute(1, 2, 0).numpy() for n in unit), truth.sum(0).numpy() != 0
    for ax, values in zip(pair, maps, strict=True):
        ax.imshow(values, interpolation="nearest", **style)
    grey = np.zeros((*valid.shape, 4))
    grey[..., :3], grey[..., 3] = INVALID, ~valid
    pair[0].imshow(grey, interpolation="nearest")


def _deepest(samples: Sequence[Sample]) -> float:
    return max(float(targets["depth"].max()) if "depth" in targets else 1.0 for _, targets in samples)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the run."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low, high = np.maximum(ends - half, 0), np.minimum(ends + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _cycle(count: int) -> list[str]:
    return [LINES[i % len(LINES)] for i in range(count)]
