"""torchMTL's lists load unchanged, its README runs, and what its model gets wrong in silence is refused by name."""

import copy
import math
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import BCEWithLogitsLoss, Linear, MSELoss, Sequential

from gradsurgery import MTLOptimizer
from gradsurgery.architectures import Concat, MTLModel, SimpleSelect, SliceSelect, TaskGraph


def readme() -> list[dict[str, Any]]:
    """The list of torchMTL's README."""
    return [
        {"name": "Embed1", "layers": Sequential(*[Linear(16, 32), Linear(32, 8)])},
        {"name": "Embed2", "layers": Sequential(*[Linear(16, 32), Linear(32, 8)])},
        {"name": "CatTask", "layers": Concat(dim=1), "loss_weight": 1.0, "anchor_layer": ["Embed1", "Embed2"]},
        {
            "name": "Task1",
            "layers": Sequential(*[Linear(8, 32), Linear(32, 1)]),
            "loss": MSELoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed1",
        },
        {
            "name": "Task2",
            "layers": Sequential(*[Linear(8, 64), Linear(64, 1)]),
            "loss": BCEWithLogitsLoss(),
            "loss_weight": 1.0,
            "anchor_layer": "Embed2",
        },
        {"name": "FNN", "layers": Sequential(*[Linear(16, 32), Linear(32, 32)]), "anchor_layer": "CatTask"},
        {
            "name": "Task3",
            "layers": Sequential(*[Linear(32, 16), Linear(16, 1)]),
            "anchor_layer": "FNN",
            "loss": MSELoss(),
            "loss_weight": "auto",
            "loss_init_val": 1.0,
        },
    ]


def test_the_readme_of_torchmtl_trains() -> None:
    torch.manual_seed(0)
    model = MTLModel(readme(), output_tasks=["Task1", "Task2", "Task3"])
    pos = nx.planar_layout(model.g)
    assert set(pos) == {"root", "Embed1", "Embed2", "CatTask", "Task1", "Task2", "FNN", "Task3"}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    X = torch.randn(64, 16)
    y = [X[:, :1], (X[:, 1:2] > 0).float(), X[:, 2:3].square()]
    history = []
    for _ in range(300):
        optimizer.zero_grad()
        y_hat, l_funcs, l_weights = model(X)
        loss = torch.zeros(1)
        for i in range(len(y_hat)):
            loss += l_weights[i] * l_funcs[i](y_hat[i], y[i])
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert math.isfinite(history[-1])
    assert history[-1] < history[0]
    # A learned factor alone went to NaN there; with its term it nears the inverse of the loss.
    weight = model.tasks.loss_weight("Task3")
    assert isinstance(weight, Tensor)
    assert 0.3 < (weight * MSELoss()(model.tasks(X)["Task3"], y[2])).item() < 3


def test_losses_and_weights_come_back_in_order() -> None:
    tasks = readme()
    outputs, losses, weights = MTLModel(tasks, ["Task2", "CatTask", "Task1"])(torch.zeros(3, 16))
    assert [tuple(y.shape) for y in outputs] == [(3, 1), (3, 16), (3, 1)]
    assert losses == [tasks[4]["loss"], None, tasks[3]["loss"]]
    assert weights == [1.0, 1.0, 1.0]


def test_a_learned_weight_has_its_optimum_at_the_inverse_loss() -> None:
    layers = [{"name": "a", "layers": nn.Identity(), "loss": MSELoss(), "loss_weight": "auto", "loss_init_val": 0.5}]
    y, target = torch.full((4, 1), 3.0), torch.zeros(4, 1)
    graph, model = TaskGraph(layers, ["a"]), MTLModel(layers, ["a"])
    loss = graph.loss("a")
    assert loss is not None and loss(y, target).item() == 9
    torch.testing.assert_close(graph.weighted_loss("a", y, target), torch.tensor(0.5 * 9 - math.log(0.5)))
    # In torchMTL's loop the product of the two is the same, with the same gradient.
    _, (scaled,), (weight,) = model(y)
    (expected,) = torch.autograd.grad(graph.weighted_loss("a", y, target), list(graph.task_parameters("a")))
    product = weight * scaled(y, target)
    (found,) = torch.autograd.grad(product, list(model.parameters()))
    torch.testing.assert_close(product, graph.weighted_loss("a", y, target))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        graph.log_weights["a"].fill_(-math.log(9))
    (at_optimum,) = torch.autograd.grad(graph.weighted_loss("a", y, target), list(graph.task_parameters("a")))
    assert at_optimum.abs() < 1e-6


