"""Engines where a first step proves nothing, where memory is shared, and where no check stands guard."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import MTLOptimizer

TASKS = 2
VMAPPED = ["batched", "gramian"]

# The trunk of weight W at a step -> what the heads see.
Trunk = Callable[[Tensor, Tensor, int], Tensor]
# That, the trunk's weight, a head's and parameters of nobody -> a task's loss.
Task = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def plain_trunk(x: Tensor, W: Tensor, step: int) -> Tensor:
    return (x @ W).tanh()


def plain_task(z: Tensor, W: Tensor, head: Tensor, extra: list[Tensor]) -> Tensor:
    return (z @ head).square().mean()


class Model:
    """Weights of a trunk, of heads, and of what stands beside them."""

    def __init__(self, trunk: Trunk = plain_trunk, task: Task = plain_task, n: Callable[[int], int] = lambda step: 5):
        torch.manual_seed(0)
        self.W = nn.Parameter(normal(4, 4))
        self.heads = [nn.Parameter(normal(4)) for _ in range(TASKS)]
        self.extra: list[Tensor] = [nn.Parameter(normal(4)) for _ in range(2)]
        self._trunk, self._task, self._n = trunk, task, n

    @property
    def own(self) -> list[Tensor]:
        return [*self.heads, *self.extra]

    def losses(self, step: int) -> list[Tensor]:
        torch.manual_seed(step)
        z = self._trunk(normal(self._n(step), 4), self.W, step)
        return [(t + 1) * self._task(z, self.W, head, self.extra) for t, head in enumerate(self.heads)]


def check_step(opt: MTLOptimizer, model: Model, step: int, **options: Any) -> None:
    """One backward with the weights that it found, beside a plain backward a task; heads weighted."""
    opt.zero_grad()
    info = opt.backward(model.losses(step), **options)
    params = [model.W, *model.own]
    J = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in model.losses(step)]
    assert info.weights is not None
    for n, p in enumerate(params):
        rows = torch.stack([torch.zeros_like(p) if row[n] is None else row[n] for row in J])
        got = torch.zeros_like(p) if p.grad is None else p.grad
        assert not got.requires_grad
        torch.testing.assert_close(got, torch.tensordot(info.weights[0], rows, dims=1))
        if p is model.W and info.engine != "representation":
            assert info.gramian is not None
            torch.testing.assert_close(info.gramian[0], rows.flatten(1) @ rows.flatten(1).T)


def check(model: Model, engine: str, steps: int, **options: Any) -> None:
    base = torch.optim.SGD([model.W, *model.own], 0.0)
    opt = MTLOptimizer(base, "mgda", [model.W], engine=engine, heads="weighted", **options)
    for step in range(steps):
        check_step(opt, model, step)


# cdist is an operator that vmap gets wrong.


def late(x: Tensor, W: Tensor, step: int) -> Tensor:
    z = plain_trunk(x, W, step)
    return z if step < 2 else z + torch.cdist(z, torch.eye(4, dtype=z.dtype))


def gated(x: Tensor, W: Tensor, step: int) -> Tensor:
    z = plain_trunk(x, W, step)
    return z + (0.0 if step == 0 else 0.7) * torch.cdist(z, torch.eye(4, dtype=z.dtype))


@pytest.mark.filterwarnings("ignore:engine=")
@pytest.mark.parametrize("engine", VMAPPED)
@pytest.mark.parametrize("trunk", [late, gated])
def test_an_operator_that_shows_after_the_first_step(trunk: Trunk, engine: str) -> None:
    check(Model(trunk), engine, steps=4)


def test_a_parameter_hook_that_comes_to_clip() -> None:
    model = Model(lambda x, W, step: plain_trunk(x, W, step) * (1 if step < 2 else 1000))
    model.W.register_hook(lambda g: g.clamp(-10, 10))
    check(model, "gramian", steps=3)


def test_a_complex_product_is_no_matter_for_a_rule() -> None:
    def trunk(x: Tensor, W: Tensor, step: int) -> Tensor:
        phase = torch.exp(1j * x.to(torch.complex128))
        return (phase @ W.to(torch.complex128)).abs()

    # The rule is cheaper in small batches only.
    check(Model(trunk, n=lambda step: 400 if step == 0 else 1), "gramian", steps=4)


def shared_sum(z: Tensor, W: Tensor, head: Tensor, extra: list[Tensor]) -> Tensor:
    return plain_task(z, W, head, extra) + (extra[0] + extra[1]).square().sum()


def total(z: Tensor, W: Tensor, head: Tensor, extra: list[Tensor]) -> Tensor:
    return plain_task(z, W, head, extra) + extra[0].sum()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", VMAPPED)
@pytest.mark.parametrize("task", [shared_sum, total])
def test_gradients_of_parameters_of_nobody_are_their_own(task: Task, engine: str) -> None:
    """Two that share memory would be weighted twice."""
    model = Model(task=task)
    check(model, engine, steps=2)
    grads = [p.grad for p in model.extra if p.grad is not None]
    assert len({g.data_ptr() for g in grads}) == len(grads)


def tied(z: Tensor, W: Tensor, head: Tensor, extra: list[Tensor]) -> Tensor:
    return (z @ (W * head)).square().mean()


def tied_and_hooked(z: Tensor, W: Tensor, head: Tensor, extra: list[Tensor]) -> Tensor:
    scaled = W * head
    scaled.register_hook(lambda g: 3 * g)
    return (z @ scaled).square().mean()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", [*VMAPPED, "representation"])
@pytest.mark.parametrize("task", [tied, tied_and_hooked])
def test_heads_that_scale_the_trunks_own_weight(task: Task, engine: str) -> None:
    """Their gradient is taken node by node, without a graph of its own, and after the user's hooks."""
    check(Model(task=task), engine, steps=3)


def test_representation_takes_sparse_gradients() -> None:
    torch.manual_seed(0)
    words, heads = nn.Embedding(5, 4, sparse=True).double(), [nn.Parameter(normal(4)) for _ in range(TASKS)]
    opt = MTLOptimizer(torch.optim.SGD([words.weight, *heads], 0.0), "mgda", [words.weight], engine="representation")

    def losses() -> list[Tensor]:
        return [(words(torch.tensor([t, t + 1])) @ head).square().mean() for t, head in enumerate(heads)]

    info = opt.backward(losses())
    rows = torch.stack([torch.autograd.grad(loss, words.weight)[0].to_dense() for loss in losses()])
    assert info.weights is not None
    torch.testing.assert_close(words.weight.grad, torch.tensordot(info.weights[0], rows, dims=1))


def resolving(model: Model) -> MTLOptimizer:
    base = torch.optim.SGD([model.W, *model.own], 0.01)
    return MTLOptimizer(
        base, "mgda", [model.W, model.extra[0]], engine="sequential", update_every=5, resolve_on_conflict=True
    )


def test_resolve_on_conflict_outlives_a_frozen_parameter() -> None:
    model = Model(task=total)
    opt = resolving(model)
    for step in range(4):
        opt.zero_grad()
        model.extra[0].requires_grad_(step != 1)
        opt.step(model.losses(step))


def test_rows_that_are_kept_keep_no_other_gradients() -> None:
    model = Model(task=total)
    opt = resolving(model)
    opt.step(model.losses(0))
    grads = [weakref.ref(p.grad) for p in (model.W, *model.heads)]
    opt.zero_grad()
    gc.collect()
    assert all(grad() is None for grad in grads)
