"""NYUv2: 13-class segmentation, depth and surface normals from one image, with one encoder and a decoder a task.

    python -m gradsurgery.recipes.nyuv2 --method ew cagrad                 # on rooms rendered into data/
    python -m gradsurgery.recipes.nyuv2 --method cagrad --data data/nyuv2  # on the real, preprocessed NYUv2

Without `--data`, n=1 (seed 0), 400 + 64 rooms of 72 x 96, 10 epochs, on two cores of an AMD EPYC that were not idle,
torch 2.14.1, 290 seconds in all, rendering and pictures included (seeds 1 and 2: Delta-m -5.96 and -5.11):

    method      mIoU   PAcc     abs     rel    mean  median  <11.25  <22.5    <30  Delta-m  s/step
    (constant)  3.76  48.88  0.7804  0.2581   50.63   44.97    1.79  13.80  24.71   +59.90
    ew         25.33  68.73  0.6069  0.1839   30.00   26.21   19.48  43.54  57.06     0.00   0.166
    cagrad     25.69  69.54  0.5642  0.1726   27.58   22.61   24.42  49.77  62.69    -9.68   0.229

The real data is the preprocessed NYUv2 that MTAN published (https://github.com/lorenmt/mtan): 795 training and 654
test views of 288 x 384. Two protocols of the field are kept, and their published rows stand beside one's own:

`--protocol mtan` (with `--data` by default; MTAN, Nash-MTL, FAMO, FairGrad): SegNet with MTAN's attention (or `--arch
hps` and its like on a SegNet), Adam 1e-4, halved after 100 of 200 epochs, batch 2, scale-crop-mirror augmentation,
metrics in test batches of 2, averaged over the last 10 epochs, surgery on all but the heads, Delta-m against the
single-task SegNet.

`--protocol deeplab` (LibMTL's tables): ResNet-50 with dilation, pretrained on ImageNet, and an ASPP decoder, Adam 1e-4
with weight decay 1e-5, halved after 100 of 200 epochs, batch 8 (PLE: 4, and no stem that experts share), the last
smaller batch dropped, no augmentation, metrics over all pixels, the best epoch on the test set, Delta-m against equal
weights on HPS. Like LibMTL's runs, it adds no penalty of an architecture's own to the losses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from gradsurgery.architectures import LTB, AdaShare, Architecture, SegNetMTAN
from gradsurgery.recipes.harness import pictures
from gradsurgery.recipes.harness.benchmark import Benchmark, Metric, Predictor, RecipeError, Task
from gradsurgery.recipes.harness.compare import Options, command, compare, method_infos, parse_options
from gradsurgery.recipes.harness.dense import (
    TASKS,
    DenseFolder,
    depth_loss,
    normal_loss,
    scale_crop_flip,
    segmentation_loss,
)
from gradsurgery.recipes.harness.metrics import DepthError, NormalAngles, Over, segmentation_meter, valid_pixels
from gradsurgery.recipes.harness.report import open_console
from gradsurgery.recipes.nyuv2_models import PRETRAINED, Arch, Choice, EncoderName, build_model, default_encoder
from gradsurgery.recipes.nyuv2_published import published
from gradsurgery.recipes.rooms import CLASSES, render_rooms

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

Protocol = Literal["mtan", "deeplab"]


@dataclass(frozen=True)
class Preset:
    """What the command line leaves open."""

    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["step", "cosine"]
    last: int
    augment: bool = True
    weight_decay: float = 0.0
    test_batch_size: int = 2
    over: Over = "batches"
    drop_last: bool = False
    arch: Arch = "hps"
    encoder: EncoderName | None = None
    pretrained: bool = False


ROOMS = Preset(epochs=10, batch_size=8, lr=2e-3, schedule="cosine", last=1)
"""without `--data` or `--protocol`: rooms that two CPU cores learn in minutes"""
PROTOCOLS: dict[str, Preset] = {
    "mtan": Preset(200, 2, 1e-4, "step", 10, arch="segnet_mtan", encoder="segnet"),
    "deeplab": Preset(200, 8, 1e-4, "step", 0, False, 1e-5, 8, "pixels", True, encoder="resnet50", pretrained=True),
}


@dataclass(frozen=True)
class Args:
    """Train and compare methods on NYUv2, or on rooms rendered in its layout."""

    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    arch: Arch | None = None
    """how the tasks share the network, a name of `gradsurgery.architectures`; None: segnet_mtan in `--protocol mtan`,
    else hps"""
    arch_option: tuple[str, ...] = ()
    """options of the architecture, as in `num_experts=4`"""
    protocol: Protocol | None = None
    """None: mtan with `--data`, and a preset for small machines without"""
    data: Path | None = None
    """the preprocessed NYUv2, with train/ and val/ below; None renders rooms"""
    cache: Path = Path("data")
    """where rendered rooms are kept"""
    rooms: tuple[int, int] = (400, 64)
    """training and test views to render"""
    size: tuple[int, int] = (72, 96)
    """height and width of a rendered view"""
    epochs: int | None = None
    """None: the protocol's 200, or 10"""
    batch_size: int | None = None
    """None: the protocol's, or 8"""
    lr: float | None = None
    """Adam's learning rate; None: the protocol's 1e-4, halved every 100 epochs, or 2e-3, by a cosine to 0"""
    encoder: EncoderName | None = None
    """None: the protocol's, or a small one that suits the architecture"""
    pretrained: bool | None = None
    """start resnet18 or resnet50 from torchvision's weights, which it fetches; None: in `--protocol deeplab`"""
    augment: bool | None = None
    """random scale, crop and mirror image; None: unless the protocol does without"""


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
    protocol = args.protocol or ("mtan" if args.data else None)
    preset = PROTOCOLS[protocol] if protocol else ROOMS
    # An encoder of one's own leaves the protocol's architecture.
    own = args.encoder is not None and args.encoder != preset.encoder
    arch = args.arch or ("hps" if own else preset.arch)
    check_positive(args)
    epochs, lr = args.epochs or preset.epochs, args.lr or preset.lr
    augment = preset.augment if args.augment is None else args.augment
    root = args.data or render(args)
    train, test = (DenseFolder(root, split, TASKS, len(CLASSES)) for split in ("train", "val"))
    if train.size is None or train.size != test.size:
        raise RecipeError(f"{test.folder} has images of {test.size}: expected {train.size}, as in {train.folder}.")
    encoder = args.encoder or default_encoder(arch, preset.encoder)
    pretrained = preset.pretrained and encoder in PRETRAINED if args.pretrained is None else args.pretrained
    options = ({"stem": 0} if protocol == "deeplab" and arch == "ple" else {}) | parse_options(args.arch_option)
    choice = Choice(arch, encoder, train.size, OUT_CHANNELS, pretrained, options)
    height, width = train.size
    kind, halved = "real data" if args.data else "rendered rooms", preset.schedule == "step"
    # LibMTL's tables halve the batch for PLE, which did not fit its card.
    batch_size = args.batch_size or (4 if protocol == "deeplab" and arch == "ple" else preset.batch_size)
    return Benchmark(
        name="nyuv2",
        description=f"{kind}, {len(train)} + {len(test)} views of {height}x{width}",
        tasks=tasks_of(preset.over),
        train=train,
        test=test,
        model=lambda tasks: build_model(replace(choice, channels={task: OUT_CHANNELS[task] for task in tasks})),
        shared=protocol_shared if protocol == "mtan" else Architecture.shared_parameters,
        optimizer=lambda parameters: Adam(parameters, lr, weight_decay=preset.weight_decay),
        scheduler=lambda optimizer: make_scheduler(optimizer, preset.schedule, epochs),
        epochs=epochs,
        batch_size=batch_size,
        test_batch_size=preset.test_batch_size,
        drop_last=preset.drop_last,
        augment=scale_crop_flip if augment else None,
        last=min(preset.last, epochs),
        each_epoch=anneal,
        floor=lambda: constant_prediction(train),
        published=published(protocol, arch, method_infos(args.options)) if protocol and args.data else (),
        pictures=lambda predict, folder, title: pictures.dense(
            test, predict, CLASSES, folder / "predictions.png", title
        ),
        settings={
            "data": str(root),
            "protocol": protocol or "none",
            "arch": " ".join([arch, *(f"{name}={value}" for name, value in options.items())]),
            "encoder": choice.encoder + (" (pretrained)" if choice.pretrained else ""),
            "optimizer": f"Adam {lr:g}" + (f", weight decay {preset.weight_decay:g}" if preset.weight_decay else ""),
            "schedule": "lr halved every 100 epochs" if halved else f"cosine to 0 over {epochs} epochs",
            "augment": augment,
        },
    )


