"""Checkpoints of MTLOptimizer: what is saved comes back, bit for bit, through every road torch has, or is refused.

The measure is an uninterrupted run: stopped after some steps, stored, loaded into fresh objects that were made from
other random numbers, and trained on, a run must end in the same bits. Trainers' checkpoints are in test_wrapper.py.
"""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import TASKS, Net, independent, own_random_state  # noqa: F401  (an autouse fixture)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from gradsurgery import MTLOptimizer, list_methods

# What every Gramian method must take; a method of another kind may refuse a variant when the optimizer is made, and
# any may refuse blocks between solves, which one weighted backward can't serve.
GRAMIAN = {"pcgrad", "mgda", "cagrad", "nash_mtl", "upgrad"}
VARIANTS = {
    "default": {},
    "every fourth step": {"update_every": 4},
    "blocks": {"blocks": "tensor"},
    "blocks every fourth step": {"blocks": "tensor", "update_every": 4},
    "heads weighted": {"heads": "weighted"},
    "heads unweighted": {"heads": "unweighted"},
}
STATEFUL = {
    "nash_mtl": {"method": "nash_mtl", "update_every": 3},
    "famo": {"method": "famo"},
    "pcgrad": {"method": "pcgrad"},
}
REFUSED = (ValueError, KeyError, RuntimeError)


def adamw(model):
    return AdamW(model.parameters(), lr=0.01)


def sgd(model):
    return SGD(model.parameters(), lr=0.05)


def make(seed=0, base=adamw, **kwargs):
    """A model and its optimizer, both made from the random numbers of that seed."""
    torch.manual_seed(seed)
    model = Net()
    return model, MTLOptimizer(base(model), **kwargs)


def losses_of(model, step):
    """Three positive losses on the batch of that number: {task: ()}."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 + step))
    y = {"a": x[:, 0], "b": -x[:, 0], "c": x[:, 1] - 0.5 * x[:, 0]}
    return {t: (out - y[t]).square().mean() + 0.1 for t, out in model(x).items()}


def train(model, opt, steps, start=0, form=lambda losses: losses):
    """Train; the weights of every step, or the model after it where the method has none."""
    weights = []
    for i in range(start, start + steps):
        opt.zero_grad()
        extra = independent(opt._surgery.rule.name, losses_of(model, 500 + i), losses_of(model, 900 + i))
        opt.step(form(losses_of(model, i)), **extra)
        weights.append(values(model) if opt.info.weights is None else opt.info.weights.clone())
    return weights


def train_plain(model, opt, steps, start=0):
    for i in range(start, start + steps):
        opt.zero_grad()
        sum(losses_of(model, i).values()).backward()
        opt.step()


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def leaf(opt):
    return opt.state_dict()["param_groups"][0]["mtl"]


def same(a, b):
    """Equality of nested containers with tensors in them, bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_continues_alike(one, two, start, steps=4):
    """Both pairs of model and optimizer train on and stay equal to the last bit."""
    for a, b in zip(train(*one, steps, start), train(*two, steps, start), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(values(one[0]), values(two[0]))
    assert same(one[1].state_dict(), two[1].state_dict())


# The tests' own objects: settings in which the method's state decides the numbers


@pytest.mark.parametrize("setting", STATEFUL)
def test_without_the_methods_state_a_resumed_run_would_differ(setting):
    model, opt = make(**STATEFUL[setting])
    train(model, opt, 4)
    state = opt.state_dict()
    del state["param_groups"][0]["mtl"]
    twin, twin_opt = make(1, **STATEFUL[setting])
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_dict(state)
    train(model, opt, 6, 4)
    train(twin, twin_opt, 6, 4)
    assert not torch.equal(values(model), values(twin)), "the state decides nothing: these tests have lost their object"


# Through torch.save


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", list_methods())
def test_every_method_resumes_bit_for_bit(method, variant):
    try:
        model, opt = make(method=method, **VARIANTS[variant])
    except ValueError as error:
        assert method not in GRAMIAN or variant == "blocks every fourth step", error
        pytest.skip(f"refused when made: {error}")
    train(model, opt, 5)
    stored = through_disk({"model": model.state_dict(), "opt": opt.state_dict()})
    twin, twin_opt = make(1, method=method, **VARIANTS[variant])
    twin.load_state_dict(stored["model"])
    twin_opt.load_state_dict(stored["opt"])
    assert_continues_alike((model, opt), (twin, twin_opt), 5)


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_saved_after_few_steps_resumes_too(setting, steps):
    model, opt = make(**STATEFUL[setting])
    train(model, opt, steps)
    twin, twin_opt = make(1, **STATEFUL[setting])
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_dict(through_disk(opt.state_dict()))
    assert_continues_alike((model, opt), (twin, twin_opt), steps)


@pytest.mark.parametrize("setting", STATEFUL)
def test_state_loads_back_into_the_optimizer_that_wrote_it(setting):
    model, opt = make(**STATEFUL[setting])
    train(model, opt, 4)
    stored = copy.deepcopy((model.state_dict(), opt.state_dict()))
    first = train(model, opt, 5, 4)
    last = values(model)
    model.load_state_dict(stored[0])
    opt.load_state_dict(stored[1])
    assert same(first, train(model, opt, 5, 4))
    assert torch.equal(values(model), last)


@pytest.mark.parametrize("setting", STATEFUL)
def test_a_state_dict_does_not_change_while_training_goes_on(setting):
    model, opt = make(base=sgd, **STATEFUL[setting])
    train(model, opt, 4)
    state = opt.state_dict()
    copied = copy.deepcopy(state)
    train(model, opt, 4, 4)
    assert same(state["param_groups"], copied["param_groups"])


def test_loading_leaves_the_given_dict_as_it_was_and_works_twice():
    model, opt = make(method="nash_mtl")
    train(model, opt, 3)
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state)
    twin, twin_opt = make(1, method="nash_mtl")
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        twin_opt.load_state_dict(state)
        assert same(state, kept)
    assert_continues_alike((model, opt), (twin, twin_opt), 3)


