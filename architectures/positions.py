"""Channels and positions of maps (B, C, H, W) or (B, H, W, C), tokens (B, N, C) and vectors (B, C)."""

from typing import final

from torch import Tensor, nn


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
