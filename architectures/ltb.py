"""LTB, learning to branch: a tree of stages whose branches are learned with the weights.

Guo, Lee, Ulbricht, "Learning to Branch for Multi-Task Learning", ICML 2020, https://arxiv.org/abs/2006.01895, section
3: every node of a layer draws its one parent in the layer before from a categorical distribution, by the Gumbel-softmax
with hard samples and soft gradients, at a temperature that falls. Here each layer has a node a task, as LibMTL has it,
and the last layer's node t feeds decoder t. At evaluation the likeliest parent is taken, which needs no random numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh_stages


@final
class LTB(Architecture):
    """T nodes in each stage of an encoder, each fed by one of the stage before.

    Until `anneal` has ended the warm-up, in training as at evaluation, each is fed by the mean of all. Each task has a
    z of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts; a function makes nodes with weights of their own, a module is
            copied.
        decoders: task -> any module from its node's features to that task's prediction.
        warm_up: part of the epochs, see `anneal`, in which nodes read the mean of all nodes before them.

    Raises:
        ValueError: an encoder of one stage, which can't branch.
    """

    temperature: Tensor

    def __init__(self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, warm_up: float = 0.01) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("LTB", decoders)
        networks, T = fresh_stages(encoder, len(decoders)), len(decoders)
        if len(networks[0]) < 2:
            raise ValueError("LTB branches between stages, and the encoder has one.")
        self.networks = nn.ModuleList(networks)
        self.logits = nn.Parameter(torch.zeros(len(networks[0]) - 1, T, T))
        self.warm_up = warm_up
        self.register_buffer("temperature", torch.tensor(math.inf))

    def anneal(self, epoch: int, epochs: int) -> None:
        """Sets the temperature of epoch 0, 1, ...: without bound in the warm-up, else LibMTL's
        `epochs / 20 / sqrt(epoch + 1)`. A new model is in its warm-up."""
        warm = epoch < self.warm_up * epochs
        self.temperature.fill_(math.inf if warm else epochs / 20 / math.sqrt(epoch + 1))

    def branches(self) -> Tensor:
        """(stages - 1, T) the likeliest parent of each node in the stage before."""
        return self.logits.argmax(-1)

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        networks: Any = self.networks
        first, *later = zip(*networks, strict=True)
        hs = {task: stage(x) for task, stage in zip(self.tasks, first, strict=True)}
        for i, (choice, stages) in enumerate(zip(self._choices(), later, strict=True), start=1):
            before = torch.stack(list(hs.values()))
            nodes = zip(self.tasks, choice, stages, strict=True)
            wanted = tasks if i == len(later) else self.tasks
            hs = {t: stage(torch.einsum("s,s...->...", row, before)) for t, row, stage in nodes if t in wanted}
        return hs

    def _choices(self) -> Tensor:
        """(stages - 1, T, T) with rows on the simplex."""
        if self.training:
            soft = F.gumbel_softmax(self.logits, tau=self.temperature)  # pyright: ignore[reportArgumentType]
            hard = F.one_hot(soft.argmax(-1), len(self.tasks)) - soft.detach() + soft
        else:
            hard = F.one_hot(self.branches(), len(self.tasks)).to(self.logits.dtype)
            soft = torch.full_like(hard, 1 / len(self.tasks))
        # At a temperature without bound, soft samples are all alike.
        return torch.where(self.temperature.isinf(), soft, hard)

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        networks: Any = self.networks
        *_, last = networks[self.tasks.index(task)]
        return last, self.decoders[task]
