"""What is particular to one architecture or to some, and what each refuses."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from families import Pooled, losses, make
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from gradsurgery import MTLOptimizer
from gradsurgery.architectures import LTB, AdaShare, DSelectK, PerTask, Stages, TaskHeads, build, split_stages
from gradsurgery.architectures.dselect_k import SelectorGate
from gradsurgery.architectures.gates import Gate


class Doubling(nn.Sequential):
    """A container that is more than its children one after another."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_sequence_with_a_forward_of_its_own_stays_whole() -> None:
    first, inner = nn.Linear(3, 4), Doubling(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(2, 3)
    expected = inner(first(x))
    for stages in (split_stages(nn.Sequential(first, inner)), Stages([first, inner])):
        torch.testing.assert_close(stages(x), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="where the stages of a Doubling begin"):
        split_stages(inner)


def test_mtan_reads_features_within_a_stage() -> None:
    """What enters the last convolution, whatever follows that."""

    def conv(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True)]

    stage = nn.Sequential(*conv(4, 6), *conv(6, 6), nn.MaxPool2d(2))
    narrow = nn.Sequential(*conv(6, 5), *conv(5, 8))
    single = nn.Sequential(*conv(8, 8), nn.MaxPool2d(2))
    model = build("mtan", Stages([nn.Sequential(*conv(3, 4)), stage, narrow, single]), {"a": Pooled(8, 1, 1)})
    x = torch.randn(2, 3, 8, 8)
    (u, p), (u2, p2), (u3, p3) = model._stages(x)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    h = model.encoder.stages[0](x)  # pyright: ignore
    torch.testing.assert_close(u, F.max_pool2d(stage[:2](h), 2))
    torch.testing.assert_close(p, stage(h))
    torch.testing.assert_close(u2, p2)
    torch.testing.assert_close(u3, p3)
    assert p3.shape == (2, 8, 2, 2)
    sum(y.sum() for y in model(x).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["mtan", "cross_stitch", "ltb", "ple", "adashare"])
def test_a_large_encoder_of_torchvision(name: str) -> None:
    encoder = torchvision.models.efficientnet_b0(weights=None)
    model = build(name, encoder, {"a": Pooled(1280, 1, 1), "b": Pooled(1280, 2, 1)})
    x = torch.randn(2, 3, 32, 32)
    assert {task: tuple(y.shape) for task, y in model(x).items()} == {"a": (2, 1), "b": (2, 2)}


@pytest.mark.parametrize("name", ["mmoe", "cgc", "dselect_k", "ple"])
@pytest.mark.parametrize("encoder", ["vit", "swin", "conv", "tokens"])
def test_gates_of_the_input_read_its_channels(name: str, encoder: str) -> None:
    """Channels of an image lie elsewhere than those of tokens or Swin's maps, which come of it."""
    small = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 2}
    makers: dict[str, tuple[Any, tuple[int, ...]]] = {
        "vit": (lambda: split_stages(VisionTransformer(image_size=12, patch_size=4, **small), 2), (3, 12, 12)),
        "swin": (
            lambda: split_stages(SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], stochastic_depth_prob=0.0)),
            (3, 8, 12),
        ),
        "conv": (lambda: Stages([nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3)]), (3, 12)),
        "tokens": (lambda: Stages([nn.Linear(3, 8), nn.Linear(8, 8)]), (12, 3)),
    }
    make_encoder, shape = makers[encoder]
    width = 16 if encoder == "swin" else 8
    dim = -1 if encoder != "conv" else 1
    model = build(name, make_encoder, {t: Pooled(width, 1, dim) for t in "ab"}, stem=0)
    x = torch.randn(2, *shape)
    channels = x.mean(1) if encoder == "tokens" else x.flatten(2).mean(2)
    seen: list[Tensor] = []
    gate = next(m for m in model.modules() if isinstance(m, Gate | SelectorGate))
    gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    torch.testing.assert_close(seen[0], channels)


