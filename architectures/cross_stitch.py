"""Cross-stitch networks: one network a task, whose activations are mixed after each stage.

Misra, Shrivastava, Gupta, Hebert, "Cross-stitch Networks for Multi-task Learning", CVPR 2016,
https://arxiv.org/abs/1604.03539, eq. 1: `h_t <- sum_s alpha_ts h_s`, with an alpha for each channel, as section 4.2 has
it, which starts near the identity (0.9 for a task's own, section 5.1).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh_stages


@final
class CrossStitch(Architecture):
    """A network a task, mixed channel by channel after every stage.

    Each task has a z of its own. All networks run on the input of any task.

    Args:
        encoder: staged, or one that `split_stages` cuts; a function makes networks with weights of their own, a module
            is copied.
        decoders: task -> any module from that task's features to its prediction.
        stem: whether the first stage's activations are mixed too.
        own_weight: what a task's own activations weigh at first; the others' weights add up to the rest.
        per_channel: a weight for each channel, or one for all of them.

    Raises:
        ValueError: nothing to mix.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: Mapping[str, nn.Module],
        *,
        stem: bool = False,
        own_weight: float = 0.9,
        per_channel: bool = True,
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("CrossStitch", decoders)
        networks = fresh_stages(encoder, len(decoders))
        widths = networks[0].widths
        if len(widths) == 1 and not stem:
            raise ValueError("An encoder of one stage has nothing to mix before the decoders: pass stem=True.")
        self.channel_dim = networks[0].channel_dim
        self.networks = nn.ModuleList(networks)
        self.stitches = nn.ParameterList(
            near_identity(len(decoders), own_weight)[..., None].repeat(1, 1, width if per_channel else 1)
            for width in (widths if stem else widths[1:])
        )

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        networks: Any = self.networks
        hs: list[Any] = [x] * len(self.tasks)
        unmixed = len(networks[0]) - len(self.stitches)
        for i, stages in enumerate(zip(*networks, strict=True)):
            hs = [stage(h) for stage, h in zip(stages, hs, strict=True)]
            if i >= unmixed:
                hs = stitched(self.stitches[i - unmixed], hs, self.channel_dim)
        return dict(zip(self.tasks, hs, strict=True))

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        return (self.decoders[task],)


def near_identity(T: int, own: float) -> Tensor:
    """(T, T), with ``own`` on the diagonal, and rows that add up to 1."""
    if T == 1:
        return torch.ones(1, 1)
    return torch.full((T, T), (1 - own) / (T - 1)).fill_diagonal_(own)


def stitched(alpha: Tensor, hs: Sequence[Tensor], channel_dim: int) -> list[Tensor]:
    """T activations: `sum_s alpha[t, s] h_s`, with alpha (T, T, C) or (T, T, 1)."""
    shape = [1] * hs[0].ndim
    shape[channel_dim] = -1
    weights = [[alpha[t, s].view(shape) for s in range(len(hs))] for t in range(len(hs))]
    return [torch.stack([a * h for a, h in zip(row, hs, strict=True)]).sum(0) for row in weights]
