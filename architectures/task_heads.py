"""Heads that samples are routed to, for batches in which each sample has one task of its own.

The heads of multi-task and continual-learning classifiers (CLArena's `HeadsMTL` among others), with classes that differ
from task to task and samples of any tasks side by side.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh


class Routed(dict[str, Tensor]):
    """task -> (n_t, C_t) predictions of its samples; tasks that the batch lacks are not there.

    Attributes:
        index: task -> (n_t,) where its samples lie in the batch.
    """

    def __init__(self, outputs: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> None:
        super().__init__(outputs)
        self.index = dict(index)

    def padded(self, fill: float = -torch.inf) -> Tensor:
        """(B, max C_t), in the order of the batch; ``fill`` where a task has fewer classes."""
        if not self:
            return torch.empty(0, 0)
        rows = [(self.index[task], out.reshape(len(out), -1)) for task, out in self.items()]
        size = (sum(len(at) for at, _ in rows), max(out.shape[1] for _, out in rows))
        whole = rows[0][1].new_full(size, fill)
        for at, out in rows:
            whole[at, : out.shape[1]] = out
        return whole

    def samples(self) -> list[Tensor]:
        """B predictions (C_t,), in the order of the batch."""
        found = {int(i): row for task, out in self.items() for i, row in zip(self.index[task], out, strict=True)}
        return [found[i] for i in range(len(found))]

    def targets(self, y: Tensor) -> dict[str, Tensor]:
        """A batch's targets (B, ...), by task."""
        return {task: y[at] for task, at in self.index.items()}


@final
class TaskHeads(Architecture):
    """One encoder, and a head for each task, which each sample of `route` or all of `forward` are given to.

    Args:
        encoder: any module from an input to features (B, ...), or a function that makes one.
        decoders: task -> any module from features to that task's prediction.
        ids: integer -> task, for ids in tensors; None: a task's name if all are whole numbers, else its position.

    Raises:
        ValueError: an id of no task.

    >>> model = TaskHeads(nn.Linear(4, 8), {"1": nn.Linear(8, 2), "2": nn.Linear(8, 5)})
    >>> routed = model.route(torch.zeros(3, 4), torch.tensor([2, 1, 2]))
    >>> {task: tuple(y.shape) for task, y in routed.items()}, tuple(routed.padded().shape)
    ({'1': (1, 2), '2': (2, 5)}, (3, 5))
    """

    def __init__(
        self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, ids: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("TaskHeads", decoders)
        (self.encoder,) = fresh(encoder, 1)
        named = all(task.isdecimal() for task in decoders)
        self.ids = dict(ids) if ids is not None else {int(t) if named else i: t for i, t in enumerate(decoders)}
        if unknown := [task for task in self.ids.values() if task not in decoders]:
            raise ValueError(f"ids name tasks {unknown} that have no decoder: there are {list(decoders)}.")

    def features(self, x: Any, tasks: Sequence[str]) -> Any:
        return self.encoder(x)

    def predict(self, z: Any, task: str) -> Tensor:
        return self.decoders[task](z)

    def task_parts(self, task: str) -> Iterable[Part]:
        return (self.decoders[task],)

    def route(self, x: Any, task_ids: Tensor | np.ndarray | Sequence[int | str] | int | str) -> Routed:
        """Each sample through its task's head.

        A loss of each task for `MTLOptimizer`, which knows a task that the batch lacks by its None, as all tasks must
        be named from the first step on: `{t: loss(routed[t], targets[t]) if t in routed else None for t in
        model.tasks}`.

        Args:
            x: a batch of B.
            task_ids: (B,) or (B, 1) integers or names, one for each sample; or one for all.

        Raises:
            ValueError: an unknown id, or another number of them than samples.
        """
        z = self.encoder(x)
        names = self._names(task_ids, len(z))
        if len(names) != len(z):
            raise ValueError(f"Got {len(names)} task_ids for a batch of {len(z)}: pass one for each sample, or one.")
        present = [task for task in self.tasks if task in names]
        index = {task: [i for i, name in enumerate(names) if name == task] for task in present}
        at = {task: torch.tensor(found, device=z.device) for task, found in index.items()}
        return Routed({task: self.decoders[task](z[at[task]]) for task in present}, at)

    def _names(self, task_ids: Any, batch: int) -> list[str]:
        if isinstance(task_ids, Tensor | np.ndarray):
            task_ids = task_ids.reshape(-1).tolist() if task_ids.ndim else task_ids.item()
        one = isinstance(task_ids, str) or not isinstance(task_ids, Sequence)
        ids: list[Any] = [i.item() if isinstance(i, Tensor) else i for i in ([task_ids] * batch if one else task_ids)]
        names = {task: task if isinstance(task, str) else self.ids.get(task, "") for task in ids}
        for task, name in names.items():
            if name not in self.decoders:
                raise ValueError(f"No task has the id {task!r}: there are {self.ids}.")
        return [names[task] for task in ids]
