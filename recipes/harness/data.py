"""Order and augmentation of the training data: functions of (seed, epoch, index), so that a run can start anywhere."""

import signal
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradsurgery.recipes.harness.benchmark import Benchmark, RecipeError, Sample
from gradsurgery.recipes.harness.processes import ALONE, Part

_ORDER, _AUGMENT = 0, 1


def size(data: Dataset[Any]) -> int:
    return len(cast(Any, data))


def steps_per_epoch(benchmark: Benchmark) -> int:
    """The last batch may be smaller, unless such a one is dropped."""
    full, rest = divmod(size(benchmark.train), benchmark.batch_size)
    return full + (rest > 0 and not benchmark.drop_last)


def epoch_batches(
    n: int, batch_size: int, *, seed: int, epoch: int, start: int = 0, draw: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, index) from step `start` on: a permutation of range(n) that (seed, epoch, draw) decide."""
    order = np.random.default_rng([_ORDER, seed, epoch, *_extra(draw)]).permutation(n).tolist()
    for first in range(start * batch_size, n, batch_size):
        yield [(epoch, index) for index in order[first : first + batch_size]]


class _Augmented(Dataset[Sample]):
    """Items by (epoch, index), so that worker processes need no news of the epoch."""

    def __init__(self, benchmark: Benchmark, seed: int, draw: int = 0) -> None:
        self.data, self.augment, self.seed, self.draw = benchmark.train, benchmark.augment, seed, draw

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self.data[index]
        if self.augment is None:
            return sample
        return self.augment(sample, np.random.default_rng([_AUGMENT, self.seed, epoch, index, *_extra(self.draw)]))


def train_batches(
    benchmark: Benchmark,
    *,
    seed: int,
    epoch: int,
    start: int,
    device: torch.device,
    workers: int,
    draw: int = 0,
    part: Part = ALONE,
) -> Iterator[tuple[Sample, float]]:
    """The batches of one epoch from step `start` on, on `device`; those of another `draw` have their own order.

    Of several processes, each has its part of every batch, with the factor that makes the mean of their losses that of
    the batch's samples, 1 where all parts are alike.
    """
    batches = epoch_batches(size(benchmark.train), benchmark.batch_size, seed=seed, epoch=epoch, start=start, draw=draw)
    wanted = list(batches)[: steps_per_epoch(benchmark) - start]
    mine = [batch[part.rank :: part.size] for batch in wanted]
    factors = [len(own) * part.size / len(batch) for own, batch in zip(mine, wanted, strict=True)]
    return zip(_load(_Augmented(benchmark, seed, draw), mine, device, workers), factors, strict=True)


def check_parts(benchmark: Benchmark, part: Part) -> None:
    """Raises RecipeError where a batch has too few samples to give each process one."""
    n, b = size(benchmark.train), benchmark.batch_size
    smallest = b if benchmark.drop_last or n % b == 0 else n % b
    if smallest < part.size:
        raise RecipeError(
            f"{part.size} processes share each batch, and there is one of {smallest} samples ({n} in batches of {b}): "
            "choose another batch size, or fewer processes."
        )


def _extra(draw: int) -> tuple[int, ...]:
    return (draw,) if draw else ()


def test_batches(
    benchmark: Benchmark, *, device: torch.device, workers: int = 0, part: Part = ALONE
) -> Iterator[Sample]:
    """The test set in its own order, in batches of `test_batch_size`, on `device`; whole ones by turns, where there are
    several processes, since metrics may be means over batches."""
    n, b = size(benchmark.test), benchmark.test_batch_size
    batches = [list(range(i, min(i + b, n))) for i in range(0, n, b)]
    return _load(benchmark.test, batches[part.rank :: part.size], device, workers)


def to_device(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, Mapping):
        return {key: to_device(value, device) for key, value in x.items()}
    return x


def _load(data: Dataset[Any], batches: list[list[Any]], device: torch.device, workers: int) -> Iterator[Sample]:
    # A loader draws a base seed when it is iterated: from a generator of its own, so that the global one, which
    # dropout uses and a checkpoint keeps, does not depend on how often an epoch was resumed.
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=torch.Generator().manual_seed(0),
    )
    for x, targets in loader:
        yield to_device(x, device), to_device(targets, device)


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
