"""The oracles of the methods that need inner products only, against second derivations and against TorchJD."""

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
import torchjd.aggregation as torchjd
from reference import (
    aligned_mtl,
    config,
    conicgrad,
    dualproj,
    epo,
    fairgrad,
    gradnorm,
    gradvac,
    imtl,
    imtl_g,
    krum,
    matrices,
    metabalance,
    mgda,
    nash_mtl,
    ntkmtl,
    pcgrad,
    pivrg,
    upgrad,
)

ZOO = matrices.zoo()
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
STATELESS = (gradvac, aligned_mtl, dualproj, config, krum, ntkmtl, conicgrad)
INDEPENDENT = [
    name
    for name in SOLVABLE
    if np.linalg.matrix_rank(ZOO[name] / np.linalg.norm(ZOO[name], axis=1, keepdims=True)) == len(ZOO[name])
]
BENIGN = ("random_2", "random_3", "random_5", "conflicting_2", "conflicting_pairs", "orthogonal", "tied_norms")
every = pytest.mark.parametrize("name", ZOO)
solvable = pytest.mark.parametrize("name", SOLVABLE)
independent = pytest.mark.parametrize("name", INDEPENDENT)
benign = pytest.mark.parametrize("name", BENIGN)


def size(J: np.ndarray) -> float:
    return np.linalg.norm(J, axis=1).max() or 1.0


def close(a, b, J, tol):
    """Equal within tol of the largest row of J."""
    np.testing.assert_allclose(a / size(J), b / size(J), rtol=0, atol=tol)


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def unit_rows(J: np.ndarray) -> np.ndarray:
    return J / np.linalg.norm(J, axis=1, keepdims=True)


def by_torchjd(aggregator, J: np.ndarray) -> np.ndarray:
    return aggregator(torch.tensor(J)).numpy()


def random_pairs(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.standard_normal((2, 6)) * 10.0 ** rng.integers(-3, 4, size=(2, 1)) for _ in range(n)]


@every
def test_direction_is_weights_times_rows(name):
    J = ZOO[name]
    losses = np.linspace(1, 2, len(J))
    for method in STATELESS:
        w, u = method.weights(J), method.direction(J)
        assert w.shape == (len(J),), method
        assert u.shape == (J.shape[1],), method
        assert np.isfinite(w).all(), method
        # an ill-conditioned J has large weights that cancel
        close(u, w @ J, J, 1e-12 * max(1, np.abs(w).max()))
    np.testing.assert_allclose(epo.direction(J, losses), epo.weights(J, losses) @ J, atol=1e-12 * size(J))
    if name in SOLVABLE:
        for method in (imtl_g, imtl, fairgrad, pivrg):
            np.testing.assert_allclose(method.direction(J), method.weights(J) @ J)


# GradVac


@every
def test_gradvac_with_targets_of_zero_is_pcgrad(name):
    J = ZOO[name]
    rng = np.random.default_rng(0)
    orders = np.array([rng.permutation(row) for row in pcgrad.index_orders(len(J))], dtype=int)
    close(gradvac.direction(J, orders), pcgrad.direction(J, orders), J, 1e-13)
    np.testing.assert_array_equal(gradvac.GradVac(len(J), 0.0).weights(J, None, orders), gradvac.weights(J, orders))


def test_gradvac_brings_the_cosine_to_its_target():
    rng = np.random.default_rng(0)
    for J in random_pairs(30):
        rho = rng.uniform(-0.9, 0.9, size=(2, 2))
        V, C, after = gradvac.vaccinated(J, rho, 0.25)
        phi = cosine(J[0], J[1])
        for i, j in ((0, 1), (1, 0)):
            assert abs(cosine(V[i], J[j]) - max(phi, rho[i, j])) < 1e-12
            np.testing.assert_allclose(after[i, j], 0.75 * rho[i, j] + 0.25 * phi, atol=1e-15)
            assert C[i, j] >= 0
            assert C[i, i] == 1
        np.testing.assert_allclose(V, C @ J, atol=1e-12 * size(J))


