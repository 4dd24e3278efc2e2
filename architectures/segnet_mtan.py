"""MTAN on SegNet: the network of the NYUv2 protocol of MTAN, Nash-MTL, FAMO, FairGrad and others.

Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, https://arxiv.org/abs/1803.10704,
section 4, and https://github.com/lorenmt/mtan: masks at every scale on the way down and up. 44.23 M parameters with
NYUv2's three heads. The protocol's code counts all but the heads, masks included, as shared; a mask is reached by its
own task alone, and here belongs to it: `protocol_shared_parameters` has the former.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, decoders_of
from gradsurgery.architectures.segnet import WIDTHS, Scales, SegNet, as_mtan_starts, conv


@final
class SegNetMTAN(Architecture):
    """A SegNet, and each task's attention to its scales.

    Each task has a z of its own.

    Args:
        decoders: task -> any module from (B, widths[0], H, W) to that task's prediction, `segnet_head` in the protocol.
        widths, channels: as in `SegNet`.
    """

    def __init__(self, decoders: Mapping[str, nn.Module], *, widths: Sequence[int] = WIDTHS, channels: int = 3) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("SegNetMTAN", decoders)
        self.net = SegNet(widths, channels)
        up_to = (widths[0], *widths[:-1])
        down = [widths[0], *(2 * width for width in widths[1:])]
        up = [i + o for i, o in zip(widths, up_to, strict=True)]
        self.down_masks = by_task({task: _masks(down, widths) for task in decoders})
        self.up_masks = by_task({task: _masks(up, up_to) for task in decoders})
        self.down_between = nn.ModuleList(conv(i, o) for i, o in pairwise((*widths, widths[-1])))
        self.up_between = nn.ModuleList(conv(i, o) for i, o in zip(widths, up_to, strict=True))
        for part in (self.down_masks, self.up_masks, self.down_between, self.up_between):
            as_mtan_starts(part)

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        found = self.net.scales(x)
        return {task: self._attended(found, task) for task in tasks}

    def _attended(self, found: Scales, task: str) -> Tensor:
        down_masks: Any = self.down_masks[task]
        up_masks: Any = self.up_masks[task]
        # The finest mask reads u alone.
        a = found.within[0][:, :0]
        for mask, between, u, p in zip(down_masks, self.down_between, found.within, found.down, strict=True):
            a = F.max_pool2d(between(mask(torch.cat([u, a], 1)) * p), 2)
        ways = list(zip(up_masks, self.up_between, found.up, found.out, strict=True))
        for mask, between, u, p in reversed(ways):
            before = between(F.interpolate(a, size=u.shape[-2:], mode="bilinear", align_corners=True))
            a = mask(torch.cat([u, before], 1)) * p
        return a

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        return self.down_masks[task], self.up_masks[task], self.decoders[task]

    def protocol_shared_parameters(self) -> Iterator[nn.Parameter]:
        """All but the decoders', on which the protocol's published rows did their surgery."""
        own = {id(p) for p in self.decoders.parameters()}
        return (p for p in self.parameters() if id(p) not in own)


def _masks(entering: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(_mask(i, width) for i, width in zip(entering, widths, strict=True))


def _mask(entering: int, width: int) -> nn.Sequential:
    layers = (nn.Conv2d(entering, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.Sigmoid())
