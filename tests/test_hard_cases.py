"""What breaks wrappers in the field: frozen layers, foreign heads, autocast, half precision, hooks, failed solves."""

import copy
import pickle

import pytest
import torch
from models import Toy, batch, flat, jacobian, optimizer, trunk_gradient
from torch import Tensor, nn

from gradsurgery import MTLOptimizer, aggregate, functional


def test_autocast_does_not_reach_the_surgery() -> None:
    """Inside the caller's autocast, products of gradients would be rounded to half precision."""
    a = torch.randn(64, generator=torch.Generator().manual_seed(0))
    b = -a + 0.02 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(torch.ones(64))
    opt = MTLOptimizer(torch.optim.SGD([p], 0.0), "upgrad", [p])
    expected = aggregate(torch.stack([a, b]), "upgrad")
    with torch.autocast("cpu", torch.bfloat16):
        opt.backward([(p * a).sum(), (p * b).sum()])
        assert torch.equal(aggregate(torch.stack([a, b]), "upgrad"), expected)
    torch.testing.assert_close(p.grad, expected)


def test_half_precision_rows_are_rounded_once() -> None:
    a = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    b = (-a.float() + 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1))).bfloat16()
    J = torch.stack([a, b])
    exact = aggregate(J.double(), "upgrad")
    torch.testing.assert_close(aggregate(J, "upgrad").double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("form", ["scaled stack", "cat", "list of a vector", "picked"])
def test_entries_of_one_vector_cannot_be_told_apart(form: str) -> None:
    model, x = Toy(), batch()
    vector = torch.stack(model.losses(x)) * 1.0
    losses = {
        "scaled stack": vector,
        "cat": torch.cat([loss[None] for loss in model.losses(x)]),
        "list of a vector": list(vector),
        "picked": [vector[t] for t in range(3)],
    }[form]
    opt = optimizer(model, shared_params=None)
    with pytest.raises(ValueError, match="entries of one vector.*pass shared_params"):
        opt.backward(losses)
    opt.backward(model.losses(x))


def test_hooks_on_a_stacked_vector_are_honoured() -> None:
    model, x = Toy(), batch()
    plain = copy.deepcopy(model)
    losses = torch.stack(model.losses(x))
    losses.register_hook(lambda g: 10 * g)
    optimizer(model, "upgrad").backward(losses)
    optimizer(plain, "upgrad").backward([10 * loss for loss in plain.losses(x)])
    torch.testing.assert_close(trunk_gradient(model), trunk_gradient(plain))


def test_layers_unfrozen_later_are_shared() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "mgda", shared_params=None)
    model.trunk[0].requires_grad_(False)
    opt.backward(model.losses(x))
    model.trunk[0].requires_grad_(True)
    model.zero_grad()
    opt.backward(model.losses(x))
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "mgda"))


def test_a_head_of_another_optimizer_that_is_unfrozen_later_trains() -> None:
    model, x = Toy(), batch()
    opt = MTLOptimizer(torch.optim.SGD(model.trunk.parameters(), 0.1), "cagrad", model.trunk.parameters())
    model.heads[1].requires_grad_(False)
    opt.backward(model.losses(x))
    assert model.heads[1].weight.grad is None
    model.heads[1].requires_grad_(True)
    opt.backward(model.losses(x))
    assert model.heads[1].weight.grad is not None


def test_a_schedule_does_not_settle_on_a_failed_solve() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "nash_mtl", engine="sequential", update_every=10)
    assert opt.backward([loss * float("inf") for loss in model.losses(x)]).weights.isnan().all()
    info = opt.backward(model.losses(x))
    assert info.engine == "sequential"
    torch.testing.assert_close(info.weights[0], functional.nash_mtl(info.gramian[0]))
    assert opt.backward(model.losses(x)).engine == "weighted"


@pytest.mark.parametrize("name", ["cagrad", "ew"])
def test_everything_shared(name: str) -> None:
    p = nn.Linear(4, 2)
    opt = MTLOptimizer(torch.optim.SGD(p.parameters(), 0.1), name, p.parameters(), update_every=2, heads="unweighted")
    for _ in range(4):
        opt.step(list(p(torch.randn(5, 4)).square().mean(0)))
    assert opt.info.engine == "weighted"


def test_accumulate_with_heads_of_another_optimizer_that_come_late() -> None:
    model, x = Toy(tasks=2), batch()
    opt = MTLOptimizer(torch.optim.SGD(model.trunk.parameters(), 0.1), "upgrad", model.trunk.parameters())
    with opt.accumulate():
        opt.backward([model.losses(x)[0], None])
        opt.backward([None, model.losses(x)[1]])
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x), "upgrad"))
    for t, head in enumerate(model.heads):
        raw = torch.autograd.grad(model.losses(x)[t], list(head.parameters()))
        torch.testing.assert_close(flat([p.grad for p in head.parameters()]), flat(raw))


def test_accumulate_keeps_one_gradient_a_head() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model)
    with opt.accumulate():
        for _ in range(5):
            opt.backward(model.losses(x))
        assert [len(own) for own in opt._surgery._held[0]._own] == [2, 2, 2]


def test_accumulate_keeps_to_the_schedule() -> None:
    model, x = Toy(), batch(12)
    opt = optimizer(model, "nash_mtl", engine="sequential", update_every=2, heads="weighted")
    engines = []
    for _ in range(4):
        opt.zero_grad()
        with opt.accumulate():
            for piece in x.split(6):
                opt.backward([loss / 2 for loss in model.losses(piece)])
        engines.append(opt.info.engine)
        summed = sum(w * loss for w, loss in zip(opt.info.weights[0], model.losses(x), strict=True))
        expected = flat(torch.autograd.grad(summed, list(model.trunk.parameters())))
        torch.testing.assert_close(trunk_gradient(model), expected)
    assert engines == ["sequential", "weighted"] * 2


