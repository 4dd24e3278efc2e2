"""Random numbers of a method, drawn before its graph runs: a compiled graph has no place for a `torch.Generator`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

Draw = Callable[[Generator | None], Tensor]

_FACTORIES = (torch.rand, torch.randn, torch.randint, torch.randperm)


class Recorded(TorchFunctionMode):
    """Notes every draw from a generator that is made inside.

    Attributes:
        draws: functions of a generator that draw alike, in their order.

    Raises:
        ValueError: a draw depends on tensors, and so cannot be made before they are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            if func not in _FACTORIES:
                raise ValueError(
                    f"The method draws random numbers with {getattr(func, '__name__', func)}, which depend on its "
                    "tensors and cannot be drawn before its graph runs. Use opt.backward(losses), or draw with "
                    "torch.rand, torch.randn, torch.randint or torch.randperm."
                )
            self.draws.append(lambda generator: func(*args, **{**kwargs, "generator": generator}))
        return func(*args, **kwargs)


class Replayed(TorchFunctionMode):
    """Hands out numbers that were drawn before, in their order, in the place of draws.

    Args:
        numbers: those that are left; each is taken out as it is handed out.
    """

    def __init__(self, numbers: list[Tensor]) -> None:
        super().__init__()
        self._left = numbers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FACTORIES:
            return self._left.pop(0)
        return func(*args, **(kwargs or {}))


class Chosen(TorchFunctionMode):
    """Draws numbers for a whole of which some columns are at hand, as every holder of others does.

    Args:
        whole: columns of it.
        shape: of the draws at hand, (n,).
        index: what gives the places (n,) of these columns in the whole.

    Raises:
        ValueError: a draw of another shape.
    """

    def __init__(self, whole: int, shape: torch.Size, index: Callable[[], Tensor]) -> None:
        super().__init__()
        self._whole, self._shape, self._index = whole, shape, index

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FACTORIES or kwargs.get("generator") is None:
            return func(*args, **kwargs)
        if func not in (torch.rand, torch.randn) or torch.Size(args[0]) != self._shape:
            raise ValueError(
                f"The method draws random numbers with {getattr(func, '__name__', func)}{args}, which cannot be told "
                "apart by columns, of which this rank has a part. Draw one number a column with torch.rand or "
                "torch.randn, or train without fully_shard."
            )
        return func((self._whole,), **kwargs)[self._index()]