@benign
def test_gradvac_agrees_with_torchjd_over_steps(name):
    J = ZOO[name]
    T = len(J)
    ours, theirs = gradvac.GradVac(T, 0.3), torchjd.GradVac(beta=0.3, eps=1e-300)
    rng = np.random.default_rng(0)
    for step in range(6):
        turned = J + 0.3 * rng.standard_normal(J.shape)
        torch.manual_seed(step)
        orders = [row[torch.randperm(T - 1).numpy()] for row in pcgrad.index_orders(T)]
        w = ours.weights(turned, None, np.array(orders))
        torch.manual_seed(step)
        close(w @ turned, by_torchjd(theirs, turned), turned, 1e-10)


def test_gradvac_leaves_zero_rows_alone_and_wants_permutations():
    J = ZOO["zero_row"]
    rule = gradvac.GradVac(4, 0.5)
    assert rule.weights(J)[2] == 1
    assert not rule.rho[2].any()
    assert not rule.rho[:, 2].any()
    with pytest.raises(ValueError, match="permutation"):
        gradvac.weights(J, np.zeros((4, 3), dtype=int))


# IMTL


@independent
def test_imtl_g_projects_equally_and_sums_to_one(name):
    J = ZOO[name]
    w = imtl_g.weights(J)
    projections = unit_rows(J) @ (w @ J)
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-6)
    assert np.sign(projections.mean()) == np.sign(imtl_g.denominator(J))


@independent
def test_imtl_g_solves_the_papers_system(name):
    J = ZOO[name] / size(ZOO[name])
    if len(J) == 1:
        assert imtl_g.weights(J) == 1
        return
    D, U = J[0] - J[1:], unit_rows(J)[0] - unit_rows(J)[1:]
    rest = np.linalg.solve(U @ D.T, U @ J[0])  # Equation 4: (g_0 - rest @ D) is orthogonal to the rows of U
    w = np.concatenate([[1 - rest.sum()], rest])
    np.testing.assert_allclose(imtl_g.weights(J), w, rtol=1e-6, atol=1e-6 * np.abs(w).max())


@benign
def test_imtl_g_agrees_with_torchjd(name):
    close(imtl_g.direction(ZOO[name]), by_torchjd(torchjd.IMTLG(), ZOO[name]), ZOO[name], 1e-9)


def test_imtl_g_of_two():
    for J in random_pairs(50):
        n = np.linalg.norm(J, axis=1)
        np.testing.assert_allclose(imtl_g.weights(J), n[::-1] / n.sum(), rtol=1e-9)


def test_imtl_g_denominator_can_be_negative_and_zero():
    # the third row is nearly the bisector of the others, so that it takes a large negative weight; if it is also short,
    # that weight outweighs the others
    J = unit_rows(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [30.0, 30.0, 1.0]])) * np.array([[1.0], [1.0], [1e-3]])
    assert imtl_g.denominator(J) < 0
    assert (J @ imtl_g.direction(J) < 0).all()
    for name in ("exactly_opposite", "all_zero"):
        with pytest.raises(ValueError, match="denominator"):
            imtl_g.weights(ZOO[name])


def test_imtl_steps_by_hand():
    rng = np.random.default_rng(0)
    T, lr = 3, 0.1
    rule = imtl.Imtl(T, lr)
    s, m, v = np.zeros(T), np.zeros(T), np.zeros(T)
    for step in range(1, 30):
        J, L = rng.standard_normal((T, 8)), rng.uniform(0.1, 5, size=T)
        w = rule.weights(J, L)
        np.testing.assert_allclose(w, imtl.weights(J, s), rtol=1e-9)
        u = w @ J
        projections = unit_rows(J) @ u  # scaling a row leaves its unit gradient
        np.testing.assert_allclose(projections, projections[0], rtol=1e-8)
        np.testing.assert_allclose((w / np.exp(s)).sum(), 1, rtol=1e-9)
        gradient = np.exp(s) * L - 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        s = s - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


