"""Ways to take one training step; each makes it for a problem of its own, and says what ran.

plain                sum of the losses, one backward
plain plus heads     the same, after one pass of every head down to the features: what `representation` can't do without
floor                T bare `torch.autograd.grad` calls, gradients summed: what any exact method pays at least if it
                     takes one pass a task
sequential, batched, gramian, representation, auto
                     `MTLOptimizer` with that engine
last block           ``measure_on`` the trunk's last block
every 10             ``update_every=10``, as a tenth of a step that solves and nine tenths of one that does not; they
                     are timed in turn with ``update_every=2``, which takes the same two kinds
compiled             `gradsurgery.compile_backward`, by inductor
torchjd vmap         TorchJD's `mtl_backward` on the shared features, all rows at once
torchjd sequential   the same, one row at a time
torchjd autogram     TorchJD's `autogram.Engine`, then one backward of the weighted losses
libmtl               LibMTL's weighting in a minimal host: its losses come as a list, which spares it the copies of
                     its trainer's vector
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libmtl import module as libmtl_module
from benchmarks.problems import Problem, losses
from benchmarks.record import in_words
from gradsurgery import MTLOptimizer, compile_backward

METHODS = ("upgrad", "mgda", "pcgrad")
# LibMTL's hyperparameters, at its defaults.
LIBMTL = {
    "upgrad": ("UPGrad", {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
    "pcgrad": ("PCGrad", {}),
}
# Relative to the largest entry; beyond it a Gramian is wrong, not rounded.
GRAMIAN_TOLERANCE = 1e-2


class DeclinedError(Exception):
    """A contender can't take a problem; the message says why."""


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        take: takes it.
        engine: what ran, where that is for the contender to choose.
        shares: of successive steps in one price.
    """

    take: Callable[[], object]
    engine: Callable[[], str] = lambda: ""
    shares: tuple[float, ...] = (1.0,)


Make = Callable[[Problem, str], Step]


def plain(problem: Problem, method: str) -> Step:
    def step() -> None:
        problem.base.zero_grad()
        torch.stack(problem.losses()[1]).sum().backward()
        problem.base.step()

    return Step(step)


def plain_plus_heads(problem: Problem, method: str) -> Step:
    def step() -> None:
        problem.base.zero_grad()
        z, losses = problem.losses()
        for loss in losses:
            torch.autograd.grad(loss, z, retain_graph=True)
        torch.stack(losses).sum().backward()
        problem.base.step()

    return Step(step)


def floor(problem: Problem, method: str) -> Step:
    def step() -> None:
        problem.base.zero_grad()
        _, losses = problem.losses()
        for loss in losses:
            gradients = torch.autograd.grad(
                loss, problem.params, retain_graph=loss is not losses[-1], allow_unused=True
            )
            for p, g in zip(problem.params, gradients, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad.add_(g)
            # Else two sets of gradients are alive at once, and the floor is not the least that can be had.
            del gradients
        problem.base.step()

    return Step(step)


def ours(engine: str = "auto", *, last: bool = False, seldom: bool = False) -> Make:
    def make(problem: Problem, method: str) -> Step:
        opt = MTLOptimizer(
            problem.base,
            method,
            problem.shared,
            engine=engine,
            measure_on=problem.last if last else None,
            update_every=2 if seldom else 1,
        )

        def step() -> None:
            opt.zero_grad()
            opt.step(problem.losses()[1])

        return Step(step, lambda: opt.info.engine if opt.info else "", (0.1, 0.9) if seldom else (1.0,))

    return make


def compiled(problem: Problem, method: str) -> Step:
    opt = MTLOptimizer(problem.base, method, problem.shared)
    backward = compile_backward(opt, problem.net, losses, backend="inductor")

    def step() -> None:
        opt.zero_grad()
        backward(problem.x, problem.y)
        opt.step()

    return Step(step)


def torchjd(chunk: int | None) -> Make:
    def make(problem: Problem, method: str) -> Step:
        autojac, aggregation = _torchjd("autojac"), _torchjd("aggregation")
        names = {"upgrad": "UPGrad", "mgda": "MGDA", "pcgrad": "PCGrad"}
        aggregator = getattr(aggregation, names[method])()

        def step() -> None:
            problem.base.zero_grad()
            z, losses = problem.losses()
            autojac.mtl_backward(losses, z, parallel_chunk_size=chunk)
            autojac.jac_to_grad(problem.shared, aggregator)
            problem.base.step()

        return Step(step)

    return make


def autogram(problem: Problem, method: str) -> Step:
    names = {"upgrad": "UPGradWeighting", "mgda": "MGDAWeighting", "pcgrad": "PCGradWeighting"}
    weighting = getattr(_torchjd("aggregation"), names[method])()
    # A forward under the engine's hooks must lead to its Gramian.
    unhooked = copy.deepcopy(problem)
    engine = _torchjd("autogram").Engine(problem.net.trunk, batch_dim=None)
    expected = _gramian(unhooked)
    found = engine.compute_gramian(torch.stack(problem.losses()[1]))
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= GRAMIAN_TOLERANCE:
        raise DeclinedError(f"its Gramian is off by {off:.0%} of the largest entry")

    def step() -> None:
        problem.base.zero_grad()
        values = torch.stack(problem.losses()[1])
        values.backward(weighting(engine.compute_gramian(values)))
        problem.base.step()

    return Step(step)


def _gramian(problem: Problem) -> Tensor:
    """(T, T) of the shared parameters, by one pass a task."""
    rows = [torch.autograd.grad(loss, problem.shared, retain_graph=True) for loss in problem.losses()[1]]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return J @ J.T


def _torchjd(name: str) -> Any:
    return importlib.import_module(f"torchjd.{name}")


def libmtl(checkout: Path) -> Make:
    """LibMTL's weighting, from a checkout."""

    def make(problem: Problem, method: str) -> Step:
        if method not in LIBMTL:
            raise DeclinedError(f"LibMTL has no {method}")
        name, options = LIBMTL[method]
        host = _host(getattr(libmtl_module(checkout, f"weighting.{name}"), name), problem)

        def step() -> None:
            problem.base.zero_grad()
            host.backward(problem.losses()[1], **options)
            problem.base.step()

        return Step(step)

    return make


