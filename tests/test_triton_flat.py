"""The kernels over flat gradients against float64 and the torch bodies: interpreted anywhere, and on a device."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import answers
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gradsurgery import MTLOptimizer, aggregate, kernels
from gradsurgery.kernels.accelerator import TRITON
from gradsurgery.methods.graddrop import GradDrop, draw
from gradsurgery.methods.trimmed_mean import TrimmedMean

pytestmark = pytest.mark.xdist_group("triton flat")

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(
    not (TRITON and torch.cuda.is_available()), reason="there is no CUDA device, or no Triton for it"
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TASKS = (1, 2, 3, 10, 40, 100)
# Odd ends, a block of one column, an empty one within and one at the end; those of an optimizer's layout; one block.
BOUNDS = {"odd": [0, 1, 1, 38, 613, 613], "aligned": [0, 32, 32, 1088], "one": [0, 67]}
# Rounding of the sums, relative to the sum of their terms' sizes, and of what is stored.
SUM = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rows(T: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(T, d), rows 3 or 32 elements further apart than they are long; the last is zero where there are several."""
    generator = torch.Generator().manual_seed(100 * T + seed)
    J = torch.randn(T, d + (32 if d % 32 == 0 else 3), generator=generator).to(dtype)[:, :d]
    if T > 1:
        J[-1] = 0
    return J


def problem(name: str, T: int, dtype: torch.dtype, bounds: list[int], option: Any = None) -> tuple[Any, ...]:
    """The arguments of one of the kernels."""
    J = rows(T, bounds[-1], dtype)
    generator = torch.Generator().manual_seed(1)
    if name == "gramian":
        return J, bounds, rows(T, bounds[-1], dtype, 7) if option == "other" else None
    if name == "combine":
        blocks = 1 if option == "same" else len(bounds) - 1
        return torch.randn(blocks, T, generator=generator, dtype=torch.float64), J, bounds
    if name == "graddrop":
        return J, draw(J.shape[1:], generator, J.device), option
    return J, option


OPTIONS = {"gramian": ("own", "other"), "combine": ("each", "same"), "graddrop": (0.0, 0.3), "trimmed_mean": (0, 1, 60)}


def cases() -> dict[str, tuple[str, tuple[Any, ...]]]:
    found = {}
    for name, options in OPTIONS.items():
        for T in TASKS:
            for dtype in DTYPES:
                # The interpreter takes its time.
                layouts = BOUNDS if T <= 3 and name in ("gramian", "combine") else ("odd",) if T <= 10 else ("one",)
                for layout in layouts:
                    for option in options:
                        label = f"{name}-{T}-{str(dtype).removeprefix('torch.')}-{layout}-{option}"
                        found[label] = name, problem(name, T, dtype, BOUNDS[layout], option)
    return found


def unclean() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Columns with a NaN, an infinity, and two that cancel."""
    found = {}
    for T in (2, 3, 10, 40):
        for dtype in DTYPES:
            J = rows(T, 45, dtype)
            J[0, 3], J[0, 7], J[1, 7], J[1, 20], J[0, 44] = math.nan, math.inf, -math.inf, math.inf, -math.inf
            kind = str(dtype).removeprefix("torch.")
            u = torch.rand(45, generator=torch.Generator().manual_seed(2))
            for name, given in {"graddrop": (u, 0.0), "trimmed_mean": (1,), "gramian": ([0, 3, 5, 45], None)}.items():
                found[f"{name}-{T}-{kind}-unclean"] = name, (J, *given)
            found[f"graddrop-{T}-{kind}-unclean-leak"] = "graddrop", (J, u, 0.5)
            w = torch.ones(3, T, dtype=torch.float64)
            found[f"combine-{T}-{kind}-unclean"] = "combine", (w, J, [0, 3, 5, 45])
    return found


CASES = cases()
UNCLEAN = unclean()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels make of every case."""
    return answers({**CASES, **UNCLEAN}, tmp_path_factory.mktemp("triton"))


def torch_body(name: str, given: tuple[Any, ...]) -> Tensor:
    """The same on the CPU; column by column in float32 at least, which half precision is rounded from once."""
    if name in ("gramian", "combine"):
        return getattr(kernels, name)(*given)
    J, *others = given
    wide = J.to(torch.promote_types(J.dtype, torch.float32))
    if name == "trimmed_mean":
        return TrimmedMean(trim=others[0]).direction(wide, {}, None).to(J.dtype)
    u, leak = others
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradsurgery.methods.graddrop.draw", lambda *_: u)
        return GradDrop(leak=leak).direction(wide, {}, None).to(J.dtype)