# Aligned-MTL


@independent
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl_sums_orthogonal_rows_of_one_length(name, scale):
    J = ZOO[name] / size(ZOO[name])
    p = np.arange(1.0, len(J) + 1)
    singular = np.linalg.svd(J, compute_uv=False)
    sigma = {
        "min": singular[-1],
        "median": torch.tensor(singular).median().item(),
        "rmse": np.linalg.norm(J) / np.sqrt(len(J)),
    }[scale]
    # the weights are B p with B J's rows orthogonal, of length sigma, and B symmetric positive definite
    B = np.stack([aligned_mtl.weights(J, scale, row) / len(J) for row in np.eye(len(J))], axis=1)
    np.testing.assert_allclose(B @ J @ (B @ J).T, sigma**2 * np.eye(len(J)), atol=1e-7 * sigma**2)
    np.testing.assert_allclose(B, B.T, atol=1e-8 * np.abs(B).max())
    assert np.linalg.eigvalsh(B).min() > 0
    np.testing.assert_allclose(aligned_mtl.weights(J, scale, p), B @ p * len(J) / p.sum(), rtol=1e-9)
    assert abs(np.linalg.norm(aligned_mtl.direction(J, scale)) - sigma * np.sqrt(len(J))) < 1e-7 * sigma


@benign
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl_agrees_with_torchjd(name, scale):
    J = ZOO[name]
    theirs = torchjd.AlignedMTL(pref_vector=torch.ones(len(J), dtype=torch.float64), scale_mode=scale)
    close(aligned_mtl.direction(J, scale), by_torchjd(theirs, J), J, 1e-9)


def test_aligned_mtl_leaves_the_null_space_out():
    J = ZOO["rank_two"]
    u = aligned_mtl.direction(J)
    singular = np.linalg.svd(J, compute_uv=False)
    assert np.linalg.norm(u) <= singular[1] * np.sqrt(5) * (1 + 1e-12)
    close(aligned_mtl.direction(ZOO["exactly_opposite"]), np.zeros(9), ZOO["exactly_opposite"], 1e-14)
    a = ZOO["opposite_unequal"]  # rank one: sigma (1, -4) / sqrt(17) . 1 times the unit row
    close(aligned_mtl.direction(a), -3 * a[0], a, 1e-13)
    assert not aligned_mtl.weights(ZOO["all_zero"]).any()


# DualProj


@every
def test_dualproj_is_the_projection_of_the_mean(name):
    J = ZOO[name] / size(ZOO[name])
    for p in (None, np.arange(1.0, len(J) + 1)):
        w, u = dualproj.weights(J, p), dualproj.direction(J, p)
        share = np.ones(len(J)) / len(J) if p is None else p / p.sum()
        assert (w >= share).all()
        norms = np.linalg.norm(J, axis=1)
        assert ((J @ u) / np.where(norms > 0, norms, 1)).min() > -1e-13
        assert abs((w - share) @ (J @ u)) < 1e-13
        close(u, upgrad.project(J, share @ J), J, 1e-14)


def test_dualproj_agrees_with_cvxpy():
    for name in ("random_10", "conflicting_pairs", "two_parameters", "pareto_stationary", "partially_stationary"):
        J = ZOO[name] / size(ZOO[name])
        v = cp.Variable(len(J))
        problem = cp.Problem(cp.Minimize(cp.sum_squares(v @ J)), [v >= 1 / len(J)])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12)
        close(dualproj.direction(J), v.value @ J, J, 1e-5)


# ConFIG


@independent
def test_config_is_equiangular_and_as_long_as_its_projections(name):
    J = ZOO[name]
    u = config.direction(J)
    angles = unit_rows(J) @ u / np.linalg.norm(u)
    np.testing.assert_allclose(angles, angles.mean(), rtol=1e-6)
    assert angles.min() > 0
    np.testing.assert_allclose(np.linalg.norm(u), angles.mean() * np.linalg.norm(J, axis=1).sum(), rtol=1e-6)


