"""Hard parameter sharing: shapes, the partition of the parameters, any encoder."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from gradsurgery.architectures import HPS


class Tokens(nn.Module):
    """A transformer that pools its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(1)


def trunk() -> nn.Module:
    net = resnet18()
    net.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return net


ENCODERS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU()), (5,), 8),
    "resnet18": (trunk, (3, 32, 32), 512),
    "transformer": (Tokens, (6, 8), 8),
}


def make(name: str = "mlp") -> tuple[HPS, Tensor]:
    torch.manual_seed(0)
    encoder, shape, width = ENCODERS[name]
    decoders = {"a": nn.Linear(width, 1), "b": nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 3))}
    return HPS(encoder(), decoders), torch.randn(4, *shape)


def ids(parameters: object) -> list[int]:
    return [id(p) for p in parameters]  # pyright: ignore[reportGeneralTypeIssues]


def assert_partition(model: HPS) -> None:
    parts = ids(model.shared_parameters()) + [i for task in model.tasks for i in ids(model.task_parameters(task))]
    assert sorted(parts) == sorted(ids(model.parameters()))


@pytest.mark.parametrize("name", ENCODERS)
def test_one_input_serves_every_task(name: str) -> None:
    model, x = make(name)
    out = model(x)
    assert {task: tuple(y.shape) for task, y in out.items()} == {"a": (4, 1), "b": (4, 3)}
    assert_partition(model)
    assert sorted(ids(model.shared_parameters())) == sorted(ids(model.encoder.parameters()))


def test_an_input_for_each_task_or_for_some() -> None:
    model, x = make()
    both = model({"b": x[:2], "a": x})
    assert list(both) == ["b", "a"]
    torch.testing.assert_close(both["a"], model(x)["a"])
    torch.testing.assert_close(both["b"], model(x[:2])["b"])
    assert list(model({"b": x})) == ["b"]


def test_forward_is_decode_of_representation() -> None:
    model, x = make()
    z = model.representation(x)
    assert all(torch.equal(y, model(x)[task]) for task, y in model.decode(z).items())
    assert list(model.decode(z, ["b"])) == ["b"]
    assert list(model.decode(model.representation({"a": x, "b": x}), ["b"])) == ["b"]


def test_what_is_reachable_twice_is_shared() -> None:
    common, encoder = nn.Linear(4, 4), nn.Linear(3, 4)
    model = HPS(encoder, {"a": nn.Sequential(common, nn.Linear(4, 1)), "b": nn.Sequential(common, nn.Linear(4, 2))})
    assert_partition(model)
    assert set(ids(common.parameters())) <= set(ids(model.shared_parameters()))

    tied = nn.Linear(4, 4)
    tied.weight = (inner := nn.Linear(4, 4)).weight
    model = HPS(inner, {"a": tied, "b": nn.Linear(4, 1)})
    assert_partition(model)
    assert ids(model.task_parameters("a")) == [id(tied.bias)]

    head = nn.Linear(4, 1)
    model = HPS(encoder, {"a": head, "b": head})
    assert_partition(model)
    assert not list(model.task_parameters("a"))


def test_copies_and_pickles_after_a_forward() -> None:
    model, x = make()
    sum(y.sum() for y in model(x).values()).backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_partition(twin)
        assert all(torch.equal(y, model(x)[task]) for task, y in twin(x).items())


def test_errors_name_the_tasks() -> None:
    model, x = make()
    with pytest.raises(ValueError, match=r"Unknown tasks \['c'\].*\['a', 'b'\]"):
        model({"c": x})
    with pytest.raises(ValueError, match="Unknown tasks"):
        model.task_parameters("c")
    with pytest.raises(ValueError, match="no entry for the tasks"):
        model.decode(model.representation({"a": x}), ["b"])
    with pytest.raises(ValueError, match="No task was asked for"):
        model({})
    with pytest.raises(ValueError, match="`decoders` is empty"):
        HPS(nn.Identity(), {})
    with pytest.raises(ValueError, match="Rename that task"):
        HPS(nn.Identity(), {"a.b": nn.Identity()})
