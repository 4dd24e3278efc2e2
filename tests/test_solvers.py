"""The roads of one small Gramian against the batched road, and what sends a problem from one to the other."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import matrices
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery import functional
from gradsurgery.methods.pcgrad import draw_orders
from gradsurgery.solvers import cagrad_multipliers, conic, dual_cone, dual_projection, fair, min_norm, nash
from gradsurgery.solvers.cagrad import cagrad_numpy, cagrad_pair
from gradsurgery.solvers.dual_cone import dual_cone_numpy, dual_cone_pair, dual_projection_numpy, dual_projection_pair
from gradsurgery.solvers.fair import nash_pair
from gradsurgery.solvers.min_norm import min_norm_numpy, min_norm_pair
from gradsurgery.solvers.nnqp import nnqp, nnqp_one
from gradsurgery.solvers.operator import plain

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items() if not matrices.expected_stationary(name)}


def solvers(T: int) -> dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    p = torch.linspace(1.0, 2.0, T, dtype=torch.float64)
    return {
        "dual_cone": lambda G: dual_cone(G, p),
        "min_norm": min_norm,
        "nash": lambda G: nash(G, p),
        "cagrad": lambda G: cagrad_multipliers(G, p / p.sum(), 0.4),
        "dual_projection": lambda G: dual_projection(G, p),
        "fair": lambda G: fair(G, p, 2.0),
    }


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("name", solvers(1))
def test_one_gramian_is_solved_as_among_many(name: str, zoo: str) -> None:
    """Two equal blocks take the batched road."""
    J = ZOO[zoo]
    G = J @ J.T
    solve = solvers(len(J))[name]
    one, residual = solve(G)
    many, _ = solve(torch.stack([G, G]))
    assert residual <= 1e-8
    assert ((one - many[0]) @ J).norm() <= 1e-7 * (one @ J).norm() + 1e-13 * J.norm(dim=1).max() * len(J)


@pytest.mark.parametrize("T", [1, 2, 3, 6, 12, 40])
def test_pivoting_on_one_program_is_the_batched_one(T: int) -> None:
    rng = np.random.default_rng(T)
    for _ in range(20):
        J = rng.standard_normal((T, T + 2)) - 0.5
        J /= np.linalg.norm(J, axis=1, keepdims=True)
        H, f = J @ J.T, J @ rng.standard_normal(T + 2)
        f /= np.abs(f).max()
        expected, residual = nnqp(H[None], f[None, None])
        assert residual <= 1e-11
        solved = nnqp_one(H, f, np.flatnonzero(f > 0))
        assert solved is not None
        np.testing.assert_allclose(solved[0], expected[0, 0], rtol=1e-8, atol=1e-9 * np.abs(expected).max())
        if (from_all := nnqp_one(H, f)) is not None:
            np.testing.assert_allclose(from_all[0], expected[0, 0], rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_many_programs_fall_to_single_flips() -> None:
    """Ties and dependent rows keep block flips busy; what is left must still be solved."""
    rng = np.random.default_rng(0)
    J = rng.integers(-1, 2, (300, 8, 3)).astype(float)
    J /= np.maximum(np.linalg.norm(J, axis=-1, keepdims=True), 1)
    H = J @ J.transpose(0, 2, 1)
    _, residual = nnqp(H, -H[:, :1])
    assert residual.max() <= 1e-11


@pytest.mark.parametrize("c", [-0.999, -0.5, 0.0, 0.5, 0.999])
@pytest.mark.parametrize("p", [(1.0, 1.0), (0.2, 1.8)])
def test_nash_of_two_tasks_in_closed_form(c: float, p: tuple[float, float]) -> None:
    G = [[4.0, 2 * c], [2 * c, 1.0]]
    solved = nash_pair(4.0, 1.0, 2 * c, list(p))
    assert solved is not None
    a, residual = solved
    assert residual <= 1e-12
    np.testing.assert_allclose(np.array(G) @ a * a, p, rtol=1e-11)


def test_no_bargain_of_two_opposite_tasks_in_closed_form() -> None:
    assert nash_pair(1.0, 1.0, -1.0, [1.0, 1.0]) is None


def test_nothing_to_project_where_nothing_conflicts() -> None:
    p = torch.tensor([0.3, 0.7], dtype=torch.float64)
    w, residual = dual_cone(torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64), p)
    assert torch.equal(w, p)
    assert residual == 0


@pytest.mark.parametrize("T", [2, 3, 10])
def test_a_nan_is_not_solved_in_silence(T: int) -> None:
    G = torch.eye(T, dtype=torch.float64)
    G[0, 1] = math.nan
    for name in ("dual_cone", "min_norm"):
        w, residual = solvers(T)[name](G)
        assert w.isnan().any() or residual.isnan()


@pytest.mark.parametrize("cosine", [-0.999999, -0.9, -0.3, 0.0, 0.6, 0.999])
@pytest.mark.parametrize("ratio", [1e-4, 0.5, 1.0, 3.0, 1e4])
def test_closed_forms_of_two_tasks(cosine: float, ratio: float) -> None:
    a, b = 1.0, ratio**2
    c, p = cosine * ratio, [0.3, 0.7]
    G, P = np.array([[[a, c], [c, b]]]), np.array(p)
    for solved, (expected, _) in (
        (min_norm_pair(a, b, c), min_norm_numpy(G)),
        (dual_cone_pair(a, b, c, p), dual_cone_numpy(G, P)),
        (dual_projection_pair(a, b, c, p), dual_projection_numpy(G, P)),
        *((cagrad_pair(a, b, c, p, radius), cagrad_numpy(G, P, radius)) for radius in (0.1, 0.4, 0.99, 5.0)),
    ):
        assert solved is not None
        assert solved[1] <= 1e-10
        difference = np.array(solved[0]) - expected[0]
        assert difference @ G[0] @ difference <= 1e-14 * (expected[0] @ G[0] @ expected[0])


@pytest.mark.parametrize("T", [2, 3])
def test_what_is_watched_goes_through_the_operator(T: int) -> None:
    G = torch.eye(T, dtype=torch.float64)
    p = torch.ones(T, dtype=torch.float64)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    assert plain(G, p)
    with Seen():
        dual_cone(G, p)
    assert names == ["gradsurgery::dual_cone"]
    assert not plain(G, p.clone().requires_grad_())
    assert not plain(torch.nn.Parameter(G, requires_grad=False))
    assert not plain(torch.empty(T, device="meta"))
    with forward_ad.dual_level():
        assert not plain(G)
    with FakeTensorMode() as mode:
        w, residual = dual_cone(mode.from_tensor(G), mode.from_tensor(p))
        assert (w.shape, residual.shape) == ((T,), ())
    graph = make_fx(lambda G: functional.upgrad(G))(G)
    assert any("dual_cone" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("name", [*solvers(1), "pcgrad"])
def test_traced_and_compiled_as_called(name: str) -> None:
    J = ZOO["random_5"]
    G = J @ J.T
    orders = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    solve = (lambda G: (functional.pcgrad(G, orders),)) if name == "pcgrad" else solvers(5)[name]
    torch._dynamo.reset()
    for other in (make_fx(solve)(2 * G), torch.compile(solve, fullgraph=True, backend="aot_eager")):
        for got, expected in zip(other(G), solve(G), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_under_vmap_and_autograd() -> None:
    G = torch.eye(3, dtype=torch.float64)
    for name, solve in solvers(3).items():
        for vmapped, expected in zip(torch.func.vmap(solve)(torch.stack([G, 2 * G])), solve(2 * G), strict=True):
            torch.testing.assert_close(vmapped[1], expected, msg=name)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        min_norm(G.clone().requires_grad_())[0].sum().backward()
    vmapped = torch.func.vmap(lambda G: functional.pcgrad(G, torch.tensor([[1, 2], [0, 2], [0, 1]])))
    torch.testing.assert_close(vmapped(torch.stack([G, 2 * G])), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("T", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pcgrad_in_numpy_is_pcgrad_in_torch(T: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(T)
    J = torch.randn(3, T, T + 2, generator=rng, dtype=dtype)
    J[1, -1] = 0
    G = J @ J.mT
    orders = draw_orders(T, rng, G.device)
    for gramian in (G, G[0], G[1], G[None]):
        w, expected = functional.pcgrad(gramian, orders), functional.pcgrad(gramian.clone().requires_grad_(), orders)
        assert w.dtype == dtype
        torch.testing.assert_close(w, expected.detach())


@pytest.mark.parametrize("T", [2, 3])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_pcgrad_of_a_bad_gramian_is_nan(T: int, bad: float) -> None:
    G = torch.eye(T)
    G[0, 1] = G[1, 0] = bad
    assert not functional.pcgrad(G)[:2].isfinite().any()


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_any_number_of_blocks(blocks: int) -> None:
    J = ZOO["random_3"]
    G = (J @ J.T).expand(blocks, 2, 3, 3)[:, :1]
    for name, solve in solvers(3).items():
        w, residual = solve(G)
        assert (w.shape, residual.shape) == ((blocks, 1, 3), (blocks, 1)), name


def test_rows_of_a_rank_that_rounding_leaves_open() -> None:
    """Many nearly collinear rows in three dimensions: factorisations of their Gramians break down at times."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        T = int(rng.integers(8, 21))
        J = torch.from_numpy(rng.standard_normal(3) + 10.0 ** -rng.uniform(1, 6) * rng.standard_normal((T, 3)))
        G, ones = J @ J.T, torch.ones(T, dtype=torch.float64)
        solved = (min_norm(G), dual_cone(G, ones), dual_projection(G, ones), cagrad_multipliers(G, ones / T, 0.4))
        for w, residual in (*solved, nash(G, ones), fair(G, ones, 2.0), conic(G, 0.5)):
            assert w.isfinite().all()
            assert residual <= 1e-8