@independent
def test_config_is_imtl_g_but_for_sign_and_length(name):
    J = ZOO[name]
    sign = np.sign(imtl_g.denominator(J))
    assert sign * cosine(config.direction(J), imtl_g.direction(J)) > 1 - 1e-9


@benign
def test_config_agrees_with_torchjd(name):
    close(config.direction(ZOO[name]), by_torchjd(torchjd.ConFIG(), ZOO[name]), ZOO[name], 1e-9)


def test_config_of_two_bisects():
    for J in random_pairs(50):
        n = np.linalg.norm(J, axis=1)
        bisector = (J[0] / n[0] + J[1] / n[1]) / np.linalg.norm(J[0] / n[0] + J[1] / n[1])
        close(config.direction(J), (J @ bisector).sum() * bisector, J, 1e-9)


def test_config_degenerate():
    for name in ("exactly_opposite", "opposite_unequal", "all_zero"):
        assert not config.weights(ZOO[name]).any()
        assert not config.direction(ZOO[name]).any()
    without = np.delete(ZOO["zero_row"], 2, axis=0)
    close(config.direction(ZOO["zero_row"]), config.direction(without), without, 1e-13)
    assert config.weights(ZOO["zero_row"])[2] == 0


# FairGrad, PIVRG


@solvable
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_residual(name, alpha):
    w = fairgrad.weights(ZOO[name], alpha)
    assert w.min() > 0
    assert fairgrad.residual(ZOO[name], w, alpha) < 1e-7


@solvable
def test_fairgrad_of_one_is_nash(name):
    np.testing.assert_allclose(fairgrad.weights(ZOO[name], 1.0), nash_mtl.weights(ZOO[name]), rtol=1e-6)


def test_fairgrad_of_orthogonal_rows():
    J = ZOO["orthogonal"]
    for alpha in (0.5, 1.0, 2.0):  # n_i^2 w_i = w_i^(-1/alpha)
        expected = np.linalg.norm(J, axis=1) ** (-2 * alpha / (1 + alpha))
        np.testing.assert_allclose(fairgrad.weights(J, alpha), expected, rtol=1e-12)


def test_fairgrad_maximises_the_fair_utility():
    # the paper: u is along the maximiser of sum_i (g_i.d)^(1 - alpha) / (1 - alpha) in a ball
    J = unit_rows(ZOO["random_5"])
    d = cp.Variable(J.shape[1])
    problem = cp.Problem(cp.Minimize(cp.sum(cp.inv_pos(J @ d))), [cp.norm(d) <= 1])
    problem.solve(solver=cp.CLARABEL)
    assert cosine(d.value, fairgrad.direction(J, 2.0)) > 1 - 1e-8


@benign
def test_fairgrad_agrees_with_torchjd(name):
    # their least squares stops near the solution
    assert cosine(fairgrad.direction(ZOO[name], 2.0), by_torchjd(torchjd.FairGrad(alpha=2.0), ZOO[name])) > 1 - 1e-6


@pytest.mark.parametrize("name", sorted(matrices.STATIONARY))
def test_fairgrad_and_pivrg_have_no_solution_at_stationary_points(name):
    for method in (fairgrad, pivrg):
        with pytest.raises(ValueError, match="no fair weights"):
            method.weights(ZOO[name])


@solvable
def test_pivrg_residual(name):
    J = ZOO[name]
    D = np.linspace(-20, 40, len(J)) if len(J) > 1 else np.zeros(1)
    w, s = pivrg.weights(J, D), pivrg.shares(D)
    np.testing.assert_allclose(J @ (w @ J) * np.sqrt(w / s), 1, rtol=1e-7)
    np.testing.assert_allclose(s.sum(), len(J))
    np.testing.assert_allclose(pivrg.weights(J), fairgrad.weights(J, 2.0), rtol=1e-9)


