"""Turns a solver of many small problems into a torch operator that compiles and runs on any device."""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from gradsurgery.solvers.accelerator import on_device

Body = Callable[..., tuple[np.ndarray, np.ndarray]]
One = Callable[..., tuple[np.ndarray, float] | None]
Pair = Callable[..., tuple[tuple[float, float], float] | None]

_LIBRARY = torch.library.Library("gradsurgery", "FRAGMENT")


def plain(*tensors: Tensor) -> bool:
    """Whether these hold numbers in the host's memory and nothing but the caller watches what becomes of them.

    Then a NumPy function may be called on them directly, which saves the 35 us of torch's dispatch. Otherwise a
    compiler, a tracer, a mode, a function transform or autograd has to see an operator.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:  # noqa: SIM110
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.requires_grad:
            return False
    return True


def solver(
    name: str, schema: str, one: One | None = None, pair: Pair | None = None
) -> Callable[[Body], Callable[..., tuple[Tensor, Tensor]]]:
    """Decorator: ``body(gramian (N, T, T), *others)`` in float64 NumPy -> ``(solution (N, T), residual (N,))``.

    What it makes of the body takes float64 tensors on any device, ``gramian (..., T, T)`` first. Plain CPU tensors go
    straight to the body; all else goes through the operator ``gradsurgery::name``. On CUDA that is the kernel of this
    name in `gradsurgery.solvers.device`; where there is none, or no Triton, the T x T problems make a round trip to the
    host. It is not differentiable: backward through it raises.

    Args:
        name: operator name, without the namespace.
        schema: torch schema of its arguments, e.g. ``"(Tensor gramian, float c)"``.
        one: the short road of a single Gramian (T, T), ``one(gramian, *others)``, to a solution (T,) and its residual;
            None where it gives up.
        pair: the closed form of a single Gramian [[a, c], [c, b]], ``pair(a, b, c, *others)`` in floats and lists, with
            a, b > 0 and all finite; None where it gives up.
    """

    def wrap(body: Body) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            solved = None
            if pair is not None and gramian.numel() == 4:
                solved = _in_floats(pair, gramian, args)
            if solved is not None:
                lead, (solution, residual) = tuple(gramian.shape[:-2]), solved
            else:
                array = gramian.numpy()
                lead, T = array.shape[:-2], array.shape[-1]
                G = array.reshape(-1, T, T)
                others = [x.numpy() if isinstance(x, Tensor) else x for x in args]
                if one is not None and len(G) == 1:
                    solved = one(G[0], *others)
                if solved is None:
                    solved = body(G, *others) if len(G) else (G[:, 0], G[:, 0, 0])
                solution, residual = solved
            solution, residual = np.array(solution), np.array(residual)
            if lead:
                solution, residual = solution.reshape((*lead, gramian.shape[-1])), residual.reshape(lead)
            elif solution.ndim > 1:
                solution, residual = solution[0], residual[0, ...]
            return torch.from_numpy(solution), torch.from_numpy(residual)

        def host(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            moved = [x.detach().cpu() if isinstance(x, Tensor) else x for x in (gramian, *args)]
            solution, residual = run(*moved)
            return solution.to(gramian.device), residual.to(gramian.device)

        def fake(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            return gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape[:-2])

        def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
            raise RuntimeError(f"The solver {name!r} has no autograd formula: detach the Gramian, or the weights.")

        # The plain registration: `torch.library.custom_op` costs 150 us a call and two seconds at the first.
        qualified = f"gradsurgery::{name}"
        _LIBRARY.define(f"{name}{schema} -> (Tensor, Tensor)")
        _LIBRARY.impl(name, host, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, on_device(name, host), "CUDA")
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        torch.library.register_autograd(qualified, backward, lib=_LIBRARY)
        operator = getattr(torch.ops.gradsurgery, name).default

        @functools.wraps(body)
        def solve(gramian: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            if plain(gramian, *[x for x in args if isinstance(x, Tensor)]):
                return run(gramian, *args)
            return operator(gramian, *args)

        return solve

    return wrap


def _in_floats(pair: Pair, gramian: Tensor, args: tuple[Any, ...]) -> tuple[tuple[float, float], float] | None:
    nested = gramian.tolist()
    while len(nested) == 1:
        nested = nested[0]
    (a, c), (_, b) = nested
    # False for a NaN, too.
    if 0 < a < math.inf and 0 < b < math.inf and abs(c) < math.inf:
        return pair(a, b, c, *[x.tolist() if isinstance(x, Tensor) else x for x in args])
    return None
