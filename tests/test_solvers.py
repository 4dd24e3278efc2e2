"""The roads of one small Gramian against the batched road, and what sends a problem from one to the other."""

import itertools
import math
import time
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
from gradsurgery.solvers.fair import fair_pair, nash_pair
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


def nearly_opposite(T: int, eps: float, seed: int) -> torch.Tensor:
    """(T, T + 5): the second row is the first, turned around, but for eps."""
    J = np.random.default_rng(seed).standard_normal((T, T + 5))
    J[1] = -J[0] + eps * J[1]
    return torch.from_numpy(J)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("T", [2, 3, 5, 10])
def test_cagrad_of_nearly_opposite_rows(T: int, c: float) -> None:
    """Exact, or as exact as float64 weights can be, and safe: in the ball, and no worse than the mean gradient."""
    for exponent, seed in itertools.product(range(1, 10), range(3)):
        J = nearly_opposite(T, 10.0**-exponent, seed)
        G, mean = J @ J.T, torch.full((T,), 1 / T, dtype=torch.float64)
        added, residual = cagrad_multipliers(G, mean, c)
        g0, radius = mean @ J, c * (mean @ J).norm()
        norm = J.norm(dim=1)
        # What one rounding of the weights moves a gain, and what a least norm that rounding of G hides moves the best.
        unit = torch.finfo(torch.float64).eps * T
        floor = unit * norm.max() * (norm @ (mean + added)) / radius**2 + (8 * unit) ** 0.5 * norm.max() / radius
        assert residual <= max(1e-8, floor)
        assert added.min() >= 0
        # G knows squared lengths to a rounding of the terms that they are sums of.
        blur = (unit * 4) ** 0.5 * norm @ (mean + added)
        assert (added @ J).norm() <= radius * (1 + 1e-12) + blur
        assert (J @ (g0 + added @ J)).min() >= (J @ g0).min() - 1e-12 * radius * norm.max() - norm.max() * blur


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
def test_cagrad_is_exact_where_multipliers_are_large(c: float) -> None:
    """Beside a third task the mean gradient is long, and 1e6 times a difference of two gradients has to be added."""
    for eps, seed in itertools.product((1e-3, 1e-4, 1e-5, 1e-6), range(4)):
        J = nearly_opposite(4, eps, seed)
        _, residual = cagrad_multipliers(J @ J.T, torch.full((4,), 0.25, dtype=torch.float64), c)
        # Multipliers of size 1 / eps, times the rounding of the Gramian.
        assert residual <= max(1e-9, 200 * np.finfo(float).eps / eps)


def test_one_rounding_of_the_weights_is_what_cagrad_has_left() -> None:
    """At an angle of 1e-5 from opposite no float64 weights are within 1e-8 of CAGrad's optimum but by luck."""
    J = nearly_opposite(2, 1e-5, 0)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    added, residual = cagrad_multipliers(J @ J.T, half, 0.4)
    assert residual <= 1e-3
    v = half + added
    moved = torch.stack([v[0].nextafter(torch.tensor(1.0).double()), v[1]])
    gains = [J.numpy().astype(np.longdouble) @ (w.numpy().astype(np.longdouble) @ J.numpy()) for w in (v, moved)]
    radius = 0.4 * (half @ J).norm().item()
    assert abs(gains[0].min() - gains[1].min()) / radius**2 > 1e-8


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("c", [-0.99, -0.3, 0.0, 0.5, 0.99])
def test_fair_of_two_tasks_in_plain_floats(c: float, alpha: float) -> None:
    p = [0.2, 1.8]
    G = np.array([[4.0, 20 * c], [20 * c, 100.0]])
    solved = fair_pair(4.0, 100.0, 20 * c, p, alpha)
    assert solved is not None
    w, residual = solved
    assert residual <= 1e-12
    np.testing.assert_allclose(G @ w, (np.array(p) / w) ** (1 / alpha), rtol=1e-11)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 5.0, 20.0])
@pytest.mark.parametrize("T", [2, 3, 10, 40])
def test_fair_at_any_alpha(T: int, alpha: float) -> None:
    """Exact, or as exact as rounding of G allows, or of the point of least norm and saying so."""
    rng = np.random.default_rng(T)
    p = torch.linspace(1.0, 2.0, T, dtype=torch.float64)
    shifted = torch.from_numpy(rng.standard_normal((T, 2 * T)))
    spread = shifted * torch.from_numpy(1e2 ** rng.uniform(-0.5, 0.5, (T, 1)))
    opposite = [nearly_opposite(T, eps, T) for eps in (0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)]
    for k, J in enumerate([shifted, spread, shifted - 0.9 * shifted.mean(dim=0), *opposite]):
        G = J @ J.T
        w, residual = fair(G, p, alpha)
        own = ((G @ w) * (w / p) ** (1 / alpha) - 1).abs().max()
        norm = G.diagonal().sqrt()
        blur = 4 * torch.finfo(torch.float64).eps * T * ((w / p) ** (1 / alpha) * norm).max() * (norm @ w)
        torch.testing.assert_close(residual, own, rtol=1e-6, atol=1e-12 + blur.item())
        if residual > 1e-4:
            # From there on w^(1/alpha) times the rounding of G w is more than that.
            assert k > (4 if alpha < 1 else 5)
            torch.testing.assert_close(w, min_norm(G)[0])
        else:
            assert residual <= max(1e-8, 4 * blur)


def singular(T: int) -> dict[str, np.ndarray]:
    """(T, d) rows whose Gramian has fewer ranks than T, as pivoting cycles on."""
    rng = np.random.default_rng(1)
    pointed = rng.standard_normal((T, 20))
    pointed[:, 0] = np.abs(pointed[:, 0]) + 0.1
    few = pointed[:, :5]
    half = rng.standard_normal((T // 2, 2 * T))
    zeros = rng.standard_normal((T, 2 * T // 5))
    zeros[::7] = 0
    return {
        "duplicates": rng.standard_normal((T // 10, 30))[rng.integers(0, T // 10, T)],
        "rank 5": few @ rng.standard_normal((5, 2 * T)),
        "rank 20": pointed @ rng.standard_normal((20, 2 * T)),
        "opposite": np.concatenate([half, -half]),
        "nearly opposite": np.concatenate([half, -half + 1e-8 * rng.standard_normal(half.shape)]),
        "zero rows": zeros,
    }


@pytest.mark.parametrize("name", singular(100))
def test_singular_gramians_of_many_tasks(name: str) -> None:
    """They took up to five seconds. The bar is wide, for machines that are busy."""
    J = torch.from_numpy(singular(100)[name])
    G, mean = J @ J.T, torch.full((100,), 0.01, dtype=torch.float64)
    solvers: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]] = [
        lambda: dual_cone(G, mean),
        lambda: min_norm(G),
        lambda: cagrad_multipliers(G, mean, 0.4),
    ]
    for solve in solvers:
        seconds = []
        # The first call may import SciPy.
        for _ in range(3):
            start = time.perf_counter()
            w, residual = solve()
            seconds.append(time.perf_counter() - start)
            assert w.isfinite().all()
            assert residual <= (1e-5 if name == "nearly opposite" else 1e-8)
        assert min(seconds) < 1.0


def test_a_mean_gradient_that_is_rounding_is_not_projected() -> None:
    J = torch.from_numpy(np.random.default_rng(0).standard_normal((10, 20)))
    J = torch.cat([J, -J])
    p = torch.ones(20, dtype=torch.float64)
    w, residual = dual_projection(J @ J.T, p)
    assert residual <= 1e-8
    assert (w @ J).norm() <= 1e-12 * J.norm()
