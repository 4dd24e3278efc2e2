"""DSelect-k: MMoE whose gates choose k experts, and are differentiable all the same.

Hazimeh, Zhao, Chowdhery, Sathiamoorthy, Chen, Mazumder, Hong, Chi, "DSelect-k: Differentiable Selection in the Mixture
of Experts with Applications to Multi-Task Learning", NeurIPS 2021, https://arxiv.org/abs/2106.03760: the smooth step
(eq. 3), a selector of one expert by its binary code (eq. 4), k selectors mixed by a softmax (eq. 6), and the penalties
of section 3 and of its appendix for numbers of experts that are no power of 2. The penalties are the caller's to add.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.gates import Experts, Mixture, mixed
from gradsurgery.architectures.stages import Encoder, fresh


@final
class DSelectK(Architecture):
    """Experts' outputs mixed by gates that choose at most k of them.

    Args:
        encoder: of an expert; a function makes them with weights of their own, a module is copied.
        decoders: task -> any module from mixed features to that task's prediction.
        num_experts: E, 2 or more.
        k: experts a gate may choose.
        gamma: width of the smooth step; selectors are binary beyond half of it to either side.
        per_sample: whether gates read the input; else a task has one choice of experts for all inputs.
        stem, gate_width: as in `MMoE`.

    Raises:
        ValueError: no experts, k or gamma below what makes sense, no stage left for experts, or a width that cannot be
            found.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: Mapping[str, nn.Module],
        *,
        num_experts: int = 4,
        k: int = 2,
        gamma: float = 1.0,
        per_sample: bool = True,
        stem: int = 0,
        gate_width: int | None = None,
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("DSelectK", decoders)
        check_count("num_experts", num_experts, 2)
        self.experts = Experts(fresh(encoder, num_experts), stem, gate_width if per_sample else 0)
        width = self.experts.gate_width
        self.gates = by_task({task: SelectorGate(width, num_experts, k, gamma) for task in decoders})

    def features(self, x: Any, tasks: Sequence[str]) -> Mixture:
        return self.experts(x)

    def gate_weights(self, z: Mixture, task: str) -> Tensor:
        """(B, E), on the simplex if E is a power of 2 or training has driven `penalty` down."""
        return self.gates[task](z.pooled)

    def penalty(self, z: Mixture, task: str) -> Tensor:
        """() what to add to the task's loss, times a coefficient, for selectors to become binary.

        The entropy of each selector's distribution over experts, summed over selectors, and where E is no power of 2
        the inverse of the mass that each puts on codes of experts that exist, of 0.001 at least; a mean over samples.
        """
        gate: Any = self.gates[task]
        return gate.penalty(z.pooled)

    def predict(self, z: Mixture, task: str) -> Tensor:
        return self.decoders[task](mixed(self.gate_weights(z, task), z.experts))

    def task_parts(self, task: str) -> Iterable[Part]:
        return self.gates[task], self.decoders[task]


@final
class SelectorGate(nn.Module):
    """k selectors of one of E experts each, mixed by a softmax.

    Args:
        width: of what it reads; 0: it reads nothing.
        experts, k, gamma: as in `DSelectK`.
    """

    codes: Tensor

    def __init__(self, width: int, experts: int, k: int, gamma: float) -> None:
        super().__init__()
        if not 1 <= k <= experts or not gamma > 0:
            raise ValueError(f"k must lie in 1..{experts} and gamma be positive; got k={k}, gamma={gamma}.")
        self.k, self.gamma = k, gamma
        bits = max(1, math.ceil(math.log2(experts)))
        codes = torch.arange(experts)[:, None] >> torch.arange(bits) & 1
        self.register_buffer("codes", codes.bool(), persistent=False)
        self.complete = experts == 2**bits
        self.bits, self.mixing = (nn.Linear(width, n) if width else Constant(n) for n in (k * bits, k))
        for p in self.bits.parameters():
            nn.init.uniform_(p, -gamma / 100, gamma / 100)

    def selectors(self, pooled: Tensor) -> Tensor:
        """(B, k, E) in [0, 1]; sums over E are 1 if E is a power of 2."""
        s = smooth_step(self.bits(pooled), self.gamma).unflatten(-1, (self.k, 1, -1))
        return torch.where(self.codes, s, 1 - s).prod(-1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, E)."""
        mixing = self.mixing(pooled).softmax(-1)
        return torch.einsum("bk,bke->be", mixing, self.selectors(pooled))

    def penalty(self, pooled: Tensor) -> Tensor:
        """()."""
        chosen = self.selectors(pooled)
        total = torch.special.entr(chosen).sum(-1)
        if not self.complete:
            total = total + 1 / chosen.sum(-1).clamp(min=1e-3)
        return total.sum(-1).mean()


@final
class Constant(nn.Module):
    """A linear map of no features: a bias."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(out).uniform_(-0.1, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 0) -> (B, out)."""
        return self.bias.expand(len(x), -1)


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 below -gamma/2, 1 above gamma/2, and the cubic between that meets them with slope 0."""
    u = (t / gamma).clamp(-0.5, 0.5)
    return -2 * u**3 + 1.5 * u + 0.5