def test_pivrg_shares_stay_within_the_bound():
    D = np.array([0.0, 5.0, 80.0])
    s = pivrg.shares(D, bound=3.0)
    np.testing.assert_allclose(s.max() / s.min(), 3.0)
    s = pivrg.shares(D / 80, bound=3.0, min_temperature=10.0)  # the range is small: the least temperature rules
    np.testing.assert_allclose(s.max() / s.min(), np.exp(0.1))
    np.testing.assert_allclose(pivrg.drops([1.5, 2.0], [1.0, 4.0]), [50, -50])


# Krum, NTKMTL


def test_krum_by_hand():
    J = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [10.0, 0.0], [0.0, -3.0]])
    # byzantine 0: three nearest others
    hand = [1 + 2 + 3, 1 + np.sqrt(5) + 9, 2 + np.sqrt(5) + 5, 9 + 10 + np.sqrt(104), 3 + np.sqrt(10) + 5]
    hand[1] = 1 + np.sqrt(5) + np.sqrt(10)
    np.testing.assert_allclose(krum.scores(J), hand)
    np.testing.assert_allclose(krum.weights(J), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(krum.weights(J, selected=2), [0.5, 0.5, 0, 0, 0])
    np.testing.assert_allclose(krum.scores(J, byzantine=9), [1, 1, 2, 9, 3])
    np.testing.assert_allclose(krum.scores(J, byzantine=2, squared=True), [1, 1, 4, 81, 9])


@pytest.mark.parametrize("name", ["random_5", "random_10", "conflicting_pairs", "norm_spread_1e2"])
def test_krum_agrees_with_torchjd(name):
    J = ZOO[name]
    for byzantine, selected in itertools.product((0, 1), (1, 2, 3)):
        if len(J) >= byzantine + 3:
            theirs = by_torchjd(torchjd.Krum(byzantine, selected), J)
            close(krum.direction(J, byzantine, selected), theirs, J, 1e-12)


@every
def test_ntkmtl_adds_unit_rows(name):
    J = ZOO[name]
    present = J[np.linalg.norm(J, axis=1) > 0]
    expected = np.linalg.norm(J) * unit_rows(present).sum(axis=0) if len(present) else np.zeros(J.shape[1])
    close(ntkmtl.direction(J), expected, J, 1e-12)
    np.testing.assert_allclose(ntkmtl.weights(present, 0.0), 1)


def test_one_over_norm_family_of_two():
    for J in random_pairs(50):
        u = ntkmtl.direction(J)
        rivals = (config.direction(J), imtl_g.direction(J), nash_mtl.direction(J), fairgrad.direction(J, 1.0))
        assert all(cosine(u, rival) > 1 - 1e-9 for rival in rivals)


# GradNorm, MetaBalance


def test_gradnorm_steps_by_finite_differences():
    rng = np.random.default_rng(0)
    T, alpha, lr = 4, 1.5, 0.025
    rule = gradnorm.GradNorm(T, alpha, lr)
    w, m, v, first = np.ones(T), np.zeros(T), np.zeros(T), None
    for step in range(1, 40):
        J = rng.standard_normal((T, 9)) * np.logspace(-1, 1, T)[:, None]
        L = rng.uniform(0.5, 3, size=T)
        first = L if first is None else first
        np.testing.assert_allclose(rule.weights(J, L), w, rtol=1e-8)
        np.testing.assert_allclose(w.sum(), T)
        n, r = np.linalg.norm(J, axis=1), L / first / np.mean(L / first)
        target = np.mean(np.abs(w) * n) * r**alpha

        def imbalance(w, n=n, target=target):
            return np.abs(np.abs(w) * n - target).sum()

        nudges = 1e-7 * np.eye(T)
        gradient = np.array([(imbalance(w + e) - imbalance(w - e)) / 2e-7 for e in nudges])
        gradient = np.round(gradient / n) * n  # each slope is +-n_i
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        w = T * w / w.sum()


def test_gradnorm_balances_norms_at_equal_rates():
    J, L = np.diag([1.0, 2.0, 4.0]), np.ones(3)
    rule = gradnorm.GradNorm(3, lr=0.01)
    for _ in range(600):
        w = rule.weights(J, L)
    np.testing.assert_allclose(w, 3 * np.array([4, 2, 1]) / 7, atol=0.05)


def test_metabalance():
    J = np.array([[3.0, 4.0], [0.6, 0.8], [0.0, 50.0]])
    np.testing.assert_allclose(metabalance.MetaBalance(3).weights(J), [1, 0.7 * 5 + 0.3, 0.7 * 0.1 + 0.3])
    np.testing.assert_allclose(metabalance.MetaBalance(3, target=2, relax=1.0).weights(J), [10, 50, 1])
    np.testing.assert_allclose(metabalance.MetaBalance(3, relax=0.0).weights(J), 1)
    rng = np.random.default_rng(0)
    rule, history = metabalance.MetaBalance(3, beta=0.8), []
    for step in range(20):
        rows = rng.standard_normal((3, 5))
        history.append(np.linalg.norm(rows, axis=1))
        averages = sum(0.2 * 0.8 ** (step - k) * n for k, n in enumerate(history))
        np.testing.assert_allclose(rule.weights(rows)[1:], 0.7 * averages[0] / averages[1:] + 0.3)
    assert np.isfinite(metabalance.MetaBalance(4).weights(ZOO["zero_row"])).all()


# ConicGrad


@every
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_conicgrad_solves_the_primal(name, c):
    J = ZOO[name] / size(ZOO[name])
    g0 = J.mean(axis=0)
    length = np.linalg.norm(g0)
    u = conicgrad.direction(J, c)
    if length == 0:
        assert not u.any()
        return
    assert abs(np.linalg.norm(u) - length) < 1e-12
    assert cosine(u, g0) > c - 1e-9
    rivals = np.random.default_rng(0).dirichlet(np.full(len(J), 0.3), size=300)
    least = min(np.linalg.norm(conicgrad.projected(w @ J, g0, c)[0]) for w in rivals) * length
    best = conicgrad.primal_value(J, u)
    assert best <= least + 1e-12  # weak duality
    assert conicgrad.duality_gap(J, conicgrad.dual_weights(J, g0, c), g0, c) < 1e-11
    moved = u + 0.02 * length * np.random.default_rng(1).standard_normal((2000, J.shape[1]))
    moved *= length / np.linalg.norm(moved, axis=1, keepdims=True)
    inside = moved[moved @ g0 >= c * length**2]
    if best > 0:
        assert (inside @ J.T).min(axis=1).max(initial=-np.inf) <= best + 1e-9
    else:
        np.testing.assert_allclose(u, g0, atol=1e-12)


def test_conicgrad_of_two_by_ternary_search():
    for J in [*random_pairs(20), ZOO["random_2"], ZOO["conflicting_2"]]:
        g0 = J.mean(axis=0)

        def reach(t, J=J, g0=g0):
            return np.linalg.norm(conicgrad.projected(np.array([t, 1 - t]) @ J, g0, 0.5)[0])

        low, high = 0.0, 1.0
        for _ in range(200):
            a, b = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, b) if reach(a) < reach(b) else (a, high)
        value = np.linalg.norm(g0) * reach(low)
        assert abs(conicgrad.primal_value(J, conicgrad.direction(J)) - value) < 1e-8 * size(J) ** 2