def test_a_loss_with_a_given_weight_or_none() -> None:
    layers = [
        {"name": "a", "layers": nn.Identity(), "loss": MSELoss(), "loss_weight": 3},
        {"name": "b", "layers": nn.Identity(), "loss": MSELoss()},
        {"name": "c", "layers": nn.Identity()},
    ]
    graph, y = TaskGraph(layers, ["a", "b", "c"]), torch.ones(2, 1)
    assert graph.weighted_loss("a", y, 0 * y).item() == 3
    assert graph.weighted_loss("b", y, 0 * y).item() == 1
    with pytest.raises(ValueError, match="'c' has no 'loss'"):
        graph.weighted_loss("c", y, y)


def test_the_attributes_of_torchmtl() -> None:
    tasks = readme()
    model = MTLModel(tasks, ["Task3", "Task1"])
    assert model.task_layers == tasks and model.output_tasks == ["Task3", "Task1"]
    assert model.layer_names == [task["name"] for task in tasks]
    assert list(model.losses) == model.layer_names and model.losses["Task1"] is tasks[3]["loss"]
    assert model.losses["Embed1"] is None
    assert model.loss_weights["Task1"] == 1.0 and isinstance(model.loss_weights["Task3"], Tensor)
    copy.deepcopy(model)


def test_layers_run_as_they_are_described() -> None:
    torch.manual_seed(0)
    tasks = readme()
    model, x = TaskGraph(tasks, ["Task1", "Task2", "Task3"]), torch.randn(3, 16)
    named = {task["name"]: task["layers"] for task in tasks}
    one, two = named["Embed1"](x), named["Embed2"](x)
    expected = {
        "Task1": named["Task1"](one),
        "Task2": named["Task2"](two),
        "Task3": named["Task3"](named["FNN"](torch.cat([one, two], 1))),
    }
    for task, y in model(x).items():
        torch.testing.assert_close(y, expected[task], rtol=0, atol=0)
    # Embed1 feeds Task1 and Task3, Embed2 feeds Task2 and Task3.
    shared = {id(p) for name in ("Embed1", "Embed2") for p in named[name].parameters()}
    assert {id(p) for p in model.shared_parameters()} == shared
    assert len(list(model.task_parameters("Task3"))) == 4 + 4 + 1


def test_only_what_outputs_depend_on_is_run() -> None:
    ran = []

    def note(name: str) -> Any:
        return lambda x: ran.append(name) or x

    layers = [
        {"name": "a", "layers": note("a")},
        {"name": "b", "layers": note("b"), "anchor_layer": "a"},
        {"name": "unused", "layers": note("unused"), "anchor_layer": "a"},
        {"name": "c", "layers": note("c"), "anchor_layer": "a"},
    ]
    model = TaskGraph(layers, ["b", "c"])
    model(torch.zeros(1))
    assert sorted(ran) == ["a", "b", "c"]
    ran.clear()
    model(torch.zeros(1), ["c"])
    assert ran == ["a", "c"]


def test_inputs_of_any_structure() -> None:
    layers = [
        {"name": "image", "layers": SimpleSelect(selection_axis="image")},
        {"name": "pair", "layers": SimpleSelect(selection_axis="pair"), "anchor_layer": "root"},
        {"name": "second", "layers": SliceSelect(slice(1, None)), "anchor_layer": "pair"},
        {"name": "sum", "layers": lambda a, b: a + b[0], "anchor_layer": ("image", "second")},
    ]
    model = TaskGraph(layers, ["sum"])
    x = {"image": torch.ones(2), "pair": [torch.zeros(2), torch.full((2,), 5.0)]}
    assert model(x)["sum"].tolist() == [6.0, 6.0]


