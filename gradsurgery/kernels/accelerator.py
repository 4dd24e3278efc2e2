"""The road of CUDA tensors: Triton kernels where Triton is installed, as operators, which compilers can see."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

# Above it a Gramian no longer fits into the registers of one program.
MAX_TASKS = 128
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON = importlib.util.find_spec("triton") is not None

_LIBRARY = torch.library.Library("gradsurgery", "FRAGMENT")


def has_kernel(rows: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can take rows (T, n), with others of their kind: on CUDA, with Triton, and where nothing
    differentiates or maps over them."""
    if not rows.is_cuda or not TRITON:
        return False
    tensors = [rows, *(other for other in others if other is not None)]
    if rows.ndim != 2 or not 0 < len(rows) <= MAX_TASKS or rows.dtype not in DTYPES:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    return peek_interpreter_stack() is None and forward_ad._current_level < 0


def _device() -> Any:
    # Late, for a machine that has Triton and no use for it: the import takes a quarter of a second.
    return importlib.import_module("gradsurgery.kernels.device")


def _gramian(jacobian: Tensor, bounds: Sequence[int], other: Tensor | None) -> Tensor:
    return _device().gramian(jacobian, bounds, other)


def _combine(weights: Tensor, jacobian: Tensor, bounds: Sequence[int], out: Tensor) -> None:
    _device().combine(weights, jacobian, bounds, out)


def _graddrop(jacobian: Tensor, uniform: Tensor, leak: float) -> Tensor:
    return _device().graddrop(jacobian, uniform, leak)


def _trimmed_mean(jacobian: Tensor, trim: int) -> Tensor:
    return _device().trimmed_mean(jacobian, trim)


_LIBRARY.define("flat_gramian(Tensor jacobian, SymInt[] bounds, Tensor? other) -> Tensor")
_LIBRARY.define("flat_combine(Tensor weights, Tensor jacobian, SymInt[] bounds, Tensor(a!) out) -> ()")
_LIBRARY.define("graddrop_columns(Tensor jacobian, Tensor uniform, float leak) -> Tensor")
_LIBRARY.define("trimmed_mean_columns(Tensor jacobian, int trim) -> Tensor")
_LIBRARY.impl("flat_gramian", _gramian, "CUDA")
_LIBRARY.impl("flat_combine", _combine, "CUDA")
_LIBRARY.impl("graddrop_columns", _graddrop, "CUDA")
_LIBRARY.impl("trimmed_mean_columns", _trimmed_mean, "CUDA")


@torch.library.register_fake("gradsurgery::flat_gramian", lib=_LIBRARY)
def _(jacobian: Tensor, bounds: Sequence[int], other: Tensor | None) -> Tensor:
    return jacobian.new_empty((len(bounds) - 1, len(jacobian), len(jacobian)), dtype=torch.float64)


@torch.library.register_fake("gradsurgery::flat_combine", lib=_LIBRARY)
def _(weights: Tensor, jacobian: Tensor, bounds: Sequence[int], out: Tensor) -> None:
    return None


@torch.library.register_fake("gradsurgery::graddrop_columns", lib=_LIBRARY)
def _(jacobian: Tensor, uniform: Tensor, leak: float) -> Tensor:
    return jacobian.new_empty(jacobian.shape[1:])


@torch.library.register_fake("gradsurgery::trimmed_mean_columns", lib=_LIBRARY)
def _(jacobian: Tensor, trim: int) -> Tensor:
    return jacobian.new_empty(jacobian.shape[1:])


def flat_gramian(jacobian: Tensor, bounds: Sequence[int], other: Tensor | None) -> Tensor:
    """`gradsurgery.kernels.gramian` in two launches; see `has_kernel`."""
    return torch.ops.gradsurgery.flat_gramian(jacobian, bounds, other)


def flat_combine(weights: Tensor, jacobian: Tensor, bounds: Sequence[int], out: Tensor | None) -> Tensor:
    """`gradsurgery.kernels.combine` in one launch; see `has_kernel`."""
    out = jacobian.new_empty(jacobian.shape[1:]) if out is None else out
    torch.ops.gradsurgery.flat_combine(weights, jacobian, bounds, out)
    return out


def graddrop_columns(jacobian: Tensor, uniform: Tensor, leak: float) -> Tensor:
    """GradDrop of one piece in one launch.

    Args:
        jacobian: (T, n) on CUDA; see `has_kernel`.
        uniform: (n,) float32 in [0, 1), the draws.
        leak: share of the dropped gradients that comes through, in [0, 1].

    Returns:
        (n,) in the dtype of ``jacobian``, NaN where a task gradient is not finite; not differentiable.
    """
    return torch.ops.gradsurgery.graddrop_columns(jacobian, uniform, leak)


def trimmed_mean_columns(jacobian: Tensor, trim: int) -> Tensor:
    """The trimmed mean of one piece in one launch.

    Args:
        jacobian: (T, n) on CUDA; see `has_kernel`.
        trim: entries left out at each end; as many as leave one or two where 2 trim >= T.

    Returns:
        (n,) in the dtype of ``jacobian``, NaN where a task gradient is not finite; not differentiable.
    """
    return torch.ops.gradsurgery.trimmed_mean_columns(jacobian, trim)
