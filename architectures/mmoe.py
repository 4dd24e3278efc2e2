"""MMoE: experts that all tasks share, and a gate over them for each.

Ma, Zhao, Yi, Chen, Hong, Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
KDD 2018, https://doi.org/10.1145/3219819.3220007, eq. 6 and 7: `f_k(x) = sum_i g_k(x)_i f_i(x)`,
`g_k(x) = softmax(W_k x)`. Of maps and tokens the gates read the mean over positions, where later image versions flatten
all pixels, which ties a model to one size of images.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.gates import Experts, Gate, Mixture, mixed
from gradsurgery.architectures.stages import Encoder, fresh


@final
class MMoE(Architecture):
    """Experts' outputs mixed by each task's softmax gate.

    Args:
        encoder: of an expert; a function makes them with weights of their own, a module is copied.
        decoders: task -> any module from mixed features to that task's prediction.
        num_experts: E.
        stem: first stages of the encoder that experts share, and whose output the gates read; 0: gates read the input,
            of an image no more than its mean colour.
        gate_width: channels of what the gates read; None finds it from the encoder.

    Raises:
        ValueError: no experts, no stage left for them, or a width that cannot be found.

    >>> import torch
    >>> model = MMoE(lambda: nn.Linear(4, 8), {"a": nn.Linear(8, 1), "b": nn.Linear(8, 3)}, num_experts=2)
    >>> model.gate_weights(model.representation(torch.zeros(5, 4)), "a").shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: Mapping[str, nn.Module],
        *,
        num_experts: int = 3,
        stem: int = 0,
        gate_width: int | None = None,
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("MMoE", decoders)
        check_count("num_experts", num_experts)
        self.experts = Experts(fresh(encoder, num_experts), stem, gate_width)
        self.gates = by_task({task: Gate(self.experts.gate_width, num_experts) for task in decoders})

    def features(self, x: Any, tasks: Sequence[str]) -> Mixture:
        return self.experts(x)

    def gate_weights(self, z: Mixture, task: str) -> Tensor:
        """(B, E), on the simplex, of one shared input's representation."""
        return self.gates[task](z.pooled)

    def predict(self, z: Mixture, task: str) -> Tensor:
        return self.decoders[task](mixed(self.gate_weights(z, task), z.experts))

    def task_parts(self, task: str) -> Iterable[Part]:
        return self.gates[task], self.decoders[task]
