"""The oracles of loss weightings, cross-Gramian, coordinate and tracking methods against second derivations."""

from itertools import product

import cvxpy as cp
import numpy as np
import pytest
import torch
from reference import (
    constant,
    cosmos,
    db_mtl,
    dwa,
    excess_mtl,
    famo,
    gls,
    go4align,
    graddrop,
    igb,
    imtl_l,
    matrices,
    mgda,
    moco,
    modo,
    pbi,
    rlw,
    sdmgrad,
    si,
    simplex,
    stch,
    trimmed_mean,
    uw,
    uw_so,
)

ZOO = matrices.zoo()
L3 = np.array([2.0, 0.5, 8.0])


def random_losses(n: int, T: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(-3, 3, size=(n, T)))


def slope(f, L: np.ndarray) -> np.ndarray:
    """(T,) central differences of f at L, with a step relative to each entry."""
    result = np.zeros(len(L))
    for i in range(len(L)):
        h = 1e-5 * abs(L[i])
        up, down = L.copy(), L.copy()
        up[i] += h
        down[i] -= h
        result[i] = (f(up) - f(down)) / (2 * h)
    return result


def softmax(x: np.ndarray) -> np.ndarray:
    return np.array([1 / np.exp(x - x[i]).sum() for i in range(len(x))])


class Adam:
    """By hand, for the learned weightings: betas .9, .999, eps 1e-8."""

    def __init__(self, x: np.ndarray, lr: float):
        self.x, self.lr, self.m, self.v, self.t = x, lr, 0.0, 0.0, 0

    def step(self, gradient: np.ndarray) -> None:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        self.x = self.x - self.lr * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


# losses only


def test_constant():
    np.testing.assert_array_equal(constant.weights(L3), np.ones(3))
    np.testing.assert_array_equal(constant.weights(L3, (1.0, 0.0, 2.5)), [1, 0, 2.5])


def test_gls_and_si_closed_forms_and_differences():
    np.testing.assert_allclose(gls.weights(L3), [1 / 3, 4 / 3, 1 / 12], rtol=1e-14)  # the geometric mean is 2
    np.testing.assert_allclose(si.weights(L3), [0.5, 2, 0.125], rtol=1e-14)
    for L in random_losses(50, 4):
        np.testing.assert_allclose(gls.weights(L), slope(lambda x: np.exp(np.log(x).mean()), L), rtol=1e-8)
        np.testing.assert_allclose(si.weights(L), slope(lambda x: np.log(x).sum(), L), rtol=1e-8)


def test_the_family_of_inverse_losses():
    """GLS, SI, UW and IMTL-L at their optimum, STCH and IGB in warm-up, and FAMO without learning are parallel."""
    for L in random_losses(20, 3):
        inverse = (1 / L) / (1 / L).sum()
        learned_uw, learned_imtl = uw.Uw(3), imtl_l.ImtlL(3)
        with torch.no_grad():
            learned_uw.s.copy_(torch.tensor(np.log(L)))
            learned_imtl.s.copy_(torch.tensor(-np.log(L)))
        rivals = [gls.weights(L), si.weights(L), learned_uw.weights(L), learned_imtl.weights(L)]
        rivals += [stch.Stch(3).weights(L), igb.Igb(3).weights(L)]
        for w in rivals:
            np.testing.assert_allclose(w / w.sum(), inverse, rtol=1e-12)
        np.testing.assert_allclose(famo.Famo(3).weights(L), inverse, rtol=1e-6)
        # already optimal: no step was taken
        np.testing.assert_allclose(learned_uw.s.detach().numpy(), np.log(L), atol=1e-6)
        np.testing.assert_allclose(learned_imtl.s.detach().numpy(), -np.log(L), atol=1e-6)


@pytest.mark.parametrize("init", [0.0, -0.5])
def test_uw_matches_adam_by_hand(init):
    rule, adam = uw.Uw(4, 0.03, init), Adam(np.full(4, init), 0.03)
    for L in random_losses(60, 4, seed=1):
        np.testing.assert_allclose(rule.weights(L), np.exp(-adam.x) / 2, rtol=1e-11)
        adam.step((1 - np.exp(-adam.x) * L) / 2)
        np.testing.assert_allclose(rule.s.detach().numpy(), adam.x, rtol=1e-10, atol=1e-12)


