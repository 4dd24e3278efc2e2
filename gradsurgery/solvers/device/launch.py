"""How a kernel is started: one program a Gramian, as many warps as its tile wants."""

from typing import Any

import torch
import triton
from torch import Tensor


def block_of(T: int) -> int:
    """The side of the tile that holds T tasks."""
    return max(2, triton.next_power_of_2(T))


def warps_of(block: int) -> int:
    """Warps for a tile: one up to 16 x 16, which then needs no barrier. From 64 x 64 on registers spill."""
    return max(1, min(32, block * block // 256))


def launch(kernel: Any, gramian: Tensor, *outputs_and_inputs: Tensor, programs: int = 1, **constants: Any) -> None:
    """Runs ``kernel(gramian, *tensors, T, BLOCK, **constants)``.

    Args:
        kernel: a Triton kernel.
        gramian: (..., T, T) float64.
        outputs_and_inputs: its other tensors; contiguous.
        programs: how many a Gramian.
        constants: further compile-time arguments.
    """
    T = gramian.shape[-1]
    N = gramian.numel() // (T * T)
    if N == 0:
        return
    block = block_of(T)
    arguments = (gramian.contiguous(), *outputs_and_inputs, T)
    options = {"BLOCK": block, "num_warps": warps_of(block), **constants}
    if gramian.is_cuda:
        with torch.cuda.device(gramian.device):
            kernel[(N, programs)](*arguments, **options)
    else:
        kernel[(N, programs)](*arguments, **options)