def test_a_gradient_that_the_user_reuses_while_rows_are_held() -> None:
    """A custom backward may hand out a buffer that it fills anew the next time."""
    buffer = torch.zeros(2)

    class Reuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p: Tensor, value: float) -> Tensor:  # pyright: ignore
            ctx.value = value
            return p.sum()

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
            return buffer.fill_(ctx.value), None

    trunk, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = MTLOptimizer(torch.optim.SGD([trunk, head], 0.1), "ew", [trunk], heads="unweighted")
    with opt.accumulate():
        for value in (1.0, 2.0):
            opt.backward([Reuse.apply(head, value) + trunk.sum(), trunk.sum()])
    assert head.grad.tolist() == [3.0, 3.0]


def test_sparse_and_dense_gradients_of_one_parameter() -> None:
    table, trunk = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2)
    base = torch.optim.SGD([*trunk.parameters(), *table.parameters()], 0.1)
    opt = MTLOptimizer(base, "ew", trunk.parameters(), heads="unweighted")
    with opt.accumulate():
        opt.backward([trunk(table(torch.tensor([1]))).sum(), trunk(table.weight).sum()])
    dense = torch.autograd.grad(trunk(table.weight).sum() + trunk(table.weight[1]).sum(), [table.weight])[0]
    torch.testing.assert_close(table.weight.grad.to_dense(), dense)


def test_a_model_cast_between_steps() -> None:
    model = Toy(dtype=torch.bfloat16)
    opt = optimizer(model, "upgrad")
    opt.backward(model.losses(batch(dtype=torch.bfloat16)))
    model.double()
    model.zero_grad()
    opt.backward(model.losses(batch()))
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, batch()), "upgrad"))


def test_info_is_nobody_elses_memory() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "nash_mtl", update_every=4)
    opt.backward(model.losses(x))
    weights = opt.backward(model.losses(x)).weights.clone()
    opt.info.weights.zero_()
    assert torch.equal(opt.backward(model.losses(x)).weights, weights)


def test_a_failed_backward_leaves_the_method_where_it_was() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "famo")
    losses = model.losses(x)
    opt.backward(losses)
    before = opt.state_dict()["param_groups"][0]["mtl"]
    with pytest.raises(RuntimeError, match="second time"):
        opt.backward(losses)
    assert opt.state_dict()["param_groups"][0]["mtl"] == before


def test_an_optimizer_in_backward_is_refused() -> None:
    model = Toy()
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="post-accumulate-grad hook"):
        optimizer(model).backward(model.losses(batch()))


@pytest.mark.parametrize("engine", ["sequential", "batched", "gramian", "auto"])
def test_hooks_of_an_ordinary_backward_see_that_of_combine_alone(engine: str) -> None:
    """DeepSpeed's ZeRO reduces gradients in them."""
    model, seen = Toy(), []
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    opt = optimizer(model, engine=engine)
    loss = opt.combine(model.losses(batch()))
    assert seen == []
    loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], model.trunk[0].weight.grad)


def test_parameters_that_were_replaced_in_the_base_optimizer_are_told_of() -> None:
    model = Toy()
    opt = optimizer(model)
    opt.base_opt.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(RuntimeError, match="no longer holds the shared parameters"):
        opt.combine(model.losses(batch()))


def test_parameters_that_deepspeed_divides_are_refused() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model)
    losses = model.losses(x)
    # As ZeRO stage 3 marks them.
    for p in model.parameters():
        p.ds_tensor = None
    for surgery in (opt.combine, opt.backward, opt.step):
        with pytest.raises(RuntimeError, match="ZeRO stage 3"):
            surgery(losses)
    assert all(p.grad is None for p in model.parameters())


def test_negative_losses_under_famo_stay_finite() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "famo")
    for _ in range(3):
        opt.backward([model.losses(x)[0] - 100, *model.losses(x)[1:]])
        assert opt.info.weights.isfinite().all()
        assert (opt.info.weights >= 0).all()


def test_head_weights_leave_out_blocks_that_no_loss_reaches() -> None:
    model, x = Toy(), batch()
    unused = nn.Parameter(torch.ones(3).double())
    shared = list(model.trunk.parameters())
    base = torch.optim.SGD([*model.parameters(), unused], 0.0)
    opt = MTLOptimizer(base, "nash_mtl", [*shared, unused], blocks=[shared, [unused]])
    opt.backward(model.losses(x))
    raw = torch.autograd.grad(model.losses(x)[0], [model.heads[0].weight])[0]
    torch.testing.assert_close(model.heads[0].weight.grad, opt.info.weights[0, 0] * raw)


@pytest.mark.parametrize("road", ["deepcopy", "pickle"])
def test_copies_keep_module_blocks_and_drop_held_rows(road: str) -> None:
    model, x = Toy(), batch()
    base = torch.optim.SGD(model.named_parameters(), 0.0)
    opt = MTLOptimizer(base, "upgrad", model.trunk.parameters(), blocks="module")
    with opt.accumulate():
        opt.backward(model.losses(x))
        twin, other = copy.deepcopy((model, opt)) if road == "deepcopy" else pickle.loads(pickle.dumps((model, opt)))
    other.step(twin.losses(x))
    assert other.info.weights.shape == (2, 3)


def test_aggregate_of_numbers_that_are_not_finite() -> None:
    for bad in (float("nan"), float("inf"), 1e30):
        for name in ("cagrad", "nash_mtl", "upgrad", "pcgrad"):
            assert aggregate(torch.tensor([[bad, 1.0], [1.0, 2.0]]), name).isnan().all()
