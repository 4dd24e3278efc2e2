"""SegNet, the encoder and decoder of the NYUv2 and Cityscapes protocols of MTAN and its followers.

Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
TPAMI 2017, https://arxiv.org/abs/1511.00561, in the form that Liu, Johns, Davison gave it (MTAN, CVPR 2019,
https://github.com/lorenmt/mtan): five scales of 64 to 512 channels, max-pooling undone at the places of the maxima.
With one head a task of NYUv2 it has 25.06 M parameters. `SegNetMTAN` is the same net with attention.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)


class Scales(NamedTuple):
    """What one pass leaves, the finest scale first.

    Attributes:
        within: (B, C_s, H_s, W_s), after a scale's first convolution on the way down.
        down: the same after its last one, before pooling.
        up: what enters a scale on the way up, unpooled; C_{s+1} channels, or the last scale's own.
        out: what leaves it, C_{s-1} channels, or the first scale's own.
    """

    within: list[Tensor]
    down: list[Tensor]
    up: list[Tensor]
    out: list[Tensor]


@final
class SegNet(nn.Module):
    """(B, 3, H, W) -> (B, widths[0], H, W), for H and W of 32 or more with five scales.

    Args:
        widths: channels by scale, the finest first.
        channels: of the image.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, channels: int = 3) -> None:
        super().__init__()
        before = (channels, *widths[:-1])
        up_to = (widths[0], *widths[:-1])
        # The two finest scales have one convolution fewer.
        further = [1 if s < 2 else 2 for s in range(len(widths))]
        self.enter = nn.ModuleList(conv(i, o) for i, o in zip(before, widths, strict=True))
        self.deepen = nn.ModuleList(chain(o, n) for o, n in zip(widths, further, strict=True))
        self.rise = nn.ModuleList(conv(i, o) for i, o in zip(widths, up_to, strict=True))
        self.refine = nn.ModuleList(chain(o, n) for o, n in zip(up_to, further, strict=True))
        self.widths = tuple(widths)
        as_mtan_starts(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.scales(x).out[0]

    def scales(self, x: Tensor) -> Scales:
        """All that attention reads."""
        found = Scales([], [], [], [])
        places = []
        h = x
        for enter, deepen in zip(self.enter, self.deepen, strict=True):
            found.within.append(enter(h))
            found.down.append(deepen(found.within[-1]))
            h, at = F.max_pool2d(found.down[-1], 2, return_indices=True)
            places.append(at)
        for rise, refine, at, down in reversed(list(zip(self.rise, self.refine, places, found.down, strict=True))):
            found.up.insert(0, F.max_unpool2d(h, at, [2, 2], output_size=down.shape[-2:]))
            h = refine(rise(found.up[0]))
            found.out.insert(0, h)
        return found


def conv(channels: int, out: int) -> nn.Sequential:
    """3 x 3, batch normalisation, ReLU."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def chain(width: int, number: int) -> nn.Sequential:
    """So many of them."""
    return nn.Sequential(*(conv(width, width) for _ in range(number)))


def segnet_head(out: int, channels: int = WIDTHS[0]) -> nn.Sequential:
    """(B, channels, H, W) -> (B, out, H, W): 3 x 3 and 1 x 1 with nothing between them."""
    head = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, out, 1))
    as_mtan_starts(head)
    return head


def as_mtan_starts(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_normal_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
