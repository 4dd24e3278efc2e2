"""The benchmarks measure what they say: contenders take the same step, and bounds can be missed."""

import copy
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import agreement, memory, overhead, pictures, problems, record, scaling
from benchmarks.contenders import CONTENDERS, DeclinedError, Step, contenders, libmtl, prepare, shared_gradient
from benchmarks.problems import Model, Problem, mlp

CPU = torch.device("cpu")
EXACT = ("sequential", "batched", "gramian", "auto", "every 10")
SUMS = ("plain", "plain plus heads", "floor")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.MODELS, "tiny", Model(mlp(2, 8, 6), lambda trunk: trunk[-2]))
    around = Model(lambda: (Around(), torch.randn(6, 8), 8), lambda trunk: trunk.first)
    monkeypatch.setitem(problems.MODELS, "around", around)


class Around(nn.Module):
    """Takes its child's weight past the child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.first.weight) * self.scale


def refuses(problem: Problem, method: str) -> Step:
    raise ValueError(f"no {method}, says {Path(__file__).resolve()}")


def gradient(name: str, make: Any = None, method: str = "upgrad") -> torch.Tensor:
    """(d,) that one step leaves in ``.grad``."""
    problem = Problem("tiny", 3, CPU)
    (make or CONTENDERS[name])(problem, method).take()
    return shared_gradient(problem)


@pytest.mark.parametrize("name", [*EXACT, *SUMS])
def test_exact_contenders_take_the_same_step(name: str) -> None:
    expected = gradient("plain" if name in SUMS else "sequential")
    torch.testing.assert_close(gradient(name), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["torchjd vmap", "torchjd sequential", "torchjd autogram"])
def test_torchjd_takes_it_up_to_its_regularisation(name: str) -> None:
    pytest.importorskip("torchjd")
    expected = gradient("sequential")
    assert (gradient(name) - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.filterwarnings("default")
def test_compiled_takes_it() -> None:
    from functools import partial

    from gradsurgery import MTLOptimizer, compile_backward

    # What `compiled` does, by the backend that needs no compiler.
    problem = Problem("tiny", 3, CPU)
    opt = MTLOptimizer(problem.base, "upgrad", problem.shared)
    partial(compile_backward(opt, problem.net, problems.losses, backend="aot_eager"))(problem.x, problem.y)
    torch.testing.assert_close(shared_gradient(problem), gradient("sequential"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["representation", "last block"])
def test_approximate_contenders_run(name: str) -> None:
    step = prepare(name, CONTENDERS[name], Problem("tiny", 3, CPU), "upgrad")
    assert step.engine() == ("representation" if name == "representation" else "batched")


def test_libmtl_is_hosted(tmp_path: Path) -> None:
    weighting = tmp_path / "LibMTL" / "weighting"
    weighting.mkdir(parents=True)
    # A stand-in with the interface: the sum of the tasks' gradients, found the roundabout way.
    (weighting / "PCGrad.py").write_text(
        "import torch\n"
        "class PCGrad(torch.nn.Module):\n"
        "    def init_param(self): pass\n"
        "    def backward(self, losses, **options):\n"
        "        assert not self.rep_grad and self.task_num == len(losses)\n"
        "        rows = []\n"
        "        for n, loss in enumerate(losses):\n"
        "            loss.backward(retain_graph=n + 1 < len(losses))\n"
        "            rows.append([p.grad.clone() for p in self.get_share_params()])\n"
        "            self.zero_grad_share_params()\n"
        "        for n, p in enumerate(self.get_share_params()):\n"
        "            p.grad.data = sum(row[n] for row in rows)\n"
    )
    before = {name for name in sys.modules if name.startswith("LibMTL")}
    try:
        torch.testing.assert_close(gradient("libmtl", libmtl(tmp_path), "pcgrad"), gradient("plain"))
    finally:
        for name in [name for name in sys.modules if name.startswith("LibMTL") and name not in before]:
            del sys.modules[name]
    with pytest.raises(DeclinedError, match="no cagrad"):
        prepare("libmtl", libmtl(tmp_path), Problem("tiny", 2, CPU), "cagrad")
    assert {"libmtl", "compiled"} <= contenders(compile=True, checkout=tmp_path).keys()


def test_who_declines_is_not_timed() -> None:
    cell = overhead.measure("tiny", 2, "upgrad", CONTENDERS | {"other": refuses}, 2, 9.0, CPU)
    assert cell["declined"] == {"other": "ValueError: no upgrad, says ..."} and "other" not in cell["seconds"]
    assert all(len(found) == 2 and min(found) > 0 for found in cell["seconds"].values())
    assert cell["engines"]["auto"] and overhead.reasons([cell])[0].startswith("- other (tiny T=2): ValueError")


def test_autogram_declines_where_its_gramian_is_wrong() -> None:
    """A parent that uses its child's parameters goes round TorchJD's hooks."""
    pytest.importorskip("torchjd")
    with pytest.raises(DeclinedError):
        prepare("torchjd autogram", CONTENDERS["torchjd autogram"], Problem("around", 2, CPU), "upgrad")


def test_fallbacks_decline() -> None:
    def falls_back(problem: Problem, method: str) -> Step:
        return Step(lambda: None, lambda: "sequential")

    with pytest.raises(DeclinedError, match="sequential ran"):
        prepare("batched", falls_back, Problem("tiny", 2, CPU), "upgrad")


def test_a_price_of_several_steps() -> None:
    taken: list[int] = []
    step = Step(lambda: taken.append(1), shares=(0.1, 0.9))
    assert overhead.timed(step, 3) > 0 and len(taken) == 2 + 6


@pytest.mark.parametrize("shares", [(1.0,), (0.1, 0.9)])
def test_what_another_left_in_the_caches_has_no_price(shares: tuple[float, ...]) -> None:
    """The first step of each kind waits long, and is not timed."""
    waits = [0.2] * len(shares)
    step = Step(lambda: time.sleep(waits.pop() if waits else 0.0), shares=shares)
    assert overhead.timed(step, 2) < 0.05 and not waits


def test_operators_tell_why_a_bound_is_missed() -> None:
    a = torch.randn(300, 300)
    once, often = (overhead.by_operator(Step(lambda n=n: [a @ a for _ in range(n)])) for n in (1, 20))
    assert often["aten::mm"] > 2 * once["aten::mm"] and often["aten::mm"] > 0.5 * sum(often.values())
    found = overhead.why({"floor": {"mm": 2.0, "add": 2.0}, "sequential": {"mm": 2.01, "copy": 1.0}})
    assert found == "copy +25.0, add -50.0"
    cell = synthetic()["results"][1] | {"operators": {"floor": {"mm": 1.0}, "sequential": {"mm": 1.2}}}
    cell["seconds"]["sequential"] = [4.0, 4.0, 4.0]
    missed = overhead.of_cell(cell)
    assert missed[0].startswith("MISSED mlp1024 T=2: sequential / floor") and missed[1].endswith("operator: mm +20.0")


def test_a_cell_is_measured_in_a_process_of_its_own() -> None:
    args = Namespace(
        models=["mlp64"], tasks=[2], only=["floor", "sequential"], method="upgrad", rounds=2, seconds=1.0, device="cpu",
        compiled=False, libmtl=None,
    )  # fmt: skip
    (cell,) = overhead.run(args)["results"]
    assert cell["seconds"].keys() == {"plain", "floor", "sequential"}
    assert cell["operators"].keys() == {"floor", "sequential"}
    with pytest.raises(RuntimeError, match="mlp64, T=2 ended with 1"):
        overhead.apart(["nobody"], "mlp64", 2, args)


def test_words_have_no_paths() -> None:
    assert record.in_words(ValueError("in /home/someone/x.py, 1/2\nmore")) == "ValueError: in ..., 1/2"


def synthetic() -> dict[str, Any]:
    """Prices at which every bound but two is held."""
    prices = {"plain": 1.0, "plain plus heads": 1.01, "floor": 3.0, "sequential": 3.05, "auto": 1.0, "libmtl": 4.0}
    prices |= {"gramian": 1.1, "representation": 1.2, "last block": 1.7, "torchjd vmap": 4.0, "batched": 1.0}
    cells = [("mlp64", 8), ("mlp1024", 2), ("mlp1024", 10), ("mlp2048", 10), ("resnet18", 3), ("celeba", 40)]
    results = [
        {
            "model": model,
            "tasks": T,
            "seconds": {name: [0.01 * p, 0.02 * p, 0.04 * p] for name, p in prices.items()},
            "engines": {"auto": "gramian"},
            "declined": {"torchjd autogram": "ValueError: BatchNorm"},
        }
        for model, T in cells
    ]
    return {"machine": {"processor": "none"}, "results": results}


def test_verdicts_can_miss() -> None:
    lines = overhead.verdicts(synthetic()["results"])
    missed = [line for line in lines if line.startswith("MISSED")]
    assert {line.split(": ")[1].split(" / ")[0] for line in missed} == {"representation less the heads", "last block"}
    assert any(line.startswith("held   mlp64 T=8: sequential / batched: 3.05") for line in lines)
    assert any("geometric mean of 6: 4" in line for line in lines)
    slow = synthetic()["results"]
    slow[0]["seconds"]["auto"] = [9.0, 9.0, 9.0]
    assert any(
        line.startswith("MISSED TorchJD's better mode / auto, least, at mlp64") for line in overhead.verdicts(slow)
    )
    cell = {"model": "mlp2048", "tasks": 2, "multiples": {"sequential": 3.1, "gramian": 1.0}, "layer": 1 / 3}
    assert [line[:6].strip() for line in memory.verdicts([cell])] == ["MISSED", "held"]


def test_tables() -> None:
    text = overhead.report(synthetic())
    assert "| mlp64 | 8 | 20 |" in text and "1.00 (1.00-1.00) gramian" in text and "| - |" in text
    assert "- torchjd autogram (mlp64 T=8, " in text


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.write("x-overhead", synthetic())
    cells = [{"model": "mlp2048", "tasks": T, "multiples": {"sequential": T, "gramian": 0.0}} for T in (2, 10)]
    record.write("x-memory", {"results": cells})
    drawn = pictures.pictures("x", tmp_path / "docs")
    assert [path.name for path in drawn] == ["price.png", "memory.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert pictures.pictures("unknown", tmp_path / "docs") == []
    assert pictures.apart([0.0, 1.0, 0.1], 0.5) == [0.0, 1.0, 0.5]


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 64 MiB: the allocator always asks the system for those. In a process of its own, as it is used: the
    # heap of this one shrinks when it likes.
    code = (
        "import torch\nfrom benchmarks.memory import peak\nfrom benchmarks.contenders import Step\n"
        "held, CPU = [], torch.device('cpu')\nplain = peak(Step(lambda: None), CPU)\n"
        "print(peak(Step(lambda: held.append(torch.ones(16 << 20))), CPU) - plain)"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True)
    more = int(run.stdout)
    assert 96 << 20 < more < 192 << 20
    found = memory.above("tiny", 2, "sequential", "upgrad", CPU)
    assert found.keys() == {"multiples"}
    monkeypatch.setitem(CONTENDERS, "sequential", refuses)
    assert memory.above("tiny", 2, "sequential", "upgrad", CPU)["declined"].startswith("ValueError")


def test_agreement() -> None:
    found = agreement.measure("tiny", "mgda", 2, CPU)
    assert found["agreement"].keys() == set(agreement.APPROXIMATIONS) and not found["declined"]
    assert all(-1 <= c <= 1 + 1e-9 for kept in found["agreement"].values() for c in kept["cosine"])
    assert "| tiny | mgda |" in agreement.table([found])
    assert agreement.compare(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])) == pytest.approx((1.0, 0.0))


def test_copies_are_apart() -> None:
    problem = Problem("tiny", 2, CPU)
    twin = copy.deepcopy(problem)
    CONTENDERS["plain"](twin, "").take()
    assert shared_gradient(twin).abs().sum() > 0 and problem.shared[0].grad is None
    assert {id(p) for p in twin.last} < {id(p) for p in twin.shared}


def test_imports_are_late() -> None:
    code = (
        "import sys; sys.modules['torchjd'] = sys.modules['matplotlib'] = sys.modules['torchvision'] = None\n"
        "import benchmarks, benchmarks.overhead, benchmarks.memory, benchmarks.agreement, benchmarks.pictures\n"
        "import benchmarks.architectures\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parent.parent)


def test_what_architectures_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import architectures

    weights = 11.19e6 * 4 / 2**20
    mib = architectures.memory("hps", Namespace(tasks=2, libmtl=None))
    assert mib is not None and 1.9 * weights < mib
    monkeypatch.setattr(architectures, "memory", lambda name, args: None)
    monkeypatch.setattr(architectures, "list_architectures", lambda: ["hps", "mtan", "esmm"])
    monkeypatch.setattr(architectures, "BATCH", 2)
    found = architectures.run(Namespace(tasks=2, rounds=2, libmtl=None))
    assert found["results"].keys() == {"hps", "mtan", "esmm"} and not found["declined"]
    assert found["results"]["mtan"]["flops"] > found["results"]["hps"]["flops"] > 0
    text = architectures.report(found)
    assert "| hps | 11.19 | 1.00 | 1.00 |" in text
    assert [path.name for path in architectures.draw(tmp_path)] == ["hps.png", "mtan.png", "esmm.png"]


def test_forecasts_count_what_a_step_sends() -> None:
    """(T + 1) d of rows under DDP where summed rows are 2 T d, and nothing where there is one rank."""
    rows = scaling.on_a_cluster(3)
    found = {(row["parameters"], row["ranks"], row["road"]): row for row in rows}
    d, s = 1e9, 2
    for W in (8, 1024):
        share = (W - 1) / W
        assert found["1 B", W, "plain DDP"]["bytes"] == pytest.approx(2 * d * s * share)
        assert found["1 B", W, "sequential"]["bytes"] == pytest.approx(4 * d * s * share)
        assert found["1 B", W, "rows all-reduced"]["bytes"] == pytest.approx(6 * d * s * share)
        assert found["1 B", W, "representation"]["bytes"] == found["1 B", W, "plain DDP"]["bytes"]
        assert found["1 B", W, "sequential"]["seconds"] < found["1 B", W, "rows all-reduced"]["seconds"]
    assert all(row["bytes"] == 0 for row in rows if row["ranks"] == 1)
    assert ("70 B", 8, "sequential") not in found and ("70 B", 8, "sequential, FSDP2") in found
    text = scaling.report({"tasks": 3, "model": rows})
    assert "Assumed:" in text and "1024" in text


def test_scaling_is_checked_against_counted_bytes() -> None:
    """Two real ranks: what their collectives were given is what the model says."""
    found = scaling.measured(2, 2, 1)
    wire = scaling.on_the_wire(found["elements"], 2)
    _, forecast = scaling.forecast("sequential", found["d"], 2, 2, scaling.HERE, forward=0.0, backward=0.0)
    assert wire == pytest.approx(forecast, rel=1e-3)
