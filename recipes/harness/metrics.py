"""Metrics of dense prediction, as the NYUv2 and Cityscapes protocols of MTAN compute them, and Delta-m.

Segmentation scores come from one confusion matrix over the whole set. Depth and normal scores are means of per-batch
values, the batch's median among them: the test batch size is part of the protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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


class _MeanOfBatches(Metric):
    """Mean over batches of the values named by `names`; a batch without a valid pixel is left out."""

    full_state_update = False
    total: Tensor
    batches: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: list[Tensor]) -> None:
        self.total += torch.stack(values).to(self.total.dtype)
        self.batches += 1

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.total / self.batches, strict=True))


class DepthError(_MeanOfBatches):
    """`abs` (the target's unit) and `rel` (a fraction) error over the valid pixels of each batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("abs", "rel"), **kwargs)

    def update(self, prediction_B1HW: Tensor, target_B1HW: Tensor) -> None:
        valid = valid_pixels(target_B1HW)
        if valid.any():
            target = target_B1HW[:, 0][valid]
            error = (prediction_B1HW[:, 0][valid] - target).abs()
            self._add([error.mean(), (error / target).mean()])


class NormalAngles(_MeanOfBatches):
    """`mean` and `median` angle in degrees, fractions `<11.25`, `<22.5`, `<30`, over each batch's valid pixels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("mean", "median", "<11.25", "<22.5", "<30"), **kwargs)

    def update(self, prediction_B3HW: Tensor, target_B3HW: Tensor) -> None:
        valid = valid_pixels(target_B3HW)
        if valid.any():
            cosine = (F.normalize(prediction_B3HW, dim=1) * target_B3HW).sum(1)[valid]
            angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).sort().values
            middle = angle[[(len(angle) - 1) // 2, len(angle) // 2]].mean()
            self._add([angle.mean(), middle, *((angle < limit).double().mean() for limit in (11.25, 22.5, 30.0))])


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