def test_load_state_dict_takes_its_argument_by_keyword():
    model, opt = make(method="nash_mtl")
    train(model, opt, 2)
    twin, twin_opt = make(1, method="nash_mtl")
    twin.load_state_dict(model.state_dict())
    twin_opt.load_state_dict(state_dict=copy.deepcopy(opt.state_dict()))
    assert_continues_alike((model, opt), (twin, twin_opt), 2)


def test_the_methods_state_is_one_leaf_of_the_first_group():
    model, opt = make(**STATEFUL["nash_mtl"])
    train(model, opt, 2)
    state = opt.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert all("mtl" not in group for group in state["param_groups"][1:])
    assert isinstance(state["param_groups"][0]["mtl"], (str, bytes, torch.Tensor))


def test_saving_changes_nothing():
    model, opt = make(**STATEFUL["pcgrad"])
    twin, twin_opt = make(**STATEFUL["pcgrad"])
    for i in range(6):
        train(model, opt, 1, i)
        train(twin, twin_opt, 1, i)
        twin_opt.state_dict()
    assert torch.equal(values(model), values(twin))


# To and from a plain optimizer


def test_a_plain_optimizers_state_loads_into_the_wrapper():
    model = Net()
    plain = adamw(model)
    train_plain(model, plain, 4)
    twin, opt = make(1, method="ew")
    twin.load_state_dict(model.state_dict())
    opt.load_state_dict(through_disk(plain.state_dict()))
    train_plain(model, plain, 4, 4)
    train(twin, opt, 4, 4)
    torch.testing.assert_close(values(twin), values(model), rtol=1e-5, atol=1e-6)
    assert leaf(opt) is not None


def test_the_wrappers_state_loads_into_a_plain_optimizer_which_trains():
    model, opt = make(method="ew")
    train(model, opt, 4)
    twin = Net()
    plain = adamw(twin)
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict(through_disk(opt.state_dict()))
    train(model, opt, 4, 4)
    train_plain(twin, plain, 4, 4)
    torch.testing.assert_close(values(twin), values(model), rtol=1e-5, atol=1e-6)


