"""Hard parameter sharing: one encoder for all tasks, one decoder for each.

Caruana, "Multitask Learning: A Knowledge-Based Source of Inductive Bias", ICML 1993; Machine Learning 28, 1997,
https://doi.org/10.1023/A:1007379606734.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn


@final
class HPS(nn.Module):
    """`forward(x) = decode(representation(x))`, with nothing kept between the two.

    Args:
        encoder: any module from an input to a representation z.
        decoders: task -> any module from z to that task's prediction; the order is the order of the tasks.

    Raises:
        ValueError: no decoders, or a task name that a module cannot carry.

    >>> import torch
    >>> model = HPS(nn.Linear(4, 8), {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)})
    >>> {task: tuple(y.shape) for task, y in model(torch.zeros(2, 4)).items()}
    {'depth': (2, 1), 'normal': (2, 3)}
    """

    def __init__(self, encoder: nn.Module, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not decoders:
            raise ValueError("HPS needs one decoder a task, and `decoders` is empty: pass {task name: module}.")
        self.encoder = encoder
        try:
            self.decoders = nn.ModuleDict(decoders)
        except KeyError as error:
            raise ValueError(
                f"HPS keeps its decoders in a torch.nn.ModuleDict, which refuses one of the task names "
                f"{list(decoders)}: {error.args[0]}. Rename that task."
            ) from error

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.decoders)

    def forward(self, x: Any) -> dict[str, Tensor]:
        """One input for all tasks, or `{task: input}` for the tasks it names.

        Returns:
            task -> prediction, for every task, or for those of the mapping in its order.

        Raises:
            ValueError: the mapping is empty or names a task that there is no decoder for.
        """
        return self.decode(self.representation(x))

    def representation(self, x: Any) -> Any:
        """z of one shared input; of `{task: input}`, `{task: z}`."""
        if isinstance(x, Mapping):
            self._check(tuple(x))
            return {task: self.encoder(x_task) for task, x_task in x.items()}
        return self.encoder(x)

    def decode(self, z: Any, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Predictions from `representation`'s result, for `tasks` (None: all that z serves)."""
        per_task = isinstance(z, Mapping)
        names = tuple(tasks) if tasks is not None else tuple(z) if per_task else self.tasks
        self._check(names)
        if per_task and (missing := [task for task in names if task not in z]):
            raise ValueError(f"The representation has no entry for the tasks {missing}: it has {list(z)}.")
        return {task: self.decoders[task](z[task] if per_task else z) for task in names}

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that no single task has to itself: the encoder's, and what decoders have in common."""
        own = {id(p) for task in self.decoders for p in self.task_parameters(task)}
        return (p for p in self.parameters() if id(p) not in own)

    def task_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """The parameters which `task` alone reaches; with `shared_parameters`, a partition of `parameters`.

        Raises:
            ValueError: an unknown task.
        """
        self._check((task,))
        users = Counter(id(p) for decoder in self.decoders.values() for p in decoder.parameters())
        users.update(2 * [id(p) for p in self.encoder.parameters()])
        return (p for p in self.decoders[task].parameters() if users[id(p)] == 1)

    def _check(self, tasks: tuple[str, ...]) -> None:
        if not tasks:
            raise ValueError(f"No task was asked for: this model has {list(self.tasks)}.")
        if unknown := [task for task in tasks if task not in self.decoders]:
            raise ValueError(f"Unknown tasks {unknown}: this model has {list(self.tasks)}.")
