"""MTLOptimizer against everything that takes a torch optimizer: schedulers, hooks, AMP, compile, copies, trainers.

The measure is always plain torch: with `ew` the wrapper must train exactly as its base does on the summed loss, and
with every other method whatever stands between the wrapper and the base (scaler, trainer, copy) must change nothing.
Checkpoints are in test_state.py.
"""

import copy
import pickle
import warnings
from collections import Counter

import pytest
import torch
from models import TASKS, Net, own_random_state  # noqa: F401  (an autouse fixture)
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsurgery import MTLOptimizer, StepInfo

METHODS = ["ew", "pcgrad", "mgda", "cagrad", "nash_mtl", "upgrad", "famo"]
STATEFUL = {
    "nash_mtl": {"method": "nash_mtl", "update_every": 3},
    "famo": {"method": "famo"},
    "pcgrad": {"method": "pcgrad", "seed": 7},
}


def make_net(seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().to(dtype)


def losses_of(model, step):
    """Three positive losses on the batch of that number: {task: ()}."""
    generator = torch.Generator().manual_seed(1000 + step)
    weight = model.heads["a"].weight if hasattr(model, "heads") else next(model.parameters())
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(weight.dtype)
    y = {"a": x[:, 0], "b": -x[:, 0], "c": x[:, 1] - 0.5 * x[:, 0]}
    return {t: (out - y[t]).square().mean() + 0.1 for t, out in model(x).items()}


def sgd(model, **kwargs):
    return SGD(model.parameters(), lr=0.05, momentum=0.9, **kwargs)


def adamw(model, **kwargs):
    return AdamW(model.parameters(), lr=0.01, **kwargs)


def two_groups(model):
    return SGD([{"params": model.trunk.parameters(), "lr": 0.05}, {"params": model.heads.parameters()}], 0.02, 0.9)


def train(opt, model, steps, start=0):
    for i in range(start, start + steps):
        opt.zero_grad()
        opt.step(losses_of(model, i))


def train_plain(opt, model, steps, start=0):
    for i in range(start, start + steps):
        opt.zero_grad()
        sum(losses_of(model, i).values()).backward()
        opt.step()


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def assert_same(a, b):
    torch.testing.assert_close(values(a), values(b), rtol=0, atol=0)


def assert_near(a, b):
    """Equal up to the order of a few float64 sums."""
    torch.testing.assert_close(values(a), values(b), rtol=1e-9, atol=1e-12)


def plain_run(make_base, steps, **kwargs):
    model = make_net()
    base = make_base(model, **kwargs)
    train_plain(base, model, steps)
    return model, base


# What it is: an Optimizer that owns nothing of the base's


def test_it_is_an_optimizer():
    assert isinstance(MTLOptimizer(sgd(make_net()), "ew"), torch.optim.Optimizer)


def test_groups_state_and_defaults_are_the_base_optimizers_own():
    model = make_net()
    base = adamw(model)
    opt = MTLOptimizer(base, "ew")
    train(opt, model, 2)
    assert opt.param_groups is base.param_groups
    assert all(mine is its for mine, its in zip(opt.param_groups, base.param_groups, strict=True))
    assert opt.state is base.state
    assert opt.defaults is base.defaults


def test_groups_state_and_defaults_assigned_to_the_wrapper_reach_the_base():
    base = two_groups(make_net())
    opt = MTLOptimizer(base, "ew")
    groups, state, defaults = [dict(g) for g in base.param_groups], copy.copy(base.state), dict(base.defaults)
    opt.param_groups, opt.state, opt.defaults = groups, state, defaults
    assert base.param_groups is groups
    assert base.state is state
    assert base.defaults is defaults
    assert opt.param_groups is groups


def test_identity_with_the_base_survives_load_state_dict():
    model = make_net()
    base = adamw(model)
    opt = MTLOptimizer(base, "ew")
    train(opt, model, 1)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state


def test_repr_names_the_method_and_the_base():
    text = repr(MTLOptimizer(adamw(make_net()), "cagrad"))
    assert "MTLOptimizer" in text
    assert "cagrad" in text.lower()
    assert "AdamW" in text


def test_lbfgs_is_refused_at_construction():
    base = torch.optim.LBFGS(make_net().parameters())
    with pytest.raises((TypeError, ValueError), match=r"(?i)lbfgs|closure"):
        MTLOptimizer(base, "ew")


def test_a_base_that_is_no_optimizer_is_refused_at_construction():
    with pytest.raises((TypeError, ValueError), match=r"(?i)optimizer"):
        MTLOptimizer(make_net(), "ew")


def test_an_unknown_method_is_refused_with_the_close_names():
    with pytest.raises((KeyError, ValueError), match="cagrad"):
        MTLOptimizer(sgd(make_net()), "cagrid")


def test_an_unknown_hyperparameter_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        MTLOptimizer(sgd(make_net()), "cagrad", no_such_option=1)


# Attributes: public ones of the base are reachable, private ones and GradScaler's never


class ScheduleFreeLike(SGD):
    """A base with public methods of its own, as schedule-free optimizers have."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.mode, self.calls, self.warmup_steps = "train", [], 3
        self._secret = 1

    def train(self):
        self.mode = "train"
        return self

    def eval(self):
        self.mode = "eval"
        return self

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1]["stamped"] = True

    def zero_grad(self, set_to_none=True):
        self.calls.append(set_to_none)
        super().zero_grad(set_to_none=set_to_none)


def test_public_methods_of_the_base_run_on_the_base():
    base = ScheduleFreeLike(make_net().parameters())
    opt = MTLOptimizer(base, "ew")
    opt.eval()
    assert base.mode == "eval"
    opt.train()
    assert base.mode == "train"
    assert opt.warmup_steps == 3


def test_private_names_of_the_base_raise_attribute_error():
    base = ScheduleFreeLike(make_net().parameters())
    opt = MTLOptimizer(base, "ew")
    with pytest.raises(AttributeError, match="_secret"):
        _ = opt._secret


def test_an_unknown_name_raises_attribute_error_naming_it():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = MTLOptimizer(sgd(make_net()), "ew").no_such_name


def test_an_object_not_yet_initialised_raises_attribute_error_not_recursion():
    bare = MTLOptimizer.__new__(MTLOptimizer)
    assert not hasattr(bare, "anything")
    assert not hasattr(bare, "_anything")


def test_amp_support_of_a_fused_base_does_not_leak():
    base = adamw(make_net(), fused=True)
    assert base._step_supports_amp_scaling, "torch no longer marks fused optimizers: this test has lost its object"
    assert not getattr(MTLOptimizer(base, "ew"), "_step_supports_amp_scaling", False)


def test_grad_scale_and_found_inf_of_the_base_do_not_leak():
    base = adamw(make_net(), fused=True)
    base.grad_scale, base.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt = MTLOptimizer(base, "ew")
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


# Groups and gradients


def test_add_param_group_reaches_the_base_and_is_trained():
    model, reference = make_net(), make_net()
    extra, extra_reference = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    base, plain = sgd(model), sgd(reference)
    opt = MTLOptimizer(base, "ew")
    train(opt, model, 2)
    train_plain(plain, reference, 2)
    opt.add_param_group({"params": [extra], "lr": 0.5})
    plain.add_param_group({"params": [extra_reference], "lr": 0.5})
    assert len(base.param_groups) == 2
    assert base.param_groups[1]["params"][0] is extra
    for i in range(2, 5):
        opt.zero_grad()
        opt.step({t: loss * extra for t, loss in losses_of(model, i).items()})
        plain.zero_grad()
        sum(loss * extra_reference for loss in losses_of(reference, i).values()).backward()
        plain.step()
    assert extra.item() != 1.0
    torch.testing.assert_close(extra.data, extra_reference.data, rtol=1e-9, atol=1e-12)
    assert_near(model, reference)


def test_an_overriding_add_param_group_of_the_base_is_honoured():
    base = ScheduleFreeLike(make_net().parameters())
    MTLOptimizer(base, "ew").add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert base.param_groups[1]["stamped"]


def test_zero_grad_sets_to_none_by_default():
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    train(opt, model, 1)
    assert all(p.grad is not None for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_zero_grad_without_set_to_none_leaves_zeros():
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    train(opt, model, 1)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_overriding_zero_grad_of_the_base_is_honoured():
    base = ScheduleFreeLike(make_net().parameters())
    opt = MTLOptimizer(base, "ew")
    opt.zero_grad()
    opt.zero_grad(set_to_none=False)
    assert base.calls == [True, False]


def test_backward_fills_the_gradients_and_leaves_the_parameters():
    model, reference = make_net(), make_net()
    before = values(model)
    MTLOptimizer(sgd(model), "ew").backward(losses_of(model, 0))
    sum(losses_of(reference, 0).values()).backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-9, atol=1e-12)
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_backward_accumulates_into_grad(method):
    model = make_net()
    opt = MTLOptimizer(sgd(model), method, seed=0)
    opt.backward(losses_of(model, 0))
    first = gradients(model)
    twin_model, twin = copy.deepcopy((model, opt))
    twin.zero_grad()
    twin.backward(losses_of(twin_model, 1))
    opt.backward(losses_of(model, 1))
    torch.testing.assert_close(gradients(model), first + gradients(twin_model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_step_with_losses_is_backward_then_step(method):
    one, two = make_net(), make_net()
    whole, split = MTLOptimizer(sgd(one), method, seed=0), MTLOptimizer(sgd(two), method, seed=0)
    train(whole, one, 4)
    for i in range(4):
        split.zero_grad()
        split.backward(losses_of(two, i))
        split.step()
    assert_same(one, two)


def test_clip_grad_norm_works_between_backward_and_step():
    model, reference = make_net(), make_net()
    opt, plain = MTLOptimizer(sgd(model), "ew"), sgd(reference)
    for i in range(4):
        opt.zero_grad()
        opt.backward(losses_of(model, i))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert norm > 0.3, "nothing to clip: the test has lost its object"
        opt.step()
        plain.zero_grad()
        sum(losses_of(reference, i).values()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        plain.step()
    torch.testing.assert_close(gradients(model).norm().item(), 0.3, rtol=1e-5, atol=0)
    assert_near(model, reference)


def test_parameters_without_requires_grad_are_left_alone():
    model, reference = make_net(), make_net()
    for net in (model, reference):
        net.trunk[0].weight.requires_grad_(False)
    opt, plain = MTLOptimizer(adamw(model), "ew"), adamw(reference)
    train(opt, model, 3)
    train_plain(plain, reference, 3)
    assert model.trunk[0].weight.grad is None
    assert_near(model, reference)


# ew is plain training


BASES = {
    "sgd_momentum": lambda m: sgd(m, nesterov=True, weight_decay=0.01),
    "sgd_foreach": lambda m: sgd(m, foreach=True),
    "sgd_fused": lambda m: sgd(m, fused=True),
    "adamw_single_tensor": lambda m: adamw(m, foreach=False),
    "adamw_foreach": lambda m: adamw(m, foreach=True),
    "adamw_fused": lambda m: adamw(m, fused=True),
    "adamw_amsgrad": lambda m: adamw(m, amsgrad=True),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
    "two_groups": two_groups,
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_ew_trains_as_the_base_does_on_the_summed_loss(name, heads):
    reference, _ = plain_run(BASES[name], 8)
    model = make_net()
    train(MTLOptimizer(BASES[name](model), "ew", heads=heads), model, 8)
    assert_near(model, reference)


def test_ew_trains_as_the_base_does_in_float32():
    model, reference = make_net(dtype=torch.float32), make_net(dtype=torch.float32)
    train(MTLOptimizer(sgd(model), "ew"), model, 6)
    train_plain(sgd(reference), reference, 6)
    torch.testing.assert_close(values(model), values(reference), rtol=1e-6, atol=1e-6)


# The forms of step


FORMS = {
    "mapping": lambda losses: losses,
    "list": lambda losses: list(losses.values()),
    "tuple": lambda losses: tuple(losses.values()),
    "tensor": lambda losses: torch.stack(list(losses.values())),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_closures_returning_them_do_surgery_in_every_form(form, closure):
    reference = make_net()
    train(MTLOptimizer(sgd(reference), "nash_mtl", reference.trunk.parameters()), reference, 3)
    model = make_net()
    opt = MTLOptimizer(sgd(model), "nash_mtl", model.trunk.parameters())
    calls = Counter()
    for i in range(3):
        opt.zero_grad()

        def give(i=i):
            calls["give"] += 1
            return FORMS[form](losses_of(model, i))

        opt.step(give if closure else give())
    assert calls["give"] == 3
    assert_near(model, reference)


@pytest.mark.parametrize("form", FORMS)
def test_shared_params_are_found_in_every_form_or_asked_for(form):
    """Each entry of a stacked tensor reaches every head, with gradient zero: the search must not be misled by it."""
    reference = make_net()
    train(MTLOptimizer(sgd(reference), "nash_mtl", reference.trunk.parameters()), reference, 3)
    model = make_net()
    opt = MTLOptimizer(sgd(model), "nash_mtl")
    for i in range(3):
        opt.zero_grad()
        try:
            opt.step(FORMS[form](losses_of(model, i)))
        except ValueError as error:
            assert form == "tensor" and "shared_params" in str(error), error
            return
    assert_near(model, reference)


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("returned", ["none", "float", "scalar tensor"])
def test_an_ordinary_closure_trains_as_on_the_base(returned, as_keyword):
    model, reference = make_net(), make_net()
    opt, plain = MTLOptimizer(sgd(model), "nash_mtl"), sgd(reference)
    state = copy.deepcopy(opt.state_dict()["param_groups"][0]["mtl"])
    calls = Counter()

    def closure(optimizer, net, i):
        def run():
            calls[net] += 1
            optimizer.zero_grad()
            total = sum(losses_of(net, i).values())
            total.backward()
            return {"none": None, "float": total.item(), "scalar tensor": total.detach()}[returned]

        return run

    for i in range(4):
        mine = closure(opt, model, i)
        got = opt.step(closure=mine) if as_keyword else opt.step(mine)
        expected = plain.step(closure(plain, reference, i))
        assert got is None if returned == "none" else float(got) == float(expected)
    assert calls[model] == 4
    assert_same(model, reference)
    assert opt.state_dict()["param_groups"][0]["mtl"] == state


def test_a_closure_runs_with_gradients_enabled_even_under_no_grad():
    model, reference = make_net(), make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    with torch.no_grad():
        opt.step(lambda: losses_of(model, 0))
    train_plain(sgd(reference), reference, 1)
    assert_near(model, reference)


@pytest.mark.parametrize("call", [lambda o: o.step(), lambda o: o.step(None), lambda o: o.step(closure=None)])
def test_step_without_losses_is_the_base_step(call):
    model, reference = make_net(), make_net()
    opt, plain = MTLOptimizer(sgd(model), "cagrad"), sgd(reference)
    for i in range(3):
        for optimizer, net in ((opt, model), (plain, reference)):
            optimizer.zero_grad()
            sum(losses_of(net, i).values()).backward()
        call(opt)
        plain.step()
    assert_same(model, reference)


# StepInfo and randomness


@pytest.mark.parametrize("blocks, count", [("model", 1), ("tensor", 4)])
def test_info_holds_what_was_measured_on_the_shared_parameters(blocks, count):
    model = make_net()
    opt = MTLOptimizer(sgd(model), "mgda", shared_params=model.trunk.parameters(), blocks=blocks)
    losses = losses_of(model, 0)
    shared = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
    if blocks == "model":
        jacobians = [torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])]
    else:
        jacobians = [torch.stack([row[k].flatten() for row in rows]) for k in range(len(shared))]
    gramian = torch.stack([j @ j.T for j in jacobians])
    returned = opt.backward(losses)
    info = opt.info
    assert isinstance(info, StepInfo)
    assert info is returned
    assert info.weights.shape == (count, 3)
    assert info.gramian.shape == (count, 3, 3)
    assert info.losses.shape == (3,)
    assert isinstance(info.engine, str)
    torch.testing.assert_close(info.gramian.to(gramian.dtype), gramian, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(info.losses.double(), torch.stack(list(losses.values())).detach(), rtol=0, atol=0)
    norms = gramian.diagonal(dim1=1, dim2=2).sqrt()
    cosines = gramian / (norms[:, :, None] * norms[:, None, :])
    torch.testing.assert_close(info.cosines.to(gramian.dtype), cosines, rtol=1e-7, atol=1e-9)
    assert hasattr(info, "conflicts")
    assert hasattr(info, "residual")
    assert not any(t.requires_grad for t in (info.weights, info.gramian, info.losses))


@pytest.mark.parametrize("blocks", ["model", "tensor"])
def test_the_gradient_of_the_shared_parameters_is_the_weighted_sum_of_the_rows(blocks):
    model = make_net()
    opt = MTLOptimizer(sgd(model), "nash_mtl", shared_params=model.trunk.parameters(), blocks=blocks)
    losses = losses_of(model, 0)
    shared = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
    weights = opt.backward(losses).weights.double()
    assert not torch.allclose(weights, torch.ones_like(weights)), "equal weights: the test has lost its object"
    for k, p in enumerate(shared):
        w = weights[k if blocks == "tensor" else 0]
        expected = sum(w[t] * rows[t][k] for t in range(3))
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9)


def test_shared_params_left_out_are_those_that_several_losses_reach():
    found, given = make_net(), make_net()
    train(MTLOptimizer(sgd(found), "cagrad"), found, 3)
    train(MTLOptimizer(sgd(given), "cagrad", shared_params=given.trunk.parameters()), given, 3)
    assert_same(found, given)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [None, 3])
def test_global_random_state_is_neither_used_nor_moved(method, seed):
    model = make_net()
    before = torch.get_rng_state()
    train(MTLOptimizer(sgd(model), method, seed=seed), model, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [5, 2**64 - 3])
def test_no_seed_means_torchs_initial_seed(seed):
    torch.manual_seed(seed)
    assert torch.initial_seed() == seed
    implicit, explicit = make_net(), make_net()
    first = MTLOptimizer(sgd(implicit), "pcgrad")
    torch.rand(7)
    train(first, implicit, 6)
    train(MTLOptimizer(sgd(explicit), "pcgrad", seed=seed), explicit, 6)
    assert_same(implicit, explicit)


def test_seeds_matter_to_pcgrad():
    runs = []
    for seed in range(4):
        model = make_net()
        train(MTLOptimizer(sgd(model), "pcgrad", seed=seed), model, 6)
        runs.append(values(model))
    assert any(not torch.equal(runs[0], run) for run in runs[1:])


# Learning-rate schedulers, weight averaging


def _sequential(opt):
    parts = [lr_scheduler.ConstantLR(opt, 0.5, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


def _chained(opt):
    parts = [lr_scheduler.ConstantLR(opt, 0.5, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=opt)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 1 / (e + 1)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": _sequential,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=True),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def scheduled(opt, base, model, scheduler, once, steps=7):
    """Train under a scheduler; what the base's own groups held at every step."""
    history = []
    for i in range(steps):
        once(opt, model, 1, i)
        scheduler.step(*([float(i)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        history.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in base.param_groups])
        assert scheduler.get_last_lr() == [g["lr"] for g in base.param_groups]
    return history


@pytest.mark.parametrize("name", sorted({*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}))
def test_every_scheduler_of_torch_drives_the_wrapper_as_it_drives_the_base(name):
    assert name in SCHEDULERS, f"torch has a scheduler that this table lacks: {name}"
    reference = make_net()
    plain = two_groups(reference)
    expected = scheduled(plain, plain, reference, SCHEDULERS[name](plain), train_plain)
    model = make_net()
    base = two_groups(model)
    groups = list(base.param_groups)
    opt = MTLOptimizer(base, "ew")
    got = scheduled(opt, base, model, SCHEDULERS[name](opt), train)
    assert all(now is then for now, then in zip(base.param_groups, groups, strict=True))
    assert len({row[0][0] for row in expected}) > 1, "the learning rate never moved: the test has lost its object"
    if name in CYCLES_MOMENTUM:
        assert len({row[0][1] for row in expected}) > 1
    assert got == expected
    assert_near(model, reference)


@pytest.mark.parametrize("name", sorted(CYCLES_MOMENTUM))
def test_momentum_cycling_reaches_the_betas_of_adam(name):
    def run(wrap, once):
        model = make_net()
        base = adamw(model)
        opt = wrap(base)
        return scheduled(opt, base, model, SCHEDULERS[name](opt), once), model

    expected, reference = run(lambda base: base, train_plain)
    got, model = run(lambda base: MTLOptimizer(base, "ew"), train)
    assert len({row[0][2] for row in expected}) > 1
    assert got == expected
    assert_near(model, reference)


def test_a_scheduler_made_on_the_base_before_wrapping_keeps_working():
    reference = make_net()
    plain = two_groups(reference)
    expected = scheduled(plain, plain, reference, lr_scheduler.StepLR(plain, 2, 0.5), train_plain)
    model = make_net()
    base = two_groups(model)
    scheduler = lr_scheduler.StepLR(base, 2, 0.5)
    opt = MTLOptimizer(base, "ew")
    assert scheduled(opt, base, model, scheduler, train) == expected
    assert_near(model, reference)


def test_a_scheduler_resumes_from_its_own_state():
    model = make_net()
    opt = MTLOptimizer(two_groups(model), "ew")
    scheduler = lr_scheduler.CosineAnnealingLR(opt, 9)
    scheduled(opt, opt, model, scheduler, train, 4)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), scheduler.state_dict()))
    scheduled(opt, opt, model, scheduler, train, 4)
    twin = make_net(1)
    twin_opt = MTLOptimizer(two_groups(twin), "ew")
    twin_scheduler = lr_scheduler.CosineAnnealingLR(twin_opt, 9)
    for part, state in zip((twin, twin_opt, twin_scheduler), saved, strict=True):
        part.load_state_dict(state)
    scheduled(twin_opt, twin_opt, twin, twin_scheduler, train, 4)
    assert_same(model, twin)


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_weight_averaging_with_swalr_is_that_of_plain_training(average):
    def run(wrap, once):
        model = make_net()
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        opt = wrap(sgd(model))
        scheduler = swa_utils.SWALR(opt, 0.01, anneal_epochs=3)
        for i in range(5):
            once(opt, model, 1, i)
            averaged.update_parameters(model)
            scheduler.step()
        return averaged.module, model

    reference, _ = run(lambda base: base, train_plain)
    averaged, last = run(lambda base: MTLOptimizer(base, "ew"), train)
    assert not torch.equal(values(averaged), values(last))
    assert_near(averaged, reference)


