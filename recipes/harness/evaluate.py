"""Every metric of a predictor over the test set."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery.recipes.harness.benchmark import Benchmark, Predictor
from gradsurgery.recipes.harness.data import test_batches
from gradsurgery.recipes.harness.metrics import delta_m
from gradsurgery.recipes.harness.processes import ALONE, Part


@torch.no_grad()
def evaluate(
    benchmark: Benchmark,
    predict: Predictor,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    each_batch: Callable[[], None] = lambda: None,
    part: Part = ALONE,
) -> dict[str, float]:
    """Test metrics in the reported units, by `task/metric`; of several processes, each passes its part of the test set
    and has the metrics of all of it.

    Args:
        predict: a model, put into eval mode and back, or any other function of a batch of inputs.
        each_batch: called after every batch; what it raises ends the evaluation.
    """
    meters = {name: task.meter().to(device) for name, task in benchmark.tasks.items()}
    training = predict.training if isinstance(predict, nn.Module) else False
    if isinstance(predict, nn.Module):
        predict.eval()
    try:
        for x, targets in test_batches(benchmark, device=torch.device(device), workers=workers, part=part):
            predictions = predict(x)
            for name, meter in meters.items():
                meter.update(predictions[name], targets[name])
            each_batch()
    finally:
        if isinstance(predict, nn.Module):
            predict.train(training)
    row: dict[str, float] = {}
    for name, task in benchmark.tasks.items():
        values = meters[name].compute()
        if isinstance(values, Tensor):
            values = {task.metrics[0].name: values}
        row |= {f"{name}/{metric.name}": metric.scale * float(values[metric.name]) for metric in task.metrics}
    return row


def reported(benchmark: Benchmark, history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The test metrics that `benchmark.last` chooses: a mean over last epochs, or the best epoch."""
    rows = history[-benchmark.last :] if benchmark.last else [best(benchmark, history)]
    return {key: float(np.mean([row[key] for row in rows])) for key in benchmark.columns}


def best(benchmark: Benchmark, history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The epoch with the lowest mean, over tasks, of Delta-m against the first, as LibMTL chooses it."""
    higher = [
        {f"{name}/{m.name}": m.higher_is_better for m in task.metrics if history[0][f"{name}/{m.name}"]}
        for name, task in benchmark.tasks.items()
    ]
    return min(history, key=lambda row: np.mean([delta_m(row, history[0], task) for task in higher if task] or [0.0]))