def test_conicgrad_extremes():
    for name in ("random_3", "random_5", "tied_norms"):
        J = ZOO[name]
        close(conicgrad.direction(J, 1.0), J.mean(axis=0), J, 1e-6)
        # a wide cone does not bind, if MGDA's direction is in it
        least = mgda.direction(J)
        assert cosine(least, J.mean(axis=0)) > 0.1
        assert cosine(conicgrad.direction(J, 0.1), least) > 1 - 1e-8


def test_conicgrad_projection_is_nearest():
    rng = np.random.default_rng(0)
    for c in (0.0, 0.3, 0.5, 0.95):
        for _ in range(50):
            g, g0 = rng.standard_normal((2, 4))
            v, a, b = conicgrad.projected(g, g0, c)
            np.testing.assert_allclose(v, a * g + b * g0, atol=1e-14)
            assert min(a, b) >= 0
            assert v @ g0 >= c * np.linalg.norm(v) * np.linalg.norm(g0) - 1e-12
            assert abs(v @ (g - v)) < 1e-12  # Moreau: the residual is orthogonal, and in the polar cone
            rays = rng.standard_normal((200, 4))
            rays = rays[rays @ g0 >= c * np.linalg.norm(rays, axis=1) * np.linalg.norm(g0)]
            assert (rays @ (g - v)).max(initial=0) < 1e-12


