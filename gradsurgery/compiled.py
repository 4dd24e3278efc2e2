"""The compiled road: forward, task gradients, weights and direction as one graph, for any model that compiles whole."""

from __future__ import annotations

import contextlib
import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_flatten

from gradsurgery import kernels
from gradsurgery.draws import Draw, Recorded, Replayed
from gradsurgery.engines import Representation, Subset
from gradsurgery.engines.layout import ALIGNMENT, Layout
from gradsurgery.losses import Losses, TaskLosses, read_losses
from gradsurgery.optimizer import MTLOptimizer
from gradsurgery.parameters import base_parameters
from gradsurgery.registry import ColumnMethod
from gradsurgery.rule import Memory, Rule, Solution
from gradsurgery.stats import Needs, StepInfo
from gradsurgery.surgery import Surgery, step_info

Gradients = Sequence[Tensor | None]
_R = TypeVar("_R")

_PROGRAMS = itertools.count()


def compile_backward(
    opt: MTLOptimizer, model: nn.Module, losses: Callable[..., Losses], **options: Any
) -> CompiledBackward:
    """The forward, `MTLOptimizer.backward` and all between them, compiled into one graph.

    Worth it where a step is many small operations, whose launches cost more than their arithmetic. The numbers are the
    ``sequential`` engine's up to rounding; dropout draws what `torch.compile` draws, which under inductor are other
    numbers than the eager ones. Blocks, head policies, absent tasks, ``update_every``, ``average``, checkpoints and
    non-finite numbers are treated as `MTLOptimizer.backward` does.

    The first batch of each kind (of a structure, or with other tasks absent) takes one forward more, of which neither
    buffers nor random numbers keep a trace.

    Args:
        opt: any method but those with tracked rows or independent batches.
        model: its buffers (running statistics) are updated as in an ordinary forward.
        losses: ``losses(model, *batch)`` -> one scalar a task, as `MTLOptimizer.backward` takes them. It is traced with
            the model: both must compile into one graph. Which tasks are absent may depend on which parts of the batch
            are None, on strings and booleans among them and on their structure, and on nothing else.
        **options: of `torch.compile` (``backend``, ``mode``, ``dynamic``, ``options``).

    Returns:
        ``step(*batch) -> StepInfo``, which accumulates into ``.grad``; to be followed by ``opt.step()``.

    Raises:
        TypeError: ``opt`` is no `MTLOptimizer`.
        ValueError: the method cannot take this road, one of the options, or of the optimizer's.

    Example:
        >>> import torch
        >>> from gradsurgery import MTLOptimizer, compile_backward
        >>> model = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)])
        >>> def losses(model, x):
        ...     z = model[0](x).tanh()
        ...     return [(t + head(z)).square().mean() for t, head in enumerate(model[1:])]
        >>> opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "cagrad")
        >>> step = compile_backward(opt, model, losses, backend="aot_eager")
        >>> for x in torch.randn(3, 16, 4):
        ...     opt.zero_grad()
        ...     info = step(x)
        ...     opt.step()
        >>> info.weights.shape
        torch.Size([1, 2])
    """
    if not isinstance(opt, MTLOptimizer):
        raise TypeError(f"opt must be an MTLOptimizer; got {type(opt).__name__}.")
    _check_options(options)
    rule = opt._surgery.rule
    if rule.method.needs & (Needs.CROSS | Needs.TRACKED):
        what = "independent batches" if Needs.CROSS in rule.method.needs else "rows that it tracks from step to step"
        raise ValueError(
            f"{rule.name} learns from {what}, which have no place in the graph of one batch. Compile the model alone "
            "(torch.compile(model)) and use opt.backward(losses)."
        )
    if isinstance(opt._surgery.engine, (Representation, Subset)) or opt._surgery.resolve_on_conflict:
        raise ValueError(
            "The compiled road takes the gradients of all shared parameters, and keeps none: engine='representation', "
            "measure_on and resolve_on_conflict belong to opt.backward(losses)."
        )
    return CompiledBackward(opt, model, losses, options)