# Hooks


STEPS = {
    "losses": lambda opt, model: opt.step(losses_of(model, 0)),
    "none": lambda opt, model: (opt.backward(losses_of(model, 0)), opt.step()),
    "closure of losses": lambda opt, model: opt.step(lambda: losses_of(model, 0)),
    "ordinary closure": lambda opt, model: opt.step(lambda: sum(losses_of(model, 0).values()).backward()),
}


@pytest.mark.parametrize("form", STEPS)
def test_step_hooks_fire_once_with_the_wrapper_around_the_base_step(form):
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    before, seen = values(model), []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, values(model))))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, values(model))))
    STEPS[form](opt, model)
    assert [name for name, _, _ in seen] == ["pre", "post"]
    assert all(o is opt for _, o, _ in seen)
    assert torch.equal(seen[0][2], before)
    assert not torch.equal(seen[1][2], before)


def test_the_step_pre_hook_sees_the_gradients_that_surgery_wrote():
    model, reference = make_net(), make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    opt.register_step_pre_hook(lambda o, args, kwargs: nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None)
    train(opt, model, 2)
    plain = sgd(reference)
    for i in range(2):
        plain.zero_grad()
        sum(losses_of(reference, i).values()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        plain.step()
    assert_near(model, reference)


def test_a_removed_step_hook_no_longer_fires():
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    count = Counter()
    handles = [
        opt.register_step_pre_hook(lambda *_: count.update(["pre"])),
        opt.register_step_post_hook(lambda *_: count.update(["post"])),
    ]
    train(opt, model, 1)
    for handle in handles:
        handle.remove()
    train(opt, model, 1)
    assert count == {"pre": 1, "post": 1}


@pytest.mark.parametrize("form", STEPS)
def test_step_hooks_of_the_base_fire_once_with_the_base(form):
    model = make_net()
    base = sgd(model)
    seen = []
    base.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o)))
    opt = MTLOptimizer(base, "ew")
    base.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o)))
    STEPS[form](opt, model)
    assert [name for name, _ in seen] == ["pre", "post"]
    assert all(o is base for _, o in seen)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("form", STEPS)
