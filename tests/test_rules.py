"""Rules of layers beside the weight gradients themselves, and what `auto` makes of the counts."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import Toy, batch, flat, optimizer
from torch import Tensor, nn

from gradsurgery import MTLOptimizer
from gradsurgery.engines import Batched, Engine, Gramian, Sequential, gramian_rule, rules
from gradsurgery.engines.rules import RULES

Make = Callable[[], tuple[nn.Module, Tensor]]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


LAYERS: dict[str, tuple[str, Make]] = {
    "linear": ("AddmmBackward0", lambda: (nn.Linear(7, 5), normal(4, 7))),
    "linear on sequences": ("AddmmBackward0", lambda: (nn.Linear(7, 5), normal(2, 3, 7))),
    "linear without bias": ("MmBackward0", lambda: (nn.Linear(7, 5, bias=False), normal(4, 7))),
    "convolution": ("ConvolutionBackward0", lambda: (nn.Conv2d(3, 5, 3, 2, 1), normal(2, 3, 6, 5))),
    "dilated": ("ConvolutionBackward0", lambda: (nn.Conv2d(3, 5, (3, 2), dilation=2), normal(2, 3, 7, 6))),
    "pointwise": ("ConvolutionBackward0", lambda: (nn.Conv2d(3, 5, 1, bias=False), normal(2, 3, 4, 4))),
    "embedding": ("EmbeddingBackward0", lambda: (nn.Embedding(6, 5), torch.tensor([[0, 2, 2], [5, 0, 0]]))),
    "padded": ("EmbeddingBackward0", lambda: (nn.Embedding(6, 5, padding_idx=0), torch.tensor([[0, 2, 2], [5, 0, 0]]))),
    "one word": ("EmbeddingBackward0", lambda: (nn.Embedding(6, 5), torch.tensor([3]))),
}


# At 30 elements, strips of one, two or all columns, and a shorter last one.
@pytest.mark.parametrize("strip", [1, 30, rules.STRIP])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_rule_is_the_gramian_of_weight_gradients(
    name: str, K: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "STRIP", strip)
    operator, make = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make()
    layer.double()
    y = layer(x)
    node, rule = y.grad_fn, RULES[operator]
    while node.name() != operator:
        node = node.next_functions[0][0]
    D = torch.randn(K, *y.shape, dtype=torch.float64)
    assert rule.takes(node)
    inner = D.reshape(K, *node._input_metadata[0].shape)
    rows = torch.stack([torch.autograd.grad(y, layer.weight, d, retain_graph=True)[0].flatten() for d in D])
    torch.testing.assert_close(rule.gramian(node, inner), rows @ rows.T)
    if getattr(layer, "bias", None) is not None:
        biases = torch.stack([torch.autograd.grad(y, layer.bias, d, retain_graph=True)[0] for d in D])
        torch.testing.assert_close(rule.bias_rows(inner), biases)


def test_a_rule_keeps_the_digits_where_samples_cancel() -> None:
    """Of a sum that is 1e-3 of its terms, float32 products of activations and gradients would leave none."""
    torch.manual_seed(0)
    layer, half = nn.Linear(20, 10), torch.randn(16, 20)
    x = torch.cat([half, half + 1e-3 * torch.randn_like(half)])
    y = layer(x)
    one = torch.randn(3, 16, 10)
    D = torch.cat([one, -one], dim=1)
    exact = torch.stack([(d.double().T @ x.double()).flatten() for d in D])
    G = RULES["AddmmBackward0"].gramian(y.grad_fn, D)
    torch.testing.assert_close(G, exact @ exact.T, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3)],
    ids=["groups", "transposed", "1-D", "3-D"],
)
def test_convolutions_that_the_rule_leaves_alone(layer: nn.Module) -> None:
    y = layer(torch.randn(2, 4, *[6] * (layer.weight.ndim - 2)))
    node = y.grad_fn
    while node.name() != "ConvolutionBackward0":
        node = node.next_functions[0][0]
    assert not RULES["ConvolutionBackward0"].takes(node)


def test_a_second_rule_of_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="AddmmBackward0"):
        gramian_rule("AddmmBackward0", weight=2, takes=bool, costs=lambda node, K: (0, 0, 0))(lambda node, D: D)


class Wide:
    """Two linear layers and a head a task."""

    def __init__(self, width: int, tasks: int):
        self.width = width
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(tasks)])
        base = torch.optim.SGD([*self.trunk.parameters(), *self.heads.parameters()], 0.1)
        self.opt = MTLOptimizer(base, "mgda", self.trunk.parameters())

    def losses(self, n: int) -> list[Tensor]:
        z = self.trunk(torch.randn(n, self.width))
        return [head(z).square().mean() for head in self.heads]


@pytest.mark.parametrize(
    ("width", "n", "tasks", "engine"),
    [
        (768, 4, 10, "gramian"),
        (64, 4, 10, "batched"),
        (64, 4, 3, "batched"),
        (64, 4, 2, "sequential"),
        (256, 512, 2, "sequential"),
    ],
)
def test_auto_goes_by_the_counts(width: int, n: int, tasks: int, engine: str) -> None:
    model = Wide(width, tasks)
    assert model.opt.backward(model.losses(n)).engine == engine


def test_auto_keeps_rows_where_they_are_wanted() -> None:
    model = Wide(768, 10)
    with model.opt.accumulate():
        for _ in range(2):
            model.opt.backward([loss / 2 for loss in model.losses(4)])
    assert model.opt.info.engine == "sequential"
    assert model.opt.backward(model.losses(4)).engine == "gramian"


@pytest.mark.parametrize("engine", ["batched", "gramian"])
def test_an_operator_that_is_new_is_compared_first(engine: str) -> None:
    """vmap is wrong for cdist, which the first step does not pass."""
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine=engine)
    assert opt.backward(model.losses(x)).engine == engine
    z = model.trunk(x)
    z = torch.cdist(z, z.flip(0))
    losses = [(t + 1) * (z.roll(t, 1)[:, :3] - t).square().mean() for t in range(3)]
    J = torch.stack(
        [flat(torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True)) for loss in losses]
    )
    opt.zero_grad()
    with pytest.warns(UserWarning, match="sequential"):
        assert opt.backward(losses).engine == "sequential"
    torch.testing.assert_close(opt.info.gramian[0], J @ J.T)


@pytest.mark.parametrize("engine", [Sequential(), Batched(2), Gramian(), "auto"])
def test_engines_are_copied_and_pickled_without_what_they_found(engine: Engine | str) -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "upgrad", engine=engine)
    ran = opt.backward(model.losses(x)).engine
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert again._surgery.engine is not opt._surgery.engine
        twin = copy.deepcopy(model)
        again = optimizer(twin, "upgrad", engine=again._surgery.engine)
        assert again.backward(twin.losses(x)).engine == ran
