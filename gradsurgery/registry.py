"""The contract of a method, and the table of those that exist. A new method is one file in `gradsurgery.methods`."""

import abc
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Generator, Tensor, device, dtype

from gradsurgery.stats import Needs, Stats

State = dict[str, Tensor]
HeadPolicy = Literal["unweighted", "weighted"]

GUARANTEES = {
    "non_conflicting": "no task's loss rises to first order: <g_t, u> >= 0 for every task t",
    "simplex": "weights are non-negative and sum to 1",
    "nonnegative": "weights are non-negative",
    "scale_invariant": "positive rescaling of a task's gradient leaves the direction unchanged",
    "linear_under_scaling": "u(diag(c) J) is linear in c, for c > 0",
    "homogeneous": "u(a J) = a u(J) for a > 0",
}


@dataclass(frozen=True)
class BaseMethod(abc.ABC):
    """What every rule has: a frozen set of hyperparameters, what it must see, and the state it starts from.

    A subclass of `Method` or `ColumnMethod` is a frozen dataclass whose fields are its hyperparameters, validated in
    ``__post_init__``; ``needs`` says what it must see.
    """

    needs: ClassVar[Needs]
    task_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def task_axes_of(self, key: str, tensor: Tensor) -> tuple[int, ...]:
        """Which axes of a state tensor run over tasks: the last one, unless ``task_axes`` says otherwise."""
        return self.task_axes.get(key, (tensor.ndim - 1,) if tensor.ndim else ())

    @abc.abstractmethod
    def init(self, T: int, blocks: int, *, dtype: dtype, device: device) -> State:
        """All of the method's state, allocated in full; absent tasks are cut out of it along `task_axes`."""


@dataclass(frozen=True)
class Method(BaseMethod):
    """A rule whose direction is a weighted sum of the task gradients."""

    @abc.abstractmethod
    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Task weights (B, T), the next state, and diagnostics: ``residual`` (B,) where a solver ran, ``head_weights``
        (T,) where weighted heads take others than the mean over blocks.

        Pure: nothing is kept on ``self``, random numbers come from ``generator`` alone, nothing synchronises.
        """


@dataclass(frozen=True)
class ColumnMethod(BaseMethod):
    """A rule that works coordinate by coordinate, and has no weights. Its heads take raw gradients.

    ``marks_nonfinite`` says that `columns` itself gives NaN in the coordinates where a task gradient is not finite.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    marks_nonfinite: ClassVar[bool] = False

    @abc.abstractmethod
    def columns(self, jacobian: Tensor, state: State, generator: Generator | None) -> Tensor:
        """The direction (n,) in n coordinates of the task gradients (T, n), in their dtype.

        Pure, as `Method.weights` is; called for one piece of the parameters after another.
        """

    def direction(self, jacobian: Tensor, state: State, generator: Generator | None) -> Tensor:
        """`columns`, and NaN in the coordinates where a task gradient is not finite."""
        direction = self.columns(jacobian, state, generator)
        return direction if self.marks_nonfinite else mark_nonfinite(jacobian, direction)


def mark_nonfinite(jacobian: Tensor, direction: Tensor) -> Tensor:
    """The direction (n,), with NaN in the coordinates where task gradients (T, n) are not finite."""
    return torch.where(jacobian.sum(dim=0).isfinite(), direction, torch.nan)


