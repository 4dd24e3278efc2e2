"""Identities between methods that their papers imply: each ties two pieces of code that know nothing of each other."""

import pytest
import torch
from models import Toy, batch, jacobian, optimizer, trunk_gradient
from reference import matrices

from gradsurgery import aggregate, functional
from gradsurgery.solvers import fair, nash

ZOO = {name: torch.from_numpy(J) for name, J in matrices.zoo().items()}
SOLVABLE = [name for name in ZOO if not matrices.expected_stationary(name)]
PAIRS = [name for name in SOLVABLE if len(ZOO[name]) == 2]


def cosine(u: torch.Tensor, v: torch.Tensor) -> float:
    return float((u @ v) / u.norm() / v.norm())


def units(J: torch.Tensor) -> torch.Tensor:
    return (J / J.norm(dim=1, keepdim=True)).sum(dim=0)


@pytest.mark.parametrize("zoo", SOLVABLE)
def test_the_family_of_inverse_norms(zoo: str) -> None:
    """NTKMTL with one batch, and DB-MTL without memory (the logarithm only rescales a row), sum unit gradients."""
    J = ZOO[zoo]
    assert cosine(aggregate(J, "ntkmtl"), units(J)) == pytest.approx(1, abs=1e-12)
    for losses in (torch.ones(len(J)).double(), torch.linspace(0.1, 5, len(J)).double()):
        u = aggregate(J, "db_mtl", losses=losses, beta=0.0)
        assert cosine(u, units(J)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g", "config", "ntkmtl"])
@pytest.mark.parametrize("zoo", PAIRS)
def test_the_family_of_inverse_norms_of_two(zoo: str, name: str) -> None:
    assert cosine(aggregate(ZOO[zoo], name), units(ZOO[zoo])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("zoo", PAIRS)
def test_nash_of_two_in_closed_form(zoo: str) -> None:
    J = ZOO[zoo]
    n = J.norm(dim=1)
    closed = 1 / (n * torch.sqrt(1 + (J[0] @ J[1]) / n.prod()))
    torch.testing.assert_close(functional.nash_mtl(J @ J.T), closed, rtol=1e-8, atol=0)


@pytest.mark.parametrize("zoo", PAIRS)
def test_pcgrad_of_two_is_twice_upgrad(zoo: str) -> None:
    J = ZOO[zoo]
    torch.testing.assert_close(aggregate(J, "pcgrad"), 2 * aggregate(J, "upgrad"), rtol=1e-7, atol=0)


@pytest.mark.parametrize("zoo", SOLVABLE)
def test_fairgrad_of_one_is_nash(zoo: str) -> None:
    J = ZOO[zoo]
    ones = torch.ones(len(J)).double()
    u, v = fair(J @ J.T, ones, 1.0)[0] @ J, nash(J @ J.T, ones)[0] @ J
    torch.testing.assert_close(u, v, rtol=1e-6, atol=1e-9 * float(v.norm()))


@pytest.mark.parametrize("zoo", ["random_3", "random_5", "random_10", "conflicting_pairs", "norm_spread_1e2"])
def test_the_two_limits_of_cagrad(zoo: str) -> None:
    J = ZOO[zoo]
    torch.testing.assert_close(aggregate(J, "cagrad", c=0.0, scale="mean"), J.mean(dim=0))
    assert cosine(aggregate(J, "cagrad", c=1e7), aggregate(J, "mgda")) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("zoo", [z for z in SOLVABLE if z not in ("more_tasks_than_parameters", "two_parameters")])
def test_config_and_imtl_g_have_one_direction(zoo: str) -> None:
    J = ZOO[zoo]
    assert cosine(aggregate(J, "config"), aggregate(J, "imtl_g")) == pytest.approx(1, abs=1e-9)
    if torch.linalg.matrix_rank(J / J.norm(dim=1, keepdim=True)) == len(J):
        by_hand = torch.linalg.solve(J @ J.T, J.norm(dim=1)) @ J
        assert cosine(aggregate(J, "config"), by_hand) == pytest.approx(1, abs=1e-6)


def test_the_family_of_inverse_losses_through_the_optimizer() -> None:
    """SI, GLS, FAMO before it has learned (whose weights are also scaled), and UW-O (1/L by hand) are parallel, on the
    trunk and on the heads. What UW and IMTL-L settle at is in test_losses_methods.py."""
    directions = []
    for name in ("si", "gls", "famo"):
        model, x = Toy(), batch()
        optimizer(model, name).backward(model.losses(x))
        directions.append(trunk_gradient(model))
    losses = torch.stack(Toy().losses(batch())).detach()
    directions.append((1 / losses) @ jacobian(Toy(), batch()))
    for u in directions:
        assert cosine(u, directions[0]) == pytest.approx(1, abs=1e-7)


def test_metabalance_all_the_way_is_equal_norms() -> None:
    J = ZOO["random_5"]
    u = aggregate(J, "metabalance", relax=1.0)
    torch.testing.assert_close(u, J[0].norm() * units(J))


def test_logs_of_losses_are_a_row_transform() -> None:
    """Passing log-losses to a Gramian method is the method on rows over losses."""
    model, x = Toy(), batch()
    optimizer(model, "mgda").backward([loss.log() for loss in model.losses(x)])
    losses = torch.stack(model.losses(x)).detach()
    torch.testing.assert_close(trunk_gradient(model), aggregate(jacobian(model, x) / losses[:, None], "mgda"))
