"""A method at work: its tasks, what it has learned, its random numbers, and when it is due again."""

import base64
import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from gradsurgery.losses import TaskLosses
from gradsurgery.registry import (
    BaseMethod,
    ColumnMethod,
    EpochMethod,
    HeadPolicy,
    Method,
    ObservingMethod,
    State,
    TrackedMethod,
)
from gradsurgery.stats import Needs, Stats, all_finite

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class GramianFunction(Method):
    """A plain callable G (B, T, T) -> w (B, T), both float64, as a method."""

    needs: ClassVar[Needs] = Needs.GRAMIAN
    function: Callable[[Tensor], Tensor]

    def init(self, T: int, blocks: int, *, dtype: torch.dtype, device: torch.device) -> State:
        return {}

    def weights(
        self, stats: Stats, state: State, generator: Generator | None
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        assert stats.gramian is not None
        w = self.function(stats.gramian)
        if not isinstance(w, Tensor) or w.shape != stats.gramian.shape[:-1]:
            got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(
                f"The method's function must return weights of shape {tuple(stats.gramian.shape[:-1])} for Gramians of "
                f"shape {tuple(stats.gramian.shape)}; got {got}."
            )
        return w.to(stats.gramian), state, {}


class Memory(NamedTuple):
    """What one solve leaves for the next: the method's state, the last finite weights, and their running mean."""

    state: State
    weights: Tensor | None
    averaged: Tensor | None


class Solution(NamedTuple):
    """Weights (B, T), the method's diagnostics, what is to be remembered, and whether () all of it was finite."""

    weights: Tensor
    diagnostics: dict[str, Tensor]
    memory: Memory
    finite: Tensor


class Rule:
    """The mutable half of a method, which is all that a checkpoint has to keep."""

    def __init__(
        self,
        method: BaseMethod,
        name: str,
        update_every: int,
        seed: int,
        heads: HeadPolicy = "unweighted",
        average: float = 0.0,
    ):
        self.method = method
        self.average = average
        self.name = name
        self.update_every = update_every
        self.heads: HeadPolicy = heads
        self.tasks: tuple[str, ...] | None = None
        self.seed = seed
        self._reset()

    def _reset(self) -> None:
        self.tasks = None
        self._state: State = {}
        self._weights: Tensor | None = None
        self._averaged: Tensor | None = None
        self._solved_for: list[int] = []
        self._finite: Tensor | None = None
        self._conflict: Tensor | None = None
        self._steps = 0
        self._random: bytes | None = None
        self._generator: Generator | None = None

    def start(self, tasks: tuple[str, ...], blocks: int, device: torch.device) -> None:
        """Allocates state at the first losses, and moves to their device what a checkpoint brought.

        Raises:
            ValueError: a per-task hyperparameter or a checkpoint does not fit the tasks or blocks.
        """
        if self._generator is not None and self._generator.device == device:
            return
        fresh = self.method.init(len(tasks), blocks, dtype=torch.float64, device=device)
        loaded = {key: tensor.to(device) for key, tensor in self._state.items()}
        if self.tasks is not None:
            _check_shapes(self.name, loaded, fresh)
        self._state = loaded if self.tasks is not None else fresh
        if self._averaged is not None:
            self._averaged = self._averaged.to(device)
        if self._weights is not None:
            self._weights = self._weights.to(device)
            if len(self._weights) != (1 if self.method.needs is Needs.LOSSES else blocks):
                raise ValueError(
                    f"The checkpoint holds weights for {len(self._weights)} blocks, and this optimizer has {blocks}; "
                    "build it with the same blocks and shared_params."
                )
        self.tasks = tasks
        self._generator = Generator(device).manual_seed(self.seed)
        if self._random is not None:
            self._restore_random()

    def _restore_random(self) -> None:
        assert self._generator is not None and self._random is not None
        state = torch.frombuffer(bytearray(self._random), dtype=torch.uint8)
        if state.numel() == self._generator.get_state().numel():
            self._generator.set_state(state)
        else:
            warnings.warn(
                f"The checkpoint's random state is another device's; {self.name} draws anew from its seed.",
                stacklevel=4,
            )
        self._random = None

    def due(self, losses: TaskLosses) -> bool:
        """Whether weights must be solved for now: every ``update_every`` steps, after a solve that failed on numbers
        that were not finite, after a `conflict`, or when a task is back."""
        return (
            self._weights is None
            or self._steps % self.update_every == 0
            or not set(losses.present) <= set(self._solved_for)
            or (self._finite is not None and not bool(self._finite))
            or (self._conflict is not None and bool(self._conflict))
        )

    def conflict(self, found: Tensor) -> None:
        """Whether () the weights at hand led to a step that runs against a task."""
        self._conflict = found

    def settled(self, losses: TaskLosses) -> bool:
        """Whether the weights at hand serve this and any other batch of the same step."""
        return not self.due(losses) and len(self._solved_for) == len(losses.tasks)

    def cached(self, *, count: bool = True) -> Tensor:
        """The weights of the last solve, for a step in between, which is counted."""
        assert self._weights is not None
        self._steps += count
        return self._weights.clone()

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to undo a solve whose step failed."""
        return {**self.__dict__, "_state": dict(self._state)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Back to `snapshot`; random numbers drawn since stay drawn."""
        self.__dict__.update(snapshot)

    def solve(
        self, losses: TaskLosses, gramian: Tensor | None, cross: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New weights (B, T), 0 for an absent task, and the method's diagnostics.

        Where a loss, a Gramian or what the method makes of them is not finite, the weights are NaN (so that an AMP
        scaler skips the step, as it would without surgery) and the state stays as it was.
        """
        solution = self.solution(self.memory, losses, gramian, cross, self._generator)
        self.accept(solution, losses.present)
        return solution.weights, solution.diagnostics

    @property
    def memory(self) -> Memory:
        """What the next solve starts from."""
        return Memory(self._state, self._weights, self._averaged)

    @property
    def generator(self) -> Generator | None:
        """Where random numbers come from; None before the first losses."""
        return self._generator

    def accept(self, solution: Solution, present: list[int]) -> None:
        """Remembers a solve for these tasks, and counts its step."""
        self._state, self._weights, self._averaged = solution.memory
        # Only a schedule ever asks again, and must not settle on a failed solve.
        self._finite = solution.finite if self.update_every > 1 else None
        self._solved_for, self._steps, self._conflict = present, self._steps + 1, None

    def solution(
        self,
        memory: Memory,
        losses: TaskLosses,
        gramian: Tensor | None,
        cross: Tensor | None = None,
        generator: Generator | None = None,
    ) -> Solution:
        """`solve` as a pure function of what it starts from, which a compiler can trace."""
        index, values, before = self._present(losses, memory.state)
        if index is not None:
            gramian, cross = (None if G is None else G[:, index][:, :, index] for G in (gramian, cross))
        assert isinstance(self.method, Method)
        stats, finite = Stats(values, gramian, cross).sanitized()
        w, after, diagnostics = self.method.weights(stats, before, generator)
        state, finite = self._keep(memory.state, before, after, finite & all_finite(w), index)
        if index is not None:
            w = w.new_zeros(len(w), len(losses.tasks)).index_copy_(1, index, w)
            if "head_weights" in diagnostics:
                own = diagnostics["head_weights"]
                diagnostics["head_weights"] = own.new_zeros(len(losses.tasks)).index_copy_(0, index, own)
        averaged = memory.averaged
        if self.average:
            w, averaged = self._smooth(w, averaged, finite, index)
        previous = torch.ones_like(w) if memory.weights is None else memory.weights
        kept = Memory(state, torch.where(finite, w, previous), averaged)
        return Solution(torch.where(finite, w, torch.nan), diagnostics, kept, finite)

    def _smooth(
        self, w: Tensor, averaged: Tensor | None, finite: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The running mean of the weights (B, T) over the steps in which a task was there, from its first weight on,
        and the mean to go on from."""
        old = torch.full_like(w, torch.nan) if averaged is None else averaged
        mean = torch.where(old.isnan(), w, self.average * old + (1 - self.average) * w)
        there = torch.ones_like(w, dtype=torch.bool)
        if index is not None:
            there = torch.zeros_like(there).index_fill_(1, index, True)
        return torch.where(there, mean, 0.0), torch.where(finite & there, mean, old)

    def columns(self, losses: TaskLosses) -> Callable[[Tensor], Tensor]:
        """The rule of a method that works column by column: J (T, n) -> direction (n,), NaN where J is not finite."""
        return self.columns_from(self.memory, losses, self._generator)

    def columns_from(
        self, memory: Memory, losses: TaskLosses, generator: Generator | None
    ) -> Callable[[Tensor], Tensor]:
        """`columns` as a pure function of what it starts from, which a compiler can trace."""
        method = self.method
        assert isinstance(method, ColumnMethod)
        index, _, state = self._present(losses, memory.state)

        def direct(jacobian: Tensor) -> Tensor:
            present = jacobian if index is None else jacobian[index]
            return method.direction(present, state, generator)

        return direct

    def track(self, losses: TaskLosses) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`TrackedMethod.track` of this step: an absent task's rows wait, and its measured ones are 0."""
        method = self.method
        assert isinstance(method, TrackedMethod)
        index, values, state = self._present(losses, self._state)
        before = dict(state)

        def track(rows: Tensor, tracked: Tensor) -> tuple[Tensor, Tensor]:
            if index is None:
                return method.track(rows, tracked, values, before)
            new, measured = method.track(rows[index], tracked[index], values, before)
            return tracked.index_copy(0, index, new), torch.zeros_like(rows).index_copy_(0, index, measured)

        return track

    def _keep(
        self, state: State, before: State, after: State, finite: Tensor, index: Tensor | None
    ) -> tuple[State, Tensor]:
        """The next state, unless something in it or before it is not finite, and whether all is."""
        changed = {key: tensor for key, tensor in after.items() if tensor is not before[key]}
        for tensor in changed.values():
            finite = finite & all_finite(tensor)
        kept = {key: torch.where(finite, tensor, before[key]) for key, tensor in changed.items()}
        return {**state, **{key: self._put(key, state[key], tensor, index) for key, tensor in kept.items()}}, finite

    def observe(self, losses: TaskLosses) -> None:
        """Tells the method what the step led to."""
        if not isinstance(self.method, ObservingMethod) or self.tasks is None:
            return
        index, values, before = self._present(losses, self._state)
        after = self.method.observe(values, before)
        self._state, _ = self._keep(self._state, before, after, all_finite(values), index)

    def epoch_end(self) -> None:
        """Tells the method that an epoch is over."""
        if isinstance(self.method, EpochMethod) and self.tasks is not None:
            self._state = self.method.epoch_end(self._state)

    def _present(self, losses: TaskLosses, state: State) -> tuple[Tensor | None, Tensor, State]:
        """Positions of the present tasks (None where all are), their losses, and their part of the state."""
        present = losses.present
        if len(present) == len(losses.tasks):
            return None, losses.values, state
        # Made of pieces that are on the device: a list that is copied there makes the host wait.
        everyone = torch.arange(len(losses.tasks), device=losses.values.device)
        index = torch.stack([everyone[t] for t in present])
        return index, losses.values[index], {key: self._take(key, value, index) for key, value in state.items()}

    def _take(self, key: str, tensor: Tensor, index: Tensor) -> Tensor:
        for axis in self.method.task_axes_of(key, tensor):
            tensor = tensor.index_select(axis, index)
        return tensor

    def _put(self, key: str, whole: Tensor, tensor: Tensor, index: Tensor | None) -> Tensor:
        if index is None:
            return tensor
        axes = self.method.task_axes_of(key, whole)
        if not axes:
            return tensor
        place: list[Tensor | slice] = [slice(None)] * tensor.ndim
        for n, axis in enumerate(axes):
            shape = [1] * len(axes)
            shape[n] = -1
            place[axis] = index.reshape(shape)
        whole = whole.clone()
        whole[tuple(place)] = tensor
        return whole

    @property
    def setup(self) -> dict[str, Any]:
        """What another rule must have in common with this one to go on in its stead."""
        return {
            "method": self.name,
            "hparams": _hparams(self.method),
            "update_every": self.update_every,
            "heads": self.heads,
            "average": self.average,
        }

    def pack(self, engine: str) -> str:
        """Everything that a resumed run needs, as one JSON text: a leaf that every checkpoint format keeps."""
        random = self._random_state()
        content = {
            "format": FORMAT,
            **self.setup,
            "averaged": None if self._averaged is None else _to_json(self._averaged),
            "engine": engine,
            "tasks": self.tasks,
            "seed": self.seed,
            "steps": self._steps,
            "solved_for": self._solved_for,
            "finite": self._finite is None or bool(self._finite),
            "conflict": self._conflict is not None and bool(self._conflict),
            "weights": None if self._weights is None else _to_json(self._weights),
            "state": {key: _to_json(tensor) for key, tensor in self._state.items()},
            "random": None if random is None else base64.b64encode(random).decode(),
        }
        return json.dumps(content)

    def check(self, text: str) -> dict[str, Any]:
        """The parsed text of `pack`, if it is this rule's.

        Raises:
            ValueError: it was written by another method, with other hyperparameters or tasks, or by a newer format.
        """
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"The checkpoint has format {content.get('format')!r}; this version reads {FORMAT}.")
        for key, value in self.setup.items():
            if content[key] != value:
                raise ValueError(
                    f"The checkpoint was written with {key} = {content[key]}, and this optimizer has {value}. Build it "
                    'alike, or set state_dict["param_groups"][0]["mtl"] to "" to load the base optimizer alone.'
                )
        if self.tasks is not None and content["tasks"] is not None and tuple(content["tasks"]) != self.tasks:
            raise ValueError(f"The checkpoint has tasks {content['tasks']}, and this optimizer has {list(self.tasks)}.")
        return content

    def unpack(self, content: dict[str, Any] | None) -> None:
        """Takes over what `check` returned; None starts afresh."""
        self._reset()
        if content is None:
            return
        self.seed = content["seed"]
        if content["tasks"] is None:
            return
        self.tasks = tuple(content["tasks"])
        self._steps = content["steps"]
        self._solved_for = content["solved_for"]
        self._finite = None if content["finite"] else torch.tensor(False)
        self._conflict = torch.tensor(True) if content.get("conflict") else None
        self._weights = None if content["weights"] is None else _from_json(content["weights"])
        self._averaged = None if content["averaged"] is None else _from_json(content["averaged"])
        self._state = {key: _from_json(entry) for key, entry in content["state"].items()}
        self._random = None if content["random"] is None else base64.b64decode(content["random"])

    def _random_state(self) -> bytes | None:
        return self._random if self._generator is None else self._generator.get_state().numpy().tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_random": self._random_state(), "_generator": None}


def _hparams(method: BaseMethod) -> dict[str, Any]:
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return json.loads(json.dumps(fields, default=lambda value: getattr(value, "__qualname__", type(value).__name__)))


def _to_json(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "data": tensor.tolist()}


def _from_json(entry: dict[str, Any]) -> Tensor:
    return torch.tensor(entry["data"], dtype=getattr(torch, entry["dtype"]))


def _check_shapes(name: str, loaded: State, fresh: State) -> None:
    got = {key: tuple(tensor.shape) for key, tensor in loaded.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    if got != wanted:
        raise ValueError(
            f"The checkpoint's state of {name!r} does not fit this optimizer: it has {got}, where {wanted} is needed. "
            "Build it with the same tasks, blocks and shared_params."
        )
