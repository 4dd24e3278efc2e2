"""MTAN: one shared network, and for each task soft masks on its features, stage by stage.

Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, https://arxiv.org/abs/1803.10704,
section 3.2: `a = h([u, f(a of the stage before)]) * p`, where u and p are features within and at the end of a stage, h
is two 1 x 1 convolutions with batch normalisation, ReLU and sigmoid, of the task, and f a 3 x 3 convolution with batch
normalisation, ReLU and pooling, of all tasks. For rows (vectors, tokens) f is a linear map. `SegNetMTAN` is the same on
both sides of a SegNet.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, decoders_of
from gradsurgery.architectures.stages import Encoder, PerPosition, Stages, fresh_stages, out_width, resized


@final
class MTAN(Architecture):
    """A shared network, and each task's attention to its stages after the first.

    What masks are made of is the output of all but a stage's last block, if it is as wide as the stage's own, and the
    stage's own otherwise. Each task has a z of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts.
        decoders: task -> any module from what the task attends to in the last stage to its prediction.
        reduction: by which the masks' inner width is smaller than a stage's.

    Raises:
        ValueError: an encoder of one stage.
    """

    def __init__(self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, reduction: int = 1) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("MTAN", decoders)
        (self.encoder,) = fresh_stages(encoder, 1)
        widths, dim = self.encoder.widths[1:], self.encoder.channel_dim
        if not widths:
            raise ValueError("MTAN attends to the stages after the first, and the encoder has one stage.")
        entering = [widths[0], *(2 * width for width in widths[1:])]
        sizes = [(i, w, max(w // reduction, 1)) for i, w in zip(entering, widths, strict=True)]
        self.masks = by_task({task: nn.ModuleList(_mask(*size, dim) for size in sizes) for task in decoders})
        self.between = nn.ModuleList(_between(self.encoder, before, after) for before, after in pairwise(widths))

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        seen = self._stages(x)
        return {task: self._attended(seen, task) for task in tasks}

    def _stages(self, x: Any) -> list[tuple[Tensor, Tensor]]:
        """Of each stage after the first: u and p."""
        stem, *stages = self.encoder
        h, seen = stem(x), []
        for stage, width in zip(stages, self.encoder.widths[1:], strict=True):
            cut = len(stage) - 1 if len(stage) > 1 and out_width(stage[:-1]) == width else len(stage)
            u = stage[:cut](h)
            h = stage[cut:](u)
            seen.append((u, h))
        return seen

    def _attended(self, seen: Sequence[tuple[Tensor, Tensor]], task: str) -> Tensor:
        masks: Any = self.masks[task]
        (u, p), *rest = seen
        a = masks[0](u) * p
        for mask, f, (u, p) in zip(masks[1:], self.between, rest, strict=True):
            before = resized(f(a), u, self.encoder.channel_dim)
            a = mask(torch.cat([u, before], self.encoder.channel_dim)) * p
        return a

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        return self.masks[task], self.decoders[task]


def _mask(entering: int, width: int, inner: int, channel_dim: int) -> PerPosition:
    layers = (nn.Linear(entering, inner), nn.BatchNorm1d(inner), nn.ReLU())
    return PerPosition(
        nn.Sequential(*layers, nn.Linear(inner, width), nn.BatchNorm1d(width), nn.Sigmoid()), channel_dim
    )


def _between(encoder: Stages, before: int, after: int) -> nn.Module:
    if encoder.layout == "maps":
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
    rows = nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
    return PerPosition(rows, encoder.channel_dim)