def test_a_plain_optimizers_state_keeps_the_base_rates_and_moments_exactly():
    model = Net()
    plain = AdamW(model.parameters(), lr=0.0123, betas=(0.8, 0.9))
    train_plain(model, plain, 2)
    _, opt = make(1, method="cagrad")
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.0123
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)
    assert same(opt.state_dict()["state"], plain.state_dict()["state"])


# Strictness: refused before anything changed


def renamed(losses):
    return {f"other_{t}": loss for t, loss in losses.items()}


def fewer(losses):
    return dict(list(losses.items())[:2])


FOREIGN = {
    "another method": ({"method": "cagrad"}, None),
    "another stateful method": ({"method": "famo"}, None),
    "other task names": ({"method": "nash_mtl"}, renamed),
    "fewer tasks": ({"method": "nash_mtl"}, fewer),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_state_is_refused_before_anything_changed(foreign):
    kwargs, form = FOREIGN[foreign]
    source, source_opt = make(2, **kwargs)
    train(source, source_opt, 4, form=form or (lambda losses: losses))
    model, opt = make(method="nash_mtl")
    twin, twin_opt = make(method="nash_mtl")
    train(model, opt, 3)
    train(twin, twin_opt, 3)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(REFUSED) as refusal:
        opt.load_state_dict(through_disk(source_opt.state_dict()))
    assert len(str(refusal.value)) > 20, "a refusal says what, why and what to do"
    assert same(opt.state_dict(), before)
    assert_continues_alike((model, opt), (twin, twin_opt), 3)


def test_another_methods_state_is_refused_by_a_fresh_optimizer_naming_both():
    source, source_opt = make(2, method="famo")
    train(source, source_opt, 2)
    _, opt = make(method="cagrad")
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(REFUSED, match=r"(?is)famo.*cagrad|cagrad.*famo"):
        opt.load_state_dict(source_opt.state_dict())
    assert same(opt.state_dict(), before)
    assert not opt.state


def test_other_task_names_are_refused_in_the_first_step_after_loading_into_a_fresh_optimizer():
    source, source_opt = make(2, method="nash_mtl")
    train(source, source_opt, 2)
    model, opt = make(method="nash_mtl")
    opt.load_state_dict(source_opt.state_dict())
    before = values(model)
    with pytest.raises(REFUSED, match="other_"):
        opt.step(renamed(losses_of(model, 0)))
    assert torch.equal(values(model), before)


def test_state_that_the_base_refuses_leaves_the_methods_state_too():
    source = nn.Linear(4, 3)
    source_opt = MTLOptimizer(adamw(source), "nash_mtl", shared_params=source.parameters())
    for _ in range(3):
        source_opt.zero_grad()
        out = source(torch.ones(2, 4))
        source_opt.step({t: (out[:, i] - i).square().mean() for i, t in enumerate(TASKS)})
    model, opt = make(method="nash_mtl")
    twin, twin_opt = make(method="nash_mtl")
    train(model, opt, 3)
    train(twin, twin_opt, 3)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="size of optimizer's group"):
        opt.load_state_dict(source_opt.state_dict())
    assert same(opt.state_dict(), before)
    assert_continues_alike((model, opt), (twin, twin_opt), 3)


def test_a_damaged_leaf_is_refused_before_anything_changed():
    source, source_opt = make(2, method="nash_mtl")
    train(source, source_opt, 2)
    state = copy.deepcopy(source_opt.state_dict())
    state["param_groups"][0]["mtl"] = state["param_groups"][0]["mtl"][:20]
    model, opt = make(method="nash_mtl")
    train(model, opt, 3)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(Exception):  # noqa: B017  (whatever the decoder raises)
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before)


# step() without losses


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("call", [lambda o: o.step(), lambda o: o.step(closure=None)])
def test_step_without_losses_does_not_advance_the_methods_state(setting, call):
    model, opt = make(base=sgd, **STATEFUL[setting])
    twin, twin_opt = make(base=sgd, **STATEFUL[setting])
    for i in range(8):
        train(model, opt, 1, i)
        twin_opt.zero_grad()
        before = leaf(twin_opt)
        call(twin_opt)
        assert same(leaf(twin_opt), before)
        train(twin, twin_opt, 1, i)
    assert torch.equal(values(model), values(twin))


