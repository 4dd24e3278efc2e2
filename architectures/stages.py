"""Encoders cut into stages, with what stage-wise designs must know of them: widths, and where the channels are."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, final

from torch import Tensor, nn

Layout = Literal["maps", "maps last", "rows"]
"""(B, C, H, W); (B, H, W, C); (B, C) or (B, N, C)"""

Encoder = nn.Module | Callable[[], nn.Module]
"""A module, which further copies are copied from with its weights; or a function that makes a new one each time."""


@final
class Stages(nn.Module):
    """An encoder in stages, each a `torch.nn.Sequential` of blocks.

    Args:
        stages: modules in the order in which they are passed.
        widths: channels that each puts out; None reads them off each stage's last convolution or linear map.
        layout: of what lies between stages; None: maps if there is a convolution, else rows.
        in_width: channels of the input; None reads it off the first convolution or linear map.

    Raises:
        ValueError: no stages, or a width that cannot be read off.

    >>> stages = Stages([nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU())])
    >>> stages.widths, stages.layout
    ((8, 16), 'maps')
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        widths: Sequence[int] | None = None,
        layout: Layout | None = None,
        in_width: int | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(s if isinstance(s, nn.Sequential) else nn.Sequential(s) for s in stages)
        if not len(self.stages):
            raise ValueError("An encoder needs one stage at least, and `stages` is empty.")
        found = list(map(out_width, self.stages)) if widths is None else list(widths)
        if len(found) != len(self.stages) or None in found:
            raise ValueError(
                f"Expected a width for each of {len(self.stages)} stages; got {found}. Pass widths=, the channels that "
                "each stage puts out."
            )
        convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in self.modules())
        self.widths: tuple[int, ...] = tuple(found)  # pyright: ignore[reportAttributeAccessIssue]
        self.layout: Layout = layout or ("maps" if convolves else "rows")
        self.in_width = in_width or in_width_of(self.stages)

    @property
    def channel_dim(self) -> int:
        """Of what lies between stages."""
        return 1 if self.layout == "maps" else -1

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[nn.Sequential]:
        return iter(self.stages)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x

    def part(self, start: int, stop: int | None = None) -> "Stages | nn.Identity":
        """Stages from one to before another, with their modules and not copies of them."""
        stages = list(self)[start:stop]
        if not stages:
            return nn.Identity()
        before = self.in_width if start == 0 else self.widths[start - 1]
        return Stages(stages, self.widths[start:stop], self.layout, before)


def split_stages(encoder: nn.Module, groups: int = 4) -> Stages:
    """Cuts an encoder into stages; the modules are the encoder's own.

    torchvision's ResNet, ConvNeXt, EfficientNet, Swin and ViT are cut into the stem and the stages of their papers,
    without the classifier: maps (B, C, H, W), for Swin maps (B, H, W, C), for ViT tokens (B, 1 + N, C) with the class
    token first. Of a `torch.nn.Sequential` a stage begins at each child that has a weight of two or more axes; what has
    none (activation, pooling) or a vector alone (normalisation) belongs to the stage before.

    Args:
        groups: stages that the layers of a ViT are put into, as even as can be.

    Raises:
        TypeError: another kind of module.
    """
    if isinstance(encoder, Stages):
        return encoder
    if isinstance(encoder, nn.Sequential):
        return Stages(_at_weights(encoder))
    if any(base.__module__.startswith("torchvision.") for base in type(encoder).__mro__):
        # Imported here, since the zoo does without torchvision.
        from gradsurgery.architectures.torchvision_stages import cut

        if (stages := cut(encoder, groups)) is not None:
            return Stages(**stages)
    raise TypeError(
        f"Don't know where the stages of a {type(encoder).__name__} begin: pass a Stages([...]) of its modules, a "
        "torch.nn.Sequential, or torchvision's ResNet, ConvNeXt, EfficientNet, SwinTransformer or VisionTransformer."
    )


def _at_weights(modules: nn.Sequential) -> list[nn.Sequential]:
    stages: list[nn.Sequential] = []
    for module in modules:
        begins = any(p.ndim > 1 for p in module.parameters())
        if not stages or (begins and any(p.ndim > 1 for p in stages[-1].parameters())):
            stages.append(nn.Sequential())
        # A stage that is a sequence of blocks stays one.
        blocks = module if isinstance(module, nn.Sequential) else [module]
        for block in blocks:
            stages[-1].append(block)
    return stages


def _ends(module: nn.Module, names: Sequence[str]) -> Iterator[int]:
    for inner in module.modules():
        for name in names:
            if isinstance(width := getattr(inner, name, None), int):
                yield width


def out_width(module: nn.Module) -> int | None:
    """Channels that its last convolution or linear map puts out; None: it has none."""
    return (list(_ends(module, ("out_channels", "out_features"))) or [None])[-1]


def in_width_of(module: nn.Module) -> int | None:
    """Channels that its first convolution or linear map takes; None: it has none."""
    return next(_ends(module, ("in_channels", "in_features")), None)


def fresh(encoder: Encoder, number: int) -> list[nn.Module]:
    """So many encoders: the module and copies of it, or as many as the function makes."""
    if isinstance(encoder, nn.Module):
        return [encoder, *(copy.deepcopy(encoder) for _ in range(number - 1))]
    return [encoder() for _ in range(number)]


def fresh_stages(encoder: Encoder, number: int) -> list[Stages]:
    """So many encoders in stages."""
    return [split_stages(one) for one in fresh(encoder, number)]


def pool(x: Tensor, channel_dim: int) -> Tensor:
    """(B, C) of maps, tokens or vectors: the mean over positions."""
    channel_dim %= x.ndim
    axes = [axis for axis in range(1, x.ndim) if axis != channel_dim]
    return x.mean(axes) if axes else x


@final
class PerPosition(nn.Module):
    """A module of rows (M, C) -> (M, C') at every sample and position: for maps a 1 x 1 convolution and its like."""

    def __init__(self, module: nn.Module, channel_dim: int) -> None:
        super().__init__()
        self.module, self.channel_dim = module, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(self.channel_dim, -1)
        return self.module(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1]).movedim(-1, self.channel_dim)


def resized(x: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """``x`` max-pooled to the positions of ``like``, whose channels may be others."""
    x, like = x.movedim(channel_dim, 1), like.movedim(channel_dim, 1)
    if x.shape[2:] != like.shape[2:]:
        pooling = {3: nn.functional.adaptive_max_pool1d, 4: nn.functional.adaptive_max_pool2d}[x.ndim]
        x = pooling(x, like.shape[2:])
    return x.movedim(1, channel_dim)
