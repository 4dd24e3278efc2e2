"""Encoders cut into stages, with what stage-wise designs must know of them: widths, and where the channels are."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeGuard, final

from torch import Tensor, nn

from gradsurgery.architectures.architecture import check_count

Layout = Literal["maps", "maps last", "rows"]
"""(B, C, H, W); (B, H, W, C); (B, C) or (B, N, C)"""

Encoder = nn.Module | Callable[[], nn.Module]
"""A module, which further copies are copied from with its weights; or a function that makes a new one each time."""


@final
class Stages(nn.Module):
    """An encoder in stages, each a `torch.nn.Sequential` of blocks.

    Args:
        stages: modules in the order in which they are passed.
        widths: channels that each puts out; None reads them off each stage's last convolution, linear map or embedding.
        layout: of what lies between stages; None: maps if there is a convolution, else rows.
        in_width: channels of the input; None reads it off the first convolution or linear map.
        in_dim: where the input has its channels, 1 or -1; None: 1 if that first one is a convolution.

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
        in_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(s if is_sequence(s) else nn.Sequential(s) for s in stages)
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
        width, dim = entrance(self.stages)
        self.in_width, self.in_dim = in_width or width, in_dim or dim

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
        before, dim = (self.widths[start - 1], self.channel_dim) if start else (self.in_width, self.in_dim)
        return Stages(stages, self.widths[start:stop], self.layout, before, dim)


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
    check_count("groups", groups)
    if isinstance(encoder, Stages):
        return encoder
    if is_sequence(encoder):
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
        if not stages or (has_weights(module) and has_weights(stages[-1])):
            stages.append(nn.Sequential())
        # A stage that is a sequence of blocks stays one.
        for block in module if is_sequence(module) else [module]:
            stages[-1].append(block)
    return stages


def is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether its children one after another are all that it is: a subclass may have a forward of its own."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_weights(module: nn.Module) -> bool:
    """Of two or more axes, as convolutions and linear maps have; normalisations have vectors alone."""
    return any(p.ndim > 1 for p in module.parameters())


def _ends(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, int]]:
    for inner in module.modules():
        for name in names:
            if isinstance(width := getattr(inner, name, None), int):
                yield inner, width


def out_width(module: nn.Module) -> int | None:
    """Channels that its last convolution, linear map or embedding puts out; None: it has none."""
    return (list(_ends(module, ("out_channels", "out_features", "embedding_dim"))) or [(None, None)])[-1][1]


def entrance(module: nn.Module) -> tuple[int | None, int]:
    """Channels that its first convolution or linear map takes, None if it has none, and their axis: 1 or -1."""
    first, width = next(_ends(module, ("in_channels", "in_features")), (None, None))
    return width, 1 if isinstance(first, nn.modules.conv._ConvNd) else -1


def fresh(encoder: Encoder, number: int) -> list[nn.Module]:
    """So many encoders: the module and copies of it, or as many as the function makes."""
    if isinstance(encoder, nn.Module):
        return [encoder, *(copy.deepcopy(encoder) for _ in range(number - 1))]
    return [encoder() for _ in range(number)]


def fresh_stages(encoder: Encoder, number: int) -> list[Stages]:
    """So many encoders in stages."""
    return [split_stages(one) for one in fresh(encoder, number)]
