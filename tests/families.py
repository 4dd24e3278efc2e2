"""Small encoders of each kind, and every architecture on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from gradsurgery.architectures import Architecture, Stages, TaskGraph, build, segnet_head, split_stages
from gradsurgery.architectures.positions import pool

TASKS = {"depth": 1, "seg": 3, "normal": 2}


@dataclass(frozen=True)
class Family:
    """A kind of encoder, staged, with `width` channels at its end.

    Attributes:
        make: a new one.
        shape: of one input.
        channel_dim: of its output.
    """

    make: Callable[[], Stages]
    shape: tuple[int, ...]
    width: int
    channel_dim: int


class Residual(nn.Module):
    """h + relu(f(h))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def maps() -> Stages:
    """Three stages, of which the last two have two blocks."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    down = [nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((4, 6), (6, 8))]
    return Stages([stem, nn.Sequential(down[0], Residual(6)), nn.Sequential(down[1], Residual(8))])


def vectors() -> Stages:
    """Three stages of linear maps, of which the last two have two blocks."""

    def block(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(i, o), nn.ReLU())

    return Stages([block(5, 8), nn.Sequential(block(8, 6), block(6, 6)), nn.Sequential(block(6, 10), block(10, 10))])


def tokens() -> Stages:
    """A ViT of four layers, in two stages after its embedding."""
    sizes = {"num_layers": 4, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 2}
    return split_stages(VisionTransformer(image_size=8, patch_size=4, **sizes), groups=2)


FAMILIES = {
    "maps": Family(maps, (3, 8, 8), 8, 1),
    "vectors": Family(vectors, (5,), 10, -1),
    "tokens": Family(tokens, (3, 8, 8), 8, -1),
}


class Pooled(nn.Module):
    """The mean over positions, and a linear map of it."""

    def __init__(self, width: int, out: int, channel_dim: int) -> None:
        super().__init__()
        self.linear, self.channel_dim = nn.Linear(width, out), channel_dim

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(pool(z, self.channel_dim))


def make(name: str, family: str = "maps", tasks: dict[str, int] = TASKS, **options: Any) -> tuple[Architecture, Tensor]:
    """An architecture with its first weights, and a batch for it."""
    torch.manual_seed(0)
    kind = FAMILIES[family]
    decoders = {task: Pooled(kind.width, out, kind.channel_dim) for task, out in tasks.items()}
    x = torch.randn(4, *kind.shape)
    if name == "segnet_mtan":
        heads = {task: segnet_head(out, 2) for task, out in tasks.items()}
        return build(name, None, heads, **{"widths": (2, 3, 4)} | options), torch.randn(2, 3, 16, 16)
    if name == "esmm":
        towers = {"ctr": Pooled(kind.width, 1, kind.channel_dim), "cvr": Pooled(kind.width, 1, kind.channel_dim)}
        return build(name, kind.make, towers, **options), x
    if name == "task_graph":
        return graph(kind, tasks), x
    if name in ("mmoe", "cgc", "dselect_k"):
        options = {"stem": 1} | options
    return build(name, kind.make, decoders, **options), x


def graph(kind: Family, tasks: dict[str, int]) -> TaskGraph:
    trunk: dict[str, Any] = {"name": "trunk", "layers": kind.make()}
    heads = [
        {"name": task, "layers": Pooled(kind.width, out, kind.channel_dim), "anchor_layer": "trunk"}
        for task, out in tasks.items()
    ]
    return TaskGraph([trunk, *heads], list(tasks))


def losses(model: Architecture, x: Any) -> dict[str, Tensor]:
    return {task: (y - 0.3).square().mean() for task, y in model(x).items()}


def ids(parameters: Any) -> list[int]:
    return [id(p) for p in parameters]
