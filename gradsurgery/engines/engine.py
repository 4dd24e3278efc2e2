"""The contract of an engine."""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from gradsurgery.engines.layout import Layout, Piece
from gradsurgery.losses import TaskLosses

# What stands for the rows (T, n) of a piece of the parameters, given the task gradients (T, n) there.
RowMap = Callable[[Piece, Tensor], Tensor]


class Measurement(abc.ABC):
    """What an engine measured of one batch, or of several that were held."""

    @abc.abstractmethod
    def gramian(self, of: RowMap | None = None) -> Tensor:
        """(B, T, T) float64 inner products of the task gradients, or of what stands for them; 0 in the rows of an
        absent task."""

    @abc.abstractmethod
    def cross_gramian(self, other: "Measurement") -> Tensor:
        """(B, T, T) float64 inner products of the task gradients with those of another batch (second task axis)."""

    @abc.abstractmethod
    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        """Accumulates into ``.grad``, as ``loss.backward()`` does.

        Args:
            weights: (B, T), of the shared parameters, or (1, T) for the same in all blocks.
            head_weights: (T,), of the task-specific parameters; None leaves their gradients raw.
            of: what the weights multiply; the task gradients if None. Called once a piece.
        """

    @abc.abstractmethod
    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        """As `write`, for a rule that works column by column; task-specific gradients stay raw.

        Args:
            columns: (T, n) columns of the task gradients -> (n,) of the direction.
        """


class Engine(abc.ABC):
    """A road from losses to `Measurement`. It holds options, and no state of a training run."""

    name: ClassVar[str]

    @abc.abstractmethod
    def measure(
        self,
        losses: TaskLosses,
        layout: Layout,
        task_specific: Sequence[Tensor],
        *,
        grad_scale: Tensor | None,
        held: Measurement | None,
    ) -> Measurement:
        """Differentiates every present loss, and frees the graph.

        Args:
            losses: the batch.
            layout: the shared parameters and their blocks.
            task_specific: the other parameters that losses may reach.
            grad_scale: () factor on every gradient (an AMP scale), or None.
            held: an earlier measurement of the same optimizer step, to which this one is added.
        """
