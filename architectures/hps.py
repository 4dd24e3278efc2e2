"""Hard parameter sharing: one encoder for all tasks, one decoder for each.

Caruana, "Multitask Learning: A Knowledge-Based Source of Inductive Bias", ICML 1993; Machine Learning 28, 1997,
https://doi.org/10.1023/A:1007379606734.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh


@final
class HPS(Architecture):
    """An encoder z = e(x), and `decoders[task](z)`.

    Args:
        encoder: any module from an input to z, or a function that makes one.
        decoders: task -> any module from z to that task's prediction.

    >>> import torch
    >>> model = HPS(nn.Linear(4, 8), {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)})
    >>> {task: tuple(y.shape) for task, y in model(torch.zeros(2, 4)).items()}
    {'depth': (2, 1), 'normal': (2, 3)}
    """

    def __init__(self, encoder: Encoder, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("HPS", decoders)
        (self.encoder,) = fresh(encoder, 1)

    def features(self, x: Any, tasks: Sequence[str]) -> Any:
        return self.encoder(x)

    def predict(self, z: Any, task: str) -> Tensor:
        return self.decoders[task](z)

    def task_parts(self, task: str) -> Iterable[Part]:
        return (self.decoders[task],)
