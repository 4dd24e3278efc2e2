"""Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout (GradDrop).

Chen, Ngiam, Huang, Luong, Kretzschmar, Chai, Anguelov. NeurIPS 2020. https://arxiv.org/abs/2010.06808, algorithm 1.

Deviation: the authors drop signs of the gradients at one shared activation, multiplied by its sign and summed over the
batch; here, as in the comparisons of CAGrad and later papers, at the shared parameters themselves.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.kernels import graddrop_columns, has_kernel
from gradsurgery.registry import ColumnMethod, State, mark_nonfinite, register
from gradsurgery.stats import Needs


def graddrop(jacobian: Tensor, *, leak: float = 0.0, generator: Generator | None = None) -> Tensor:
    """Sum of the task gradients, in every coordinate of those of one sign, drawn by its purity.

    Args:
        jacobian: (..., T, d).
        leak: share of the dropped gradients that comes through, in [0, 1].
        generator: source of the d uniform numbers.

    Returns:
        u (..., d). A coordinate keeps its positive entries with probability (1 + sum g / sum |g|) / 2, else its
        negative ones.

    Source: Chen et al., NeurIPS 2020, algorithm 1.

    Example:
        >>> import torch
        >>> from gradsurgery.functional import graddrop
        >>> graddrop(torch.tensor([[1.0, -1.0], [2.0, -3.0]]))
        tensor([ 3., -4.])
    """
    total, size = jacobian.sum(dim=-2), jacobian.abs().sum(dim=-2)
    positive = 0.5 * (1 + torch.where(size > 0, total / size, 0.0))
    uniform = draw(total.shape, generator, jacobian.device)
    keeps_positive = (positive > uniform).unsqueeze(-2)
    kept = torch.where(keeps_positive, jacobian.clamp(min=0), jacobian.clamp(max=0))
    return (leak * jacobian + (1 - leak) * kept).sum(dim=-2)


def draw(shape: torch.Size, generator: Generator | None, device: device) -> Tensor:
    """Uniform numbers, float32 for gradients of any width."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=device)


@register(
    "graddrop",
    paper="Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout, "
    "https://arxiv.org/abs/2010.06808",
    venue="NeurIPS 2020",
    heads="unweighted",
    guarantees=frozenset({"homogeneous"}),
    randomized=True,
)
@dataclass(frozen=True)
class GradDrop(ColumnMethod):
    """Every coordinate takes the gradients of one sign, drawn by its purity.

    Args:
        leak: share of the dropped gradients that comes through, in [0, 1].
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    marks_nonfinite: ClassVar[bool] = True
    leak: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.leak <= 1:
            raise ValueError(f"leak is a share: it must be in [0, 1]; got {self.leak}.")

    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        return {}

    def columns(self, jacobian: Tensor, state: State, generator: Generator | None) -> Tensor:
        if has_kernel(jacobian):
            return graddrop_columns(jacobian, draw(jacobian.shape[-1:], generator, jacobian.device), self.leak)
        return mark_nonfinite(jacobian, graddrop(jacobian, leak=self.leak, generator=generator))