# EPO


def vertices(A: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """All vertices of {alpha on the simplex: A alpha >= b}."""
    T = A.shape[1]
    planes, levels = np.vstack([np.eye(T), A]), np.concatenate([np.zeros(T), b])
    found = []
    for active in map(list, itertools.combinations(range(len(planes)), T - 1)):
        system = np.vstack([np.ones(T), planes[active]])
        if np.linalg.matrix_rank(system, tol=1e-10) == T:
            alpha = np.linalg.solve(system, np.concatenate([[1.0], levels[active]]))
            if (planes @ alpha >= levels - 1e-9).all():
                found.append(alpha)
    return found


@pytest.mark.parametrize("name", [name for name in ZOO if len(ZOO[name]) <= 5])
def test_epo_solves_its_program(name):
    J = ZOO[name]
    T = len(J)
    rng = np.random.default_rng(0)
    for losses, p in ((np.linspace(1, 3, T), None), (np.ones(T), None), (rng.uniform(0.1, 2, T), rng.uniform(1, 3, T))):
        kind, c, A, b = epo.constraints(J, losses, p)
        assert kind == ("dominance" if np.ptp(losses) == 0 else "balance") or T == 1
        corners = vertices(A, b)
        w = epo.weights(J, losses, p)
        np.testing.assert_allclose(w.sum(), T)
        if corners:
            objective, broken = epo.value(J, losses, p, w)
            assert broken < 1e-6
            assert abs(objective - max(c @ alpha for alpha in corners)) < 1e-6
        else:
            np.testing.assert_allclose(w, np.ones(T) if p is None else T * p / p.sum())


def test_epo_adjustment_is_the_gradient_of_the_non_uniformity():
    L, r = np.array([1.0, 2.0, 0.5]), np.array([0.5, 1.5, 1.0])
    mu, a = epo.adjustment(L, r)
    slopes = [(epo.adjustment(L + e, r)[0] - epo.adjustment(L - e, r)[0]) / 2e-6 for e in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(a / (r * L).sum(), slopes, rtol=1e-6)
    assert mu > 0
    assert abs(a @ L) < 1e-15
    assert epo.adjustment(1 / r, r)[0] < 1e-15


def test_epo_balances_and_then_descends():
    # two quadratics, from a lopsided start: r * L becomes uniform, then both fall to the front
    x, r = np.array([0.9, 1.5]), np.array([1.0, 3.0])
    a, b = np.array([1.0, 0.0]), np.array([-1.0, 0.0])
    for _ in range(250):
        L = np.array([(x - a) @ (x - a), (x - b) @ (x - b)])
        x = x - 0.02 * epo.direction(np.stack([2 * (x - a), 2 * (x - b)]), L, r)
    assert abs(x[1]) < 0.05
    np.testing.assert_allclose(L[0] / L[1], 3.0, rtol=0.1)