def test_gates_say_what_they_cannot_read() -> None:
    ids = torch.randint(9, (2, 5))
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    model = build("mmoe", embedding, {"a": nn.Linear(4, 1)}, gate_width=4)
    with pytest.raises(TypeError, match=r"torch.int64 has not: pass stem="):
        model(ids)
    assert build("mmoe", embedding, {"a": nn.Linear(4, 1)}, stem=1)(ids)["a"].shape == (2, 5, 1)


def test_ltb_is_evaluated_as_it_is_trained() -> None:
    model, x = make("ltb", tasks={"a": 1, "b": 1})
    assert isinstance(model, LTB)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([[[9.0, 0.0], [9.0, 0.0]]] * 2))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    warm = model(x)
    one, two = model.networks
    # In the warm-up all nodes are fed, and read, the mean of both before them.
    model.eval()
    first = torch.stack([one.stages[0](x), two.stages[0](x)]).mean(0)  # pyright: ignore
    second = torch.stack([one.stages[1](first), two.stages[1](first)]).mean(0)  # pyright: ignore
    torch.testing.assert_close(model(x)["b"], model.decode({"b": two.stages[2](second)}, "b")["b"])  # pyright: ignore
    assert warm.keys() == {"a", "b"}
    model.anneal(50, 100)
    alone = one.stages[1](one.stages[0](x))  # pyright: ignore
    torch.testing.assert_close(model(x)["b"], model.decode({"b": two.stages[2](alone)}, "b")["b"])  # pyright: ignore


def test_ltb_runs_the_last_nodes_that_are_wanted() -> None:
    model, x = make("ltb")
    ran: list[int] = []
    for i, network in enumerate(model.networks):  # pyright: ignore
        network.stages[-1].register_forward_hook(lambda *_, i=i: ran.append(i))
    model(x, "seg")
    assert ran == [1]


@pytest.mark.parametrize("base", ["momentum", "decay", "restored"])
def test_adashare_keeps_what_it_has_decided(base: str) -> None:
    model, x = make("adashare")
    assert isinstance(model, AdaShare)
    for task in model.tasks:
        with torch.no_grad():
            model.logits[task].normal_()
    options = {"momentum": 0.9} if base == "momentum" else {"weight_decay": 0.5}
    opt = torch.optim.SGD(model.parameters(), 1.0, **options)
    sum(model.logits[task][:, 0].sum() for task in model.tasks).backward()  # pyright: ignore
    model.harden()
    chosen = {task: model.policy(task) for task in model.tasks}
    assert all(set(policy.tolist()) <= {0.0, 1.0} for policy in chosen.values())
    if base == "restored":
        state = model.state_dict()
        model, _ = make("adashare")
        assert isinstance(model, AdaShare)
        model.load_state_dict(state)
    else:
        for _ in range(5):
            opt.step()
            opt.zero_grad()
            (losses(model, x)["depth"] - 0.1 * model.sparsity() + model.sharing()).backward()
    assert {task: model.policy(task).tolist() for task in model.tasks} == {t: p.tolist() for t, p in chosen.items()}
    assert model.sparsity().isfinite()
    for training in (True, False):
        model.train(training)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        for task in model.tasks:
            torch.testing.assert_close(model(x, task)[task], model.network(task)(x))


def test_temperatures_stay_where_samples_are_finite() -> None:
    model, x = make("adashare")
    assert isinstance(model, AdaShare)
    model.anneal(100_000, 100_000)
    assert all(y.isfinite().all() for y in model(x).values())
    sum(losses(model, x).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad.isfinite().all() for p in model.logits.values())


def test_dselect_k_without_samples_needs_no_width() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    model = build("dselect_k", Lookup, {t: nn.Linear(4, 1) for t in "ab"}, num_experts=3, per_sample=False)
    assert isinstance(model, DSelectK)
    ids = torch.randint(9, (5,))
    z = model.representation(ids)
    weights = model.gate_weights(z, "a")
    torch.testing.assert_close(weights, weights[:1].expand(5, -1))
    (model(ids)["a"].sum() + model.penalty(z, "a")).backward()
    # No mass on an expert at all: a penalty that can be added all the same.
    gate: Any = model.gates["a"]
    with torch.no_grad():
        gate.bits.bias.fill_(9.0)
    assert model.penalty(z, "a").isfinite()


