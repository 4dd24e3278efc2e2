"""NYUv2: 13-class segmentation, depth and surface normals from one image, with one encoder and a decoder a task.

    python -m gradsurgery.recipes.nyuv2 --method ew cagrad                 # on rooms rendered into data/
    python -m gradsurgery.recipes.nyuv2 --method cagrad --data data/nyuv2  # on the real, preprocessed NYUv2

Without `--data`, n=1 (seed 0), 400 + 64 rooms of 72 x 96, 10 epochs, on two cores of an AMD EPYC that were not idle,
torch 2.15.0, about 170 seconds in all, rendering and pictures included:

    method      mIoU   PAcc     abs     rel    mean  median  <11.25  <22.5    <30  Delta-m  s/step
    (constant)  3.76  48.88  0.7804  0.2581   50.63   44.97    1.79  13.80  24.71   +66.18
    ew         28.24  70.54  0.5516  0.1704   28.56   24.16   21.91  47.35  60.64     0.00   0.110
    cagrad     26.57  69.70  0.5699  0.1730   26.73   21.69   26.14  51.67  64.39    -4.36   0.130

The real data is the preprocessed NYUv2 that MTAN published (https://github.com/lorenmt/mtan): 795 training and 654
test views of 288 x 384, and the protocol is its and its followers' (Nash-MTL, FAMO, FairGrad): Adam 1e-4, halved
after 100 of 200 epochs, batch 2, scale-crop-mirror augmentation, metrics in test batches of 2, averaged over the last
10 epochs, Delta-m against the published single-task SegNet row. The published rows are SegNet's and MTAN's; with
another encoder, compare with each other the rows that you train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR
from torchvision.models import ResNet, resnet18, resnet50

from gradsurgery.architectures import HPS
from gradsurgery.recipes.harness import pictures
from gradsurgery.recipes.harness.benchmark import Benchmark, Metric, Predictor, RecipeError, Row, Task
from gradsurgery.recipes.harness.compare import Options, command, compare
from gradsurgery.recipes.harness.dense import (
    TASKS,
    DenseFolder,
    depth_loss,
    normal_loss,
    scale_crop_flip,
    segmentation_loss,
)
from gradsurgery.recipes.harness.metrics import DepthError, NormalAngles, segmentation_meter, valid_pixels
from gradsurgery.recipes.harness.report import open_console
from gradsurgery.recipes.rooms import CLASSES, render_rooms

Encoder = Literal["small", "resnet18", "resnet50"]

METRICS = {
    "segmentation": (Metric("mIoU", "%", True, 100), Metric("PAcc", "%", True, 100)),
    "depth": (Metric("abs", "m", digits=4), Metric("rel", digits=4)),
    "normal": (
        Metric("mean", "deg"),
        Metric("median", "deg"),
        *(Metric(limit, "%", True, 100) for limit in ("<11.25", "<22.5", "<30")),
    ),
}
OUT_CHANNELS = {"segmentation": len(CLASSES), "depth": 1, "normal": 3}

PUBLISHED = Row(
    "STL (published)",
    {
        "segmentation/mIoU": 38.30,
        "segmentation/PAcc": 63.76,
        "depth/abs": 0.6754,
        "depth/rel": 0.2780,
        "normal/mean": 25.01,
        "normal/median": 19.21,
        "normal/<11.25": 30.14,
        "normal/<22.5": 57.20,
        "normal/<30": 69.15,
    },
)
"""SegNet, one a task, as Nash-MTL, FAMO and FairGrad quote it"""


@dataclass(frozen=True)
class Preset:
    """What the command line leaves open."""

    epochs: int
    batch_size: int
    lr: float
    encoder: Encoder
    schedule: Literal["step", "cosine"]
    last: int


PROTOCOL = Preset(epochs=200, batch_size=2, lr=1e-4, encoder="resnet50", schedule="step", last=10)
"""with `--data`: the field's protocol"""
ROOMS = Preset(epochs=10, batch_size=8, lr=2e-3, encoder="small", schedule="cosine", last=1)
"""without: rooms that two CPU cores learn in minutes"""


@dataclass(frozen=True)
class Args:
    """Train and compare methods on NYUv2, or on rooms rendered in its layout."""

    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    arch: Literal["hps"] = "hps"
    """how the tasks share the network; hps: one encoder, a decoder a task"""
    data: Path | None = None
    """the preprocessed NYUv2, with train/ and val/ below; None renders rooms"""
    cache: Path = Path("data")
    """where rendered rooms are kept"""
    rooms: tuple[int, int] = (400, 64)
    """training and test views to render"""
    size: tuple[int, int] = (72, 96)
    """height and width of a rendered view"""
    epochs: int | None = None
    """None: 200 with `--data`, 10 without"""
    batch_size: int | None = None
    """None: 2 with `--data`, 8 without; test batches are always of 2, as the protocol's metrics ask"""
    lr: float | None = None
    """Adam's learning rate; None: 1e-4 with `--data` (halved every 100 epochs), 2e-3 without (cosine to 0)"""
    encoder: Encoder | None = None
    """None: resnet50 (dilated, not pretrained) with `--data`, small without"""
    augment: bool = True
    """random scale, crop and mirror image"""


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