def test_an_output_may_feed_another() -> None:
    first, second = Linear(2, 2), Linear(2, 1)
    model = TaskGraph(
        [{"name": "a", "layers": first}, {"name": "b", "layers": second, "anchor_layer": "a"}], ["a", "b"]
    )
    x = torch.randn(3, 2)
    torch.testing.assert_close(model(x)["b"], second(first(x)))
    assert {id(p) for p in model.shared_parameters()} == {id(p) for p in first.parameters()}
    assert list(model(x, ["b"])) == ["b"]


def test_a_loss_with_parameters_is_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, y: Tensor, target: Tensor) -> Tensor:
            return (self.scale * y - target).square().mean()

    loss = Scaled()
    model = TaskGraph([{"name": "a", "layers": Linear(2, 1), "loss": loss}], ["a"])
    assert any(p is loss.scale for p in model.task_parameters("a"))


def test_surgery_on_a_graph() -> None:
    torch.manual_seed(0)
    model = TaskGraph(readme(), ["Task1", "Task2", "Task3"])
    opt = MTLOptimizer(torch.optim.Adam(model.parameters(), 1e-2), "upgrad", model.shared_parameters())
    X = torch.randn(64, 16)
    y = {"Task1": X[:, :1], "Task2": (X[:, 1:2] > 0).float(), "Task3": X[:, 2:3]}
    first = None
    for _ in range(100):
        opt.zero_grad()
        losses = {task: model.weighted_loss(task, out, y[task]) for task, out in model(X).items()}
        first = first or sum(loss.item() for loss in losses.values())
        opt.step(losses)
    assert sum(loss.item() for loss in losses.values()) < 0.7 * first
    copy.deepcopy(model)


LAYER = {"name": "a", "layers": Linear(2, 2)}
WRONG = {
    "cycle": ([LAYER | {"anchor_layer": "b"}, {**LAYER, "name": "b", "anchor_layer": "a"}], ["a"], "circle: .* -> "),
    "missing parent": ([LAYER, {**LAYER, "name": "b", "anchor_layer": "aa"}], ["b"], "fed by 'aa'.*did you mean 'a'"),
    "duplicate": ([LAYER, LAYER], ["a"], "Two layers are named 'a'"),
    "mistyped key": ([LAYER | {"anchor_layers": "b"}], ["a"], "'anchor_layers'; did you mean 'anchor_layer'"),
    "unknown output": ([LAYER], ["b"], "Output 'b' is no layer"),
    "no output": ([LAYER], [], "outputs must name one layer"),
    "output twice": ([LAYER], ["a", "a"], "none twice"),
    "no name": ([{"layers": Linear(2, 2)}], ["a"], r"Layer 0 \(without a name\) needs a name"),
    "reserved name": ([LAYER | {"name": "root"}], ["root"], "other than 'root'"),
    "no layers": ([{"name": "a"}], ["a"], "needs 'layers'"),
    "no start": ([LAYER | {"loss_weight": "auto"}], ["a"], "needs loss_init_val, above 0"),
    "bad weight": ([LAYER | {"loss_weight": "much"}], ["a"], "number, 'auto' or None"),
    "bad loss": ([LAYER | {"loss": 3}], ["a"], "'loss' that can be called"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_could_not_run_is_refused(what: str) -> None:
    layers, outputs, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        TaskGraph(layers, outputs)


def test_its_names_are_no_trap() -> None:
    layers = [{"name": name, "layers": Linear(2, 2)} for name in ("g", "outputs", "losses")]
    assert list(TaskGraph(layers, ["g", "outputs", "losses"])(torch.zeros(1, 2))) == ["g", "outputs", "losses"]
    with pytest.raises(ValueError, match="'forward'.*Rename"):
        TaskGraph([LAYER | {"name": "forward"}], ["forward"])


def test_the_graph_and_its_picture(tmp_path: Any) -> None:
    model = TaskGraph(readme(), ["Task1", "Task2", "Task3"])
    expected = nx.DiGraph(
        {
            "root": ["Embed1", "Embed2"],
            "Embed1": ["CatTask", "Task1"],
            "Embed2": ["CatTask", "Task2"],
            "CatTask": ["FNN"],
            "FNN": ["Task3"],
        }
    )
    assert nx.utils.edges_equal(model.graph().edges, expected.edges, directed=True)
    assert model.draw(tmp_path / "graph.png").stat().st_size > 5000
