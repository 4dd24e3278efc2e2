"""Encoder and decoder of dense prediction: torchvision's dilated ResNet and its ASPP head. Needs torchvision.

Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation" (DeepLabv3), 2017,
https://arxiv.org/abs/1706.05587; LibMTL's NYUv2 and Cityscapes protocols use both.
"""

from collections.abc import Sequence
from typing import Any, Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.architectures.stages import Stages, split_stages

DILATION = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}


def dilated_resnet(name: str = "resnet50", output_stride: Literal[8, 16, 32] = 8, weights: Any = None) -> Stages:
    """(B, 3, H, W) -> (B, 2048, H / stride, W / stride), in five stages; 512 channels for resnet18 and resnet34.

    Args:
        name: of torchvision's ResNets; those of basic blocks (18, 34) take no dilation, and a stride of 32 alone.
        output_stride: by which maps are smaller than the image.
        weights: what torchvision's loader takes, ``"DEFAULT"`` or ``"IMAGENET1K_V2"``, which it fetches; None: none.

    Raises:
        ValueError: an unknown name or weights, a stride that the net can't have.
    """
    from torchvision.models import get_model

    if output_stride not in DILATION:
        raise ValueError(f"output_stride must be one of {list(DILATION)}; got {output_stride}.")
    basic = name in ("resnet18", "resnet34")
    if basic and output_stride != 32:
        raise ValueError(f"{name} has basic blocks, which torchvision does not dilate: output_stride must be 32.")
    dilation: dict[str, Any] = {} if basic else {"replace_stride_with_dilation": list(DILATION[output_stride])}
    return split_stages(get_model(name, weights=weights, **dilation))


@final
class ASPPDecoder(nn.Module):
    """(B, channels, h, w) -> (B, out, H, W): atrous spatial pyramid pooling, two convolutions, bilinear to size.

    Args:
        channels: of the encoder's maps.
        out: of the prediction.
        size: (H, W).
        rates: of the pyramid's dilated convolutions.
        align_corners: of the interpolation; torchvision's DeepLab has False, LibMTL's protocols have True.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        size: tuple[int, int],
        rates: Sequence[int] = (12, 24, 36),
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        self.head = DeepLabHead(channels, out, rates)
        self.size, self.align_corners = size, align_corners

    def forward(self, z: Tensor) -> Tensor:
        return F.interpolate(self.head(z), size=self.size, mode="bilinear", align_corners=self.align_corners)
