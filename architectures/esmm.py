"""ESMM, the entire-space model: a conversion rate learned over all impressions, as the product of two rates.

Ma, Zhao, Huang, Wang, Hu, Zhu, Gai, "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click
Conversion Rate", SIGIR 2018, https://arxiv.org/abs/1804.07931, eq. 1 and 3: `pCTCVR = pCTR * pCVR`, with losses on
click and on click-and-conversion alone. Predictions are logits, for `binary_cross_entropy_with_logits`; the product is
taken in the logarithm.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh


class Impressions(NamedTuple):
    """What the two tasks share.

    Attributes:
        features: of the impressions.
        ctr: (B, ...) logits of a click.
    """

    features: Any
    ctr: Tensor


@final
class ESMM(Architecture):
    """Tasks ``ctr`` and ``ctcvr``: logits of a click, and of a click with a conversion.

    Both losses reach the click's tower.

    Args:
        encoder: any module from an input (embedding lookups, say) to features, or a function that makes one.
        decoders: ``{"ctr": tower, "cvr": tower}``, each from features to a logit.

    Raises:
        ValueError: other towers.

    >>> model = ESMM(nn.Linear(4, 8), {"ctr": nn.Linear(8, 1), "cvr": nn.Linear(8, 1)})
    >>> {task: tuple(y.shape) for task, y in model(torch.zeros(2, 4)).items()}
    {'ctr': (2, 1), 'ctcvr': (2, 1)}
    """

    def __init__(self, encoder: Encoder, decoders: dict[str, nn.Module]) -> None:
        super().__init__(("ctr", "ctcvr"))
        self.decoders = decoders_of("ESMM", decoders)
        if set(decoders) != {"ctr", "cvr"}:
            raise ValueError(f"ESMM has the towers 'ctr' and 'cvr'; got {list(decoders)}.")
        (self.encoder,) = fresh(encoder, 1)

    def features(self, x: Any, tasks: Sequence[str]) -> Impressions:
        z = self.encoder(x)
        return Impressions(z, self.decoders["ctr"](z))

    def conversion(self, z: Impressions) -> Tensor:
        """(B, ...) logits of a conversion after a click, the paper's pCVR."""
        return self.decoders["cvr"](z.features)

    def predict(self, z: Impressions, task: str) -> Tensor:
        return z.ctr if task == "ctr" else logit_of_both(z.ctr, self.conversion(z))

    def task_parts(self, task: str) -> Iterable[Part]:
        return () if task == "ctr" else (self.decoders["cvr"],)


def logit_of_both(a: Tensor, b: Tensor) -> Tensor:
    """`logit(sigmoid(a) sigmoid(b))`.

    With `p = sigmoid(a) sigmoid(b)`, `1 / p - 1 = exp(-a) + exp(-b) + exp(-a - b)`.
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), 0)
