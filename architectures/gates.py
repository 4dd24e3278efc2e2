"""Gates over experts, as all mixtures of experts have them."""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.positions import pool
from gradsurgery.architectures.stages import Stages, entrance, split_stages


class Mixture(NamedTuple):
    """What tasks share in a mixture of experts.

    Attributes:
        experts: (E, B, ...), the outputs of the shared experts.
        entered: what the experts were given.
        pooled: (B, C), what gates read; (B, 0) where they read nothing.
    """

    experts: Tensor
    entered: Tensor
    pooled: Tensor


@final
class Gate(nn.Module):
    """`softmax(W h)` over E experts, of pooled features h (B, C)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, experts, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, E), of which each row is on the simplex."""
        return self.linear(pooled).softmax(-1)


@final
class Experts(nn.Module):
    """Encoders side by side, behind stages that all of them share.

    Args:
        encoders: E of them, of which experts are the last stages where ``stem`` is not 0.
        stem: how many first stages the experts share; more than 0 only for encoders that `split_stages` can cut.
        gate_width: channels of what enters the experts; None reads it off, 0 has gates read nothing.
    """

    def __init__(self, encoders: Sequence[nn.Module], stem: int, gate_width: int | None) -> None:
        super().__init__()
        experts = [after_stem(encoder, stem) for encoder in encoders]
        first = experts[0]
        self.stem = split_stages(encoders[0]).part(0, stem) if stem else nn.Identity()
        self.experts = nn.ModuleList(experts)
        found, self.channel_dim = (first.in_width, first.in_dim) if isinstance(first, Stages) else entrance(first)
        width = found if gate_width is None else gate_width
        if width is None:
            raise ValueError(
                f"Can't tell how many channels a {type(encoders[0]).__name__} takes, which gates must know: pass "
                "gate_width=."
            )
        self.gate_width: int = width

    def forward(self, x: Tensor) -> Mixture:
        h = self.stem(x)
        pooled = self._pooled(h) if self.gate_width else None
        outputs = stacked([expert(h) for expert in self.experts])
        return Mixture(outputs, h, outputs.new_zeros(outputs.shape[1], 0) if pooled is None else pooled)

    def _pooled(self, h: Tensor) -> Tensor:
        if not isinstance(h, Tensor) or not (h.is_floating_point() or h.is_complex()):
            kind = str(h.dtype) if isinstance(h, Tensor) else type(h).__name__
            raise TypeError(
                f"Gates read a mean over positions, which {kind} has not: pass stem=, so that they read the output of "
                "an embedding or the like."
            )
        pooled = pool(h, self.channel_dim)
        if pooled.shape[1] != self.gate_width:
            raise ValueError(
                f"Gates were made for {self.gate_width} channels, and what enters the experts has {pooled.shape[1]}: "
                "pass gate_width=."
            )
        return pooled


def after_stem(encoder: nn.Module, stem: int) -> nn.Module:
    """An expert: what follows the first stages.

    Raises:
        ValueError: nothing does.
    """
    if not stem:
        return encoder
    stages = split_stages(encoder)
    if not 0 <= stem < len(stages):
        raise ValueError(f"stem must leave experts a stage of {len(stages)}; got {stem}.")
    return stages.part(stem)


def stacked(outputs: Sequence[Tensor]) -> Tensor:
    """(E, B, ...) of E outputs.

    Raises:
        TypeError: they are not tensors.
    """
    if not isinstance(outputs[0], Tensor):
        raise TypeError(
            f"A mixture adds up what its experts put out, which must be a tensor; got {type(outputs[0]).__name__}. Use "
            "an encoder that returns one."
        )
    return torch.stack(list(outputs))


def mixed(weights: Tensor, outputs: Tensor) -> Tensor:
    """(B, ...): `sum_e weights[:, e] outputs[e]`, for weights (B, E) and outputs (E, B, ...)."""
    return torch.einsum("be,eb...->b...", weights, outputs)