@dataclass(frozen=True)
class TrackedMethod(Method):
    """A rule that remembers numbers in the coordinates of the shared parameters: T x d beside its state, 0 at first.

    ``Stats.gramian`` holds the inner products of what `track` measures. ``acts_on`` says what the weights multiply:
    the task gradients, or the rows that were measured (which then take their place).
    """

    needs: ClassVar[Needs] = Needs.TRACKED
    acts_on: ClassVar[Literal["gradients", "measured"]] = "measured"

    @abc.abstractmethod
    def track(self, rows: Tensor, tracked: Tensor, losses: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """What to remember next (T, n), and the rows (T, n) to measure, in n coordinates.

        Pure and coordinate by coordinate: it is called for one piece of the parameters after another, for each of them
        twice in a step, with the state from before the step.

        Args:
            rows: (T, n) task gradients, unscaled, float32 at least.
            tracked: (T, n), what was remembered, in the same dtype.
            losses: (T,) float64.
            state: as `Method.weights` will see it.
        """


@dataclass(frozen=True)
class ObservingMethod(Method):
    """A method that also learns from the losses after the step, on the same batch (FAMO)."""

    @abc.abstractmethod
    def observe(self, losses: Tensor, state: State) -> State:
        """The next state, given the losses (T,) float64 that the step led to."""


@dataclass(frozen=True)
class EpochMethod(Method):
    """A method that goes by epochs: by calls of `MTLOptimizer.epoch_end`, or by itself every ``window`` steps.

    Args:
        window: steps that make an epoch, and nothing else does then; None waits for `MTLOptimizer.epoch_end`.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window must be a whole number of steps, 1 or more, or None; got {self.window!r}.")

    @abc.abstractmethod
    def epoch_end(self, state: State) -> State:
        """The state with which the next epoch begins."""


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a registered method.

    Attributes:
        name: registered name, snake case.
        cls: its class.
        needs: what it must see.
        paper: title and link.
        venue: where it was published.
        hparams: hyperparameters with their defaults.
        heads: whether its authors ran task-specific parameters on raw or on weighted gradients.
        guarantees: what it promises of the direction, keys of `GUARANTEES`; each is tested. Empty: it promises none.
        randomized: whether it draws random numbers.
    """

    name: str
    cls: type[BaseMethod]
    needs: Needs
    paper: str
    venue: str
    hparams: Mapping[str, Any]
    heads: HeadPolicy
    guarantees: frozenset[str]
    randomized: bool


_METHODS: dict[str, MethodInfo] = {}
_M = TypeVar("_M", bound=type[BaseMethod])


def register(
    name: str,
    *,
    paper: str,
    venue: str,
    heads: HeadPolicy,
    guarantees: frozenset[str] = frozenset(),
    randomized: bool = False,
) -> Callable[[_M], _M]:
    """Class decorator that makes a `Method` available by name, and puts it under the property suite.

    Raises:
        ValueError: the name is taken, or a guarantee is not one of `GUARANTEES`.
    """

    def add(cls: _M) -> _M:
        if fold(name) in {fold(other) for other in _METHODS}:
            raise ValueError(f"A method named {name!r} is registered already; give yours another name.")
        if unknown := guarantees - GUARANTEES.keys():
            raise ValueError(f"Unknown guarantees {sorted(unknown)}; known ones: {sorted(GUARANTEES)}.")
        hparams = {f.name: f.default for f in dataclasses.fields(cls)}
        _METHODS[name] = MethodInfo(name, cls, cls.needs, paper, venue, hparams, heads, guarantees, randomized)
        return cls

    return add


def fold(name: str) -> str:
    """A name without case and punctuation, so that ``CAGrad``, ``Nash_MTL`` and ``nash-mtl`` all resolve."""
    return "".join(c for c in name.casefold() if c.isalnum())


def closest(name: str, known: list[str]) -> str:
    """A hint for an error message: the known names nearest to ``name``, and all of them."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


def list_methods(pattern: str = "*", *, needs: Needs | None = None) -> list[str]:
    """Names of the registered methods, sorted.

    Args:
        pattern: shell-style pattern on the name, e.g. ``"*grad"``.
        needs: keep only methods that need exactly this.

    Example:
        >>> from gradsurgery import list_methods
        >>> list_methods("pc*")
        ['pcgrad']
    """
    return sorted(
        name for name, info in _METHODS.items() if fnmatch.fnmatch(name, pattern) and needs in (None, info.needs)
    )


def get_method(name: str) -> MethodInfo:
    """What is known of a method, by its name or an alias that differs in case or punctuation only.

    Raises:
        ValueError: no such method; the message lists the close names.

    Example:
        >>> from gradsurgery import get_method
        >>> get_method("CAGrad").hparams["c"]
        0.4
    """
    for known, info in _METHODS.items():
        if fold(known) == fold(name):
            return info
    raise ValueError(f"There is no method named {name!r}. {closest(name, list_methods())}")


def build_method(name: str, hparams: Mapping[str, Any]) -> BaseMethod:
    """The method ``name`` with ``hparams``, every one of which it must have.

    Raises:
        ValueError: unknown method, unknown hyperparameter, or a value out of its range.
    """
    info = get_method(name)
    for key in hparams:
        if key not in info.hparams:
            raise ValueError(
                f"Method {info.name!r} has no hyperparameter {key!r}. {closest(key, sorted(info.hparams))}"
            )
    return info.cls(**hparams)
