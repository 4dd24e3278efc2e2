"""Every metric of a predictor over the test set."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery.recipes.harness.benchmark import Benchmark, Predictor
from gradsurgery.recipes.harness.data import test_batches


@torch.no_grad()
def evaluate(
    benchmark: Benchmark,
    predict: Predictor,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    each_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Test metrics in the reported units, by `task/metric`.

    Args:
        predict: a model, put into eval mode and back, or any other function of a batch of inputs.
        each_batch: called after every batch; what it raises ends the evaluation.
    """
    meters = {name: task.meter().to(device) for name, task in benchmark.tasks.items()}
    training = predict.training if isinstance(predict, nn.Module) else False
    if isinstance(predict, nn.Module):
        predict.eval()
    try:
        for x, targets in test_batches(benchmark, device=torch.device(device), workers=workers):
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
    """The mean of the test metrics over the last `benchmark.last` epochs."""
    rows = history[-benchmark.last :]
    return {key: float(np.mean([row[key] for row in rows])) for key in benchmark.columns}
