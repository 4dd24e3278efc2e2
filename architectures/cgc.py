"""CGC, customized gate control: MMoE with experts of each task's own beside the shared ones.

Tang, Liu, Zhao, Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
Recommendations", RecSys 2020, https://doi.org/10.1145/3383313.3412236, section 3.1, eq. 1 to 3: a task's gate is over
its own experts and the shared ones. `PLE` is the same in several levels.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.gates import Experts, Gate, Mixture, after_stem, mixed, stacked
from gradsurgery.architectures.stages import Encoder, fresh


@final
class CGC(Architecture):
    """Shared and own experts' outputs mixed by each task's softmax gate, shared ones first.

    Args:
        encoder: of an expert; a function makes them with weights of their own, a module is copied.
        decoders: task -> any module from mixed features to that task's prediction.
        shared_experts: how many all tasks share.
        task_experts: how many each task has to itself, 0 or more, one number or one a task.
        stem: first stages of the encoder that all experts share, and whose output gates read; 0: gates read the input,
            of an image no more than its mean colour.
        gate_width: channels of what the gates read; None finds it from the encoder.

    Raises:
        ValueError: no shared expert, a number missing for a task, no stage left for experts, or a width that cannot be
            found.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: Mapping[str, nn.Module],
        *,
        shared_experts: int = 1,
        task_experts: int | Mapping[str, int] = 1,
        stem: int = 0,
        gate_width: int | None = None,
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("CGC", decoders)
        numbers = dict.fromkeys(decoders, task_experts) if isinstance(task_experts, int) else dict(task_experts)
        if numbers.keys() != decoders.keys():
            raise ValueError(f"task_experts must have a number for each of {list(decoders)}; it has {list(numbers)}.")
        check_count("shared_experts", shared_experts)
        for task, number in numbers.items():
            check_count(f"task_experts of {task!r}", number, 0)
        encoders = fresh(encoder, shared_experts + sum(numbers.values()))
        self.experts = Experts(encoders[:shared_experts], stem, gate_width)
        own = iter(encoders[shared_experts:])
        experts = {task: [after_stem(next(own), stem) for _ in range(number)] for task, number in numbers.items()}
        self.task_experts = by_task({task: nn.ModuleList(modules) for task, modules in experts.items()})
        width = self.experts.gate_width
        self.gates = by_task({task: Gate(width, shared_experts + number) for task, number in numbers.items()})

    def features(self, x: Any, tasks: Sequence[str]) -> Mixture:
        return self.experts(x)

    def gate_weights(self, z: Mixture, task: str) -> Tensor:
        """(B, shared + own), on the simplex, of one shared input's representation."""
        return self.gates[task](z.pooled)

    def predict(self, z: Mixture, task: str) -> Tensor:
        own: Any = self.task_experts[task]
        outputs = torch.cat([z.experts, stacked([expert(z.entered) for expert in own])]) if len(own) else z.experts
        return self.decoders[task](mixed(self.gate_weights(z, task), outputs))

    def task_parts(self, task: str) -> Iterable[Part]:
        return self.task_experts[task], self.gates[task], self.decoders[task]
