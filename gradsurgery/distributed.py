"""The reductions that make a step on several ranks equal the step of one process on the whole batch.

Surgery is defined on task gradients averaged over all ranks: the loss of a task is the mean of the ranks' losses, over
those that have it, and so is its gradient. Every rank differentiates its own losses, times its share in that mean, and
sums over ranks follow. Weights come from the same sums on every rank, and are the same everywhere.
"""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradsurgery.losses import Output, TaskLosses

# Of gradients that are summed at once.
BUCKET_BYTES = 25 << 20
# Relative difference of a parameter's sums between ranks that is put down to different devices.
ROUNDING = 1e-6

Group: TypeAlias = Any


class Ranks:
    """The processes that train one model together, each on its part of the batch.

    Args:
        group: their process group.
        params: what they train: the same parameters, in the same order, on every rank.
        wrapper: the `DistributedDataParallel` that averages gradients of an ordinary backward, if there is one.

    Attributes:
        shards: how the parameters are divided among the ranks; None where each has all of them.
        agreed: whether `agree` has compared them.
    """

    shards: Shards | None = None

    def __init__(self, group: Group, params: Sequence[Tensor], wrapper: DistributedDataParallel | None = None):
        self.group, self.wrapper = group, wrapper
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._params = list(params)
        self.agreed = False
        self._forwards = _Forwards()
        if wrapper is not None:
            wrapper.register_forward_hook(self._forwards)

    @property
    def params(self) -> list[Tensor]:
        """Every parameter that they train."""
        return [p for p in self._params if p.requires_grad]

    @property
    def awaited(self) -> list[Tensor]:
        """Parameters that an ordinary backward must reach, come what may: the model's wrapper waits for them."""
        return self.params

    @property
    def device(self) -> torch.device:
        """Where they hold parameters."""
        return self._params[0].device

    def agree(self, what: object) -> None:
        """Compares what the ranks were set up with, and their parameters.

        Raises:
            RuntimeError: they differ.
        """
        shapes = [(*p.shape, str(p.dtype), p.requires_grad) for p in self._params]
        text = json.dumps([repr(what), shapes]).encode()
        digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        low, high = self._extremes(torch.tensor([digest], device=self.device))
        if int(low) != int(high):
            raise RuntimeError(
                "The ranks of one process group differ in their tasks, their method or the shapes of their parameters: "
                f"every rank must build the same model and optimizer. This is rank {self.rank}: {what}."
            )
        self._agree_on_values()
        self.agreed = True

    def _agree_on_values(self) -> None:
        with torch.no_grad():
            sums = [[p.detach().double().sum(), p.detach().double().square().sum()] for p in self._params]
        low, high = self._extremes(torch.stack([entry for pair in sums for entry in pair]))
        close = torch.isclose(low, high, rtol=ROUNDING, atol=ROUNDING * float(high.abs().max().nan_to_num()) / 1e3)
        if not bool((close | ~low.isfinite()).all()):
            raise RuntimeError(
                "The ranks hold parameters of different values, and surgery on averaged gradients would not bring them "
                "together. Wrap the model in DistributedDataParallel, which starts from rank 0's, or broadcast them."
            )

    def _extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        low, high = values.clone(), values.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, self.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, self.group)
        return low, high

    def first(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        # In two halves: a seed may have all of 64 bits, without a sign.
        halves = torch.tensor([number >> 32, number & 0xFFFFFFFF], device=self.device)
        dist.broadcast(halves, group=self.group, group_src=0)
        high, low = halves.tolist()
        return (high << 32) + low

    def join(self, losses: TaskLosses) -> TaskLosses:
        """The losses of the whole batch: of each task, the mean over the ranks that have it."""
        T, here, device = len(losses.tasks), losses.here, losses.values.device
        there = torch.ones(T, dtype=torch.float64, device=device)
        for t in set(range(T)) - set(here):
            there[t] = 0
        both = torch.cat([torch.where(there > 0, losses.values, 0.0), there])
        dist.all_reduce(both, group=self.group)
        total, counts = both.split(T)
        # A rank that has every task knows that none is absent, and need not wait for the answer.
        elsewhere = [] if len(here) == T else [t for t, n in enumerate(counts.tolist()) if n and t not in here]
        outputs = tuple(self._absent(losses, t) if t in elsewhere else o for t, o in enumerate(losses.outputs))
        share = torch.where(there > 0, 1 / counts, 0.0)
        return TaskLosses(losses.tasks, outputs, total / counts, share, frozenset(elsewhere))

    def _absent(self, losses: TaskLosses, task: int) -> Output | None:
        """What this rank differentiates of a task that is absent here alone, times a share of zero.

        Raises:
            ValueError: it must, and has nothing to.
        """
        return None

    def sum(self, values: Tensor) -> Tensor:
        """Over ranks, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def scatter(self, values: Tensor, own: Tensor) -> Any:
        """Begins to sum values (n,) over ranks, of which each gets its own n / W; returns what to wait for."""
        return _REDUCE_SCATTER(own, values, group=self.group, async_op=True)

    def gather(self, own: Tensor, whole: Tensor) -> Any:
        """Begins to lay every rank's own values (n / W,) side by side (n,); returns what to wait for."""
        return _ALL_GATHER(whole, own, group=self.group, async_op=True)

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether any rank has it."""
        raised = torch.ones(len(flags), dtype=torch.uint8, device=self.device)
        if not all(flags):
            raised = torch.tensor(flags, dtype=torch.uint8, device=raised.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self.group)
        # A rank that has them all need not wait for the answer.
        return list(flags) if all(flags) else [bool(flag) for flag in raised.tolist()]

    def total(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients summed over ranks; None where no rank has one.

        Args:
            params: the same on every rank.
            gradients: of each, or None.
        """
        if not params:
            return []
        seen = self.anywhere([g is not None for g in gradients])
        wanted = [n for n, found in enumerate(seen) if found]
        totals: list[Tensor | None] = [None] * len(params)
        pending = []
        for bucket in _buckets(wanted, params):
            dense = [torch.zeros_like(params[n]) if (g := gradients[n]) is None else g.to_dense() for n in bucket]
            flat = torch.cat([g.detach().reshape(-1).to(params[bucket[0]].dtype) for g in dense])
            pending.append((bucket, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        for bucket, flat, handle in pending:
            handle.wait()
            pieces = flat.split([params[n].numel() for n in bucket])
            for n, piece in zip(bucket, pieces, strict=True):
                totals[n] = piece.view(params[n].shape)
        return totals

    @property
    def native(self) -> bool:
        """Whether an ordinary backward is averaged by the model's own wrapper.

        One that looks for unused parameters knows those of the forward pass, and would wait for a loss that is absent;
        and after a forward under ``no_sync``, or past the wrapper, it leaves gradients local.
        """
        wrapper, ready = self.wrapper, self._forwards.taken()
        if wrapper is None or wrapper.find_unused_parameters or not ready:
            return False
        inside = {id(p) for p in wrapper.parameters()}
        return all(id(p) in inside for p in self.params) and not wrapper.parameters_to_ignore


class ShardedRanks(Ranks):
    """Ranks that have parts of the parameters, whose gradients `fully_shard` averages as they come.

    Args:
        group: of all ranks that have a part of the batch.
        params: what they train.
        shards: how that is divided.
    """

    def __init__(self, group: Group, params: Sequence[Tensor], shards: Shards):
        super().__init__(group, params)
        self.shards = shards

    def _agree_on_values(self) -> None:
        return

    def join(self, losses: TaskLosses) -> TaskLosses:
        joined = super().join(losses)
        if not joined.here:
            raise ValueError(f"Every task ({', '.join(joined.tasks)}) is absent on every rank; skip the step instead.")
        return joined

    def _absent(self, losses: TaskLosses, task: int) -> Output:
        if task in losses.stand_ins:
            return losses.stand_ins[task].loss()
        raise ValueError(
            f"Task {losses.tasks[task]!r} is absent on rank {self.rank} and present on another, and fully_shard wants "
            "every backward pass on every rank. Pass gradsurgery.Absent(outputs) in its place, which takes part with a "
            "gradient of zero."
        )

    @property
    def awaited(self) -> list[Tensor]:
        return []

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def total(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        return list(gradients)

    @property
    def native(self) -> bool:
        return True


class Shards:
    """How `torch.distributed.fsdp.fully_shard` divides parameters: each rank has a part of every one.

    A parameter that the model computes with is not the one of the optimizer, and a backward pass must run to its end
    for the latter to get a gradient, averaged over ranks.

    Args:
        params: all of the optimizer's.

    Raises:
        RuntimeError: some are not sharded, or in another way than the rest.
    """

    def __init__(self, params: Sequence[Any]):
        plain = [p for p in params if not is_sharded(p)]
        if plain:
            raise RuntimeError(
                f"{len(plain)} of {len(params)} parameters (one of shape {tuple(plain[0].shape)}) are outside of "
                "fully_shard, and their gradients would differ from rank to rank. Call fully_shard on the whole model."
            )
        kinds = {(p.device_mesh, tuple(placement.is_shard() for placement in p.placements)) for p in params}
        self.mesh, kind = next(iter(kinds))
        if len(kinds) > 1 or kind not in ((True,), (False,), (False, True)):
            raise RuntimeError(
                "Parameters are divided in ways that surgery has no sum for (tensor parallelism, or several meshes). "
                "It takes fully_shard over a mesh of one dimension, or of two to replicate and shard."
            )
        self._groups = [self.mesh.get_group(dim) for dim, sharded in enumerate(kind) if sharded]
        self._params = list(params)
        self._used: list[tuple[Any, weakref.ref[Any], int]] = []

    def stepped(self) -> None:
        """Notes which gradients a step of the optimizer has used."""
        self._used = [(p, weakref.ref(p.grad), _version(p.grad)) for p in self._params if p.grad is not None]

    def warn_of_used(self) -> None:
        """Warns of gradients that a step has used and nobody has cleared since."""
        used, self._used = self._used, []
        if any(p.grad is not None and p.grad is ref() and _version(p.grad) == version for p, ref, version in used):
            warnings.warn(
                "Gradients that the last step has used are still there, and this backward adds to them. Under "
                "fully_shard(reshard_after_forward=False), the model's zero_grad() does not reach the parameters that "
                "are trained if it is called between forward and backward. Call the optimizer's zero_grad().",
                stacklevel=4,
            )

    def group(self) -> Group:
        """Of all ranks that have a part of the batch."""
        if self.mesh.size() == dist.get_world_size():
            return dist.group.WORLD
        return self.mesh.get_group() if self.mesh.ndim == 1 else self.mesh._flatten().get_group()

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks whose parts make up the whole, in place."""
        for group in self._groups:
            dist.all_reduce(values, group=group)
        return values

    def part(self, p: Any, whole: Tensor, *, axes: int = 0) -> Tensor:
        """This rank's part of a whole tensor that goes with a parameter, with further axes before the parameter's."""
        for dim, placement in enumerate(p.placements):
            if placement.is_shard():
                parts = whole.chunk(self.mesh.size(dim), placement.dim + axes)
                r = self.mesh.get_local_rank(dim)
                whole = parts[r] if r < len(parts) else whole.narrow(placement.dim + axes, 0, 0)
        return whole

    def gradients(
        self, outputs: Sequence[Any], seeds: Sequence[Tensor], inputs: Sequence[Tensor], *, retain: bool
    ) -> list[Tensor | None]:
        """This rank's parts of the averaged gradients, by a whole backward pass that leaves ``.grad`` as it was."""
        before = [p.grad for p in self._params]
        try:
            # Of the optimizer's own parameters: the model may show others at this time.
            for p in self._params:
                p.grad = None
            torch.autograd.backward(outputs, seeds, retain_graph=retain)
            return [None if p.grad is None else local(p.grad) for p in inputs]
        finally:
            for p, g in zip(self._params, before, strict=True):
                p.grad = g


def is_sharded(p: Any) -> bool:
    """Whether it is a `DTensor`, whose module takes long to import and may never be needed."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def local(p: Any) -> Tensor:
    """What this rank has of a tensor."""
    return p.to_local() if is_sharded(p) else p


def placed(like: Any, part: Tensor, *, axes: int = 0) -> Tensor:
    """This rank's part of something that is divided as ``like`` is, with further axes before its own."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor, Replicate, Shard

    places = [Shard(place.dim + axes) if place.is_shard() else Replicate() for place in like.placements]
    shape = torch.Size([*part.shape[:axes], *like.shape])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, places, run_check=False, shape=shape, stride=stride)


def _version(g: Any) -> int:
    """A number that grows when a gradient is written: through it, or through this rank's part."""
    return g._version + local(g)._version


class _Forwards:
    """A forward hook of a wrapper: it may leave gradients local, or be passed by, and nothing tells afterwards."""

    def __init__(self) -> None:
        self._ready = False

    def __call__(self, wrapper: Any, args: Any, output: Any) -> None:
        self._ready = torch.is_grad_enabled() and wrapper.require_backward_grad_sync

    def taken(self) -> bool:
        """Whether the last forward readied the wrapper for a backward, which is said once."""
        ready, self._ready = self._ready, False
        return ready


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_ranks(params: Sequence[Tensor], group: Group | None) -> Ranks | None:
    """The ranks that train these parameters; None for a single process.

    Args:
        params: of the base optimizer.
        group: the process group, where no wrapper of the model tells.

    Raises:
        RuntimeError: nothing tells, or it is a wrapper under which per-task gradients cannot be had.
        ValueError: the group is not the wrapper's.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("process_group was given, and torch.distributed is not initialised in this process.")
        return None
    if dist.get_world_size() == 1 or (group is not None and dist.get_world_size(group) == 1):
        return None
    if any(is_sharded(p) for p in params):
        shards = Shards(params)
        chosen = shards.group()
        _check_groups(chosen, [] if group is None else [group])
        return ShardedRanks(chosen, params, shards)
    wrappers = _wrappers(params)
    for wrapper in wrappers:
        _check_wrapper(wrapper)
    groups = [wrapper.process_group for wrapper in wrappers]
    if group is None and not groups:
        raise RuntimeError(
            f"torch.distributed runs {dist.get_world_size()} processes, and nothing says whether they train this model "
            "together: on gradients of its own, each would drift apart from the others. Wrap the model in "
            "DistributedDataParallel; or pass process_group=torch.distributed.group.WORLD to average over it without a "
            "wrapper (parameters must start equal), or process_group=torch.distributed.new_group([rank], "
            "use_local_synchronization=True) for a model that this process trains alone."
        )
    chosen = group if group is not None else groups[0]
    _check_groups(chosen, groups)
    known = {id(p): p for p in params}
    for wrapper in wrappers:
        known.update((id(p), p) for p in wrapper.parameters())
    return Ranks(chosen, list(known.values()), wrappers[0] if len(wrappers) == 1 else None)


def _check_groups(chosen: Group, others: Sequence[Group]) -> None:
    members = dist.get_process_group_ranks(chosen)
    if any(dist.get_process_group_ranks(other) != members for other in others):
        raise ValueError(
            "Two process groups claim this model: that of its wrapper, and another wrapper's or that of process_group. "
            "Surgery averages over one; leave process_group out, or wrap the model for that group."
        )


def _wrappers(params: Sequence[Tensor]) -> list[Any]:
    """Wrappers of models with these parameters: nothing else of the parameters leads there."""
    wanted = {id(p) for p in params}
    names = ("DistributedDataParallel", "FullyShardedDataParallel")

    def is_one(obj: Any) -> bool:
        # The type itself: `isinstance` asks proxies for their class, which may do anything.
        return any(kind.__name__ in names for kind in type(obj).__mro__)

    modules = [obj for obj in _modules() if is_one(obj)]
    return [module for module in modules if any(id(p) in wanted for p in module.parameters())]


def _modules() -> Iterator[torch.nn.Module]:
    for obj in gc.get_objects():
        if issubclass(type(obj), torch.nn.Module):
            yield obj


def _check_wrapper(wrapper: Any) -> None:
    if not isinstance(wrapper, DistributedDataParallel):
        raise RuntimeError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), which frees what a second backward pass needs. "
            "Use torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if wrapper.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) counts on every backward pass being like the first, and "
            "surgery takes several that end elsewhere. Leave static_graph out."
        )


def _buckets(wanted: Sequence[int], params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Parameters of one dtype, in runs of a size that is worth a message."""
    bucket: list[int] = []
    size = 0
    for n in wanted:
        p = params[n]
        if bucket and (p.dtype != params[bucket[0]].dtype or size + p.numel() * p.element_size() > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(n)
        size += p.numel() * p.element_size()
    if bucket:
        yield bucket


def _newest(*names: str) -> Any:
    """The first of these names that this version of torch has, which renames; None where it has no such at all."""
    return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)


_REDUCE_SCATTER = _newest("reduce_scatter_single", "reduce_scatter_tensor")
_ALL_GATHER = _newest("all_gather_single", "all_gather_into_tensor")