# torch.distributed.checkpoint

OPTIONS = {
    "default": {},
    "full, offloaded": {"full_state_dict": True, "cpu_offload": True},
    # The group's entries become "param_groups.<parameter>.<key>", non-tensors among them. On loading, torch asks for
    # the keys of the *live* groups only, so the wrapper's leaf must be found there too, or it is lost in silence.
    "flattened": {"flatten_optimizer_state_dict": True},
}
single_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def through_dcp(path, one, two, **options):
    """Save one pair of model and optimizer, load into the other as a user of torch.distributed.checkpoint does."""

    def gather(model, opt):
        optim = get_optimizer_state_dict(model, opt, options=StateDictOptions(**options))
        return {"model": get_model_state_dict(model), "optim": optim}

    dcp.save(gather(*one), checkpoint_id=path, no_dist=True)
    state = gather(*two)
    dcp.load(state, checkpoint_id=path, no_dist=True)
    set_model_state_dict(two[0], state["model"])
    set_optimizer_state_dict(two[0], two[1], optim_state_dict=state["optim"], options=StateDictOptions(**options))


@single_process
@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("options", OPTIONS)
def test_dcp_save_and_load_into_fresh_objects_resume_bit_for_bit(setting, options, tmp_path):
    one, two = make(**STATEFUL[setting]), make(1, **STATEFUL[setting])
    train(*one, 4)
    through_dcp(tmp_path, one, two, **OPTIONS[options])
    assert same(leaf(one[1]), leaf(two[1]))
    assert_continues_alike(one, two, 4)


@single_process
@pytest.mark.parametrize("options", OPTIONS)
def test_dcp_load_into_an_optimizer_that_has_trained_resumes_bit_for_bit(options, tmp_path):
    one, two = make(**STATEFUL["nash_mtl"]), make(1, **STATEFUL["nash_mtl"])
    train(*one, 4)
    train(*two, 2, 20)
    through_dcp(tmp_path, one, two, **OPTIONS[options])
    assert_continues_alike(one, two, 4)


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("options", OPTIONS)
def test_optimizer_state_passes_through_get_and_set_without_a_file(setting, options):
    one, two = make(**STATEFUL[setting]), make(1, **STATEFUL[setting])
    train(*one, 4)
    chosen = StateDictOptions(**OPTIONS[options])
    state = through_disk(get_optimizer_state_dict(*one, options=chosen))
    two[0].load_state_dict(one[0].state_dict())
    set_optimizer_state_dict(*two, optim_state_dict=state, options=chosen)
    assert_continues_alike(one, two, 4)


@pytest.mark.parametrize("setting", STATEFUL)
@pytest.mark.parametrize("options", OPTIONS)
def test_gathering_state_for_dcp_changes_nothing(setting, options):
    one, two = make(base=sgd, **STATEFUL[setting]), make(base=sgd, **STATEFUL[setting])
    for i in range(6):
        train(*one, 1, i)
        two[1].zero_grad()  # a base without state and gradients: torch initialises it by step(closure=None)
        get_optimizer_state_dict(*two, options=StateDictOptions(**OPTIONS[options]))
        train(*two, 1, i)
    assert torch.equal(values(one[0]), values(two[0]))
    assert all(isinstance(p, nn.Parameter) for p in two[1].param_groups[0]["params"])


@single_process
@pytest.mark.parametrize("options", OPTIONS)
def test_dcp_with_several_groups_keeps_the_state(options, tmp_path):
    def groups(model):
        return AdamW([{"params": model.trunk.parameters()}, {"params": model.heads.parameters(), "lr": 0.02}], lr=0.01)

    one, two = make(base=groups, **STATEFUL["famo"]), make(1, base=groups, **STATEFUL["famo"])
    train(*one, 4)
    through_dcp(tmp_path, one, two, **OPTIONS[options])
    assert_continues_alike(one, two, 4)


@single_process
def test_dcp_checkpoint_of_another_method_is_refused(tmp_path):
    one, two = make(method="famo"), make(1, method="cagrad")
    train(*one, 3)
    with pytest.raises(REFUSED):
        through_dcp(tmp_path, one, two)
