"""PLE, progressive layered extraction: CGC in levels, the shared experts with a path and a gate of their own.

Tang, Liu, Zhao, Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
Recommendations", RecSys 2020, https://doi.org/10.1145/3383313.3412236, section 3.2, eq. 4 to 6. In each level a task's
gate mixes its own and the shared experts, and reads what its own experts are given; the shared gate mixes the experts
of all tasks, and its result enters the next level's shared experts. The last level has no shared gate. A level is a
stage of the encoder.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.gates import Gate, mixed, stacked
from gradsurgery.architectures.positions import pool
from gradsurgery.architectures.stages import Encoder, fresh_stages

SHARED = ""
"""the shared experts' path, beside those of the tasks"""


@final
class PLE(Architecture):
    """CGC levels, the outputs of one entering the next.

    The gradient of a task passes the shared gates into other tasks' experts, so that only what follows the last shared
    gate is a task's own. Each task has a z of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts; a function makes experts with weights of their own, a module
            is copied.
        decoders: task -> any module from the last level's mixed features to that task's prediction.
        shared_experts: in each level, for all tasks.
        task_experts: in each level, for each task.
        stem: first stages that all share, before the first level; 0: the first gates read the input, of an image no
            more than its mean colour.

    Raises:
        ValueError: no experts of one kind, no stage left for a level, or a width that cannot be found.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: Mapping[str, nn.Module],
        *,
        shared_experts: int = 1,
        task_experts: int = 1,
        stem: int = 1,
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("PLE", decoders)
        check_count("shared_experts", shared_experts)
        check_count("task_experts", task_experts)
        numbers = {SHARED: shared_experts, **dict.fromkeys(decoders, task_experts)}
        encoders = fresh_stages(encoder, sum(numbers.values()))
        first, remaining = encoders[0], iter(encoders)
        owned = {path: [list(next(remaining)) for _ in range(number)] for path, number in numbers.items()}
        if not 0 <= stem < len(first):
            raise ValueError(f"stem must leave a stage of {len(first)} for a level; got {stem}.")
        widths = [first.in_width, *first.widths]
        if widths[stem] is None:
            raise ValueError("Can't tell how many channels the encoder takes, which gates must know: pass in_width=.")
        self.stem = first.part(0, stem)
        self.levels = nn.ModuleList(
            Level(
                {path: [stages[i] for stages in experts] for path, experts in owned.items()},
                widths[i] or 0,
                first.channel_dim if i else first.in_dim,
                last=i == len(first) - 1,
            )
            for i in range(stem, len(first))
        )

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        entering: Tensor = self.stem(x)
        paths: dict[str, Tensor] = dict.fromkeys((SHARED, *self.tasks), entering)
        for level in self.levels:
            paths = level(paths, (*tasks,) if level is self.levels[-1] else self.tasks)
        return paths

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        last: Any = self.levels[-1]
        before: list[Any] = list(self.levels)[-2:-1]
        return [self.decoders[task], last.experts[task], *(level.gates[task] for level in (*before, last))]


@final
class Level(nn.Module):
    """Experts and gates of one level.

    Args:
        experts: path -> its experts, the shared path first.
        width: of what they are given.
        channel_dim: of what they are given.
        last: whether the shared path ends here.
    """

    def __init__(self, experts: Mapping[str, Sequence[nn.Module]], width: int, channel_dim: int, *, last: bool) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.shared = nn.ModuleList(experts[SHARED])
        self.experts = by_task({path: nn.ModuleList(own) for path, own in experts.items() if path != SHARED})
        number = {path: len(own) for path, own in experts.items()}
        over = {path: number[SHARED] + own for path, own in number.items() if path != SHARED}
        self.gates = by_task({path: Gate(width, total) for path, total in over.items()})
        self.shared_gate = None if last else Gate(width, sum(number.values()))

    def forward(self, paths: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        """What enters each path, to what leaves those of ``tasks``, and the shared one if it does not end."""
        shared = stacked([expert(paths[SHARED]) for expert in self.shared])
        own = {task: stacked([expert(paths[task]) for expert in self._own(task)]) for task in tasks}
        left = {task: mixed(self.weights(paths, task), torch.cat([shared, own[task]])) for task in tasks}
        if self.shared_gate is None:
            return left
        return left | {SHARED: mixed(self.weights(paths, SHARED), torch.cat([shared, *own.values()]))}

    def weights(self, paths: Mapping[str, Tensor], path: str) -> Tensor:
        """(B, experts), on the simplex; shared experts first, then the path's own, or those of all tasks."""
        gate: Any = self.shared_gate if path == SHARED else self.gates[path]
        return gate(pool(paths[path], self.channel_dim))

    def _own(self, task: str) -> Any:
        return self.experts[task]
