"""What a benchmark is: data and functions in frozen dataclasses. Nothing here is made to be subclassed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torchmetrics
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

Sample = tuple[Any, dict[str, Any]]
"""An input, or {task: input}, and {task: target}."""

Predictor = Callable[[Any], Mapping[str, Tensor]]
"""A batch of inputs -> {task: prediction}; a model is one."""


class RecipeError(Exception):
    """A mistake of the user's or in the data, shown without a traceback: what, where, and what was expected."""


@dataclass(frozen=True)
class Metric:
    """One column of the table."""

    name: str
    unit: str = ""
    higher_is_better: bool = False
    scale: float = 1.0
    """factor from the meter's value to the reported unit: 100 for a fraction shown in percent"""
    digits: int = 2


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is judged."""

    loss: Callable[[Tensor, Any], Tensor]
    """(prediction, target) of a batch -> scalar with a graph"""
    meter: Callable[[], torchmetrics.Metric | torchmetrics.MetricCollection]
    """a fresh meter; `compute()` gives {metric name: value}, or just the value if there is one metric"""
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table: `values` by `task/metric`."""

    name: str
    values: Mapping[str, float]
    seconds_per_step: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """Everything that a run needs apart from the method and the seed."""

    name: str
    tasks: Mapping[str, Task]
    train: Dataset[Sample]
    """map-style and sized, like `test`; items are `Sample`s of tensors"""
    test: Dataset[Sample]
    model: Callable[[Sequence[str]], nn.Module]
    """task names -> a freshly initialised module that maps a batch of inputs to {task: prediction}"""
    optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
    """named parameters -> the base optimizer; the names give `--blocks module` its modules"""
    epochs: int
    batch_size: int
    test_batch_size: int
    description: str = ""
    """of the data, for the title of the table"""
    shared: Callable[[Any], Iterable[nn.Parameter]] | None = None
    """model -> its shared parameters (`HPS.shared_parameters`); None lets the optimizer find them"""
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    """stepped after each epoch"""
    augment: Callable[[Sample, np.random.Generator], Sample] | None = None
    """drawn from (seed, epoch, index) alone"""
    last: int = 1
    """the reported metrics are the mean over so many last epochs; 0: those of the epoch with the best mean of the
    tasks' Delta-m against the first, which looks at the test set"""
    drop_last: bool = False
    """whether an epoch leaves out a last batch that is smaller"""
    each_epoch: Callable[[Any, int, int], None] | None = None
    """called with model, epoch (from 0) and number of epochs as an epoch begins: schedules inside the model"""
    floor: Callable[[], Predictor] | None = None
    """the predictor that has seen no input, the table's first row"""
    published: tuple[Row, ...] = ()
    """published rows, shown in the table; Delta-m is taken against the first"""
    pictures: Callable[[Predictor, Path, str], None] | None = None
    """(predictor, folder, title) -> pictures in that folder"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """plain values that a resumed run must agree on: data, model, learning rate, schedule"""

    @property
    def columns(self) -> dict[str, Metric]:
        """`task/metric` -> Metric, in the order of the table."""
        return {f"{name}/{metric.name}": metric for name, task in self.tasks.items() for metric in task.metrics}

    def only(self, task: str) -> "Benchmark":
        """The same benchmark with a single task, for a single-task baseline."""
        return replace(self, tasks={task: self.tasks[task]})
