"""What every architecture is: an encoder's side, a task's side, and which parameters belong to whom."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

Part = nn.Module | nn.Parameter


class PerTask(dict[str, Any]):
    """{task: an input of its own, or what came of it}."""


class Architecture(nn.Module, ABC):
    """`forward(x) = decode(representation(x))`, with nothing kept between the two.

    A subclass gives `features`, `predict` and `task_parts`; inputs of one kind or the other, a choice of tasks, and the
    partition of the parameters follow from them.

    Args:
        tasks: their names, in order.

    Attributes:
        takes_mappings: whether a mapping is one input, False at first; an input for each task is then
            `PerTask({task: input})`.
    """

    takes_mappings = False

    def __init__(self, tasks: Iterable[str]) -> None:
        super().__init__()
        self._tasks = tuple(tasks)

    @abstractmethod
    def features(self, x: Any, tasks: Sequence[str]) -> Any:
        """The representation of one input, as far as these tasks need it."""

    @abstractmethod
    def predict(self, z: Any, task: str) -> Tensor:
        """One task's prediction from `features`."""

    @abstractmethod
    def task_parts(self, task: str) -> Iterable[Part]:
        """Modules and parameters that one task's loss alone reaches."""

    @property
    @final
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    @final
    def forward(self, x: Any, tasks: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """One input for all tasks, or `{task: input}` for the tasks it names.

        Args:
            tasks: the one or those that are wanted; None: all, or all of the mapping.

        Returns:
            task -> prediction, in the order of `tasks`, of the mapping, or of the model.

        Raises:
            ValueError: no task at all, or one that the model or the mapping does not have.
        """
        return self.decode(self.representation(x, tasks), tasks)

    @final
    def representation(self, x: Any, tasks: str | Sequence[str] | None = None) -> Any:
        """z of one shared input; of `{task: input}`, `{task: z}`."""
        per_task = isinstance(x, PerTask if self.takes_mappings else Mapping)
        names = self._chosen(tasks, x if per_task else None, "input")
        if per_task:
            return PerTask({task: self.features(x[task], (task,)) for task in names})
        return self.features(x, names)

    @final
    def decode(self, z: Any, tasks: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Predictions from `representation`'s result, for `tasks` (None: all that z serves)."""
        names = self._chosen(tasks, z if isinstance(z, PerTask) else None, "representation")
        return {task: self.predict(z[task] if isinstance(z, PerTask) else z, task) for task in names}

    @final
    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that no single task has to itself, whatever way tasks come to share it."""
        own = {id(p) for task in self._tasks for p in self.task_parameters(task)}
        return (p for p in self.parameters() if id(p) not in own)

    @final
    def task_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """The parameters which `task` alone reaches; with `shared_parameters`, a partition of `parameters`.

        Raises:
            ValueError: an unknown task.
        """
        self._chosen(task, None, "")
        places = Counter(id(p) for _, p in self.named_parameters(remove_duplicate=False))
        mine = [p for part in self.task_parts(task) for p in _parameters(part)]
        within = Counter(id(p) for p in mine)
        return (p for p in dict.fromkeys(mine) if within[id(p)] == places[id(p)])

    def _chosen(self, tasks: str | Sequence[str] | None, given: Mapping[str, Any] | None, what: str) -> tuple[str, ...]:
        wanted = (tasks,) if isinstance(tasks, str) else tasks
        names = tuple(wanted) if wanted is not None else tuple(given) if given is not None else self._tasks
        if not names:
            raise ValueError(f"No task was asked for: this model has {list(self._tasks)}.")
        if unknown := [task for task in names if task not in self._tasks]:
            hint = ""
            if wanted is None and not self.takes_mappings:
                hint = " A mapping is taken for {task: input}; set model.takes_mappings = True if it is one input."
            raise ValueError(f"Unknown tasks {unknown}: this model has {list(self._tasks)}.{hint}")
        if given is not None and (missing := [task for task in names if task not in given]):
            raise ValueError(f"The {what} has no entry for the tasks {missing}: it has {list(given)}.")
        return names


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError: it is no whole number, or a lower one."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}.")


def decoders_of(name: str, decoders: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A `torch.nn.ModuleDict` of an architecture's decoders.

    Raises:
        ValueError: none, or a task name that a module cannot carry.
    """
    if not decoders:
        raise ValueError(f"{name} needs one decoder a task, and `decoders` is empty: pass {{task name: module}}.")
    return by_task(decoders)


def by_task(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A `torch.nn.ModuleDict`.

    Raises:
        ValueError: it refuses a name.
    """
    try:
        return nn.ModuleDict(modules)
    except KeyError as error:
        raise ValueError(
            f"A torch.nn.ModuleDict, in which modules are kept by name, refuses one of the names {list(modules)}: "
            f"{error.args[0]}. Rename that task or layer."
        ) from error


def _parameters(part: Part) -> Iterator[nn.Parameter]:
    if isinstance(part, nn.Parameter):
        yield part
    else:
        yield from (p for _, p in part.named_parameters(remove_duplicate=False))
