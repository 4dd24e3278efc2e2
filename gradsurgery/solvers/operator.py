"""Turns a solver of many small problems into a torch operator that compiles and runs on any device."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from gradsurgery.solvers.accelerator import on_device

Body = Callable[..., tuple[np.ndarray, np.ndarray]]
Scalar = Callable[..., tuple[list[float], float] | None]

_LIBRARY = torch.library.Library("gradsurgery", "FRAGMENT")


def solver(
    name: str, schema: str, small: Scalar | None = None, tasks: int = 0
) -> Callable[[Body], Callable[..., tuple[Tensor, Tensor]]]:
    """Decorator: ``body(gramian (N, T, T), *others)`` in float64 NumPy -> ``(solution (N, T), residual (N,))``.

    The operator takes float64 tensors on any device, ``gramian (..., T, T)`` first; on CUDA they go to the
    kernel of that name in `gradsurgery.solvers.device`, and without Triton the T x T problems make a round trip to the
    host. It is not differentiable: backward through it raises.

    Args:
        name: operator name, without the namespace.
        schema: torch schema of its arguments, e.g. ``"(Tensor gramian, float c)"``.
        small: the road of a single finite Gramian, in lists of floats, with no NumPy call; None where it gives up.
        tasks: up to how many tasks that is the shorter road.
    """

    def wrap(body: Body) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(gramian: Tensor, *args: Tensor | float) -> tuple[Tensor, Tensor]:
            shape, device = gramian.shape, gramian.device
            G = gramian.detach().cpu().numpy().reshape(-1, shape[-1], shape[-1])
            arrays = [a.detach().cpu().numpy() if isinstance(a, Tensor) else a for a in args]
            short = small is not None and len(G) == 1 and shape[-1] <= tasks and _one(small, G, arrays)
            solution, residual = short or body(G, *arrays)
            return (
                torch.from_numpy(solution).view(shape[:-1]).to(device),
                torch.from_numpy(residual).view(shape[:-2]).to(device),
            )

        def fake(gramian: Tensor, *args: Tensor | float) -> tuple[Tensor, Tensor]:
            return gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])

        def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
            raise RuntimeError(f"The solver {name!r} has no autograd formula: detach the Gramian, or the weights.")

        # The plain registration: `torch.library.custom_op` costs 150 us a call and two seconds at the first.
        qualified = f"gradsurgery::{name}"
        _LIBRARY.define(f"{name}{schema} -> (Tensor, Tensor)")
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_device(name, run), "CUDA")
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        torch.library.register_autograd(qualified, backward, lib=_LIBRARY)
        return getattr(torch.ops.gradsurgery, name).default

    return wrap


def _one(small: Scalar, gramian: np.ndarray, args: list[Any]) -> tuple[np.ndarray, np.ndarray] | None:
    G = gramian[0].tolist()
    if not math.isfinite(sum(map(sum, G))):
        return None
    solved = small(G, *[a.tolist() if isinstance(a, np.ndarray) else a for a in args])
    return solved and (np.array(solved[0]), np.array(solved[1]))
