"""The Triton kernels against the CPU bodies: interpreted anywhere, and on the device where there is one."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import answers
from models import independent
from reference import matrices
from torch import Tensor

from gradsurgery import MTLOptimizer, list_methods, solvers
from gradsurgery.methods.gradvac import gradvac
from gradsurgery.methods.pcgrad import draw_orders, pcgrad
from gradsurgery.solvers.accelerator import TRITON
from gradsurgery.stats import Needs

pytestmark = pytest.mark.xdist_group("triton solvers")

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(
    not (TRITON and torch.cuda.is_available()), reason="there is no CUDA device, or no Triton for it"
)

CPU: dict[str, Any] = {
    "cagrad": solvers.cagrad_multipliers,
    "dual_cone": solvers.dual_cone,
    "dual_projection": solvers.dual_projection,
    "fair": solvers.fair,
    "min_norm": solvers.min_norm,
    "nash": solvers.nash,
    "pcgrad": pcgrad,
}
# Where no solution exists, the weights are those of the point of least norm, whatever the last iterate was.
FAIR = ("fair", "nash")
ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
# The interpreter takes its time: the solvers of many steps get the matrices that bear on what is special about them.
HARD = (
    "conflicting_pairs",
    "near_opposite",
    "exactly_opposite",
    "duplicate_rows",
    "zero_row",
    "all_zero",
    "single",
    "norm_spread_1e4",
    "scale_1e-12",
    "scale_1e12",
    "pareto_stationary",
)
QUICK = ("dual_projection", "min_norm", "pcgrad")


def conflicting(T: int, spread: float = 1.0, d: int | None = None) -> Tensor:
    """(T, d) rows whose mean is a tenth of what it was, with norms over a range of ``spread``."""
    rng = np.random.default_rng(T)
    J = rng.standard_normal((T, d or 2 * T)) * spread ** rng.uniform(-0.5, 0.5, (T, 1))
    return torch.from_numpy(J - 0.9 * J.mean(axis=0))


def arguments(name: str, G: Tensor) -> tuple[Any, ...]:
    """What the operator of that name takes, with Gramians (..., T, T)."""
    T = G.shape[-1]
    p = torch.linspace(1.0, 2.0, T, dtype=torch.float64)
    orders = draw_orders(T, torch.Generator().manual_seed(3), torch.device("cpu"))
    others = {
        "cagrad": (p / p.sum(), 0.4),
        "fair": (p, 2.0),
        "min_norm": (),
        "pcgrad": (orders,),
    }
    return (G, *others.get(name, (p,)))


def cases() -> dict[str, tuple[str, Tensor, tuple[Any, ...]]]:
    """Name -> operator, Jacobians (N, T, d) and arguments."""
    found = {}

    def add(name: str, label: str, J: Tensor) -> None:
        found[f"{name}-{label}"] = (name, J.unsqueeze(0), arguments(name, J @ J.mT))

    for name in CPU:
        for zoo in ZOO if name in QUICK else HARD:
            add(name, zoo, ZOO[zoo])
        sizes = {"dual_cone": (8,), "cagrad": (10,), "fair": (10,), "nash": (17, 40)}
        for T in sizes.get(name, (10, 17, 40, 64)):
            add(name, f"conflicting_{T}", conflicting(T))
        if name != "dual_cone":
            add(name, "spread_10", conflicting(10, 1e4))
            add(name, "dependent_9", conflicting(9, d=4))
        several = [ZOO["random_5"], ZOO["duplicate_rows"], conflicting(5), ZOO["rank_two"]]
        J = torch.stack([J[:, :8] for J in several[: 4 if name in QUICK else 2]])
        found[f"{name}-batch"] = (name, J, arguments(name, J @ J.mT))
    for c in (0.0, 0.1, 5.0):
        J = ZOO["conflicting_pairs"]
        found[f"cagrad-c={c}"] = ("cagrad", J.unsqueeze(0), (J @ J.T, torch.full((4,), 0.25).double(), c))
    for alpha in (0.3, 1.0, 10.0):
        J = ZOO["random_5"]
        found[f"fair-alpha={alpha}"] = ("fair", J.unsqueeze(0), (J @ J.T, torch.ones(5).double(), alpha))
    return found


CASES = cases()
NAN = ("cagrad", "dual_cone", "dual_projection", "fair", "min_norm", "nash")


def with_nan(name: str) -> tuple[Any, ...]:
    G = torch.eye(3, dtype=torch.float64)
    G[0, 1] = math.nan
    return arguments(name, G)


def gradvac_problem() -> tuple[Tensor, Tensor, Tensor, float]:
    J = torch.stack([conflicting(5), 3 * conflicting(5).flip(1) ** 2])
    target = torch.from_numpy(np.random.default_rng(0).uniform(-0.4, 0.9, (2, 5, 5)))
    return J @ J.mT, target, draw_orders(5, torch.Generator().manual_seed(1), torch.device("cpu")), 0.01


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels make of every case."""
    problems = {label: (name, given) for label, (name, _, given) in CASES.items()}
    problems |= {f"{name}-nan": (name, with_nan(name)) for name in NAN}
    problems["gradvac"] = ("gradvac", gradvac_problem())
    return answers(problems, tmp_path_factory.mktemp("triton"))