class Trunk(nn.Module):
    """A torchvision ResNet up to its last feature map."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, out, H, W)."""

    def __init__(self, channels: int, out: int, size: tuple[int, int], width: int = 48) -> None:
        super().__init__()
        self.head = nn.Sequential(conv(channels, width), nn.Conv2d(width, out, 1))
        self.size = size

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.head(z), size=self.size, mode="bilinear")


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def build_model(tasks: Sequence[str], encoder: Encoder, size: tuple[int, int]) -> HPS:
    """Any encoder will do; these have no pretrained weights."""
    makers: dict[Encoder, tuple[Callable[[], nn.Module], int]] = {
        "small": (SmallEncoder, 48),
        "resnet18": (lambda: Trunk(resnet18()), 512),
        "resnet50": (lambda: Trunk(resnet50(replace_stride_with_dilation=[False, True, True])), 2048),
    }
    make, channels = makers[encoder]
    model = HPS(make(), {task: Decoder(channels, OUT_CHANNELS[task], size) for task in tasks})
    return model.to(memory_format=torch.channels_last)  # a quarter faster on a CPU


def constant_prediction(data: DenseFolder) -> Predictor:
    """The most frequent class, the mean depth and the mean normal of the training pixels, whatever the image."""
    counts = torch.zeros(len(CLASSES))
    depths, normals = torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _, targets in (data[i] for i in range(len(data))):
        label, depth, normal = targets["segmentation"], targets["depth"], targets["normal"]
        counts += torch.bincount(label[label >= 0], minlength=len(CLASSES))
        depths += torch.stack([depth.double().sum(), valid_pixels(depth[None]).sum()])
        normals += normal.double().sum((1, 2))
    means = {
        "segmentation": F.one_hot(counts.argmax(), len(CLASSES)).float(),
        "depth": (depths[:1] / depths[1]).float(),
        "normal": F.normalize(normals, dim=0).float(),
    }

    def predict(x: Tensor) -> dict[str, Tensor]:
        shape = (len(x), 1, *x.shape[-2:])
        return {task: mean.to(x.device)[None, :, None, None] * x.new_ones(shape) for task, mean in means.items()}

    return predict


def make_scheduler(optimizer: Optimizer, schedule: str, epochs: int) -> LRScheduler:
    if schedule == "step":
        return StepLR(optimizer, step_size=100, gamma=0.5)
    return CosineAnnealingLR(optimizer, T_max=epochs)


def make_benchmark(args: Args) -> Benchmark:
    preset = PROTOCOL if args.data else ROOMS
    epochs, lr, encoder = args.epochs or preset.epochs, args.lr or preset.lr, args.encoder or preset.encoder
    root = args.data or render(args)
    train, test = (DenseFolder(root, split, TASKS, len(CLASSES)) for split in ("train", "val"))
    if train.size is None or train.size != test.size:
        raise RecipeError(f"{test.folder} has images of {test.size}: expected {train.size}, as in {train.folder}.")
    height, width = train.size
    kind = "real data" if args.data else "rendered rooms"
    schedule = "lr halved every 100 epochs" if preset.schedule == "step" else f"cosine to 0 over {epochs} epochs"
    meters = {"segmentation": partial(segmentation_meter, len(CLASSES)), "depth": DepthError, "normal": NormalAngles}
    losses = {"segmentation": segmentation_loss, "depth": depth_loss, "normal": normal_loss}
    return Benchmark(
        name="nyuv2",
        description=f"{kind}, {len(train)} + {len(test)} views of {height}x{width}",
        tasks={task: Task(losses[task], meters[task], METRICS[task]) for task in TASKS},
        train=train,
        test=test,
        model=lambda tasks: build_model(tasks, encoder, (height, width)),
        shared=HPS.shared_parameters,
        optimizer=lambda parameters: Adam(parameters, lr),
        scheduler=lambda optimizer: make_scheduler(optimizer, preset.schedule, epochs),
        epochs=epochs,
        batch_size=args.batch_size or preset.batch_size,
        test_batch_size=2,
        augment=scale_crop_flip if args.augment else None,
        last=min(preset.last, epochs),
        floor=lambda: constant_prediction(train),
        published=PUBLISHED if args.data else None,
        pictures=lambda predict, folder, title: pictures.dense(
            test, predict, CLASSES, folder / "predictions.png", title
        ),
        settings={
            "data": str(root),
            "arch": args.arch,
            "encoder": encoder,
            "optimizer": f"Adam {lr:g}",
            "schedule": schedule,
            "augment": args.augment,
        },
    )


def render(args: Args) -> Path:
    """The cache folder of the rooms asked for, rendered unless it is there."""
    (train, test), (height, width) = args.rooms, args.size
    root = args.cache / f"rooms-{train}-{test}-{height}x{width}"
    return render_rooms(root, train=train, val=test, height=height, width=width)


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.nyuv2", description=__doc__)
    console = open_console()

    def run() -> None:
        console.print(
            "Protocol preset for real data" if args.data else "Preset for rendered rooms (no --data)", style="bold"
        )
        compare(make_benchmark(args), args.options, console)

    command(run)


if __name__ == "__main__":
    main()
