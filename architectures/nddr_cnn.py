"""NDDR-CNN: one network a task, whose activations are fused after each stage by a 1 x 1 convolution over all of them.

Gao, Ma, Zhao, Liu, Yuille, "NDDR-CNN: Layerwise Feature Fusing in Multi-Task CNNs by Neural Discriminative
Dimensionality Reduction", CVPR 2019, https://arxiv.org/abs/1801.08297, section 3: concatenation of all tasks' channels,
a 1 x 1 convolution back to a task's width, batch normalisation, ReLU; it starts as 0.9 of the task's own channels and
the rest of the others' (section 3.3). The shortcut variant is not here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, decoders_of
from gradsurgery.architectures.cross_stitch import near_identity
from gradsurgery.architectures.positions import PerPosition
from gradsurgery.architectures.stages import Encoder, fresh_stages


@final
class NDDRCNN(Architecture):
    """A network a task, fused after every stage.

    All networks run on the input of any task. z is what enters the last fusion, common to all tasks.

    Args:
        encoder: staged, or one that `split_stages` cuts; a function makes networks with weights of their own, a module
            is copied.
        decoders: task -> any module from that task's features to its prediction.
        stem: whether the first stage's activations are fused too.
        own_weight: what a task's own activations weigh at first; the others' weights add up to the rest.

    Raises:
        ValueError: nothing to fuse.
    """

    def __init__(
        self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, stem: bool = False, own_weight: float = 0.9
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("NDDRCNN", decoders)
        networks = fresh_stages(encoder, len(decoders))
        widths = networks[0].widths
        if len(widths) == 1 and not stem:
            raise ValueError("An encoder of one stage has nothing to fuse before the decoders: pass stem=True.")
        self.channel_dim = networks[0].channel_dim
        self.networks = nn.ModuleList(networks)
        self.fusions = nn.ModuleList(
            by_task(dict(zip(decoders, _fusions(len(decoders), width, own_weight, self.channel_dim), strict=True)))
            for width in (widths if stem else widths[1:])
        )

    def features(self, x: Any, tasks: Sequence[str]) -> Tensor:
        networks: Any = self.networks
        hs: list[Any] = [x] * len(self.tasks)
        unfused = len(networks[0]) - len(self.fusions)
        for i, stages in enumerate(zip(*networks, strict=True)):
            if i > unfused:
                fusion: Any = self.fusions[i - unfused - 1]
                together = torch.cat(hs, self.channel_dim)
                hs = [fusion[task](together) for task in self.tasks]
            hs = [stage(h) for stage, h in zip(stages, hs, strict=True)]
        return torch.cat(hs, self.channel_dim)

    def predict(self, z: Tensor, task: str) -> Tensor:
        fusion: Any = self.fusions[-1]
        return self.decoders[task](fusion[task](z))

    def task_parts(self, task: str) -> Iterable[Part]:
        last: Any = self.fusions[-1]
        return last[task], self.decoders[task]


def _fusions(T: int, width: int, own: float, channel_dim: int) -> list[PerPosition]:
    """A layer (T C) -> (C) for each task."""
    layers = []
    for row in near_identity(T, own):
        reduce = nn.Linear(T * width, width, bias=False)
        with torch.no_grad():
            reduce.weight.copy_(torch.cat([a * torch.eye(width) for a in row], 1))
        layers.append(PerPosition(nn.Sequential(reduce, nn.BatchNorm1d(width), nn.ReLU()), channel_dim))
    return layers