def check(name: str, J: Tensor, given: tuple[Any, ...], answer: Any) -> None:
    """The direction is that of the CPU body to 1e-9, and the residual as good as its own."""
    G = given[0]
    expected = CPU[name](*given)
    if name == "pcgrad":
        w, w0, residual = answer, expected, None
    else:
        (w, residual), (w0, residual0) = answer, expected
        assert residual.shape == residual0.shape
    assert w.shape == w0.shape
    w, w0 = w.reshape(-1, 1, J.shape[1]), w0.reshape(-1, 1, J.shape[1])
    u, u0 = (w @ J)[:, 0], (w0 @ J)[:, 0]
    floor = 1e-13 * (w0.abs() @ J.norm(dim=-1).unsqueeze(-1))[:, 0, 0]
    assert ((u - u0).norm(dim=-1) <= 1e-9 * u0.norm(dim=-1) + floor).all()
    if residual is None:
        return
    residual, residual0 = residual.reshape(-1), residual0.reshape(-1)
    solved = residual0 <= 1e-8
    if name not in FAIR:
        assert solved.all()
    assert (residual <= 1e-11 + 10 * residual0)[solved].all()
    assert (10 * residual >= residual0)[~solved].all()
    for n, g in enumerate(G.reshape(-1, *G.shape[-2:])):
        if (solved[n] or name in FAIR) and (true := own_residual(name, g, w[n, 0], given)) is not None:
            assert abs(residual[n] - true) <= 1e-13 * len(g) + 1e-6 * true + 1e-15 * rounding(name, w[n, 0], g)


def own_residual(name: str, G: Tensor, w: Tensor, given: tuple[Any, ...]) -> float | None:
    """The residual that these weights have, by its definition."""
    square = G.diagonal()
    if name == "min_norm":
        slope = G @ w
        least = square.min()
        return float((w @ slope - slope.min()).clamp(min=0) / (least if least > 0 else 1.0))
    if name in FAIR:
        there = square > 0
        power = 1.0 if name == "nash" else 1 / given[2]
        ratio = (G @ w)[there] * (w / given[1])[there] ** power
        return float((ratio - 1).abs().max()) if len(ratio) else 0.0
    return None


def rounding(name: str, w: Tensor, G: Tensor) -> float:
    """How much larger than the answer the numbers are of which the residual is the difference."""
    norm = G.diagonal().sqrt()
    if name == "min_norm":
        return float((w @ norm) ** 2 / norm.min().clamp(min=1e-300) ** 2) if norm.min() > 0 else 0.0
    return float((w * norm).sum() * (w * norm).max())


@needs_triton
@pytest.mark.parametrize("label", CASES)
def test_interpreted_kernel_agrees_with_the_cpu(label: str, interpreted: dict[str, Any]) -> None:
    name, J, given = CASES[label]
    check(name, J, given, interpreted[label])


@needs_triton
@pytest.mark.parametrize("name", NAN)
def test_interpreted_kernel_passes_nan_on(name: str, interpreted: dict[str, Any]) -> None:
    w, residual = interpreted[f"{name}-nan"]
    assert w.isnan().any()
    assert residual.isnan()


@needs_triton
def test_interpreted_gradvac_moves_weights_and_targets(interpreted: dict[str, Any]) -> None:
    check_gradvac(interpreted["gradvac"])


