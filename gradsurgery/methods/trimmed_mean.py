"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (coordinate-wise trimmed mean).

Yin, Chen, Kannan, Bartlett. ICML 2018. https://arxiv.org/abs/1803.01498, definition 2.

Deviation: the paper trims a fraction of the entries; here, as TorchJD does, their number is given.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.kernels import has_kernel, trimmed_mean_columns
from gradsurgery.registry import ColumnMethod, State, mark_nonfinite, register
from gradsurgery.stats import Needs


def trimmed_mean(jacobian: Tensor, *, trim: int = 1) -> Tensor:
    """Mean of the task gradients, in every coordinate without its ``trim`` largest and smallest entries.

    Args:
        jacobian: (..., T, d).
        trim: entries left out at each end; as many as leave one or two where 2 trim >= T.

    Returns:
        u (..., d); with 2 trim >= T - 2 it is the median.

    Source: Yin et al., ICML 2018, definition 2.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import trimmed_mean
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [300.0]]))
        tensor([2.])
    """
    T = jacobian.shape[-2]
    cut = min(trim, (T - 1) // 2)
    return torch.sort(jacobian, dim=-2).values[..., cut : T - cut, :].mean(dim=-2)


@register(
    "trimmed_mean",
    paper="Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, https://arxiv.org/abs/1803.01498",
    venue="ICML 2018",
    heads="unweighted",
    guarantees=frozenset({"homogeneous"}),
)
@dataclass(frozen=True)
class TrimmedMean(ColumnMethod):
    """Mean of every coordinate without its extremes.

    Args:
        trim: entries left out at each end, >= 0.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    marks_nonfinite: ClassVar[bool] = True
    trim: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.trim, int) or self.trim < 0:
            raise ValueError(f"trim is a number of entries, 0 or more; got {self.trim!r}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def columns(self, jacobian: Tensor, state: State, generator: Generator | None) -> Tensor:
        if has_kernel(jacobian):
            return trimmed_mean_columns(jacobian, self.trim)
        return mark_nonfinite(jacobian, trimmed_mean(jacobian, trim=self.trim))
