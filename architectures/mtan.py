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

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.positions import PerPosition, resized
from gradsurgery.architectures.stages import Encoder, Stages, fresh_stages, has_weights, out_width


@final
class MTAN(Architecture):
    """A shared network, and each task's attention to its stages after the first.

    What masks are made of is what enters the last block of a stage that has weights, if it is as wide as the stage's
    output and made in that stage, and that output otherwise. Each task has a z of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts.
        decoders: task -> any module from what the task attends to in the last stage to its prediction.
        reduction: by which the masks' inner width is smaller than a stage's.

    Raises:
        ValueError: an encoder of one stage, a reduction below 1.
    """

    def __init__(self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, reduction: int = 1) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("MTAN", decoders)
        (self.encoder,) = fresh_stages(encoder, 1)
        check_count("reduction", reduction)
        widths, dim = self.encoder.widths[1:], self.encoder.channel_dim
        if not widths:
            raise ValueError("MTAN attends to the stages after the first, and the encoder has one stage.")
        entering = [widths[0], *(2 * width for width in widths[1:])]
        sizes = [(i, w, max(w // reduction, 1)) for i, w in zip(entering, widths, strict=True)]
        self.cuts = [_cut(stage, width) for stage, width in zip(list(self.encoder)[1:], widths, strict=True)]
        self.masks = by_task({task: nn.ModuleList(_mask(*size, dim) for size in sizes) for task in decoders})
        self.between = nn.ModuleList(_between(self.encoder, before, after) for before, after in pairwise(widths))

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        seen = self._stages(x)
        return {task: self._attended(seen, task) for task in tasks}

    def _stages(self, x: Any) -> list[tuple[Tensor, Tensor]]:
        """Of each stage after the first: u and p, at the same positions."""
        stem, *stages = self.encoder
        h, seen = stem(x), []
        for stage, cut in zip(stages, self.cuts, strict=True):
            u = h = _through(list(stage)[:cut], h)
            h = _through(list(stage)[cut:], h)
            seen.append((resized(u, h, self.encoder.channel_dim), h))
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


def _cut(stage: nn.Sequential, width: int) -> int:
    """How many blocks u is behind: those before the last with weights, or all."""
    blocks = list(stage)
    last = max((i for i, block in enumerate(blocks) if has_weights(block)), default=0)
    return last if out_width(nn.ModuleList(blocks[:last])) == width else len(blocks)


def _through(blocks: Iterable[nn.Module], x: Any) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


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
