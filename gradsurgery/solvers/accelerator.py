"""The road of CUDA tensors: a solver's Triton kernel where Triton is installed, else what its operator does anyway."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Above it a tile no longer fits into the registers of one program.
MAX_TASKS = 128
TRITON = importlib.util.find_spec("triton") is not None

_LIBRARY = torch.library.Library("gradsurgery", "FRAGMENT")


def has_kernel(gramian: Tensor) -> bool:
    """Whether the kernels can take Gramians (..., T, T): on CUDA, with Triton, and not too many tasks for a tile."""
    return TRITON and gramian.is_cuda and gramian.shape[-1] <= MAX_TASKS


def on_device(name: str, host: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The CUDA implementation of the operator of that name, which leaves to ``host`` what no kernel can take."""

    def run(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return (_device().BODIES.get(name, host) if has_kernel(gramian) else host)(gramian, *args)

    return run


def _device() -> Any:
    # Late, for a machine that has Triton and no use for it: the import takes a quarter of a second.
    return importlib.import_module("gradsurgery.solvers.device")


def _pcgrad(gramian: Tensor, orders: Tensor) -> Tensor:
    return _device().pcgrad(gramian, orders)


def _gradvac(gramian: Tensor, target: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return _device().gradvac(gramian, target, orders, beta)


_LIBRARY.define("pcgrad_visits(Tensor gramian, Tensor orders) -> Tensor")
_LIBRARY.define("gradvac_visits(Tensor gramian, Tensor target, Tensor orders, float beta) -> (Tensor, Tensor)")
_LIBRARY.impl("pcgrad_visits", _pcgrad, "CUDA")
_LIBRARY.impl("gradvac_visits", _gradvac, "CUDA")


@torch.library.register_fake("gradsurgery::pcgrad_visits", lib=_LIBRARY)
def _(gramian: Tensor, orders: Tensor) -> Tensor:
    return gramian.new_empty(gramian.shape[:-1])


@torch.library.register_fake("gradsurgery::gradvac_visits", lib=_LIBRARY)
def _(gramian: Tensor, target: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape)


def pcgrad_visits(gramian: Tensor, orders: Tensor) -> Tensor:
    """The visits of PCGrad in one kernel.

    Args:
        gramian: (..., T, T) on CUDA; see `has_kernel`.
        orders: (T, T - 1) int64, row i the order in which task i visits the others.

    Returns:
        w (..., T) in the dtype of ``gramian``; not differentiable.
    """
    return torch.ops.gradsurgery.pcgrad_visits(gramian.double(), orders).to(gramian.dtype)


def gradvac_visits(gramian: Tensor, target: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The visits of GradVac in one kernel.

    Args:
        gramian: (..., T, T) on CUDA; see `has_kernel`.
        target: (..., T, T), the target cosines.
        orders: as in `pcgrad_visits`.
        beta: step of the targets' moving average.

    Returns:
        w (..., T) and the moved targets (..., T, T) in the dtype of ``gramian``; not differentiable.
    """
    target = target.expand(gramian.shape).double()
    w, moved = torch.ops.gradsurgery.gradvac_visits(gramian.double(), target, orders, beta)
    return w.to(gramian.dtype), moved.to(gramian.dtype)