def test_global_step_hooks_fire_once(form, copied):
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    if copied:
        model, opt = copy.deepcopy((model, opt))
    count = Counter()
    handles = [
        register_optimizer_step_pre_hook(lambda *_: count.update(["pre"])),
        register_optimizer_step_post_hook(lambda *_: count.update(["post"])),
    ]
    try:
        STEPS[form](opt, model)
    finally:
        for handle in handles:
            handle.remove()
    assert count == {"pre": 1, "post": 1}


def test_the_four_state_dict_hooks_fire_once_with_the_wrapper():
    opt = MTLOptimizer(sgd(make_net()), "ew")
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append(("state_dict_pre", o)))
    opt.register_state_dict_post_hook(lambda o, state: seen.append(("state_dict_post", o)))
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append(("load_pre", o)))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("load_post", o)))
    opt.load_state_dict(opt.state_dict())
    assert [name for name, _ in seen] == ["state_dict_pre", "state_dict_post", "load_pre", "load_post"]
    assert all(o is opt for _, o in seen)


def test_the_four_state_dict_hooks_of_the_base_fire_once_with_the_base():
    base = sgd(make_net())
    opt = MTLOptimizer(base, "ew")
    seen = []
    base.register_state_dict_pre_hook(lambda o: seen.append(("state_dict_pre", o)))
    base.register_state_dict_post_hook(lambda o, state: seen.append(("state_dict_post", o)))
    base.register_load_state_dict_pre_hook(lambda o, state: seen.append(("load_pre", o)))
    base.register_load_state_dict_post_hook(lambda o: seen.append(("load_post", o)))
    opt.load_state_dict(opt.state_dict())
    assert [name for name, _ in seen] == ["state_dict_pre", "state_dict_post", "load_pre", "load_post"]
    assert all(o is base for _, o in seen)


