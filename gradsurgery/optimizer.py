"""`MTLOptimizer`: the wrapper that gives any `torch.optim` optimizer gradient surgery."""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.engines import Engine, Subset, make_engine
from gradsurgery.engines.representation import Nested
from gradsurgery.losses import Losses
from gradsurgery.parameters import Blocks, Parameters, SharedParams, base_parameters
from gradsurgery.registry import (
    BaseMethod,
    ColumnMethod,
    HeadPolicy,
    TrackedMethod,
    build_method,
    get_method,
    list_methods,
)
from gradsurgery.rule import GramianFunction, Rule
from gradsurgery.stats import Needs, StepInfo
from gradsurgery.surgery import Surgery

MethodLike = str | BaseMethod | Callable[[Tensor], Tensor]


class MTLOptimizer(Optimizer):
    """A `torch.optim` optimizer that trains one network on several losses.

    It *is* an `Optimizer`: parameter groups, state and hooks are the base optimizer's own, so that schedulers,
    `GradScaler`, clipping, checkpoints and trainers take it as they take the base.

    Args:
        base_opt: any `torch.optim.Optimizer` whose ``step()`` needs no closure.
        method: a registered name (see `list_methods`), a `Method`, or a function of Gramians (B, T, T) that returns
            weights (B, T), both float64.
        shared_params: the parameters that the tasks share, as tensors or (name, tensor) pairs, all of them in
            ``base_opt``. None finds, in the first batch, those that more than one loss reaches.
        engine: how per-task gradients are measured. ``"sequential"``: one backward pass a task, for any model.
            ``"batched"``: all tasks in one pass, for models of small operators. ``"gramian"``: layer by layer, without
            ever holding all gradients. ``"representation"``: gradients at the tensors where heads begin.
            ``"auto"``: what is cheapest and exact. Or an `Engine` with its options.
        blocks: what surgery treats as one gradient: all shared parameters (``"model"``), each (``"tensor"``), each
            module's (``"module"``, which needs named parameters), or lists of parameters.
        measure_on: some of the shared parameters, those of the last block, say: T short backward passes measure the
            inner products of their gradients alone, and the weights act on all shared parameters by one ordinary
            backward. It is exact where the method is defined so (GradNorm: the last shared layer), and an approximation
            elsewhere: what a method guarantees, it guarantees on these parameters. None: all.
        heads: whether every other parameter takes the gradient of the plain sum of losses (``"unweighted"``) or of the
            weighted sum (``"weighted"``; with several blocks, by the mean weight over blocks). None: as the method's
            authors ran it (see `get_method`).
        update_every: solve for weights every so many steps, and take one ordinary weighted backward in between.
        resolve_on_conflict: solve early where the step between would undo a task's progress: its gradient has a cosine
            below -0.01 with a task's gradient of the last solve. It reads the kept rows once a step, at no further
            backward, and the host waits for the answer. Where ``.grad`` was not empty before, nothing is compared; nor
            after a resume until the next solve, since rows are not in checkpoints.
        average: share of the past in a running mean of the weights, in [0, 1): ``average * mean + (1 - average) *
            weights``, as CR-MOGM (Zhou et al., NeurIPS 2022) steadies any method's weights. 0 takes them as they are.
        preference: T positive numbers, one a task, for the methods that can take them.
        seed: of the method's random numbers; None derives it from `torch.initial_seed`. Of several ranks, rank 0's.
        process_group: the ranks that train this model together, over which task gradients are averaged before the
            method sees them. None asks the model's `DistributedDataParallel`, if there is one; a model in several
            processes without it must name its group. Not in copies and pickles.
        **hparams: the method's hyperparameters.

    Raises:
        ValueError, TypeError: an argument is unknown, out of range, or cannot be combined with another.

    Example:
        >>> import torch
        >>> from gradsurgery import MTLOptimizer
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList([torch.nn.Linear(8, 1) for _ in range(2)])
        >>> base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
        >>> opt = MTLOptimizer(base, method="cagrad", shared_params=trunk.parameters())
        >>> z = trunk(torch.randn(16, 4))
        >>> opt.zero_grad()
        >>> opt.step([head(z).square().mean() for head in heads])
        >>> opt.info.weights.shape
        torch.Size([1, 2])
    """

    base_opt: Optimizer

    def __init__(
        self,
        base_opt: Optimizer,
        method: MethodLike = "cagrad",
        shared_params: SharedParams | None = None,
        *,
        engine: str | Engine = "auto",
        blocks: Blocks = "model",
        measure_on: Iterable[Tensor] | None = None,
        heads: HeadPolicy | None = None,
        update_every: int = 1,
        resolve_on_conflict: bool = False,
        average: float = 0.0,
        preference: Sequence[float] | None = None,
        seed: int | None = None,
        process_group: Any = None,
        **hparams: Any,
    ):
        # Optimizer.__init__ is left out on purpose: it would build groups and state of its own beside the base's.
        _check_base(base_opt)
        rule, name, policy = _make_method(method, preference, hparams)
        if heads not in (None, "unweighted", "weighted"):
            raise ValueError(f"heads must be 'unweighted', 'weighted' or None; got {heads!r}.")
        if not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every must be a whole number of steps, 1 or more; got {update_every!r}.")
        if seed is not None and not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number or None; got {seed!r}.")
        if update_every > 1 and blocks != "model":
            raise ValueError(
                f"update_every={update_every} takes one weighted backward between solves, which has one weight a task, "
                "while blocks give each its own. Use blocks='model' or update_every=1."
            )
        if not isinstance(average, (int, float)) or not 0 <= average < 1:
            raise ValueError(f"average is a share of the past: it must be in [0, 1); got {average!r}.")
        if isinstance(rule, ColumnMethod) and (heads == "weighted" or update_every > 1 or average):
            raise ValueError(
                f"{name} works coordinate by coordinate and has no weights: heads='weighted', update_every and average "
                "have nothing to go by. Leave them at their defaults, or use a method with weights."
            )
        if isinstance(rule, TrackedMethod) and rule.acts_on == "measured" and update_every > 1:
            raise ValueError(
                f"update_every={update_every} takes ordinary backwards between solves, while {name} moves along rows "
                "that it tracks from step to step, and has nothing to go by there. Use update_every=1."
            )
        parameters = Parameters(base_opt, shared_params, blocks)
        rows = resolve_on_conflict or measure_on is not None
        road = make_engine(engine, rows=rows or bool(rule.needs & (Needs.COLUMNS | Needs.TRACKED | Needs.CROSS)))
        if measure_on is not None:
            road = Subset(road, parameters.subset(measure_on))
        road.refuse(rule.needs, name, blocks=parameters.in_blocks)
        if resolve_on_conflict and not (road.holds and update_every > 1):
            raise ValueError(
                "resolve_on_conflict compares steps between two solves of update_every with the rows of the last one: "
                "it needs update_every > 1, and engine='auto', 'sequential' or 'batched' without measure_on."
            )
        self.base_opt = base_opt
        self._heads = heads
        self._surgery = Surgery(
            Rule(rule, name, update_every, torch.initial_seed() if seed is None else seed, heads or policy, average),
            road,
            parameters,
            resolve_on_conflict=resolve_on_conflict,
            process_group=process_group,
        )
        for registry in _HOOKS:
            setattr(self, registry, OrderedDict())
        self._mark_groups()

    # The base's own groups, state and defaults, never copies: schedulers and checkpoints write into them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_opt.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_opt.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's per-parameter state."""
        return self.base_opt.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_opt.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_opt.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_opt.defaults = value

    @property
    def info(self) -> StepInfo | None:
        """What came of the last `backward`; None before the first."""
        return self._surgery.info

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer; its parameters are shared only where shared ones are found, not named."""
        self.base_opt.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer does."""
        self.base_opt.zero_grad(set_to_none=set_to_none)

    @torch._disable_dynamo
    def backward(
        self,
        losses: Losses,
        *,
        representation: Nested | None = None,
        scaler: torch.amp.GradScaler | None = None,
        independent: Sequence[Losses] | None = None,
    ) -> StepInfo:
        """Accumulates into ``.grad``, as ``loss.backward()`` does, the direction that the method makes of the losses.

        Args:
            losses: one scalar a task, as a sequence, mapping or 1-D tensor; None, a missing key or
                `gradsurgery.Absent` for a task that is absent from this batch. The first call fixes the tasks.
            representation: what the tasks share of the forward pass, a tensor, or several in tuples, lists and mappings
                as an architecture's ``representation(x)`` has them: surgery on gradients with respect to it, and one
                backward of what lies below (see `gradsurgery.engines.Representation`).
            scaler: the AMP scaler. Losses are given unscaled; the method sees unscaled gradients, and ``.grad`` is left
                scaled for ``scaler.step(optimizer)``.
            independent: for the methods that learn their weights from independent samples (``sdmgrad``, ``modo``): the
                losses of two further batches, each of its own draw and forward. Shared parameters alone are
                differentiated there, and ``.grad`` takes nothing from it.

        Returns:
            What came of it, also kept as ``info``.

        Raises:
            TypeError, ValueError: the losses cannot be used (the message says why); nothing has been changed then.
            RuntimeError: a compiled model can be passed backward but once, or activations are checkpointed in the
                reentrant way; nothing has been changed then.
        """
        try:
            return self._surgery.backward(losses, scaler, independent, representation)
        except RuntimeError as error:
            if "donated buffers" in str(error):
                raise RuntimeError(_DONATED) from error
            raise

    @torch._disable_dynamo
    def combine(self, losses: Losses, *, independent: Sequence[Losses] | None = None) -> Tensor:
        """The weighted sum of the losses, on which one ordinary ``backward()`` makes the method's direction.

        It is for whoever wants a scalar loss and does the rest: a trainer's ``compute_loss``, automatic optimisation,
        an engine or a wrapper that averages gradients in its own way. Weights are found as in `backward`, by T passes
        that leave ``.grad`` and the graph as they were, so that a step costs one backward more. Task-specific
        parameters take the weighted gradient too (``heads="weighted"``); a step between two solves of ``update_every``
        costs nothing beside the caller's backward. ``.grad`` is the caller's: step with ``opt.step()``, or with what
        else trains the model.

        Args:
            losses: as in `backward`; unscaled, under AMP too: scale what is returned. Under DDP, parameters of a task
                that no rank has get a gradient of zero from the caller's backward, where `backward` leaves None.
            independent: as in `backward`.

        Returns:
            (), with a graph: ``sum_t w_t L_t``, the weights without one; NaN where a loss or a gradient is not finite.

        Raises:
            TypeError, ValueError: the losses cannot be used, or the step of this method is no weighted sum (one that
                works column by column or tracks rows, or ``blocks``, or ``heads="unweighted"``).
        """
        if self._heads == "unweighted":
            raise ValueError(
                "heads='unweighted' was asked for, and one backward of a weighted sum weighs every parameter. Leave "
                "heads out, or use opt.backward(losses)."
            )
        try:
            return self._surgery.combine(losses, independent)
        except RuntimeError as error:
            if "donated buffers" in str(error):
                raise RuntimeError(_DONATED) from error
            raise

    @torch._disable_dynamo
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        losses: Losses | Callable[[], Any] | None = None,
        *,
        closure: Callable[[], Any] | None = None,
        representation: Nested | None = None,
        independent: Sequence[Losses] | None = None,
    ) -> Any:
        """One step of the base optimizer, after `backward` where losses are given.

        Args:
            losses: as in `backward`, or a closure returning them. A closure that returns None, a number or a 0-D tensor
                has done its own backward, as any torch closure. None: the gradients are there already; the method's
                state is left alone.
            closure: the same, by torch's name.
            representation: as in `backward`; a closure cannot have one.
            independent: as in `backward`.

        Returns:
            What the closure returned, else None.
        """
        if losses is not None and closure is not None:
            raise ValueError("step() got losses and a closure; pass one of them.")
        if self._surgery.holding:
            raise RuntimeError("step() inside accumulate(): the rows are still being held; step after the block.")
        given = losses if losses is not None else closure
        result = None
        if representation is not None and (given is None or callable(given)):
            raise ValueError("step() got a representation, and no losses of the same forward pass beside it.")
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            if callable(given):
                with torch.enable_grad():
                    result = given()
                if _are_losses(result):
                    self.backward(result, independent=independent)
                elif independent is not None:
                    raise ValueError("step() got independent batches, and its closure returned no losses.")
            elif given is not None:
                self.backward(given, representation=representation, independent=independent)
            elif independent is not None:
                raise ValueError("step() got independent batches and no losses to operate on.")
            self._base_step()
        return result

    # Torch would otherwise wrap the method to run hooks, global ones included, which the base runs already.
    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    def observe(self, losses: Losses) -> None:
        """Tells the method what the step led to: the losses after it, on the same batch, detached or not.

        Only a method that learns from them takes notice (FAMO, whose own rule this is; without it FAMO makes do with
        the next batch's losses). It costs the caller a forward.
        """
        self._surgery.observe(losses)

    def epoch_end(self) -> None:
        """Tells the method that an epoch is over: those that go by epochs (`EpochMethod`) learn from it, others ignore
        it. A method with a ``window`` of steps needs no call."""
        self._surgery.rule.epoch_end()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Micro-batches as one batch: every ``backward`` inside only adds to the per-task rows, and the surgery runs
        once, on their sum, when the block ends.

        Divide the losses by the number of micro-batches where they are means. If the block raises, the rows are
        dropped and ``.grad`` is as it was; only between two solves of ``update_every``, where each micro-batch takes
        an ordinary backward, what went before stays in ``.grad``.

        Example:
            >>> with opt.accumulate():  # doctest: +SKIP
            ...     for x, y in micro_batches:
            ...         opt.backward([loss / len(micro_batches) for loss in losses(x, y)])
            >>> opt.step()  # doctest: +SKIP
        """
        if self._surgery.holding:
            raise RuntimeError("accumulate() is not reentrant: a block is open already.")
        self._surgery.hold()
        try:
            yield
            self._surgery.release()
        finally:
            self._surgery.drop()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with the method's own under ``["param_groups"][0]["mtl"]``.

        That entry is one JSON text: `torch.load` with ``weights_only=True`` and `torch.distributed.checkpoint` keep it,
        and a plain optimizer that loads the dict passes it by. What a method remembers of each parameter (`moco`,
        `db_mtl`, `excess_mtl`) is an entry ``"mtl_rows"`` (T, *shape) of that parameter's state, empty where there is
        nothing. Two roads do not take it: flattened distributed checkpoints drop it (a warning follows at loading), and
        a plain optimizer that makes its state at its first step takes it for that state, if none was there yet.
        """
        for hook in self._hooks("_optimizer_state_dict_pre_hooks"):
            hook(self)
        state_dict = self.base_opt.state_dict()
        groups = [dict(group) for group in state_dict["param_groups"]]
        groups[0]["mtl"] = self._surgery.rule.pack(self._surgery.engine.name)
        state, remembered = _split_rows(state_dict["state"])[0], dict(self._surgery.remembered())
        if remembered:
            for n, p in enumerate(base_parameters(self.base_opt)):
                # torch.distributed.checkpoint wants the same entries of all parameters.
                state[n] = {**state.get(n, {}), "mtl_rows": remembered.get(p, p.new_empty(0))}
        state_dict = {**state_dict, "state": state, "param_groups": groups}
        for hook in self._hooks("_optimizer_state_dict_post_hooks"):
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, or a plain optimizer's dict, after which the method starts afresh.

        Raises:
            ValueError: it was written by another method, with other hyperparameters or tasks; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._hooks("_optimizer_load_state_dict_pre_hooks"):
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = [dict(group) for group in state_dict["param_groups"]]
        text = groups[0].pop("mtl", "") if groups else ""
        content = self._surgery.rule.check(text) if text else None
        state, rows = _split_rows(state_dict["state"])
        ids = [n for group in groups for n in group["params"]]
        pairs = zip(ids, base_parameters(self.base_opt), strict=False)
        # Without the method's own text, the rows are another's.
        known = [(p, rows[n]) for n, p in pairs if content is not None and n in rows and rows[n].numel()]
        _check_rows(known, content)
        self.base_opt.load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self._surgery.rule.unpack(content)
        self._surgery.remember(known)
        self._mark_groups()
        for hook in self._hooks("_optimizer_load_state_dict_post_hooks"):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # An LR scheduler's patch of `step` is bound to this very object.
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __getattr__(self, name: str) -> Any:
        # Public extras of the base (schedule-free's train() and eval()). GradScaler must not take the wrapper for a
        # fused optimizer and hand it the scale instead of unscaling, so nothing private or of its protocol leaks.
        private = name.startswith("_") or name in ("base_opt", "grad_scale", "found_inf")
        if private or not hasattr(self.base_opt, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self.base_opt, name)

    def __repr__(self) -> str:
        surgery = self._surgery
        options = f"engine={surgery.engine.name}, heads={surgery.rule.heads}, update_every={surgery.rule.update_every}"
        return f"{type(self).__name__}({surgery.rule.method!r}, {options}, base_opt={self.base_opt!r})"

    def _hooks(self, registry: str) -> list[Callable[..., Any]]:
        return list(getattr(self, registry).values())

    def _mark_groups(self) -> None:
        # Flattened checkpoints read just those entries that the live group has.
        self.base_opt.param_groups[0].setdefault("mtl", "")

    def _base_step(self) -> None:
        args, kwargs = (self,), {}
        for hook in self._hooks("_optimizer_step_pre_hooks"):
            changed = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"A step pre-hook must return None or (args, kwargs); got {changed!r}.")
                args, kwargs = changed
        self.base_opt.step()
        self._surgery.stepped()
        for hook in self._hooks("_optimizer_step_post_hooks"):
            hook(self, args, kwargs)