def check_positive(args: Args) -> None:
    """Raises RecipeError: a number that must be above 0 is not."""
    for name in ("epochs", "batch_size", "lr"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise RecipeError(f"--{name.replace('_', '-')} {value}: expected a number above 0.")


def tasks_of(over: Over) -> dict[str, Task]:
    """Losses, and meters whose means are over batches or pixels."""
    return {
        "segmentation": Task(segmentation_loss, partial(segmentation_meter, len(CLASSES)), METRICS["segmentation"]),
        "depth": Task(depth_loss, partial(DepthError, over), METRICS["depth"]),
        "normal": Task(normal_loss, partial(NormalAngles, over), METRICS["normal"]),
    }


def protocol_shared(model: Architecture) -> Iterator[nn.Parameter]:
    """What MTAN's followers operate on: all but the heads, attention included."""
    return model.protocol_shared_parameters() if isinstance(model, SegNetMTAN) else model.shared_parameters()


def anneal(model: Architecture, epoch: int, epochs: int) -> None:
    """The schedules inside those architectures that have one."""
    if isinstance(model, LTB | AdaShare):
        model.anneal(epoch, epochs)


def render(args: Args) -> Path:
    """The cache folder of the rooms asked for, rendered unless it is there."""
    (train, test), (height, width) = args.rooms, args.size
    root = args.cache / f"rooms-{train}-{test}-{height}x{width}"
    return render_rooms(root, train=train, val=test, height=height, width=width)


def main() -> None:
    args = tyro.cli(Args, prog="python -m gradsurgery.recipes.nyuv2", description=__doc__)
    console = open_console()

    def make() -> Benchmark:
        rooms = args.protocol is None and args.data is None
        preset = "Preset for rendered rooms" if rooms else f"Protocol {args.protocol or 'mtan'}"
        console.print(preset + ("" if args.data else " (no --data)"), style="bold")
        return make_benchmark(args)

    command(lambda: compare(make, args.options, console))


if __name__ == "__main__":
    main()
