"""Where the stages of torchvision's encoders begin."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, EfficientNet, ResNet, SwinTransformer, VisionTransformer


def cut(encoder: nn.Module, groups: int) -> dict[str, Any] | None:
    """What `Stages` takes, for an encoder without its classifier; None: not one of those known."""
    match encoder:
        case ResNet():
            stem = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool)
            return {"stages": [stem, encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]}
        case ConvNeXt():
            return {"stages": _with_downsampling(encoder.features)}
        case SwinTransformer():
            stages = _with_downsampling(encoder.features)
            return {"stages": [*stages[:-1], _ending(stages[-1], encoder.norm)], "layout": "maps last"}
        case EfficientNet():
            return {"stages": encoder.features}
        case VisionTransformer():
            return _of_vit(encoder, groups)
        case _:
            return None


def _with_downsampling(features: nn.Sequential) -> list[nn.Sequential]:
    """The stem, then stages of blocks, each but the first with what downsamples before them."""
    stem, first, *rest = features
    stages = [nn.Sequential(stem), nn.Sequential(*_blocks(first))]
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return [*stages, *(nn.Sequential(down, *_blocks(blocks)) for down, blocks in pairs)]


def _blocks(stage: nn.Module) -> list[nn.Module]:
    return list(stage.children())


def _of_vit(net: VisionTransformer, groups: int) -> dict[str, Any]:
    layers = _blocks(net.encoder.layers)
    bounds = [round(i * len(layers) / groups) for i in range(groups + 1)]
    grouped = [nn.Sequential(*layers[a:b]) for a, b in pairwise(bounds) if a < b]
    stages = [_Embedding(net), *grouped[:-1], _ending(grouped[-1], net.encoder.ln)]
    return {"stages": stages, "widths": [net.hidden_dim] * len(stages), "layout": "rows", "in_width": 3}


def _ending(stage: nn.Sequential, norm: nn.Module) -> nn.Sequential:
    """A stage whose last block ends with the encoder's last normalisation."""
    return nn.Sequential(*stage[:-1], nn.Sequential(stage[-1], norm))


class _Embedding(nn.Module):
    """Patches, class token and positions of a ViT."""

    def __init__(self, net: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.class_token, self.dropout = net.conv_proj, net.class_token, net.encoder.dropout
        self.pos_embedding = net.encoder.pos_embedding

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, C)."""
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        known = self.pos_embedding.shape[1] - 1
        if patches.shape[1] != known:
            raise ValueError(
                f"This ViT has positions for {known} patches, and an image of {tuple(x.shape[-2:])} has "
                f"{patches.shape[1]}: resize the image, or the positions with "
                "torchvision.models.vision_transformer.interpolate_embeddings."
            )
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1)
        return self.dropout(tokens + self.pos_embedding)
