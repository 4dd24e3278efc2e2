"""Turns a NumPy solver of many small problems into a torch operator that compiles and runs on any device."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Body = Callable[..., tuple[np.ndarray, np.ndarray]]


def solver(name: str, schema: str) -> Callable[[Body], Callable[..., tuple[Tensor, Tensor]]]:
    """Decorator: ``body(gramian (N, T, T), *others)`` in float64 NumPy -> ``(solution (N, T), residual (N,))``.

    The operator takes float64 tensors on any device, ``gramian (..., T, T)`` first; on an accelerator the T x T
    problems make a round trip to the host.

    Args:
        name: operator name, without the namespace.
        schema: torch schema of its arguments, e.g. ``"(Tensor gramian, float c)"``.
    """

    def wrap(body: Body) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(gramian: Tensor, *args: Tensor | float) -> tuple[Tensor, Tensor]:
            T = gramian.shape[-1]
            batch = gramian.shape[:-2]
            arrays = [a.detach().cpu().numpy() if isinstance(a, Tensor) else a for a in args]
            solution, residual = body(gramian.detach().cpu().numpy().reshape(-1, T, T), *arrays)
            return (
                torch.from_numpy(solution).reshape(*batch, T).to(gramian.device),
                torch.from_numpy(residual).reshape(batch).to(gramian.device),
            )

        def fake(gramian: Tensor, *args: Tensor | float) -> tuple[Tensor, Tensor]:
            return gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])

        operator = torch.library.custom_op(
            f"gradsurgery::{name}", run, mutates_args=(), schema=f"{schema} -> (Tensor, Tensor)"
        )
        operator.register_fake(fake)
        return operator

    return wrap
