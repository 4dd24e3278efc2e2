"""Which parameters are shared, which are one task's own, and how the shared ones fall into blocks."""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.optim import Optimizer

from gradsurgery.graph import survey
from gradsurgery.losses import Output, TaskLosses, node_of

Blocks: TypeAlias = Literal["model", "tensor", "module"] | Sequence[Sequence[Tensor]]
SharedParams: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Parameters:
    """Shared and task-specific parameters of a base optimizer's model.

    ``shared`` is what the user named, or is found from the graphs of the first losses: every parameter of the base
    optimizer that more than one of them reaches.

    Raises:
        ValueError: a named shared parameter is not in the base optimizer, or none is named; ``blocks`` is unknown.
    """

    def __init__(self, base_opt: Optimizer, shared: SharedParams | None, blocks: Blocks):
        self._base = base_opt
        self._names = _optimizer_names(base_opt)
        self._named = None if shared is None else self._read(shared)
        self._found: list[Tensor] | None = None
        self._traced: set[str] = set()
        self._flags: tuple[tuple[int, bool], ...] = ()
        self._foreign: list[Tensor] = []
        if isinstance(blocks, str) and blocks not in ("model", "tensor", "module"):
            raise ValueError(f"blocks must be 'model', 'tensor', 'module' or lists of parameters; got {blocks!r}.")
        if not isinstance(blocks, str) and any(isinstance(block, Tensor) for block in blocks):
            raise ValueError("blocks is a flat list of tensors; pass a list of lists, one a block.")
        self._blocks = blocks if isinstance(blocks, str) else [list(block) for block in blocks]
        if blocks == "module" and self._named is not None:
            self._module_blocks(self._named)

    def _read(self, shared: SharedParams) -> list[Tensor]:
        given: dict[int, Tensor] = {}
        for entry in shared:
            if isinstance(entry, tuple):
                name, p = entry
                self._names.setdefault(p, name)
            else:
                p = entry
            if not isinstance(p, Tensor):
                raise TypeError(f"shared_params must hold tensors or (name, tensor) pairs; got {type(p).__name__}.")
            given.setdefault(id(p), p)
        if not given:
            raise ValueError(
                "shared_params is empty (an exhausted generator, perhaps?). Pass the parameters that the tasks share, "
                "or None to find them from the losses."
            )
        owned = {id(p) for p in base_parameters(self._base)}
        if strangers := [p for p in given.values() if id(p) not in owned]:
            raise ValueError(
                f"{len(strangers)} of {len(given)} shared parameters are not in the base optimizer, which would leave "
                f"them untrained; the first: {self._describe(strangers[0])}. Add them to the base optimizer, or leave "
                "them out of shared_params."
            )
        return list(given.values())

    def subset(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Some of the shared parameters, to measure on.

        Raises:
            TypeError, ValueError: none are given, or one is no tensor or is not among those named as shared.
        """
        chosen = list({id(p): p for p in params}.values())
        if any(not isinstance(p, Tensor) for p in chosen):
            raise TypeError("measure_on must hold tensors: some of the shared parameters.")
        if not chosen:
            raise ValueError(
                "measure_on is empty (an exhausted generator, perhaps?). Pass some of the shared parameters."
            )
        known = {id(p) for p in (base_parameters(self._base) if self._named is None else self._named)}
        if strangers := [p for p in chosen if id(p) not in known]:
            raise ValueError(
                f"{len(strangers)} of {len(chosen)} parameters of measure_on are not shared; the first: "
                f"{self._describe(strangers[0])}. Pass some of the shared parameters, those of the last block, say."
            )
        return chosen

    def _describe(self, p: Tensor) -> str:
        return f"{self._names.get(p, 'unnamed')} {tuple(p.shape)}"

    def all(self) -> list[Tensor]:
        """Those of the base optimizer."""
        return base_parameters(self._base)

    def refuse_hooks(self) -> None:
        """Raises ValueError where a hook waits for an ordinary backward, which none of ours is."""
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in (*self.shared, *self.task_specific())):
            raise ValueError(
                "A parameter has a post-accumulate-grad hook (optimizer-in-backward, perhaps), which fires in an "
                "ordinary backward only: under surgery it would run on the wrong gradient, or never. Remove it, and "
                "step after opt.backward(losses); or take the ordinary backward of opt.combine(losses)."
            )

    def refuse_replaced(self) -> None:
        """Raises RuntimeError where something else has put others, or nothing, in the place of shared parameters."""
        owned = {id(p) for p in base_parameters(self._base)}
        if any(id(p) not in owned for p in self._named or ()):
            raise RuntimeError(
                "The base optimizer no longer holds the shared parameters: something has put others in their place, as "
                "DeepSpeed's ZeRO does with the optimizer that it is given. Give that an optimizer of its own, and "
                "MTLOptimizer another over model.parameters(), which only combines the losses."
            )
        # What stage 3 leaves of a parameter outside of its module's own pass is empty, and this its part of it.
        if any(hasattr(p, "ds_tensor") for p in base_parameters(self._base)):
            raise RuntimeError(
                "Parameters are divided by DeepSpeed's ZeRO stage 3, which gathers them for passes of its own alone: a "
                "task's gradient cannot be had. Use ZeRO stage 0 to 2, or torch's fully_shard, which divides them too."
            )

    def refuse_search(self) -> None:
        """Raises ValueError where shared parameters are to be found in a graph that has others in their place."""
        if self._named is None:
            raise ValueError(
                "Shared parameters are not found by themselves in a model under fully_shard, which computes with "
                "others than the optimizer has. Pass shared_params, model.encoder.parameters() say."
            )

    def trace(self, losses: TaskLosses) -> None:
        """Learns from their graphs what the losses reach: once a task, and again when the base optimizer's parameters
        or their ``requires_grad`` change. Where parameters outside it were found, every batch is looked at, since only
        the graph tells which of those are in use.

        Raises:
            ValueError: shared parameters are to be found, and a task is absent, the losses are the entries of one
                vector, or no parameter is shared.
            RuntimeError: a part of the graph hides the parameters below it.
        """
        flags = tuple((id(p), p.requires_grad) for p in base_parameters(self._base))
        if flags != self._flags or self._foreign:
            self._traced.clear()
        if flags != self._flags:
            self._found, self._flags = None, flags
        new = [t for t in losses.here if losses.tasks[t] not in self._traced]
        if not new:
            return
        if self._named is None and self._found is None and len(losses.here) < len(losses.tasks):
            absent = [losses.tasks[t] for t in range(len(losses.tasks)) if t not in losses.here]
            raise ValueError(
                f"Shared parameters are found from the first batch, in which {', '.join(map(repr, absent))} is absent. "
                "Pass shared_params, or start with a batch that has every task."
            )
        graphs = {t: survey([losses.outputs[t]]) for t in new}
        _check_open(node for graph in graphs.values() for node in graph.next)
        reached = {t: {id(p): p for p in graph.leaves.values()} for t, graph in graphs.items()}
        if self._named is None and self._found is None:
            _check_separate([losses.outputs[t] for t in new])
            self._found = self._find([reached[t] for t in new])
        known = {id(p) for p in base_parameters(self._base)} | {id(p) for p in self._foreign}
        for leaf in {id(p): p for found in reached.values() for p in found.values()}.values():
            if id(leaf) not in known and isinstance(leaf, Parameter):
                self._foreign.append(leaf)
        self._traced.update(losses.tasks[t] for t in new)

    def _find(self, reached: list[dict[int, Tensor]]) -> list[Tensor]:
        shared = [p for p in base_parameters(self._base) if sum(id(p) in found for found in reached) > 1]
        if not shared:
            raise ValueError(
                f"No parameter of the base optimizer is reached by more than one of the {len(reached)} losses, so "
                "there is nothing to operate on. Check that the losses come from one model whose parameters the base "
                "optimizer holds, or pass shared_params."
            )
        return shared

    def _all_shared(self) -> list[Tensor]:
        return self._named if self._named is not None else (self._found or [])

    @property
    def shared(self) -> list[Tensor]:
        """Shared parameters that require a gradient.

        Raises:
            ValueError: all of them are frozen.
        """
        active = [p for p in self._all_shared() if p.requires_grad]
        if not active:
            raise ValueError("Every shared parameter is frozen (requires_grad is False); unfreeze some.")
        return active

    def task_specific(self) -> list[Tensor]:
        """Every other parameter that takes a gradient: of the base optimizer, and those that only the losses reach."""
        shared = {id(p) for p in self._all_shared()}
        candidates = [*base_parameters(self._base), *self._foreign]
        return [p for p in candidates if p.requires_grad and id(p) not in shared]

    @property
    def in_blocks(self) -> bool:
        """Whether there may be more blocks than one."""
        return self._blocks != "model"

    def blocks(self) -> list[list[Tensor]]:
        """The shared parameters, by block.

        Raises:
            ValueError: given blocks do not cover them exactly once, or modules are wanted and have no names.
        """
        shared = self.shared
        if self._blocks == "model":
            return [shared]
        if self._blocks == "tensor":
            return [[p] for p in shared]
        if self._blocks == "module":
            return self._module_blocks(shared)
        return self._given_blocks(shared)

    def _module_blocks(self, shared: list[Tensor]) -> list[list[Tensor]]:
        modules: dict[str, list[Tensor]] = {}
        for p in shared:
            name = self._names.get(p)
            if name is None:
                raise ValueError(
                    "blocks='module' groups parameters by the module in their name, and these have none: build the "
                    "base optimizer on model.named_parameters(), or pass encoder.named_parameters() as shared_params."
                )
            modules.setdefault(name.rpartition(".")[0], []).append(p)
        return list(modules.values())

    def _given_blocks(self, shared: list[Tensor]) -> list[list[Tensor]]:
        wanted = {id(p) for p in shared}
        blocks = [[p for p in block if id(p) in wanted] for block in self._blocks if not isinstance(block, str)]
        listed = [id(p) for block in blocks for p in block]
        covered = set(listed)
        if missing := [p for p in shared if id(p) not in covered]:
            raise ValueError(
                f"{len(missing)} shared parameters are in no block; the first: {self._describe(missing[0])}. List each "
                "exactly once, or use blocks='model', 'tensor' or 'module'."
            )
        if len(listed) != len(covered):
            raise ValueError("A shared parameter is in two blocks; list each exactly once.")
        return [block for block in blocks if block]


def base_parameters(base_opt: Optimizer) -> list[Tensor]:
    return [p for group in base_opt.param_groups for p in group["params"]]


def _check_open(nodes: Iterable[Node]) -> None:
    """What is behind a reentrant checkpoint gets gradients in an ordinary backward alone: in any other, none, and no
    word of it."""
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise RuntimeError(
            "A part of the model is under reentrant activation checkpointing, which knows no gradients of single "
            "tasks. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint "
            "(gradient_checkpointing_kwargs={'use_reentrant': False} in Hugging Face's models and trainers)."
        )


def _check_separate(outputs: Sequence[Output | None]) -> None:
    """Through a common vector, every entry reaches all that any reaches: nothing tells the tasks apart."""
    joints = [_joint(output) for output in outputs]
    if len({node for node in joints if node is not None}) < sum(node is not None for node in joints):
        raise ValueError(
            "The losses are entries of one vector, in whose graph each reaches every parameter of all the others, so "
            "shared parameters cannot be found. Pass the losses as a list (or torch.stack of it) before any other "
            "operation on the vector, or pass shared_params."
        )


def _joint(output: Output | None) -> Node | None:
    """The vector's node, if a loss was picked out of one."""
    node = node_of(output)
    while node is not None and node.name().startswith(("Squeeze", "View", "Unsqueeze", "Reshape")):
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith("Select"):
        return node.next_functions[0][0]
    return node if node is not None and node.name().startswith("Unbind") else None


def _optimizer_names(base_opt: Optimizer) -> dict[Tensor, str]:
    return {
        p: name
        for group in base_opt.param_groups
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
    }