class CompiledBackward:
    """What `compile_backward` returns: ``step(*batch) -> StepInfo``."""

    def __init__(self, opt: MTLOptimizer, model: nn.Module, losses: Callable[..., Losses], options: dict[str, Any]):
        self._opt = opt
        self._model = model
        self._losses = losses
        self._options = options
        self._programs: dict[object, _Program] = {}
        self._kinds: dict[object, _Program] = {}

    @torch._disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> StepInfo:
        """Accumulates into ``.grad`` the direction that the method makes of the losses on this batch.

        Raises:
            RuntimeError: model, losses or method do not compile into one graph, or `MTLOptimizer.accumulate` is open;
                nothing has been changed then.
            TypeError, ValueError: the losses cannot be used (the message says why); nothing has been changed then.
        """
        surgery = self._opt._surgery
        if surgery.holding:
            raise RuntimeError(
                "accumulate() holds rows from one micro-batch to the next, and a compiled step keeps none. Use "
                "opt.backward(losses) inside it."
            )
        if surgery.ranks() is not None:
            raise RuntimeError(
                "A compiled step takes the gradients of one process, and other ranks train this model too. Compile the "
                "model alone (torch.compile(model)) and use opt.backward(losses)."
            )
        program, rule = self._program(surgery, args, kwargs), surgery.rule
        before = rule.snapshot()
        try:
            surgery.info = program.step(args, kwargs, self._options)
        except BaseException:
            rule.restore(before)
            raise
        return surgery.info

    def _program(self, surgery: Surgery, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Program:
        """That of this kind of batch, with the method's state allocated."""
        flags = tuple((id(p), p.requires_grad, p.dtype, p.device) for p in base_parameters(self._opt.base_opt))
        leaves, structure = tree_flatten((args, kwargs))
        shown = tuple(x if x is None or isinstance(x, (bool, str)) else type(x) for x in leaves)
        kind, rule = (flags, structure, shown), surgery.rule
        program = self._kinds.get(kind)
        if program is None or rule.tasks not in (None, program.tasks):
            read = self._probe(surgery, args, kwargs)
            rule.start(read.tasks, surgery.layout.blocks, read.values.device)
            key = (flags, read.tasks, tuple(read.present))
            if key not in self._programs:
                self._programs[key] = _Program(surgery, self._model, self._losses, read)
            program = self._kinds[kind] = self._programs[key]
        rule.start(program.tasks, program.layout.blocks, program.layout.device)
        return program

    def _probe(self, surgery: Surgery, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskLosses:
        """Learns from an eager forward which tasks there are, and what their losses reach."""
        with _undone(self._model), torch.enable_grad():
            read = read_losses(self._losses(self._model, *args, **kwargs), surgery.rule.tasks)
        surgery.prepare(read)
        return TaskLosses(
            read.tasks, tuple(None if o is None else read.values[t] for t, o in enumerate(read.outputs)), read.values
        )


class _Traced(NamedTuple):
    """What the graph returns: losses (T,), the solve or None, the Gramian or None, gradients."""

    values: Tensor
    solution: Solution | None
    gramian: Tensor | None
    shared: list[Tensor | None]
    own: list[Tensor | None]


class _Program:
    """The graph of one kind of batch."""

    def __init__(self, surgery: Surgery, model: nn.Module, losses: Callable[..., Losses], read: TaskLosses):
        self.tasks = read.tasks
        self.layout: Layout = surgery.layout
        self._surgery = surgery
        self._model = model
        self._losses = losses
        self._read = read
        self._present = tuple(read.present)
        self._own = surgery.parameters.task_specific()
        self._places = [_Place.of(p) for p in self.layout.params]
        self._draws = self._recorded(surgery.rule)
        self._compiled: Callable[..., _Traced] | None = None

    def _recorded(self, rule: Rule) -> list[Draw]:
        """The draws of a solve, learned from one on stand-ins."""
        T, device = len(self.tasks), self.layout.device
        losses = TaskLosses(self.tasks, self._read.outputs, torch.ones_like(self._read.values))
        with Recorded() as recorded:
            if isinstance(rule.method, ColumnMethod):
                direct = rule.columns_from(rule.memory, losses, Generator(device))
                for piece in self.layout.pieces:
                    direct(torch.zeros(T, piece.stop - piece.start, dtype=self.layout.dtype, device=device))
            else:
                eye = torch.eye(T, dtype=torch.float64, device=device).expand(self.layout.blocks, T, T)
                gramian = eye.contiguous() if Needs.GRAMIAN in rule.method.needs else None
                rule.solution(rule.memory, losses, gramian, None, Generator(device))
        return recorded.draws

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> StepInfo:
        """One step of the rule."""
        rule = self._surgery.rule
        weights = None if rule.due(self._read) else rule.cached()
        numbers = [draw(rule.generator) for draw in self._draws] if weights is None else []
        if self._compiled is None:
            self._compiled = _compile(self._trace, options)
        with torch._dynamo.config.patch(trace_autograd_ops=True), _explained():
            traced = self._compiled(args, kwargs, self._memory(rule), weights, numbers)
        if traced.solution is not None:
            rule.accept(traced.solution, list(self._present))
            weights = traced.solution.weights
        _accumulate([*self.layout.params, *self._own], [*traced.shared, *traced.own])
        losses = TaskLosses(self.tasks, self._read.outputs, traced.values)
        diagnostics = {} if traced.solution is None else traced.solution.diagnostics
        return step_info(losses, weights, traced.gramian, diagnostics, "compiled")

    def _memory(self, rule: Rule) -> Memory:
        """The rule's, with what stands for weights before the first solve: None would be a graph of its own."""
        memory, blocks = rule.memory, 1 if rule.method.needs is Needs.LOSSES else self.layout.blocks
        if memory.weights is not None or isinstance(rule.method, ColumnMethod):
            return memory
        ones = torch.ones(blocks, len(self.tasks), dtype=torch.float64, device=self.layout.device)
        return Memory(memory.state, ones, torch.full_like(ones, torch.nan) if rule.average else None)

    # All below is traced: it reads nothing that changes from step to step.

    def _trace(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        memory: Memory,
        weights: Tensor | None,
        numbers: list[Tensor],
    ) -> _Traced:
        with torch.enable_grad():
            outputs = self._outputs(self._losses(self._model, *args, **kwargs))
        with torch.no_grad(), torch.autocast(self.layout.device.type, enabled=False):
            values = torch.stack([_value(outputs, t, self.layout.device) for t in range(len(self.tasks))])
            losses = TaskLosses(self.tasks, tuple(outputs.get(t) for t in range(len(self.tasks))), values)
            if weights is not None or self._surgery.rule.method.needs is Needs.LOSSES:
                return self._one_backward(losses, outputs, memory, weights, numbers)
            return self._task_gradients(losses, outputs, memory, numbers)

    def _outputs(self, losses: Losses) -> dict[int, Tensor]:
        """The losses of the present tasks, by their position."""
        if isinstance(losses, Mapping):
            named = {str(name): loss for name, loss in losses.items()}
        else:
            entries = losses.unbind() if isinstance(losses, Tensor) else losses
            named = {str(t): loss for t, loss in enumerate(entries)}
        found = {t: named.get(name) for t, name in enumerate(self.tasks)}
        outputs = {t: loss for t, loss in found.items() if isinstance(loss, Tensor)}
        if tuple(outputs) != self._present:
            raise ValueError(
                f"tasks {self._present} were present in a batch of this kind, and now {tuple(outputs)} are"
            )
        return outputs

    def _one_backward(
        self,
        losses: TaskLosses,
        outputs: dict[int, Tensor],
        memory: Memory,
        weights: Tensor | None,
        numbers: list[Tensor],
    ) -> _Traced:
        """For weights that need no task gradient."""
        solution = None if weights is not None else self._solution(memory, losses, None, numbers)
        w = solution.weights[0] if solution is not None else weights[0]  # pyright: ignore[reportOptionalSubscript]
        heads = torch.ones_like(w) if self._surgery.rule.heads == "unweighted" else w
        if heads is w:
            gradients = _gradients(outputs, w, [*self.layout.params, *self._own], retain=False)
            split = len(self.layout.params)
            return _Traced(losses.values, solution, None, gradients[:split], gradients[split:])
        own = _gradients(outputs, heads, self._own, retain=True) if self._own else []
        shared = _gradients(outputs, w, self.layout.params, retain=False)
        return _Traced(losses.values, solution, None, shared, own)

    def _task_gradients(
        self, losses: TaskLosses, outputs: dict[int, Tensor], memory: Memory, numbers: list[Tensor]
    ) -> _Traced:
        """For all other methods: a backward a task."""
        inputs, split = [*self.layout.params, *self._own], len(self.layout.params)
        ones, rule = torch.ones_like(losses.values), self._surgery.rule
        found = {t: _gradients({t: out}, ones, inputs, retain=t != self._present[-1]) for t, out in outputs.items()}
        none: list[Tensor | None] = [None] * split
        rows = torch.stack([self._row(found[t][:split] if t in found else none) for t in range(len(self.tasks))])
        solution, gramian, head_weights = None, None, None
        if isinstance(rule.method, ColumnMethod):
            direct = rule.columns_from(memory, losses, None)
            pieces = [rows[:, piece.start : piece.stop] for piece in self.layout.pieces]
            direction = _replaying(numbers, lambda: torch.cat([direct(piece) for piece in pieces]))
        else:
            gramian = kernels.gramian(rows, self.layout.bounds)
            solution = self._solution(memory, losses, gramian, numbers)
            head_weights = self._surgery.head_weights(solution.weights, gramian, solution.diagnostics)
            direction = kernels.combine(solution.weights, rows, self.layout.bounds)
        shared, offset = [], 0
        for n, place in enumerate(self._places):
            reached = any(gradients[n] is not None for gradients in found.values())
            shared.append(place.gradient(direction, offset) if reached else None)
            offset += place.size
        own = [_weighted_sum(found, split + n, head_weights) for n in range(len(self._own))]
        return _Traced(losses.values, solution, gramian, shared, own)

    def _solution(self, memory: Memory, losses: TaskLosses, gramian: Tensor | None, numbers: list[Tensor]) -> Solution:
        return _replaying(numbers, lambda: self._surgery.rule.solution(memory, losses, gramian))

    def _row(self, gradients: Gradients) -> Tensor:
        """Gradients of the shared parameters, one of them None where its loss does not reach it, as a row (d,)."""
        return torch.cat([place.flat(g, self.layout) for place, g in zip(self._places, gradients, strict=True)])


@dataclass(frozen=True)
class _Place:
    """How a parameter lies in a row: as in `Layout`, so that methods that draw by the column draw alike.

    Attributes:
        shape: of the parameter, with its dtype.
        order: its axes in memory order, slowest first.
        back: the inverse permutation.
        size: elements in the row, with the gap that follows.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    back: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, p: Tensor) -> _Place:
        stride = torch.empty_like(p, device="meta").stride()
        order = tuple(sorted(range(p.ndim), key=lambda axis: -stride[axis]))
        back = tuple(sorted(range(p.ndim), key=lambda axis: order[axis]))
        return cls(tuple(p.shape), p.dtype, order, back, -(-p.numel() // ALIGNMENT) * ALIGNMENT)

    def flat(self, g: Tensor | None, layout: Layout) -> Tensor:
        """A gradient as its piece of a row (size,)."""
        if g is None:
            return torch.zeros(self.size, dtype=layout.dtype, device=layout.device)
        flat = g.permute(self.order).reshape(-1).to(layout.dtype)
        return torch.nn.functional.pad(flat, (0, self.size - flat.numel()))

    def gradient(self, row: Tensor, offset: int) -> Tensor:
        """What a row (d,) holds of the parameter from ``offset`` on, in its shape and memory order."""
        shape = [self.shape[axis] for axis in self.order]
        return row[offset : offset + math.prod(shape)].view(shape).permute(self.back).to(self.dtype)


def _value(outputs: dict[int, Tensor], t: int, device: torch.device) -> Tensor:
    if t not in outputs:
        return torch.full((), torch.nan, dtype=torch.float64, device=device)
    return outputs[t].detach().double().reshape(())


def _gradients(
    outputs: dict[int, Tensor], weights: Tensor, inputs: Sequence[Tensor], *, retain: bool
) -> list[Tensor | None]:
    """Of the weighted sum of losses; None for a parameter that it does not reach. Each has memory of its own."""
    seeds = [weights[t].to(loss.dtype).expand(loss.shape) for t, loss in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), inputs, seeds, retain_graph=retain, allow_unused=True)
    return [None if g is None else g.clone() for g in gradients]


def _weighted_sum(found: dict[int, list[Tensor | None]], n: int, weights: Tensor | None) -> Tensor | None:
    """Of the n-th gradient over the tasks that reach it."""
    total = None
    for t, gradients in found.items():
        g = gradients[n]
        if g is not None:
            g = g if weights is None else g * weights[t].to(g.dtype)
            total = g if total is None else total + g
    return total


def _replaying(numbers: list[Tensor], function: Callable[[], _R]) -> _R:
    """The function's result, with these numbers in the place of its draws."""
    if not numbers:
        return function()
    left = list(numbers)
    with Replayed(left):
        result = function()
    # Where a compiler looks through the mode, numbers of its own would take their place in silence.
    if left:
        raise RuntimeError("this version of torch cannot replay random numbers inside a graph")
    return result


def _accumulate(params: Sequence[Tensor], gradients: Gradients) -> None:
    pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    old, new = [], []
    taken: set[int] = set()
    for p, g in pairs:
        if p.grad is not None:
            old.append(p.grad)
            new.append(g)
            continue
        # A compiler may return one tensor for two equal gradients; clipping would then scale it twice.
        p.grad = g.clone() if g.data_ptr() in taken else g
        taken.add(g.data_ptr())
    if old:
        torch._foreach_add_(old, new)


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Leaves buffers and torch's random numbers as they were."""
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([device.index for device in devices], device_type=kind):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer.copy_(saved)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    # Two seconds that only a user of this road should wait for.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = "; ".join(
            [lines[0], *(line for line in lines if line.startswith(("Explanation:", "Developer debug")))]
        )
        raise RuntimeError(
            f"The model, its losses and the method do not compile into one graph. {reason}. Torch's own error, chained "
            "to this one, names the line. Change it there, or take the eager road, opt.backward(losses), with "
            "torch.compile on those parts of the model that can take it."
        ) from error


def _check_options(options: Mapping[str, Any]) -> None:
    if "fullgraph" in options:
        raise ValueError("The compiled road is one graph or none: leave `fullgraph` out.")
    replayed = dict(options.get("options") or {}).get("triton.cudagraphs", False)
    if replayed or options.get("mode") in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            "CUDA graphs hand out memory that the next step overwrites, while .grad and the method's state stay. Use "
            "mode='default' or 'max-autotune-no-cudagraphs'."
        )


def _compile(method: Callable[..., _Traced], options: dict[str, Any]) -> Callable[..., _Traced]:
    """With code of its own: torch counts recompilations, and remembers sizes, by code and its name."""
    assert isinstance(method, types.MethodType)
    function = method.__func__
    code = function.__code__.replace(co_name=f"compiled_backward_{next(_PROGRAMS)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(types.MethodType(own, method.__self__), fullgraph=True, **options)
