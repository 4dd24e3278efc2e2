"""The networks of the NYUv2 recipe: an architecture of the zoo, an encoder that it can take, a decoder a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.architectures import Architecture, ASPPDecoder, SegNet, Stages, build, dilated_resnet, segnet_head
from gradsurgery.recipes.harness.benchmark import RecipeError

Arch = Literal[
    "hps", "cross_stitch", "sluice", "nddr_cnn", "mmoe", "cgc", "ple", "mtan", "dselect_k", "ltb", "adashare",
    "segnet_mtan",
]  # fmt: skip
EncoderName = Literal["small", "stages", "resnet18", "resnet50", "segnet"]
WHOLE = ("hps", "mmoe", "cgc", "dselect_k")
"""designs that take an encoder as it is; the others cut it into stages"""
PRETRAINED = ("resnet18", "resnet50")
"""encoders with weights that torchvision fetches"""


@dataclass(frozen=True)
class Choice:
    """What is to be built.

    Attributes:
        arch: of the zoo.
        encoder: None for the architecture's own.
        size: height and width of the image and of predictions.
        channels: task -> channels of its prediction.
        pretrained: whether torchvision's weights are fetched.
        options: of the architecture.
    """

    arch: Arch
    encoder: EncoderName
    size: tuple[int, int]
    channels: Mapping[str, int]
    pretrained: bool = False
    options: Mapping[str, Any] | None = None


class SmallEncoder(nn.Module):
    """Four strided stages; the maps of the last three are summed at a quarter of the image's size."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96), channels: int = 48) -> None:
        super().__init__()
        stages = zip((3, *widths[:-1]), widths, strict=True)
        self.stages = nn.ModuleList(nn.Sequential(conv(i, o, stride=2), conv(o, o)) for i, o in stages)
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths[1:])
        self.mix = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        size = maps[1].shape[-2:]
        wide = [lateral(y) for lateral, y in zip(self.laterals, maps[1:], strict=True)]
        return self.mix(torch.stack([F.interpolate(y, size=size, mode="bilinear") for y in wide]).sum(0))


class Residual(nn.Module):
    """h + f(h), f of two dilated convolutions."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(channels, channels, dilation=dilation), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def small_stages(widths: Sequence[int] = (16, 32, 48, 48), dilations: Sequence[int] = (1, 1, 2, 4)) -> Stages:
    """Four stages of two blocks, at a quarter of the image's size from the second on."""
    entering = zip((3, *widths[:-1]), widths, (2, 2, 1, 1), dilations, strict=True)
    return Stages([nn.Sequential(conv(i, o, stride=s), Residual(o, d)) for i, o, s, d in entering])


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, out, H, W)."""

    def __init__(self, channels: int, out: int, size: tuple[int, int], width: int = 48) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(channels, width), nn.Conv2d(width, out, 1))
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.head(z), size=self.size, mode="bilinear")


def conv(channels: int, out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels, out, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def encoder_of(choice: Choice) -> tuple[Callable[[], nn.Module], Callable[[int], nn.Module]]:
    """What makes the encoder, and what makes a decoder of so many channels for it."""
    # Those of the published runs; torchvision has better ones by now.
    weights = "IMAGENET1K_V1" if choice.pretrained else None
    match choice.encoder:
        case "small":
            return SmallEncoder, lambda out: Decoder(48, out, choice.size)
        case "stages":
            return small_stages, lambda out: Decoder(48, out, choice.size)
        case "resnet18":
            return lambda: dilated_resnet("resnet18", 32, weights), lambda out: Decoder(512, out, choice.size)
        case "resnet50":
            return lambda: dilated_resnet("resnet50", 8, weights), lambda out: aspp(out, choice.size)
        case "segnet":
            return SegNet, segnet_head


def aspp(out: int, size: tuple[int, int]) -> ASPPDecoder:
    return ASPPDecoder(2048, out, size, align_corners=True)


def build_model(choice: Choice) -> Architecture:
    """One task alone has a network without any sharing, whatever the others are to share.

    Raises:
        RecipeError: the architecture cannot take the encoder, or has no such option.
    """
    if len(choice.channels) == 1:
        choice = replace(choice, arch="hps", options=None)
    if choice.encoder in ("small", "segnet") and choice.arch not in (*WHOLE, "segnet_mtan"):
        raise RecipeError(
            f"--arch {choice.arch} cuts its encoder into stages, and {choice.encoder} (--encoder or --protocol mtan) "
            f"has none: choose --protocol deeplab, --encoder stages, resnet18 or resnet50, or one of --arch "
            f"{', '.join(WHOLE)}."
        )
    if choice.arch == "segnet_mtan" and choice.encoder != "segnet":
        raise RecipeError(f"--arch segnet_mtan is a SegNet: leave --encoder {choice.encoder} out.")
    if choice.pretrained and choice.encoder not in PRETRAINED:
        raise RecipeError(f"--pretrained is for {' and '.join(PRETRAINED)}; {choice.encoder} has no published weights.")
    make, decoder = encoder_of(choice)
    if choice.arch == "segnet_mtan":
        make, decoder = None, segnet_head
    try:
        decoders = {task: decoder(out) for task, out in choice.channels.items()}
        model = build(choice.arch, make, decoders, **(choice.options or {}))
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    return model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU


def default_encoder(arch: Arch, preset: EncoderName | None) -> EncoderName:
    """The preset's; None: one with which two CPU cores learn rendered rooms in minutes. SegNetMTAN has its own."""
    small = "small" if arch in WHOLE else "stages"
    return "segnet" if arch == "segnet_mtan" else preset or small


ARCHS: tuple[Arch, ...] = get_args(Arch)