def test_imtl_l_matches_adam_by_hand():
    rule, adam = imtl_l.ImtlL(4, 0.03), Adam(np.zeros(4), 0.03)
    for L in random_losses(60, 4, seed=2):
        np.testing.assert_allclose(rule.weights(L), np.exp(adam.x), rtol=1e-11)
        adam.step(np.exp(adam.x) * L - 1)
        np.testing.assert_allclose(rule.s.detach().numpy(), adam.x, rtol=1e-10, atol=1e-12)


def test_uw_and_imtl_l_converge_to_inverse_losses():
    learned_uw, learned_imtl = uw.Uw(3, 0.1), imtl_l.ImtlL(3, 0.1)
    np.testing.assert_array_equal(learned_uw.weights(L3), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(learned_imtl.weights(L3), [1, 1, 1])
    for _ in range(400):
        w, v = learned_uw.weights(L3), learned_imtl.weights(L3)
    np.testing.assert_allclose(w, 1 / (2 * L3), rtol=1e-3)
    np.testing.assert_allclose(v, 1 / L3, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_uw_so_maximises_inverse_losses_plus_entropy(temperature):
    L = np.array([0.4, 1.0, 3.0])
    w = cp.Variable(3)
    gain = cp.sum(cp.multiply(1 / L, w)) + temperature * cp.sum(cp.entr(w))
    cp.Problem(cp.Maximize(gain), [cp.sum(w) == 1]).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(uw_so.weights(L, temperature), w.value, atol=1e-5)
    np.testing.assert_allclose(uw_so.weights(L, temperature), softmax(1 / (temperature * L)), rtol=1e-13)


def test_uw_so_by_hand_and_small_losses():
    np.testing.assert_allclose(uw_so.weights([1 / np.log(2), 1 / np.log(6)]), [0.25, 0.75], rtol=1e-14)
    np.testing.assert_allclose(uw_so.weights([1e-9, 1.0]), [1, 0], atol=1e-15)


def test_dwa_by_hand():
    rule = dwa.Dwa(2, temperature=0.5)
    for epoch, losses in enumerate(([[2.0, 1.0], [4.0, 3.0]], [[3.0, 1.0]], [[9.0, 9.0], [0.0, 1.0], [0.0, 2.0]])):
        for L in losses:
            w = rule.weights(L)
            # epoch means (3, 2), (3, 1): ratios 1 and 1/2
            expected = [1, 1] if epoch < 2 else [2 / (1 + np.exp(-1)), 2 / (1 + np.exp(1))]
            np.testing.assert_allclose(w, expected, rtol=1e-14)
        rule.epoch_end()
    np.testing.assert_allclose(rule.weights([1.0, 1.0]), 2 * softmax(np.array([1.0, 4.0]) / 0.5), rtol=1e-14)


def test_dwa_window_is_an_epoch_of_that_many_steps():
    windowed, plain = dwa.Dwa(3, window=4), dwa.Dwa(3)
    for step, L in enumerate(random_losses(30, 3)):
        w = plain.weights(L)
        np.testing.assert_array_equal(windowed.weights(L), w)
        assert abs(w.sum() - 3) < 1e-13
        if step % 4 == 3:
            plain.epoch_end()


def test_rlw_law():
    draws = np.random.default_rng(0).standard_normal((20_000, 3))
    normal = np.array([rlw.weights_normal(x) for x in draws])
    np.testing.assert_allclose(normal[0], softmax(draws[0]), rtol=1e-14)
    np.testing.assert_allclose(normal.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(normal.mean(axis=0), 1 / 3, atol=0.01)
    exponential = np.random.default_rng(1).exponential(size=(20_000, 3))
    flat = np.array([rlw.weights_dirichlet(x) for x in exponential])
    np.testing.assert_allclose(flat.sum(axis=1), 1, rtol=1e-14)
    # Dirichlet(1, 1, 1): mean 1/3, variance 2/36, covariance -1/36; P(w_0 > 1/2) = 1/4
    covariance = (np.eye(3) * 3 - 1) / 36
    np.testing.assert_allclose(np.cov(flat.T), covariance, atol=2e-3)
    assert abs((flat[:, 0] > 0.5).mean() - 0.25) < 0.01


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_stch_closed_form_and_differences(mu):
    rule = stch.Stch(3, mu, warmup_epochs=1)
    means = random_losses(5, 3)
    for L in means:
        np.testing.assert_allclose(rule.weights(L), 1 / L, rtol=1e-14)
    rule.epoch_end()
    z = means.mean(axis=0)
    for L in random_losses(20, 3, seed=3):
        w = rule.weights(L)
        np.testing.assert_allclose(w, 3 * softmax(np.log(L / z) / mu) / L, rtol=1e-12)
        values = lambda x: 3 * mu * np.log(((x / z) ** (1 / mu)).sum())
        np.testing.assert_allclose(w, slope(values, L), rtol=1e-6, atol=1e-8)
        if mu == 1:  # the logarithm of the normalised sum
            np.testing.assert_allclose(w, 3 / z / (L / z).sum(), rtol=1e-12)


def test_stch_warm_up_ends_after_its_epochs_and_averages_the_last():
    rule, windowed = stch.Stch(2, 0.5, warmup_epochs=3), stch.Stch(2, 0.5, warmup_epochs=3, window=2)
    losses = random_losses(12, 2)
    for epoch in range(6):
        for L in losses[2 * epoch : 2 * epoch + 2]:
            w = rule.weights(L)
            np.testing.assert_array_equal(w, windowed.weights(L))
            assert np.allclose(w, 1 / L) == (epoch < 3)
        rule.epoch_end()
    np.testing.assert_allclose(rule.z, losses[4:6].mean(axis=0))


def test_go4align_clusters_like_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    for T, K in ((3, 2), (4, 2), (5, 3), (4, 4), (3, 5), (4, 1)):
        for _ in range(5):
            x = rng.uniform(size=T)
            best, best_means = np.inf, None
            for labels in product(range(K), repeat=T):
                labels = np.array(labels)
                means = np.array([x[labels == labels[i]].mean() for i in range(T)])
                if ((x - means) ** 2).sum() < best - 1e-12:
                    best, best_means = ((x - means) ** 2).sum(), means
            np.testing.assert_allclose(go4align.group_means(x, K), best_means, rtol=1e-12)
    np.testing.assert_allclose(go4align.group_means([5.0, 1.0, 1.2, 5.2], 2), [5.1, 1.1, 1.1, 5.1])
    np.testing.assert_allclose(go4align.group_means([2.0, 2.0, 2.0], 2), 2)


def test_go4align_weights():
    rule, total = go4align.Go4Align(3, groups=3, eta=0.01), np.zeros(3)
    for L in random_losses(30, 3):
        total = total + L
        p = softmax(-0.01 * total)  # multiplicative updates: only the sum of the losses counts
        np.testing.assert_allclose(rule.weights(L), p * L.sum() / L, rtol=1e-11)
    one = go4align.Go4Align(3, groups=1, eta=0.0).weights(L3)
    np.testing.assert_allclose(one, np.full(3, (10.5 / L3).mean() / 3))
    two = go4align.Go4Align(3, groups=2, eta=0.0).weights(L3)  # indicators 1.75, 7, .4375
    np.testing.assert_allclose(two, [1.09375, 7, 1.09375])


def test_igb():
    rule, windowed = igb.Igb(3), igb.Igb(3, window=2)
    losses = random_losses(8, 3)
    for step, L in enumerate(losses):
        w = rule.weights(L)
        np.testing.assert_array_equal(w, windowed.weights(L))
        a = np.ones(3) if step < 4 else 3 * softmax(L / losses[2:4].mean(axis=0))
        np.testing.assert_allclose(w, slope(lambda x, a=a: (a * np.log(x)).sum(), L), rtol=1e-8)
        np.testing.assert_allclose(w * L, a, rtol=1e-13)
        if step % 2 == 1:
            rule.epoch_end()
    first = igb.Igb(2, base_epoch=0)
    first.weights([1.0, 2.0])
    first.epoch_end()
    np.testing.assert_allclose(first.weights([1.0, 2.0]), [1, 0.5])
    np.testing.assert_allclose(first.weights([np.log(3), 0.0 + 1e-12])[0] * np.log(3), 1.5)


def test_pbi_closed_form_and_differences():
    rng = np.random.default_rng(0)
    for L in random_losses(30, 4):
        p, z, theta = rng.uniform(0.1, 1, 4), rng.uniform(-1, 0, 4), rng.uniform(0, 6)
        w = pbi.weights(L, theta, p, z)
        ray = p / np.linalg.norm(p)
        across = (L - z) - ray * (ray @ (L - z))
        np.testing.assert_allclose(w, ray + theta * across / np.linalg.norm(across), rtol=1e-10, atol=1e-12)
        d1 = lambda x, z=z, ray=ray: (x - z) @ ray
        pythagoras = lambda x, z=z, d1=d1: np.sqrt((x - z) @ (x - z) - d1(x) ** 2)
        differences = slope(lambda x, theta=theta, d1=d1, d2=pythagoras: d1(x) + theta * d2(x), L)
        np.testing.assert_allclose(w, differences, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(w, pbi.weights(L, theta, 7 * p, z), rtol=1e-10, atol=1e-12)  # only the ray counts
        # Euler: the objective is homogeneous of degree 1 around z
        p_, z_ = torch.tensor(p), torch.tensor(z)
        np.testing.assert_allclose(w @ (L - z), float(pbi.objective(torch.tensor(L), theta, p_, z_)), rtol=1e-10)


def test_pbi_by_hand():
    # on (3, 1) with the diagonal as ray: across is (1, -1), so (1, 1)/sqrt(2) + theta (1, -1)/sqrt(2)
    np.testing.assert_allclose(pbi.weights([3.0, 1.0], 2.0), np.array([3, -1]) / np.sqrt(2))
    np.testing.assert_allclose(pbi.weights([4.0, 0.0], 2.0, ideal=[1.0, -1.0]), np.array([3, -1]) / np.sqrt(2))
    np.testing.assert_allclose(pbi.weights([1.0, 1.0], 5.0, [1.0, 0.0]), [1, 5])
    np.testing.assert_allclose(pbi.weights([2.0, 0.0], 5.0, [1.0, 0.0]), [1, 0])  # on the ray


def test_cosmos_closed_form_and_differences():
    rng = np.random.default_rng(0)
    for L in random_losses(30, 4):
        r, lam = rng.dirichlet(np.ones(4)), rng.uniform(0, 8)
        w = cosmos.weights(L, lam, r)
        n, m = np.linalg.norm(r), np.linalg.norm(L)
        np.testing.assert_allclose(w, r - lam * (r / (n * m) - (r @ L) * L / (n * m**3)), rtol=1e-9, atol=1e-12)
        value = lambda x, r=r, lam=lam: r @ x - lam * (r / np.linalg.norm(r)) @ (x / np.linalg.norm(x))
        np.testing.assert_allclose(w, slope(value, L), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(w @ L, r @ L, rtol=1e-9)  # the cosine does not change along L
        np.testing.assert_allclose(w, cosmos.weights(L, lam, 5 * r), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(cosmos.weights(L3, 0.0), [1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(cosmos.weights([2.0, 2.0], 3.0), [0.5, 0.5])  # aligned already
    # r = (1/2, 1/2), L = (1, 0): the cosine is 1/sqrt(2), its slope (0, 1/sqrt(2))
    np.testing.assert_allclose(cosmos.weights([1.0, 0.0], 2.0), [0.5, 0.5 - np.sqrt(2)])


# columns


def test_graddrop_by_hand():
    J = np.array([[3.0, -1.0, 2.0, 0.0], [-1.0, -2.0, 2.0, 0.0]])  # P = 3/4, 0, 1, (zero)
    np.testing.assert_allclose(graddrop.direction(J, [0.7, 0.5, 0.5, 0.5]), [3, -3, 4, 0])
    np.testing.assert_allclose(graddrop.direction(J, [0.8, 0.5, 0.999, 0.5]), [-1, -3, 4, 0])
    np.testing.assert_allclose(graddrop.direction(J, [0.7, 0.5, 0.5, 0.5], leak=0.5), [2.5, -3, 4, 0])
    np.testing.assert_allclose(graddrop.direction(J, [0.75, 0.5, 0.5, 0.5]), [0, -3, 4, 0])  # a tie keeps nothing


@pytest.mark.parametrize("name", ZOO)
def test_graddrop_is_the_masked_sum(name):
    J = ZOO[name]
    U = np.random.default_rng(0).uniform(size=J.shape[1])
    positive, negative = np.clip(J, 0, None).sum(axis=0), np.clip(-J, 0, None).sum(axis=0)
    P = np.divide(positive, positive + negative, out=np.full(len(U), 0.5), where=positive + negative > 0)
    kept = np.where(P > U, positive, -negative)  # U is never P here
    size = np.abs(J).max() or 1.0
    for leak in (0.0, 0.3, 1.0):
        expected = leak * J.sum(axis=0) + (1 - leak) * kept
        np.testing.assert_allclose(graddrop.direction(J, U, leak) / size, expected / size, atol=1e-13)


def test_graddrop_is_unbiased():
    """E u = (p^2 - n^2) / (p + n) = p - n with p and n the positive and negative mass: the sum is unbiased."""
    J = ZOO["random_3"]
    grid = (np.arange(2000) + 0.5) / 2000
    mean = np.mean([graddrop.direction(J, np.full(J.shape[1], u)) for u in grid[::4]], axis=0)
    np.testing.assert_allclose(mean, J.sum(axis=0), atol=0.02)


def test_trimmed_mean():
    J = np.array([[1.0, 9.0], [2.0, -50.0], [3.0, 1.0], [40.0, 2.0], [5.0, 3.0]])
    np.testing.assert_allclose(trimmed_mean.direction(J), [10 / 3, 2])
    np.testing.assert_allclose(trimmed_mean.direction(J, 2), np.median(J, axis=0))
    np.testing.assert_allclose(trimmed_mean.direction(J, 0), J.mean(axis=0))
    for J in ZOO.values():
        for trim in range((len(J) + 1) // 2):
            expected = np.sort(J, axis=0)[trim : len(J) - trim].mean(axis=0)
            np.testing.assert_allclose(
                trimmed_mean.direction(J, trim), expected, rtol=1e-12, atol=1e-14 * np.abs(J).max()
            )
    with pytest.raises(ValueError, match="leave a task"):
        trimmed_mean.direction(np.ones((2, 3)), 1)


# the simplex and cross-Gramians


def test_simplex_projection_against_a_threshold_and_cvxpy():
    rng = np.random.default_rng(0)
    for T in (1, 2, 3, 5, 7):
        for size in (0.1, 1.0, 30.0):
            v = size * rng.standard_normal(T)
            w = simplex.project(v)
            low, high = v.min() - 1, v.max()  # bisect for the threshold t with sum max(v - t, 0) = 1
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if np.clip(v - middle, 0, None).sum() > 1 else (low, middle)
            np.testing.assert_allclose(w, np.clip(v - low, 0, None), atol=1e-12)
    v = np.array([0.9, 0.4, -0.3, 0.35])
    x = cp.Variable(4, nonneg=True)
    cp.Problem(cp.Minimize(cp.sum_squares(x - v)), [cp.sum(x) == 1]).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(simplex.project(v), x.value, atol=1e-6)
    np.testing.assert_allclose(simplex.project([2.0, 1.5]), [0.75, 0.25])
    np.testing.assert_allclose(simplex.project([0.2, 0.3, 0.5]), [0.2, 0.3, 0.5])


def three_batches(seed: int, T: int = 4, d: int = 9, noise: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, d)) + noise * rng.standard_normal((3, T, d))


def test_modo_step_is_projected_descent_by_cvxpy_and_by_hand():
    rule, w = modo.Modo(4, lr=0.05, rho=0.2), np.full(4, 0.25)
    for seed in range(5):
        J1, J2, J3 = three_batches(seed)
        target = w - 0.05 * (J1 @ J2.T + 0.2 * np.eye(4)) @ w
        x = cp.Variable(4, nonneg=True)
        cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [cp.sum(x) == 1]).solve(solver=cp.CLARABEL)
        u = rule.direction(J1, J2, J3)
        np.testing.assert_allclose(rule.w, x.value, atol=1e-6)
        np.testing.assert_allclose(u, x.value @ J3, atol=1e-4)
        w = rule.w
    # J1 J2^T = diag(2, 4): w = (.5, .5) - .1 (1 + .05, 2 + .05) = (.395, .295), back to the simplex + .155 each
    by_hand = modo.step([0.5, 0.5], np.diag([1.0, 2.0]), np.diag([2.0, 2.0]), lr=0.1, rho=0.1)
    np.testing.assert_allclose(by_hand, [0.55, 0.45])
    J1, J2, _ = three_batches(9)
    two = modo.Modo(4)
    np.testing.assert_allclose(two.direction(J1, J2), two.w @ (J1 + J2) / 2)


def test_modo_without_noise_tends_to_mgda():
    J = ZOO["conflicting_2"]
    rule = modo.Modo(2, lr=0.01, rho=0.0)
    for _ in range(2000):
        u = rule.direction(J, J, J)
    np.testing.assert_allclose(u, mgda.direction(J), atol=1e-6)


def test_sdmgrad_matches_torch_sgd():
    rule, w = sdmgrad.Sdmgrad(4, lam=0.6), torch.full((4,), 0.25, dtype=torch.float64)
    for seed in range(4):
        J1, J2, J3 = three_batches(seed)
        A, B = torch.tensor(J1), torch.tensor(J2)
        scale = (A * B).sum(dim=1).clamp(min=0).sqrt().mean()
        w = w.detach().requires_grad_()
        sgd = torch.optim.SGD([w], lr=10, momentum=0.5)
        for _ in range(20):
            w.grad = A @ ((w.detach() + 0.6 / 4) @ B) / scale**2
            sgd.step()
            w.data = torch.tensor(simplex.project(w.detach().numpy()))
        expected = (w.detach().numpy() + 0.6 / 4) / 1.6
        u = rule.direction(J1, J2, J3)
        np.testing.assert_allclose(rule.w, w.detach().numpy(), atol=1e-10)
        np.testing.assert_allclose(u, expected @ J3, atol=1e-9)


def test_sdmgrad_slope_is_that_of_the_regularised_objective():
    J, lam = torch.tensor(ZOO["random_3"]), 0.3
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    objective = ((w @ J + lam * J.mean(dim=0)) ** 2).sum() / 2
    objective.backward()
    C = (J @ J.T).numpy()
    start = w.detach().numpy()
    one = sdmgrad.solve(C, start, lam, steps=1, lr=1e-3)
    np.testing.assert_allclose(one, simplex.project(start - 1e-3 * w.grad.numpy()), atol=1e-14)


def test_sdmgrad_with_small_steps_solves_the_regularised_problem():
    J = ZOO["random_5"]
    C = sdmgrad.normalised(J @ J.T)
    w = sdmgrad.solve(C, np.full(5, 0.2), lam=0.3, steps=600, lr=0.2)
    size = np.linalg.norm(J, axis=1).mean()
    x = cp.Variable(5, nonneg=True)
    shifted = (x @ J + 0.3 * J.mean(axis=0)) / size
    cp.Problem(cp.Minimize(cp.sum_squares(shifted)), [cp.sum(x) == 1]).solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(w, x.value, atol=1e-4)
    v = sdmgrad.solve(C, np.full(5, 0.2), lam=0.0, steps=600, lr=0.2)
    np.testing.assert_allclose(v, mgda.weights(J), atol=1e-6)


def test_sdmgrad_scales():
    J1, J2, J3 = three_batches(0)
    u = sdmgrad.Sdmgrad(4).direction(J1, J2, J3)
    np.testing.assert_allclose(sdmgrad.Sdmgrad(4, scale="sum").direction(J1, J2, J3), 4 * u)
    np.testing.assert_allclose(sdmgrad.Sdmgrad(4).direction(1e3 * J1, 1e-5 * J2, J3), u, atol=1e-12)  # normalised
    C = np.array([[-4.0, 1.0], [1.0, 16.0]])
    np.testing.assert_allclose(sdmgrad.normalised(C), C / 4)  # (0 + 4) / 2 squared
    np.testing.assert_allclose(sdmgrad.normalised(-np.eye(2)), -np.eye(2))
    assert abs(sdmgrad.Sdmgrad(4).weights(J1, J2).sum() - 1) < 1e-14


# tracked rows


def test_moco_against_unrolled_averages_and_cvxpy():
    rng, beta, gamma, rho = np.random.default_rng(0), 0.3, 0.05, 0.1
    rule, w, seen = moco.Moco(3, 8, beta, gamma, rho), np.full(3, 1 / 3), []
    for _ in range(6):
        seen.append(rng.standard_normal((3, 8)))
        k = len(seen)
        Y = sum(beta * (1 - beta) ** (k - 1 - j) * seen[j] for j in range(k))
        x = cp.Variable(3, nonneg=True)
        target = w - gamma * (Y @ Y.T + rho * np.eye(3)) @ w
        cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [cp.sum(x) == 1]).solve(solver=cp.CLARABEL)
        u = rule.direction(seen[-1])
        np.testing.assert_allclose(rule.Y, Y, atol=1e-14)
        np.testing.assert_allclose(rule.w, x.value, atol=1e-6)
        np.testing.assert_allclose(u, rule.w @ Y, atol=1e-14)
        w = rule.w


def test_moco_by_hand_and_its_limit():
    rule = moco.Moco(2, 2)
    # Y = (1, 0), (0, 2); w - .1 (1, 4)/2 = (.45, .3), + .125 each
    np.testing.assert_allclose(rule.direction(np.diag([2.0, 4.0])), [0.575, 0.85])
    J = ZOO["conflicting_2"]
    rule = moco.Moco(2, J.shape[1], beta=1.0, gamma=0.01)
    for _ in range(2000):
        u = rule.direction(J, np.ones(2))
    np.testing.assert_allclose(u, mgda.direction(J), atol=1e-6)


def test_db_mtl_against_unrolled_averages():
    rng = np.random.default_rng(0)
    for beta, decay in ((0.9, 0.5), (0.5, 0.0), (0.1, 1.0), (0.0, 0.5)):
        rule, seen, betas = db_mtl.DbMtl(3, 8, beta, decay), [], []
        for k in range(1, 7):
            J, losses = rng.standard_normal((3, 8)) * [[1.0], [100.0], [0.01]], rng.uniform(0.1, 5, 3)
            seen.append(J / losses[:, None])
            betas.append(beta / k**decay)
            h = sum((1 - betas[j]) * np.prod(betas[j + 1 :]) * seen[j] for j in range(k))
            norms = np.linalg.norm(h, axis=1)
            u = rule.direction(J, losses)
            np.testing.assert_allclose(u, norms.max() * (h / norms[:, None]).sum(axis=0), rtol=1e-10, atol=1e-12)


def test_db_mtl_uses_the_gradients_of_the_logarithms():
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([(x**2).sum(), torch.exp(x).sum() * 10, (x[0] - x[2]) ** 4 + 1])
    raw = torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]).numpy()
    logs = torch.stack([torch.autograd.grad(loss.log(), x, retain_graph=True)[0] for loss in losses]).numpy()
    norms = np.linalg.norm(logs, axis=1)
    expected = norms.max() * (logs / norms[:, None]).sum(axis=0)
    np.testing.assert_allclose(db_mtl.DbMtl(3, 3, beta=0.0).direction(raw, losses.detach().numpy()), expected)
    # only the first beta, undecayed, shrinks the first direction
    first = db_mtl.DbMtl(3, 3, beta=0.9).direction(raw, losses.detach().numpy())
    np.testing.assert_allclose(first, 0.1 * expected)


def test_db_mtl_of_a_zero_row():
    J = ZOO["zero_row"]
    u = db_mtl.DbMtl(4, 8, beta=0.0).direction(J, np.ones(4))
    norms = np.linalg.norm(J[[0, 1, 3]], axis=1)
    np.testing.assert_allclose(u, norms.max() * (J[[0, 1, 3]] / norms[:, None]).sum(axis=0))


def test_excess_mtl_against_unrolled_sums():
    rng, lr = np.random.default_rng(0), 0.3
    rule, seen, risks, ratios = excess_mtl.ExcessMtl(3, 8, lr), [], [], []
    for k in range(6):
        seen.append(rng.standard_normal((3, 8)) * [[1.0], [100.0], [0.01]])
        spread = np.sqrt(sum(J**2 for J in seen))
        e = np.array([g @ np.diag(1 / s) @ g for g, s in zip(seen[-1], spread, strict=True)])
        risks.append(e)
        ratios.append(e / risks[0] if k else np.zeros(3))
        expected = 3 * softmax(lr * np.sum(ratios, axis=0))  # renormalising at every step cancels
        u = rule.direction(seen[-1])
        np.testing.assert_allclose(rule.w, expected, rtol=1e-11)
        np.testing.assert_allclose(u, expected @ seen[-1], rtol=1e-11)
    np.testing.assert_allclose(rule.w.sum(), 3)


def test_excess_mtl_by_hand():
    rule = excess_mtl.ExcessMtl(2, 2, lr=1.0)
    J = np.array([[3.0, 0.0], [1.0, -1.0]])
    np.testing.assert_array_equal(rule.direction(J), [4, -1])  # e is the l1 norms, 3 and 2
    # S = (25, 0), (2, 2): e = 16/5 and sqrt(2), over the first 16/15 and 1/sqrt(2)
    w = rule.weights(np.array([[4.0, 0.0], [1.0, -1.0]]))
    np.testing.assert_allclose(w, 2 * softmax(np.array([16 / 15, np.sqrt(0.5)])))
    with pytest.raises(ValueError, match="first gradient"):
        excess_mtl.ExcessMtl(4, 8).weights(ZOO["zero_row"])