def check_gradvac(answer: tuple[Tensor, Tensor]) -> None:
    from gradsurgery.methods.gradvac import _gradvac

    for ours, expected in zip(answer, _gradvac(*gradvac_problem()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


COMPILE = """
import importlib
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gradsurgery.solvers.device import launch

shared = {"RADIUS": 0.4, "BETA": 0.01}
# The fair kernel serves two operators, FairGrad's and, at a power of 1, Nash-MTL's.
parts = [(name, 0.5) for name in ("cagrad", "dual_cone", "fair", "min_norm", "visits")] + [("fair", 1.0)]
for name, power in parts:
    constants = {**shared, "POWER": power}
    module = importlib.import_module(f"gradsurgery.solvers.device.{name}")
    for kernel in [f for name, f in vars(module).items() if name.endswith("_kernel")]:
        types = {"T": "i32", "orders": "*i64"}
        signature = {a: "constexpr" if a.isupper() and a != "T" else types.get(a, "*fp64") for a in kernel.arg_names}
        block = int(sys.argv[1])
        values = {a: constants.get(a, block) for a, kind in signature.items() if kind == "constexpr"}
        options = {"num_warps": launch.warps_of(block)}
        compiled = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
        assert "f32" not in compiled.asm["ttir"], f"{kernel.__name__} computes something in single precision"
        print(kernel.__name__)
"""


@needs_triton
def test_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    """No device is needed for that, and all types are then checked as the interpreter does not."""
    import triton

    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this Triton brings no ptxas")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 8


# From here on with a device.


def on_device(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.cuda() if isinstance(x, Tensor) else x for x in given)


@needs_cuda
@pytest.mark.parametrize("label", CASES)
def test_kernel_agrees_with_the_cpu(label: str) -> None:
    name, J, given = CASES[label]
    answer = CPU[name](*on_device(given))
    check(name, J, given, answer.cpu() if name == "pcgrad" else tuple(x.cpu() for x in answer))


@needs_cuda
@pytest.mark.parametrize("T", [2, 3, 30, 64, 100, 128])
@pytest.mark.parametrize("name", CPU)
def test_kernel_agrees_with_the_cpu_on_many_tasks(name: str, T: int) -> None:
    J = torch.stack([conflicting(T), 1e3 * conflicting(T, 1e2), conflicting(T).flip(0)])
    given = arguments(name, J @ J.mT)
    answer = CPU[name](*on_device(given))
    check(name, J, given, answer.cpu() if name == "pcgrad" else tuple(x.cpu() for x in answer))


@needs_cuda
def test_gradvac_on_the_device() -> None:
    from gradsurgery.methods.gradvac import _gradvac

    w, target = _gradvac(*on_device(gradvac_problem()))
    check_gradvac((w.cpu(), target.cpu()))
    G, _, orders, _ = gradvac_problem()
    torch.testing.assert_close(gradvac(G.cuda(), orders=orders.cuda()).cpu(), gradvac(G, orders=orders))


@needs_cuda
@pytest.mark.parametrize("name", NAN)
def test_kernel_passes_nan_on(name: str) -> None:
    w, residual = CPU[name](*on_device(with_nan(name)))
    assert w.isnan().any()
    assert residual.isnan()


@needs_cuda
@pytest.mark.parametrize("name", CPU)
def test_kernel_is_captured_in_a_graph(name: str) -> None:
    J, other = conflicting(6), conflicting(6).flip(1) + 1
    given = on_device(arguments(name, J @ J.T))
    CPU[name](*given)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = CPU[name](*given)
    for rows in (J, other):
        given[0].copy_(rows @ rows.T)
        graph.replay()
        torch.cuda.synchronize()
        check(
            name,
            rows.unsqueeze(0),
            arguments(name, rows @ rows.T),
            answer.cpu() if name == "pcgrad" else tuple(x.cpu() for x in answer),
        )


SYNCHRONISES = {
    **dict.fromkeys(("aligned_mtl", "config", "imtl", "imtl_g"), "torch.linalg.eigh reads its status on the host"),
    **dict.fromkeys(("conicgrad", "epo"), "its solver has no kernel"),
}


@needs_cuda
@pytest.mark.parametrize("blocks", ["model", "tensor"])
@pytest.mark.parametrize("name", list_methods())
def test_a_step_never_waits_for_the_device(name: str, blocks: str) -> None:
    if name in SYNCHRONISES:
        pytest.xfail(SYNCHRONISES[name])
    torch.manual_seed(0)
    trunk = torch.nn.Linear(8, 8).cuda()
    heads = torch.nn.ModuleList(torch.nn.Linear(8, 1).cuda() for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    opt = MTLOptimizer(torch.optim.SGD(parameters, 0.01), name, trunk.parameters(), blocks=blocks)  # pyright: ignore[reportArgumentType]
    x = torch.randn(16, 8, device="cuda")

    def losses() -> list[Tensor]:
        z = trunk(x).tanh()
        return [head(z).square().mean() for head in heads]

    def two_more(absent: bool = False) -> dict[str, Any]:
        batches = [losses(), losses()]
        return independent(name, *([a, None if absent else b, c] for a, b, c in batches))

    for _ in range(2):  # kernels are compiled and state is made
        opt.zero_grad()
        opt.step(losses(), **two_more())
    opt.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.backward(losses(), **two_more())
        if Needs.COLUMNS not in opt._surgery.rule.method.needs:
            given: list[Tensor | None] = [*losses()]
            given[1] = None
            opt.backward(given, **two_more(absent=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
