"""What was measured before a step (`Stats`) and what came of it (`StepInfo`).

Legend, used everywhere: ``T`` tasks; ``d`` elements of the shared parameters; ``B`` blocks of shared parameters;
``J (T, d)`` per-task gradients, one row a task; ``G (B, T, T)`` Gramians ``J_b J_b^T``; ``w (B, T)`` task weights.
"""

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Needs(enum.Flag):
    """What a method must see before it can weigh the tasks; engines measure no more than this."""

    LOSSES = enum.auto()
    GRAMIAN = enum.auto()
    COLUMNS = enum.auto()
    CROSS = enum.auto()
    TRACKED = enum.auto()


@dataclass(frozen=True)
class Stats:
    """What an engine measured of the tasks that are present in this step.

    Attributes:
        losses: (T,) float64, loss values.
        gramian: (B, T, T) float64, inner products of the task gradients in each block, in squared gradient units; of
            the rows that `TrackedMethod.track` returns, for a method that has such; None where it was not asked for.
        cross: (B, T, T) float64, inner products of the gradients of one independent batch (first task axis) with those
            of another; None where it was not asked for.
    """

    losses: Tensor
    gramian: Tensor | None = None
    cross: Tensor | None = None

    def sanitized(self) -> "tuple[Stats, Tensor]":
        """Statistics that are safe to solve for, and whether () they are these: a solver never sees NaN or Inf."""
        measured = [G for G in (self.gramian, self.cross) if G is not None]
        finite = all_finite(self.losses, *measured)

        def safe(G: Tensor | None) -> Tensor | None:
            return None if G is None else torch.where(finite, G, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))

        return Stats(torch.where(finite, self.losses, 1.0), safe(self.gramian), safe(self.cross)), finite


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether () every entry is finite. A sum is NaN or infinite if an entry is; one that leaves the range of float64
    over finite entries counts as not finite."""
    return torch.stack([tensor.sum() for tensor in tensors]).sum().isfinite()


def cosines(gramian: Tensor) -> Tensor:
    """Cosine similarities (..., T, T) in [-1, 1] of a Gramian (..., T, T); a zero gradient has cosine 0 with all."""
    norm = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norm.unsqueeze(-1) * norm.unsqueeze(-2)
    return torch.where(scale > 0, gramian / scale, 0.0).clamp(-1, 1)


@dataclass(frozen=True)
class StepInfo:
    """What came of a step. Every tensor stays on its device; reading one is the only synchronisation.

    Attributes:
        tasks: names of the T tasks, in the order of every task axis below.
        losses: (T,) float64; NaN for a task that was absent.
        weights: (B, T) float64, what each task's gradient was multiplied by; 0 for an absent task, NaN where a loss or
            the Gramian is not finite. None while rows are only being held (inside `MTLOptimizer.accumulate`), and of a
            method that works column by column.
        gramian: (B, T, T) float64, 0 in the rows of an absent task; None in a step that took no inner products of its
            own gradients (a method that needs only losses, columns, other batches or tracked rows, or a step between
            two solves of ``update_every``).
        residual: (B,) float64, relative optimality residual that the solver reached; None for closed forms.
        engine: name of the engine that ran, ``"weighted"`` for one ordinary backward of the weighted sum, or
            ``"compiled"``.
        diagnostics: whatever else the method reports, by name.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    weights: Tensor | None
    gramian: Tensor | None
    residual: Tensor | None
    engine: str
    diagnostics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def cosines(self) -> Tensor | None:
        """(B, T, T) cosine similarities between task gradients, or None where no Gramian was measured."""
        return None if self.gramian is None else cosines(self.gramian)

    @property
    def conflicts(self) -> Tensor | None:
        """(B,) int64, number of task pairs whose gradients have a negative inner product, or None."""
        if self.gramian is None:
            return None
        return (self.gramian < 0).sum(dim=(-2, -1)) // 2