def test_state_dict_post_hook_sees_the_whole_state_and_may_replace_it():
    opt = MTLOptimizer(sgd(make_net()), "ew")
    opt.register_state_dict_post_hook(lambda o, state: {**state, "leaf": state["param_groups"][0]["mtl"]})
    state = opt.state_dict()
    assert state["leaf"] == state["param_groups"][0]["mtl"]


def test_load_state_dict_pre_hook_may_replace_what_is_loaded():
    opt = MTLOptimizer(sgd(make_net()), "ew")

    def set_rate(o, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.123
        return state

    opt.register_load_state_dict_pre_hook(set_rate)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr"] == 0.123


def test_state_dict_hooks_honour_prepend():
    opt = MTLOptimizer(sgd(make_net()), "ew")
    seen = []
    for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        register = getattr(opt, f"register_{name}_hook")
        register(lambda *_, name=name: seen.append((name, "second")))
        register(lambda *_, name=name: seen.append((name, "first")), prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert [when for _, when in seen] == ["first", "second"] * 4


# Copies


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


CLONES = {"deepcopy": copy.deepcopy, "pickle": through_pickle}


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_trains_on_as_the_original_and_apart_from_it(clone, setting, steps):
    model = make_net()
    opt = MTLOptimizer(adamw(model), **STATEFUL[setting])
    train(opt, model, steps)
    before = values(model)
    twin, twin_opt = CLONES[clone]((model, opt))
    train(twin_opt, twin, 5, steps)
    assert torch.equal(values(model), before), "training the copy moved the original"
    train(opt, model, 5, steps)
    assert not torch.equal(values(model), before)
    assert_same(model, twin)
    assert twin_opt.param_groups[0]["params"][0] is next(twin.parameters())


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("setting", STATEFUL)
def test_a_copy_made_while_a_scheduler_is_attached_trains_on_alone(clone, setting):
    model = make_net()
    opt = MTLOptimizer(sgd(model), **STATEFUL[setting])
    scheduled(opt, opt, model, lr_scheduler.StepLR(opt, 2, 0.5), train, 4)
    before = values(model)
    twin, twin_opt = CLONES[clone]((model, opt))
    train(twin_opt, twin, 4, 4)
    assert torch.equal(values(model), before), "training the copy moved the original"
    train(opt, model, 4, 4)
    assert_same(model, twin)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("setting", STATEFUL)
def test_a_copy_made_together_with_its_scheduler_trains_on(clone, setting):
    model = make_net()
    opt = MTLOptimizer(sgd(model), **STATEFUL[setting])
    scheduler = lr_scheduler.StepLR(opt, 2, 0.5)
    scheduled(opt, opt, model, scheduler, train, 3)
    twin, twin_opt, twin_scheduler = CLONES[clone]((model, opt, scheduler))
    got = scheduled(twin_opt, twin_opt, twin, twin_scheduler, train, 4)
    assert got == scheduled(opt, opt, model, scheduler, train, 4)
    assert_same(model, twin)


def test_copying_and_loading_do_not_poison_the_class():
    step = MTLOptimizer.__dict__["step"]
    model = make_net()
    opt = MTLOptimizer(sgd(model), "ew")
    copy.deepcopy(opt)
    through_pickle(opt)
    opt.load_state_dict(opt.state_dict())
    opt.zero_grad()
    assert MTLOptimizer.__dict__["step"] is step
    for instance in (opt, MTLOptimizer(sgd(model), "ew")):
        count = Counter()
        instance.register_step_pre_hook(lambda *_, count=count: count.update(["pre"]))
        train(instance, model, 1)
        assert count == {"pre": 1}


# GradScaler


def scaled_step(opt, losses, scaler, between=lambda: None):
    opt.zero_grad()
    opt.backward(losses, scaler=scaler)
    between()
    scaler.step(opt)
    scaler.update()


def make_scaler(scale=1024.0, **kwargs):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6, **kwargs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_under_grad_scaler_the_base_sees_unscaled_gradients(method, fused):
    model, reference = make_net(), make_net()
    base, plain = adamw(model, fused=fused), adamw(reference, fused=fused)
    opt, unscaled = MTLOptimizer(base, method, seed=0), MTLOptimizer(plain, method, seed=0)
    scaler = make_scaler()
    for i in range(4):
        scaled_step(opt, losses_of(model, i), scaler)
        train(unscaled, reference, 1, i)
        torch.testing.assert_close(opt.info.weights, unscaled.info.weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(opt.info.losses, unscaled.info.losses, rtol=1e-6, atol=1e-9)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(base.state[p]["exp_avg"], plain.state[q]["exp_avg"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(base.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(values(model), values(reference), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_backward_with_a_scaler_leaves_scaled_gradients(method):
    model, reference = make_net(), make_net()
    scaler = make_scaler()
    MTLOptimizer(sgd(model), method, seed=0).backward(losses_of(model, 0), scaler=scaler)
    MTLOptimizer(sgd(reference), method, seed=0).backward(losses_of(reference, 0))
    torch.testing.assert_close(gradients(model), 1024 * gradients(reference), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_unscale_and_clip_between_backward_and_scaler_step(fused):
    model, reference = make_net(), make_net()
    opt = MTLOptimizer(adamw(model, fused=fused), "nash_mtl")
    unscaled = MTLOptimizer(adamw(reference, fused=fused), "nash_mtl")
    scaler = make_scaler()

    def clip():
        scaler.unscale_(opt)
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05

    for i in range(3):
        scaled_step(opt, losses_of(model, i), scaler, clip)
        unscaled.zero_grad()
        unscaled.backward(losses_of(reference, i))
        nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        unscaled.step()
    torch.testing.assert_close(values(model), values(reference), rtol=1e-6, atol=1e-9)


def test_a_disabled_scaler_changes_nothing():
    model, reference = make_net(), make_net()
    opt, scaler = MTLOptimizer(sgd(model), "nash_mtl"), make_scaler(enabled=False)
    for i in range(3):
        scaled_step(opt, losses_of(model, i), scaler)
    train(MTLOptimizer(sgd(reference), "nash_mtl"), reference, 3)
    assert_same(model, reference)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused, bad", [(False, float("inf")), (True, float("nan"))])
def test_a_step_with_non_finite_gradients_is_skipped_and_poisons_nothing(method, fused, bad):
    model = make_net()
    base = adamw(model, fused=fused)
    opt = MTLOptimizer(base, method, seed=0)
    scaler = make_scaler()
    for i in range(2):
        scaled_step(opt, losses_of(model, i), scaler)
    before, moments = values(model), copy.deepcopy(base.state_dict()["state"])
    broken = losses_of(model, 2)
    scaled_step(opt, {**broken, "b": broken["b"] * bad}, scaler)
    assert torch.equal(values(model), before)
    assert scaler.get_scale() == 512.0
    for k, state in base.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(state[n]), torch.as_tensor(moments[k][n])) for n in state)
    for i in range(3, 5):
        scaled_step(opt, losses_of(model, i), scaler)
        assert torch.isfinite(opt.info.weights).all()
    assert scaler.get_scale() == 512.0
    assert torch.isfinite(values(model)).all()
    assert not torch.equal(values(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_too_large_backs_off_until_training_goes_on(method):
    model = make_net(dtype=torch.float32)
    opt = MTLOptimizer(adamw(model), method, seed=0)
    scaler = make_scaler(2.0**127, backoff_factor=2.0**-16)
    before = values(model)
    scaled_step(opt, {t: 64 * loss for t, loss in losses_of(model, 0).items()}, scaler)
    assert torch.equal(values(model), before), "the scale overflowed nothing: the test has lost its object"
    for i in range(1, 9):
        scaled_step(opt, {t: 64 * loss for t, loss in losses_of(model, i).items()}, scaler)
    assert torch.isfinite(opt.info.weights).all()
    assert torch.isfinite(values(model)).all()
    assert not torch.equal(values(model), before)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_leaves_no_attributes_behind(fused):
    model = make_net()
    base = adamw(model, fused=fused)
    opt = MTLOptimizer(base, "ew")
    scaled_step(opt, losses_of(model, 0), make_scaler())
    for optimizer in (opt, base):
        assert getattr(optimizer, "grad_scale", None) is None
        assert getattr(optimizer, "found_inf", None) is None


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compile_test = pytest.mark.filterwarnings(
    # Dynamo itself asks every non-leaf tensor that crosses a graph break for .grad; plain torch does it too.
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)


@compile_test
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("method, split", [("ew", False), ("nash_mtl", False), ("cagrad", True)])
def test_a_compiled_training_step_gives_the_same_numbers(method, split):
    model, reference = make_net(), make_net()
    opt = MTLOptimizer(sgd(model), method, shared_params=model.trunk.parameters())

    def step(x, y):
        opt.zero_grad()
        losses = {t: (out - y[t]).square().mean() for t, out in model(x).items()}
        if split:
            opt.backward(losses)
            opt.step()
        else:
            opt.step(losses)

    compiled = torch.compile(step, backend="eager")
    plain = MTLOptimizer(sgd(reference), method, shared_params=reference.trunk.parameters())
    for i in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        y = {"a": x[:, 0], "b": -x[:, 0], "c": x[:, 1]}
        compiled(x, y)
        plain.zero_grad()
        plain.step({t: (out - y[t]).square().mean() for t, out in reference(x).items()})
    assert_near(model, reference)
    torch.testing.assert_close(opt.info.weights, plain.info.weights, rtol=1e-9, atol=1e-12)


@compile_test
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_step_without_losses_is_the_base_step():
    model, reference = make_net(), make_net()
    opt, plain = MTLOptimizer(sgd(model), "mgda"), MTLOptimizer(sgd(reference), "mgda")
    compiled = torch.compile(lambda: opt.step(), backend="eager")
    for i in range(3):
        opt.zero_grad()
        opt.backward(losses_of(model, i))
        compiled()
        plain.zero_grad()
        plain.step(losses_of(reference, i))
    assert_near(model, reference)


# Accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("road", ["closure", "backward"])
def test_accelerate_prepares_and_steps_the_wrapper(accelerator, setting, road):
    reference = make_net()
    train(MTLOptimizer(adamw(reference), **STATEFUL[setting]), reference, 5)
    net = make_net()
    opt = MTLOptimizer(adamw(net), **STATEFUL[setting])
    model, prepared = accelerator.prepare(net, opt)
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert prepared.optimizer is opt
    for i in range(5):
        prepared.zero_grad()
        if road == "closure":
            prepared.step(lambda i=i: losses_of(model, i))
        else:
            opt.backward(losses_of(model, i))
            prepared.step()
    assert_same(net, reference)


def test_accelerate_drives_a_scheduler_on_the_wrapper(accelerator):
    reference = make_net()
    plain = sgd(reference)
    expected = scheduled(plain, plain, reference, lr_scheduler.StepLR(plain, 2, 0.5), train_plain, 5)
    net = make_net()
    base = sgd(net)
    opt = MTLOptimizer(base, "ew")
    model, prepared, scheduler = accelerator.prepare(net, opt, lr_scheduler.StepLR(opt, 2, 0.5))
    history = []
    for i in range(5):
        prepared.zero_grad()
        accelerator.backward(sum(losses_of(model, i).values()))
        prepared.step()
        scheduler.step()
        history.append([(g["lr"], g["momentum"], None) for g in base.param_groups])
    assert history == expected
    assert_near(net, reference)


def test_accelerate_accumulation_steps_only_when_gradients_are_synchronised(accelerator):
    accelerator.gradient_accumulation_steps = 2
    net, reference = make_net(), make_net()
    opt = MTLOptimizer(sgd(net), "ew")
    model, prepared = accelerator.prepare(net, opt)
    for i in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(sum(losses_of(model, i).values()))
            prepared.step()
            prepared.zero_grad()
    plain = sgd(reference)
    for i in (0, 2):
        plain.zero_grad()
        (sum(losses_of(reference, i).values()) / 2).backward()
        (sum(losses_of(reference, i + 1).values()) / 2).backward()
        plain.step()
    assert_near(net, reference)


@pytest.mark.parametrize("setting", STATEFUL)
def test_accelerate_save_state_resumes_bit_for_bit(accelerator, setting, tmp_path):
    def prepare(seed):
        net = make_net(seed)
        opt = MTLOptimizer(adamw(net), **STATEFUL[setting])
        return net, opt, *accelerator.prepare(net, opt)

    net, opt, *_ = prepare(0)
    train(opt, net, 4)
    accelerator.save_state(str(tmp_path))
    train(opt, net, 5, 4)
    accelerator.free_memory()
    twin, twin_opt, _, prepared = prepare(1)
    accelerator.load_state(str(tmp_path))
    assert prepared.state_dict()["param_groups"][0]["mtl"] == twin_opt.state_dict()["param_groups"][0]["mtl"]
    train(twin_opt, twin, 5, 4)
    assert_same(net, twin)


# Lightning


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its import emits is not ours
        return pytest.importorskip("lightning")


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("road", ["closure", "backward on ours", "backward on theirs"])
def test_fabric_sets_up_and_steps_the_wrapper(lightning, setting, road):
    reference = make_net()
    plain = MTLOptimizer(adamw(reference), **STATEFUL[setting])
    train(plain, reference, 5)
    net = make_net()
    opt = MTLOptimizer(adamw(net), **STATEFUL[setting])
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, prepared = fabric.setup(net, opt)
    assert isinstance(prepared, MTLOptimizer)
    for i in range(5):
        prepared.zero_grad()
        if road == "closure":
            prepared.step(lambda i=i: losses_of(model, i))
        else:
            (opt if road == "backward on ours" else prepared).backward(losses_of(model, i))
            prepared.step()
    assert_same(net, reference)
    assert torch.equal(prepared.info.weights, plain.info.weights)
    assert opt.info is prepared.info
    assert prepared.state_dict()["param_groups"][0]["mtl"] == plain.state_dict()["param_groups"][0]["mtl"]


def test_fabric_takes_groups_hooks_and_schedulers_through_its_own_object(lightning):
    net = make_net()
    base = sgd(net)
    opt = MTLOptimizer(base, "ew")
    _, prepared = lightning.Fabric(accelerator="cpu", devices=1).setup(net, opt)
    assert prepared.param_groups is base.param_groups
    count = Counter()
    prepared.register_step_pre_hook(lambda *_: count.update(["pre"]))
    scheduler = lr_scheduler.StepLR(prepared, 1, 0.5)
    prepared.step(lambda: losses_of(net, 0))
    scheduler.step()
    assert count == {"pre": 1}
    assert base.param_groups[0]["lr"] == 0.025
    prepared.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(base.param_groups) == 2


@pytest.mark.parametrize("setting", STATEFUL)
def test_fabric_save_and_load_resume_bit_for_bit(lightning, setting, tmp_path):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def prepare(seed):
        net = make_net(seed)
        return net, *fabric.setup(net, MTLOptimizer(adamw(net), **STATEFUL[setting]))

    def run(model, opt, start):
        for i in range(start, start + 5):
            opt.zero_grad()
            opt.backward(losses_of(model, i))
            opt.step()

    net, model, opt = prepare(0)
    run(model, opt, 0)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "opt": opt})
    run(model, opt, 5)
    twin, twin_model, twin_opt = prepare(1)
    fabric.load(tmp_path / "state.ckpt", {"model": twin_model, "opt": twin_opt})
    run(twin_model, twin_opt, 5)
    assert_same(net, twin)


def lightning_module(lightning, wrap, road, *, seed=0, schedule=False):
    """A LightningModule over Net; `road` is how its training step reaches the optimizer."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net(seed)
            self.automatic_optimization = road == "automatic"

        def configure_optimizers(self):
            self.wrapped = wrap(sgd(self.net))
            if not schedule:
                return self.wrapped
            return [self.wrapped], [lr_scheduler.StepLR(self.wrapped, 1, 0.5)]

        def training_step(self, batch, batch_idx):
            losses = losses_of(self.net, int(batch))
            if road == "automatic":
                return sum(losses.values())
            opt = self.optimizers()
            opt.zero_grad()
            if road == "closure":
                opt.step(closure=lambda: losses)
            elif road == "backward":
                opt.backward(losses)
                opt.step()
            else:
                self.manual_backward(sum(losses.values()))
                opt.step()
            return None

    return Module()


def fit(lightning, module, *, epochs=1, ckpt_path=None, **kwargs):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    loader = torch.utils.data.DataLoader(range(5), batch_size=1)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


trainer_test = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
)


@trainer_test
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.2}, {"accumulate_grad_batches": 2}])
def test_trainer_automatic_optimisation_trains_as_the_plain_base(lightning, options):
    plain = lightning_module(lightning, lambda base: base, "automatic", schedule=True)
    fit(lightning, plain, epochs=2, **options)
    module = lightning_module(lightning, lambda base: MTLOptimizer(base, "nash_mtl"), "automatic", schedule=True)
    trainer = fit(lightning, module, epochs=2, **options)
    assert trainer.optimizers[0] is module.wrapped
    assert not torch.equal(values(module.net), values(make_net()))
    assert_same(module.net, plain.net)


@trainer_test
@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("road", ["closure", "backward"])
def test_trainer_manual_optimisation_does_surgery(lightning, setting, road):
    module = lightning_module(lightning, lambda base: MTLOptimizer(base, **STATEFUL[setting]), road)
    trainer = fit(lightning, module)
    assert trainer.global_step == 5
    reference = make_net()
    plain = MTLOptimizer(sgd(reference), **STATEFUL[setting])
    train(plain, reference, 5)
    assert_same(module.net, reference)
    assert module.wrapped.state_dict()["param_groups"][0]["mtl"] == plain.state_dict()["param_groups"][0]["mtl"]


@trainer_test
def test_trainer_manual_backward_and_step_train_as_the_plain_base(lightning):
    module = lightning_module(lightning, lambda base: MTLOptimizer(base, "nash_mtl"), "manual")
    fit(lightning, module)
    reference, _ = plain_run(sgd, 5)
    assert_same(module.net, reference)


@trainer_test
@pytest.mark.parametrize("setting", STATEFUL)
def test_trainer_checkpoint_resumes_bit_for_bit(lightning, setting, tmp_path):
    def module(seed=0):
        return lightning_module(
            lightning, lambda base: MTLOptimizer(base, **STATEFUL[setting]), "closure", seed=seed, schedule=True
        )

    whole = module()
    fit(lightning, whole, epochs=2)
    half = module()
    fit(lightning, half, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(seed=1)
    fit(lightning, resumed, epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.net, whole.net)