def _host(weighting: Any, problem: Problem) -> Any:
    """What a weighting expects of the model that it is mixed into."""

    class Host(weighting):
        def get_share_params(self) -> Any:
            return problem.net.trunk.parameters()

        def zero_grad_share_params(self) -> None:
            problem.net.trunk.zero_grad(set_to_none=False)

    host = Host()
    host.rep_grad, host.device = False, problem.x.device
    host.task_num, host.task_name = problem.tasks, [str(t) for t in range(problem.tasks)]
    host.init_param()
    return host


ENGINES = ("sequential", "batched", "gramian", "representation")
CONTENDERS: dict[str, Make] = {
    "plain": plain,
    "plain plus heads": plain_plus_heads,
    "floor": floor,
    **{engine: ours(engine) for engine in ENGINES},
    "auto": ours(),
    "last block": ours(last=True),
    "every 10": ours(seldom=True),
    "torchjd vmap": torchjd(None),
    "torchjd sequential": torchjd(1),
    "torchjd autogram": autogram,
}


def contenders(*, compile: bool = False, checkout: Path | None = None) -> dict[str, Make]:
    """All that are wanted, by name."""
    found = dict(CONTENDERS)
    if compile:
        found["compiled"] = compiled
    if checkout is not None:
        found["libmtl"] = libmtl(checkout)
    return found


def prepare(name: str, make: Make, problem: Problem, method: str) -> Step:
    """A step that has been taken twice, so that what is done once is done.

    Raises:
        DeclinedError: the contender refuses the problem, fails on it, or falls back to something else.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            step = make(problem, method)
            for _ in range(2):
                step.take()
    except DeclinedError:
        raise
    except Exception as error:
        raise DeclinedError(in_words(error)) from error
    if name in ENGINES and step.engine() != name:
        said = [in_words(entry.message) for entry in caught if "instead" in str(entry.message)]
        raise DeclinedError(said[0] if said else f"{step.engine()} ran instead")
    return step


def shared_gradient(problem: Problem) -> Tensor:
    """(d,) of what a step left in ``.grad``."""
    return nn.utils.parameters_to_vector([p.grad for p in problem.shared if p.grad is not None])
