"""Metrics of dense prediction, as the NYUv2 and Cityscapes protocols of MTAN compute them, and Delta-m.

Segmentation scores come from one confusion matrix over the whole set. Depth and normal scores are means of per-batch
values, the batch's median among them, by which the test batch size is part of the protocol; or they are over all pixels
of the set, as LibMTL has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex


def valid_pixels(target_BCHW: Tensor) -> Tensor:
    """(B, H, W) bool: a pixel without a measurement is zero in all channels."""
    return target_BCHW.sum(1) != 0


def segmentation_meter(classes: int, ignore_index: int = -1) -> MetricCollection:
    """`mIoU` (mean over classes that occur) and `PAcc`, of logits (B, C, H, W) and labels (B, H, W)."""
    return MetricCollection(
        {
            "mIoU": MulticlassJaccardIndex(classes, ignore_index=ignore_index),
            "PAcc": MulticlassAccuracy(classes, average="micro", ignore_index=ignore_index),
        }
    )


Over = Literal["batches", "pixels"]
"""what a mean is over: per-batch values, or all valid pixels"""


class _Mean(Metric):
    """Mean of the values named by `names`; a batch without a valid pixel is left out."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, names: Sequence[str], over: Over, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names, self.over = tuple(names), over
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: list[Tensor], pixels: int) -> None:
        """Per-batch values, of so many valid pixels."""
        weight = pixels if self.over == "pixels" else 1
        self.total += weight * torch.stack(values).to(self.total.dtype)
        self.weight += weight

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.total / self.weight, strict=True))


class DepthError(_Mean):
    """`abs` (the target's unit) and `rel` (a fraction) error over valid pixels."""

    def __init__(self, over: Over = "batches", **kwargs: Any) -> None:
        super().__init__(("abs", "rel"), over, **kwargs)

    def update(self, prediction_B1HW: Tensor, target_B1HW: Tensor) -> None:
        valid = valid_pixels(target_B1HW)
        if valid.any():
            target = target_B1HW[:, 0][valid]
            error = (prediction_B1HW[:, 0][valid] - target).abs()
            self._add([error.mean(), (error / target).mean()], len(error))


class NormalAngles(_Mean):
    """`mean` and `median` angle in degrees, fractions `<11.25`, `<22.5`, `<30`, over valid pixels."""

    angles: list[Tensor]

    def __init__(self, over: Over = "batches", **kwargs: Any) -> None:
        super().__init__(("mean", "median", "<11.25", "<22.5", "<30"), over, **kwargs)
        self.add_state("angles", [], dist_reduce_fx="cat")

    def update(self, prediction_B3HW: Tensor, target_B3HW: Tensor) -> None:
        valid = valid_pixels(target_B3HW)
        if valid.any():
            cosine = (F.normalize(prediction_B3HW, dim=1) * target_B3HW).sum(1)[valid]
            angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
            shares = [(angle < limit).double().mean() for limit in (11.25, 22.5, 30.0)]
            self._add([angle.mean(), _median(angle), *shares], len(angle))
            if self.over == "pixels":
                self.angles.append(angle.float().cpu())

    def compute(self) -> dict[str, Tensor]:
        values = super().compute()
        return values | ({"median": _median(torch.cat(self.angles))} if self.over == "pixels" else {})


def _median(values: Tensor) -> Tensor:
    """() of values (n,); between the two in the middle of an even number."""
    ordered = values.sort().values
    return ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean()


def delta_m(values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """Mean relative loss against a baseline in percent, over the metrics of `higher_is_better`; lower is better.

    Delta-m = 100/K sum_k (-1)^{h_k} (M_k - B_k) / B_k, with h_k = 1 where higher is better.

    >>> delta_m({"accuracy": 0.9, "error": 2.0}, {"accuracy": 1.0, "error": 1.0}, {"accuracy": True, "error": False})
    55.0
    """
    terms = [
        (-1) ** higher * (values[name] - baseline[name]) / baseline[name] for name, higher in higher_is_better.items()
    ]
    return 100 * sum(terms) / len(terms)
