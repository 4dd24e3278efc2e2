"""Models from launch-bound to compute-bound, each with T linear heads, one batch, and one loss a task."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A trunk and its batch.

    Attributes:
        make: returns the trunk, the batch, and the width of the features.
        last: the trunk's last block.
        tasks: numbers of tasks at which it is measured.
        outputs: of a head: classes, or 1 for a binary task.
    """

    make: Callable[[], tuple[Any, Tensor, int]]
    last: Callable[[Any], nn.Module]
    tasks: tuple[int, ...] = (2, 3, 10, 40)
    outputs: int = CLASSES


def mlp(layers: int, width: int, batch: int) -> Callable[[], tuple[nn.Module, Tensor, int]]:
    def make() -> tuple[nn.Module, Tensor, int]:
        modules = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*modules), torch.randn(batch, width), width

    return make


def resnet18() -> tuple[nn.Module, Tensor, int]:
    """torchvision's ResNet-18 on 16 images of 64 x 64: 11.2 M shared parameters."""
    from torchvision.models import resnet18

    trunk = resnet18(weights=None)
    trunk.fc = nn.Identity()
    return trunk, torch.randn(16, 3, 64, 64), 512


def vit() -> tuple[nn.Module, Tensor, int]:
    """Six transformer layers of width 192 on 16 images of 32 x 32 in 4 x 4 patches: 2.7 M shared parameters."""
    from torchvision.models import VisionTransformer

    trunk = VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=CLASSES
    )
    trunk.heads = nn.Identity()
    return trunk, torch.randn(16, 3, 32, 32), 192


MODELS = {
    # Eight layers of 64, batch 8: launching an operator costs more than its arithmetic.
    "mlp64": Model(mlp(8, 64, 8), lambda trunk: trunk[-2], tasks=(2, 3, 8, 10, 40)),
    # 3.1 M parameters, few of them reused within a batch, so that rows weigh much.
    "mlp1024": Model(mlp(3, 1024, 256), lambda trunk: trunk[-2]),
    # 12.6 M parameters and 32 samples: a gradient is far larger than what it is made of.
    "mlp2048": Model(mlp(3, 2048, 32), lambda trunk: trunk[-2]),
    "resnet18": Model(resnet18, lambda trunk: trunk.layer4[-1], tasks=(2, 3, 10)),
    "vit": Model(vit, lambda trunk: trunk.encoder.layers[-1], tasks=(2, 3, 10)),
    # CelebA's 40 attributes, as in the MTL papers: binary tasks on a ResNet-18.
    "celeba": Model(resnet18, lambda trunk: trunk.layer4[-1], tasks=(40,), outputs=1),
}


class Net(nn.Module):
    """A trunk and T heads; returns features (N, width) and outputs, T of (N, outputs)."""

    def __init__(self, trunk: nn.Module, width: int, tasks: int, outputs: int):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, outputs) for _ in range(tasks)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = self.trunk(x)
        return z, [head(z) for head in self.heads]


def losses(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """T losses: cross-entropy, or its binary form where a head has one output."""
    return of_outputs(net(x)[1], y)


def of_outputs(outputs: Iterable[Tensor], y: Tensor) -> list[Tensor]:
    binary = nn.functional.binary_cross_entropy_with_logits
    return [
        nn.functional.cross_entropy(o, t) if o.shape[1] > 1 else binary(o[:, 0], t.to(o.dtype))
        for o, t in zip(outputs, y, strict=True)
    ]


class Problem:
    """A network, a batch and SGD."""

    def __init__(self, model: str, tasks: int, device: torch.device):
        torch.manual_seed(0)
        spec = MODELS[model]
        trunk, x, width = spec.make()
        self.net = Net(trunk, width, tasks, spec.outputs).to(device)
        self.x = x.to(device)
        self.y = torch.randint(max(spec.outputs, 2), (tasks, len(x)), device=device)
        self.last = list(spec.last(trunk).parameters())
        self.shared = list(self.net.trunk.parameters())
        self.params = list(self.net.parameters())
        self.base = torch.optim.SGD(self.params, lr=1e-4)

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.net.heads)

    def losses(self) -> tuple[Tensor, list[Tensor]]:
        """Shared features and the losses."""
        z, outputs = self.net(self.x)
        return z, of_outputs(outputs, self.y)
