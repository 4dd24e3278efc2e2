"""The oracles of tests/reference against each other, against closed forms and against second solvers."""

import cvxpy as cp
import numpy as np
import pytest
from reference import cagrad, ew, famo, matrices, mgda, nash_mtl, pcgrad, upgrad

ZOO = matrices.zoo()
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
PAIRS = [name for name in SOLVABLE if len(ZOO[name]) == 2]
every = pytest.mark.parametrize("name", ZOO)
solvable = pytest.mark.parametrize("name", SOLVABLE)


def size(J: np.ndarray) -> float:
    return np.linalg.norm(J, axis=1).max() or 1.0


def close(a, b, J, tol):
    """Equal within tol of the largest row of J."""
    np.testing.assert_allclose(a / size(J), b / size(J), rtol=0, atol=tol)


def random_pairs(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, 6)) * 10.0 ** rng.integers(-3, 4, size=(2, 1)) for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_zoo_holds_what_its_names_promise(seed):
    for name, J in matrices.zoo(seed=seed).items():
        assert J.ndim == 2
        assert J.shape[1] >= 2
        unit = J / np.maximum(np.linalg.norm(J, axis=1, keepdims=True), 1e-300)
        assert (np.linalg.norm(mgda.direction(unit)) < 1e-12) == matrices.expected_stationary(name), name
    single = matrices.zoo(np.float32, seed)
    assert {J.dtype for J in single.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(J).all() for J in single.values())
    for J in (ZOO["tied_norms"], single["tied_norms"]):
        assert len({float(row @ row) for row in J}) == 1
    combinations = {"exactly_opposite": [1, 1], "opposite_unequal": [4, 1], "pareto_stationary": [1, 2, 1]}
    for name, w in combinations.items():
        assert not (np.array(w, dtype=np.float32) @ single[name]).any()


@every
def test_direction_is_weights_times_rows(name):
    J = ZOO[name]
    for method in (ew, pcgrad, mgda, cagrad, upgrad):
        close(method.direction(J), method.weights(J) @ J, J, 1e-12)
    if not matrices.expected_stationary(name):
        u = nash_mtl.direction(J)
        np.testing.assert_allclose(u, nash_mtl.weights(J) @ J, atol=1e-12)


def test_ew():
    J = ZOO["random_3"]
    np.testing.assert_allclose(ew.direction(J), J.sum(axis=0))
    np.testing.assert_allclose(ew.weights(J, [1, 1, 4]), [0.5, 0.5, 2])


def test_pcgrad_of_two_is_twice_upgrad():
    for J in [*random_pairs(50), *(ZOO[name] for name in PAIRS), ZOO["exactly_opposite"], ZOO["opposite_unequal"]]:
        close(pcgrad.direction(J), 2 * upgrad.direction(J), J, 1e-13)


def test_pcgrad_by_hand():
    J = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -2.0]])
    orders = np.array([[1, 2], [2, 0], [0, 1]])
    # row 0: on row 1 -> (.5, .5), on row 2 -> (.2, -.1) + ...: (.5, .5) + 1.5/5 (-1, -2) = (.2, -.1)
    # row 1: (-1, 1).(-1, -2) = -1 -> (-1.2, .6), on row 0 -> (0, .6). row 2: on row 0 -> (0, -2), on row 1 -> (-1, -1)
    np.testing.assert_allclose(pcgrad.projected(J, orders)[0], [[0.2, -0.1], [0, 0.6], [-1, -1]], atol=1e-15)
    assert not np.allclose(pcgrad.direction(J, orders), pcgrad.direction(J, orders[:, ::-1]))
    with pytest.raises(ValueError, match="permutation"):
        pcgrad.direction(J, np.array([[1, 1], [0, 2], [0, 1]]))


def test_pcgrad_without_conflict_is_the_sum():
    for name in ("all_aligned", "collinear", "single", "all_zero"):
        close(pcgrad.direction(ZOO[name]), ew.direction(ZOO[name]), ZOO[name], 0)


def test_mgda_closed_form_of_two():
    for J in [*random_pairs(50), *(ZOO[name] for name in PAIRS)]:
        a, b = J
        w = np.clip((b - a) @ b / ((b - a) @ (b - a)), 0, 1)
        close(mgda.direction(J), w * a + (1 - w) * b, J, 1e-13)


@every
def test_mgda_is_the_least_norm_point(name):
    J = ZOO[name] / size(ZOO[name])
    w = mgda.weights(J)
    assert w.min() >= 0
    assert abs(w.sum() - 1) < 1e-14
    assert mgda.duality_gap(J, w) < 1e-15
    rivals = np.random.default_rng(0).dirichlet(np.full(len(J), 0.3), size=2000)
    assert np.linalg.norm(w @ J) <= np.linalg.norm(rivals @ J, axis=1).min() + 1e-15