def truth(name: str, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The answer in float64, block by block or column by column, and the size of the terms that it is the sum of."""
    if name == "gramian":
        J, bounds, other = given[0].double(), given[1], given[0 if given[2] is None else 2].double()
        blocks = [(J[:, a:b], other[:, a:b]) for a, b in pairwise(bounds)]
        norms = [torch.outer(x.norm(dim=1), y.norm(dim=1)) for x, y in blocks]
        return torch.stack([x @ y.T for x, y in blocks]), torch.stack(norms)
    if name == "combine":
        w, J, bounds = given[0], given[1].double(), given[2]
        w = w.expand(len(bounds) - 1, -1)
        blocks = [(x, J[:, a:b]) for x, (a, b) in zip(w, pairwise(bounds), strict=True)]
        return torch.cat([x @ y for x, y in blocks]), torch.cat([x.abs() @ y.abs() for x, y in blocks])
    J = given[0].double()
    size = J.abs().sum(dim=0)
    if name == "trimmed_mean":
        cut = min(given[1], (len(J) - 1) // 2)
        columns = [sorted(column)[cut : len(J) - cut] for column in J.T.tolist()]
        return torch.tensor([sum(column) / len(column) for column in columns], dtype=torch.float64), size
    _, u, leak = given
    direction = []
    for column, drawn in zip(J.T.tolist(), u.tolist(), strict=True):
        total, absolute = sum(column), sum(map(abs, column))
        purity = total / absolute if absolute else 0.0
        kept = sum(max(x, 0.0) if 0.5 * (1 + purity) > drawn else min(x, 0.0) for x in column)
        direction.append(leak * total + (1 - leak) * kept)
    return torch.tensor(direction, dtype=torch.float64), size


def check(name: str, given: tuple[Any, ...], answer: Tensor) -> None:
    J = given[1] if name == "combine" else given[0]
    expected, size = truth(name, given)
    body = torch_body(name, given)
    assert answer.dtype == body.dtype
    assert answer.shape == body.shape
    stored = STORED[J.dtype] if name != "gramian" else 0.0
    for reference in (expected, body.double()):
        error = (answer.double() - reference).abs()
        # The bodies round as much themselves.
        assert (error <= 2 * SUM[J.dtype] * size + 2 * stored * reference.abs() + 1e-30).all()


@needs_triton
@pytest.mark.parametrize("label", CASES)
def test_interpreted_kernel_agrees_with_float64_and_the_torch_body(label: str, interpreted: dict[str, Any]) -> None:
    name, given = CASES[label]
    check(name, given, interpreted[label])


@needs_triton
@pytest.mark.parametrize("label", UNCLEAN)
def test_interpreted_kernel_passes_nan_and_infinity_on(label: str, interpreted: dict[str, Any]) -> None:
    name, given = UNCLEAN[label]
    check_unclean(name, given, interpreted[label])


def check_unclean(name: str, given: tuple[Any, ...], answer: Tensor) -> None:
    body = torch_body(name, given)
    assert torch.equal(answer.isfinite(), body.isfinite())
    assert not body.isfinite().all()
    if name != "gramian":
        J = given[1] if name == "combine" else given[0]
        finite = body.isfinite()
        size, expected = J.double().abs().sum(dim=0)[finite], body[finite].double()
        slack = 2 * SUM[J.dtype] * size + 2 * STORED[J.dtype] * expected.abs() + 1e-30
        assert ((answer[finite].double() - expected).abs() <= slack).all()


@needs_triton
def test_plain_cpu_tensors_never_reach_the_kernels() -> None:
    code = """if True:
        import sys, torch, gradsurgery
        from gradsurgery import kernels
        J = torch.randn(3, 100)
        kernels.combine(torch.ones(2, 3), J, [0, 40, 100]), kernels.gramian(J, [0, 40, 100])
        gradsurgery.aggregate(J, "graddrop"), gradsurgery.aggregate(J, "trimmed_mean")
        assert not kernels.has_kernel(J) and "triton" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
def test_operators_tell_a_compiler_what_they_return() -> None:
    with FakeTensorMode():
        J = torch.empty(3, 100, device="cuda", dtype=torch.bfloat16)
        w = torch.empty(2, 3, device="cuda", dtype=torch.float64)
        assert kernels.has_kernel(J)
        G, u = kernels.gramian(J, [0, 40, 100]), kernels.combine(w, J, [0, 40, 100])
        assert (G.shape, G.dtype, G.device.type) == ((2, 3, 3), torch.float64, "cuda")
        assert (u.shape, u.dtype) == ((100,), torch.bfloat16)
        for method in (GradDrop(), TrimmedMean()):
            assert method.direction(J, {}, None).shape == (100,)


COMPILE = """
import importlib
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

# Two of the modules lie hidden behind functions of their name.
columns, combine, gramian = (
    importlib.import_module(f"gradsurgery.kernels.device.{name}") for name in ("columns", "combine", "gramian")
)

WIDE = {"fp64": tl.float64}


def build(kernel, kind, warps, align, **constants):
    constants = {"ALIGN": align, "ACC": WIDE.get(kind, tl.float32), **constants}
    types = {"table": "*i64", "partial": "*fp64", "gramian": "*fp64", "weights": "*fp64", "uniform": "*fp32"}
    types |= dict.fromkeys(("jacobian", "other", "out"), f"*{kind}")
    signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32") for p in kernel.params}
    constants = {name: value for name, value in constants.items() if name in signature}
    # Pointers are multiples of 16 bytes, and n one of 16 elements.
    fits = [i for i, name in enumerate(signature) if name in types or name == "n"] if align > 1 else []
    attributes = {(i,): [["tt.divisibility", 16]] for i in fits}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert len(compiled.asm["cubin"]) > 0
    vector = {"fp64": "ld.global.v2.b64", "fp32": "ld.global.v4.b32", "bf16": "ld.global.v4.b32"}[kind]
    copied = "cp.async.cg" in compiled.asm["ptx"]
    wide = vector in compiled.asm["ptx"] or copied
    assert wide == (align > 1) or constants.get("VECTOR", 4) < 4, f"{kernel.__name__} {kind} {align} {constants}"
    assert "tf32" not in compiled.asm["ptx"]
    print(kernel.__name__)


dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
few = [("fp32", 2, 0, 0), ("fp32", 3, 1, 1), ("fp32", 16, 0, 1), ("bf16", 3, 0, 1), ("fp64", 3, 1, 0)]
for kind, T, cross, table in few:
    vector = gramian.vector_of(T, dtypes[kind], cross=bool(cross))
    options = {"T": T, "LANES": gramian.LANES, "VECTOR": vector, "CROSS": bool(cross), "TABLE": bool(table)}
    build(gramian.few_kernel, kind, 4, 16, **options)
    build(gramian.few_kernel, kind, 4, 1, **options)
for kind, T, cross in [("bf16", 10, 0), ("fp32", 40, 1), ("bf16", 128, 1), ("fp32", 128, 1), ("fp64", 128, 1)]:
    side, depth, warps = gramian.tile_of(T, dtypes[kind])
    build(gramian.many_kernel, kind, warps, 16, TILE=side, DEPTH=depth, CROSS=bool(cross), TABLE=True)
build(gramian.sum_kernel, "fp64", 8, 1, ROWS=256, ENTRIES=16, TABLE=True)
for kind in dtypes:
    block = combine.THREADS * 16 // dtypes[kind].itemsize
    build(combine.combine_kernel, kind, 4, 16, BLOCK=block, GROUP=8, OWN=True, TABLE=True)
    build(columns.graddrop_kernel, kind, 4, 16, BLOCK=block, GROUP=3, LEAK=0.3, EXACT=kind != "fp64")
    build(columns.sorted_kernel, kind, 4, 16, T=3, CUT=1, BLOCK=columns.block_of(3, dtypes[kind]))
build(columns.ranked_kernel, "fp32", 8, 16, SIDE=128, BLOCK=columns.TILE // 128)
"""


@needs_triton
def test_kernels_compile_for_sm_90(tmp_path: Path) -> None:
    """No device is needed for that: types are checked, aligned rows are read 16 bytes at a time, nothing is TF32."""
    import triton

    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this Triton brings no ptxas")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 7


# From here on with a device.


def on_device(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_with_its_strides(x) if isinstance(x, Tensor) else x for x in given)


def _with_its_strides(x: Tensor) -> Tensor:
    if x.ndim < 2 or x.is_contiguous():
        return x.cuda()
    return torch.empty(len(x), x.stride(0), dtype=x.dtype, device="cuda")[:, : x.shape[1]].copy_(x)


def run(name: str, given: tuple[Any, ...]) -> Tensor:
    operators = {"graddrop": kernels.graddrop_columns, "trimmed_mean": kernels.trimmed_mean_columns}
    return operators.get(name, getattr(kernels, name, None))(*on_device(given)).cpu()  # pyright: ignore[reportOptionalCall]


@needs_cuda
@pytest.mark.parametrize("label", CASES)
def test_kernel_agrees_with_float64_and_the_torch_body(label: str) -> None:
    name, given = CASES[label]
    check(name, given, run(name, given))


@needs_cuda
@pytest.mark.parametrize("label", UNCLEAN)
def test_kernel_passes_nan_and_infinity_on(label: str) -> None:
    name, given = UNCLEAN[label]
    check_unclean(name, given, run(name, given))


@needs_cuda
@pytest.mark.parametrize("T", [2, 16, 17, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_agrees_on_many_columns(name: str, dtype: torch.dtype, T: int) -> None:
    d = (1 << 18) + 7
    for option in OPTIONS[name][:2]:
        given = problem(name, T, dtype, [0, 64, 1 << 17, d], option)
        answer, (expected, size) = run(name, given).double(), truth_on_device(name, given)
        stored = 0.0 if name == "gramian" else STORED[dtype]
        # Chains of up to 8192 columns are summed in float32.
        slack = 20 if name == "gramian" else 2
        wrong = (answer - expected).abs() > slack * SUM[dtype] * size + 2 * stored * expected.abs() + 1e-30
        # A draw may fall between two roundings of a purity.
        assert wrong.sum() <= (3 if name == "graddrop" else 0)


def truth_on_device(name: str, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """As `truth`, where lists of numbers would take minutes."""
    if name in ("gramian", "combine"):
        return truth(name, given)
    J = given[0].double()
    wide = torch_body(name, (J, *given[1:]))
    return wide, J.abs().sum(dim=0)


@needs_cuda
def test_kernels_never_wait_for_the_device_and_are_captured() -> None:
    bounds = [0, 32, 1024, 4096]
    J, other = (rows(3, 4096, torch.float32, seed).cuda() for seed in (0, 1))
    w = torch.rand(3, 3, dtype=torch.float64, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        return kernels.gramian(J, bounds), kernels.gramian(J, bounds, other), kernels.combine(w, J, bounds)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    J.copy_(other.flip(1))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@needs_cuda
def test_a_table_is_not_made_while_a_graph_is_captured() -> None:
    J = rows(2, 96, torch.float32).cuda()
    kernels.gramian(J, [0, 32, 96])
    with (
        pytest.raises(RuntimeError, match="before the CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        kernels.gramian(J, [0, 64, 96])


@needs_cuda
def test_results_repeat_bit_for_bit() -> None:
    J = rows(5, 1 << 20, torch.float32).cuda()
    assert all(torch.equal(kernels.gramian(J, [0, 1 << 20]), kernels.gramian(J, [0, 1 << 20])) for _ in range(10))


@needs_cuda
@pytest.mark.parametrize("blocks", ["model", "tensor"])
def test_a_whole_step_is_captured(blocks: Any) -> None:
    torch.manual_seed(0)
    trunk, x = torch.nn.Linear(8, 8).cuda(), torch.randn(16, 8, device="cuda")
    heads = torch.nn.ModuleList(torch.nn.Linear(8, 1).cuda() for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    opt = MTLOptimizer(torch.optim.SGD(parameters, 0.01), "upgrad", trunk.parameters(), blocks=blocks)

    def step() -> None:
        opt.zero_grad()
        z = trunk(x).tanh()
        opt.step([head(z).square().mean() for head in heads])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    start = [p.detach().clone() for p in parameters]
    graph.replay()
    replayed = [p.detach().clone() for p in parameters]
    for p, before in zip(parameters, start, strict=True):
        p.data.copy_(before)
    step()
    for p, expected in zip(parameters, replayed, strict=True):
        torch.testing.assert_close(p.detach(), expected)


@needs_cuda
def test_aggregate_compiles_and_differentiates() -> None:
    J = rows(3, 200, torch.float32).cuda()
    expected = aggregate(J.cpu(), "upgrad", blocks=[50, 150])
    compiled = torch.compile(lambda x: aggregate(x, "upgrad", blocks=[50, 150]), fullgraph=True)
    torch.testing.assert_close(compiled(J).cpu(), expected, rtol=1e-4, atol=1e-5)
    J = J[:2].clone().requires_grad_()
    aggregate(J, "ew").sum().backward()
    assert J.grad is not None
    torch.testing.assert_close(J.grad, torch.full_like(J.grad, 0.5))