def backward(opt: Any, losses: Losses, **options: Any) -> StepInfo:
    """`MTLOptimizer.backward` of an optimizer that a trainer has wrapped, and whose methods it hides.

    Args:
        opt: an `MTLOptimizer`, or what holds one as its ``optimizer`` (Accelerate, Lightning); the AMP scaler of
            Accelerate's wrapper is taken into account.
        losses: as in `MTLOptimizer.backward`.
        **options: the same.

    Raises:
        TypeError: there is no `MTLOptimizer` inside.
    """
    return unwrap(opt).backward(losses, **{"scaler": scaler_of(opt), **options})


def scaler_of(opt: Any) -> torch.amp.GradScaler | None:
    """The AMP scaler of Accelerate's wrapper, if there is one."""
    return getattr(opt, "scaler", None)


def unwrap(opt: Any) -> MTLOptimizer:
    """The `MTLOptimizer` within what a trainer made of it.

    Raises:
        TypeError: there is none.
    """
    inner = opt
    while not isinstance(inner, MTLOptimizer):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "_optimizer", None)
        if inner is None:
            raise TypeError(f"There is no MTLOptimizer in this {type(opt).__name__}: wrap the optimizer before it.")
    return inner


_DONATED = (
    "A compiled part of the model can be passed backward once a forward, and this step needs several passes: torch "
    "compiled its backward for a run with one pass, or found such a one in its cache, so that it overwrites what the "
    "forward saved (donated buffers). Set torch._functorch.config.donated_buffer = False before the model is compiled, "
    "and leave it so; or let this be the first backward of the freshly compiled model, which torch then takes into "
    "account; or compile the whole step with gradsurgery.compile_backward. Nothing has been changed: take the step "
    "again on a new forward."
)
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _split_rows(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
    """A state dict's state without what a method remembers of parameters, and that."""
    rows = {n: entry["mtl_rows"] for n, entry in state.items() if isinstance(entry, Mapping) and "mtl_rows" in entry}
    own = {n: {k: v for k, v in entry.items() if k != "mtl_rows"} if n in rows else entry for n, entry in state.items()}
    return {n: entry for n, entry in own.items() if n not in rows or entry}, rows


def _check_rows(known: Sequence[tuple[Tensor, Tensor]], content: Mapping[str, Any] | None) -> None:
    for p, rows in known:
        if content is not None and rows.shape != (len(content["tasks"] or ()), *p.shape):
            raise ValueError(
                f"The checkpoint remembers rows of shape {tuple(rows.shape)} of a parameter of shape {tuple(p.shape)}: "
                "it was written for another model or other tasks."
            )


def _check_base(base_opt: Optimizer) -> None:
    if not isinstance(base_opt, Optimizer):
        raise TypeError(
            f"base_opt must be a torch.optim.Optimizer; got {type(base_opt).__name__}. Build it as you would without "
            "surgery, e.g. torch.optim.AdamW(model.parameters(), 1e-4)."
        )
    if isinstance(base_opt, MTLOptimizer):
        raise TypeError("base_opt is an MTLOptimizer already; surgery can be wrapped around it once.")
    # The class's step: a scheduler may have patched the instance's, and hidden its signature.
    _, *parameters = inspect.signature(type(base_opt).step).parameters.values()
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise TypeError(
            f"{type(base_opt).__name__}.step() needs a closure that it evaluates several times a step, each of which "
            "would be a surgery of its own; use a base optimizer that takes gradients as they are, e.g. SGD or AdamW."
        )


def _make_method(
    method: MethodLike, preference: Sequence[float] | None, hparams: dict[str, Any]
) -> tuple[BaseMethod, str, HeadPolicy]:
    """The method, its name, and its head policy."""
    if isinstance(method, str):
        info = get_method(method)
        if preference is not None:
            if "preference" not in info.hparams:
                able = [name for name in list_methods() if "preference" in get_method(name).hparams]
                raise ValueError(
                    f"Method {info.name!r} takes no preference: its rule has no place for one. Methods that do: "
                    f"{', '.join(able)}."
                )
            hparams = {**hparams, "preference": tuple(float(p) for p in preference)}
        return build_method(info.name, hparams), info.name, info.heads
    if hparams or preference is not None:
        extra = [*hparams, *(["preference"] if preference is not None else [])]
        raise ValueError(f"{', '.join(extra)} go to a method by name; set them on the method that you pass.")
    if isinstance(method, BaseMethod):
        known = [get_method(name) for name in list_methods()]
        found = next((info for info in known if info.cls is type(method)), None)
        return (method, found.name, found.heads) if found else (method, type(method).__qualname__, "unweighted")
    if callable(method) and not isinstance(method, type):
        return GramianFunction(method), getattr(method, "__qualname__", type(method).__name__), "unweighted"
    got = f"the class {method.__name__}: make one of it" if isinstance(method, type) else type(method).__name__
    raise TypeError(f"method must be a name, a Method or a function of Gramians; got {got}.")


def _are_losses(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.ndim == 1
    return isinstance(result, Mapping) or (isinstance(result, Sequence) and not isinstance(result, str))