def test_mgda_normalisation_applies_weights_to_raw_rows():
    J, losses = ZOO["norm_spread_1e2"], np.array([2.0, 0.5, 1.0, 4.0])
    norms = np.linalg.norm(J, axis=1)
    for kind, s in {"l2": norms, "loss": losses, "loss+": losses * norms}.items():
        w = mgda.weights(J, kind, losses)
        np.testing.assert_allclose(w, mgda.weights(J / s[:, None]), atol=1e-14)
        np.testing.assert_allclose(mgda.direction(J, kind, losses), w @ J)
    with pytest.raises(ValueError, match="positive"):
        mgda.weights(J, "loss", np.array([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("c", [0.0, 0.2, 0.5, 1.0, 2.0])
@every
def test_cagrad_solves_the_primal(name, c):
    J = ZOO[name] / size(ZOO[name])
    g0 = J.mean(axis=0)
    u = cagrad.direction(J, c, rescale=0, scale="mean")
    assert np.linalg.norm(u - g0) <= c * np.linalg.norm(g0) + 1e-12
    best = cagrad.primal_value(J, u)
    rng = np.random.default_rng(0)
    rivals = rng.dirichlet(np.full(len(J), 0.3), size=500)
    assert best <= min(cagrad.dual_value(J, w, c) for w in rivals) + 1e-13  # weak duality
    turned = u + 0.01 * rng.standard_normal((500, J.shape[1]))
    excess = np.maximum(np.linalg.norm(turned - g0, axis=1, keepdims=True), 1e-300)
    turned = g0 + (turned - g0) * np.minimum(1, c * np.linalg.norm(g0) / excess)
    assert best >= (turned @ J.T).min(axis=1).max() - 1e-13


@every
def test_cagrad_agrees_with_cvxpy(name):
    J = ZOO[name] / size(ZOO[name])
    u = cagrad.direction(J, 0.4, rescale=0, scale="mean")
    by_cvxpy = cagrad.primal_direction(J, 0.4)
    assert abs(cagrad.primal_value(J, u) - cagrad.primal_value(J, by_cvxpy)) < 1e-8
    if not matrices.expected_stationary(name):
        np.testing.assert_allclose(u, by_cvxpy, atol=1e-4)  # the value is flat around the solution


@every
def test_cagrad_without_slack_is_the_mean(name):
    J = ZOO[name]
    close(cagrad.direction(J, 0.0, rescale=0, scale="mean"), J.mean(axis=0), J, 1e-15)


def test_cagrad_with_much_slack_is_mgda():
    for name in SOLVABLE:
        J = ZOO[name]
        least, u = mgda.direction(J), cagrad.direction(J, 1e9, rescale=0, scale="mean")
        cosine = least @ u / np.linalg.norm(least) / np.linalg.norm(u)
        assert cosine > 1 - 1e-9, name


def test_cagrad_scales():
    J = ZOO["random_5"]
    plain = cagrad.direction(J, 0.5, rescale=0, scale="mean")
    for rescale, divisor in ((0, 1), (1, 1.25), (2, 1.5)):
        np.testing.assert_allclose(cagrad.direction(J, 0.5, rescale, "sum"), 5 * plain / divisor)


def test_cagrad_where_the_dual_optimum_is_zero_is_the_projected_mean():
    J = ZOO["partially_stationary"]
    g0 = J.mean(axis=0)
    v = upgrad.project(J, g0)
    reach = np.linalg.norm(v - g0) / np.linalg.norm(g0)
    assert 0.05 < reach < 1
    close(cagrad.direction(J, reach + 0.05, rescale=0, scale="mean"), v, J, 1e-14)
    assert cagrad.primal_value(J, cagrad.direction(J, reach - 0.05)) < -1e-3
    # it is the limit of the smoothed dual: minimise over the cone of the rows, and let the smoothing go
    k, w, gaps = (reach + 0.05) * np.linalg.norm(g0), cp.Variable(3, nonneg=True), []
    for eps in (1e-1, 1e-3):
        smooth = cp.norm(cp.hstack([w @ J, eps]))
        cp.Problem(cp.Minimize(w @ J @ g0 + k * smooth), [cp.sum(w) == 1]).solve(solver=cp.CLARABEL)
        gw = w.value @ J
        gaps.append(np.linalg.norm(g0 + k * gw / np.sqrt(gw @ gw + eps**2) - v))
    assert gaps[1] < 1e-3 * np.linalg.norm(v)


@solvable
def test_nash_residual(name):
    J = ZOO[name]
    T = len(J)
    preference = np.arange(1, T + 1) ** 2
    for p in (None, preference):
        a = nash_mtl.weights(J, p)
        assert a.min() > 0
        assert nash_mtl.residual(J, a, p) < 1e-9
        assert abs(np.linalg.norm(a @ J) - np.sqrt(T)) < 1e-9
    scaled = J * np.logspace(-3, 3, T)[:, None]
    np.testing.assert_allclose(nash_mtl.direction(scaled), nash_mtl.direction(J), atol=1e-9)


def test_nash_closed_form_of_two():
    for J in [*random_pairs(50), *(ZOO[name] for name in PAIRS)]:
        n = np.linalg.norm(J, axis=1)
        bisector = J[0] / n[0] + J[1] / n[1]
        one_plus_cosine = bisector @ bisector / 2
        np.testing.assert_allclose(nash_mtl.weights(J), 1 / (n * np.sqrt(one_plus_cosine)), rtol=1e-11)


@pytest.mark.parametrize("name", sorted(matrices.STATIONARY))
def test_nash_has_no_solution_at_stationary_points(name):
    with pytest.raises(ValueError, match="no bargain"):
        nash_mtl.weights(ZOO[name])


def test_nash_is_the_best_product_of_gains():
    J = ZOO["conflicting_pairs"]
    u = nash_mtl.direction(J)
    moved = u + 0.05 * np.random.default_rng(0).standard_normal((2000, J.shape[1]))
    gains = moved / np.linalg.norm(moved, axis=1, keepdims=True) * np.linalg.norm(u) @ J.T
    gains = gains[(gains > 0).all(axis=1)]
    assert len(gains) > 100
    assert np.log(J @ u).sum() >= np.log(gains).sum(axis=1).max()


@every
def test_upgrad_projections_are_feasible_and_nearest(name):
    J = ZOO[name]
    norms = np.linalg.norm(J, axis=1)
    unit = J / np.where(norms > 0, norms, 1)[:, None]
    rng = np.random.default_rng(0)
    for i in range(len(J)):
        v = upgrad.project(J, J[i])
        mu = upgrad.multipliers(J, J[i][None])[0]
        assert mu.min() >= 0
        assert (unit @ v).min() > -1e-13 * (norms[i] or 1)
        assert abs(mu @ (J @ v)) <= 1e-13 * norms[i] ** 2  # complementary slackness
        rivals = v + 0.1 * norms[i] * rng.standard_normal((500, J.shape[1]))
        rivals = rivals[(rivals @ unit.T >= 0).all(axis=1)]
        distances = np.linalg.norm(rivals - J[i], axis=1)
        assert distances.min(initial=np.inf) >= np.linalg.norm(v - J[i]) * (1 - 1e-13)


def test_upgrad_agrees_with_cvxpy():
    for name in ("random_10", "conflicting_pairs", "norm_spread_1e4", "two_parameters", "pareto_stationary"):
        J = ZOO[name] / np.linalg.norm(ZOO[name], axis=1, keepdims=True)
        v = cp.Variable(J.shape[1])
        cp.Problem(cp.Minimize(cp.sum_squares(v - J[0])), [J @ v >= 0]).solve(solver=cp.CLARABEL, tol_gap_abs=1e-12)
        np.testing.assert_allclose(upgrad.project(J, J[0]), v.value, atol=1e-5)


def test_upgrad_is_linear_under_scaling_and_preference_weighs_the_projections():
    J, s, p = ZOO["random_5"], np.array([1.0, 10.0, 0.1, 3.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    scaled = sum(s[i] * upgrad.project(J, J[i]) for i in range(5)) / 5
    np.testing.assert_allclose(upgrad.direction(J * s[:, None]), scaled, atol=1e-13)
    weighted = sum(p[i] * upgrad.project(J, J[i]) for i in range(5)) / p.sum()
    np.testing.assert_allclose(upgrad.direction(J, p), weighted, atol=1e-13)
    np.testing.assert_allclose(upgrad.direction(J, np.ones(5)), upgrad.direction(J))


def test_famo_weights_and_first_update():
    L, b = np.array([2.0, 0.5, 8.0]), np.array([0.0, 0.1, -1.0])
    rule = famo.Famo(3, min_losses=b)
    np.testing.assert_allclose(rule.weights(L), (1 / (L - b)) / (1 / (L - b)).sum(), rtol=1e-7)
    rule.update(L, L * np.array([0.5, 0.9, 1.0]))
    # Adam's first step has size lr: away from the task that improved most, towards the one that improved least
    np.testing.assert_allclose(rule.xi.detach().numpy()[[0, 2]], [-0.025, 0.025], rtol=1e-5)


def test_famo_matches_adam_by_hand():
    rng = np.random.default_rng(0)
    T, lr, gamma, eps = 4, 0.025, 1e-3, 1e-8
    rule = famo.Famo(T, lr, gamma)
    xi, m, v = np.zeros(T), np.zeros(T), np.zeros(T)
    for step in range(1, 60):
        before, after = rng.uniform(0.1, 3, size=(2, T))
        z = np.exp(xi) / np.exp(xi).sum()
        np.testing.assert_allclose(rule.weights(before), z / (before + eps) / (z / (before + eps)).sum(), rtol=1e-11)
        delta = np.log(before + eps) - np.log(after + eps)
        gradient = (np.diag(z) - np.outer(z, z)) @ delta + gamma * xi
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        xi = xi - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + eps)
        rule.update(before, after)
        np.testing.assert_allclose(rule.xi.detach().numpy(), xi, rtol=1e-10, atol=1e-12)