COUNTS = [
    ("mmoe", {"num_experts": 0}),
    ("mmoe", {"num_experts": -1}),
    ("cgc", {"shared_experts": 0}),
    ("cgc", {"task_experts": -1}),
    ("cgc", {"task_experts": {"depth": 1}}),
    ("ple", {"shared_experts": 0}),
    ("ple", {"task_experts": 0}),
    ("dselect_k", {"num_experts": 1}),
    ("dselect_k", {"k": 5}),
    ("sluice", {"subspaces": 0}),
    ("mtan", {"reduction": 0}),
]


@pytest.mark.parametrize(("name", "options"), COUNTS)
def test_numbers_are_checked(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make(name, **options)


def test_one_task_by_its_name() -> None:
    model, x = make("hps")
    assert list(model(x, "seg")) == ["seg"]
    with pytest.raises(ValueError, match=r"Unknown tasks \['se'\]"):
        model(x, "se")


def test_an_input_that_is_a_mapping() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 4)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.linear(torch.cat([x["left"], x["right"]], 1))

    model = build("hps", Joined, {"a": nn.Linear(4, 1), "b": nn.Linear(4, 2)})
    x = {"left": torch.randn(3, 2), "right": torch.randn(3, 3)}
    with pytest.raises(ValueError, match="model.takes_mappings = True"):
        model(x)
    model.takes_mappings = True
    assert list(model(x)) == ["a", "b"]
    assert list(model(PerTask({"b": x}))) == ["b"]


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([2, 1, 2]),
        torch.tensor([[2], [1], [2]]),
        np.array([2, 1, 2]),
        [2, 1, 2],
        ["2", "1", "2"],
        [np.int64(2), torch.tensor(1), 2],
    ],
)
def test_samples_go_to_the_heads_of_their_tasks(ids: Any) -> None:
    model = TaskHeads(nn.Linear(4, 8), {"1": nn.Linear(8, 2), "2": nn.Linear(8, 5), "3": nn.Linear(8, 3)})
    x, y = torch.randn(3, 4), torch.tensor([4, 1, 0])
    routed = model.route(x, ids)
    assert list(routed) == ["1", "2"] and {t: at.tolist() for t, at in routed.index.items()} == {"1": [1], "2": [0, 2]}
    z = model.encoder(x)
    expected = [model.decoders[t](z[i]) for i, t in enumerate(["2", "1", "2"])]
    for row, found, one in zip(routed.padded(), routed.samples(), expected, strict=True):
        torch.testing.assert_close(found, one)
        torch.testing.assert_close(row[: len(one)], one)
        assert (row[len(one) :] == -torch.inf).all()
    assert {t: v.tolist() for t, v in routed.targets(y).items()} == {"1": [1], "2": [4, 0]}
    # The task that the batch lacks, from the first step on.
    opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.1), "upgrad", model.shared_parameters())
    targets = routed.targets(y)
    for task_ids in (ids, [3, 3, 1]):
        routed = model.route(x, task_ids)
        targets = routed.targets(torch.tensor([1, 0, 1]))
        opt.step({t: F.cross_entropy(routed[t], targets[t]) if t in routed else None for t in model.tasks})


def test_one_id_for_all_an_empty_batch_and_flat_outputs() -> None:
    model = TaskHeads(nn.Linear(4, 8), {"a": nn.Linear(8, 2), "b": nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))})
    x = torch.randn(3, 4)
    for one in (1, "b", torch.tensor(1), np.int64(1), np.array(1)):
        assert {t: tuple(y.shape) for t, y in model.route(x, one).items()} == {"b": (3,)}
    assert model.route(x, [0, 1, 1]).padded().shape == (3, 2)
    empty = model.route(x[:0], [])
    assert not empty and empty.padded().shape == (0, 0) and empty.samples() == []
    with pytest.raises(ValueError, match="Got 2 task_ids for a batch of 3"):
        model.route(x, [0, 1])
    with pytest.raises(ValueError, match="No task has the id 7"):
        model.route(x, [0, 1, 7])
    with pytest.raises(ValueError, match="that have no decoder"):
        TaskHeads(nn.Linear(4, 8), {"a": nn.Linear(8, 2)}, ids={1: "b"})
