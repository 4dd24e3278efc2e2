"""Scaled losses, half precision and what else a real loop has around a step, for every method there is."""

import copy
from typing import Any

import pytest
import torch
from models import Toy, batch, flat, independent, optimizer, own_random_state, samples  # noqa: F401
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from gradsurgery import MTLOptimizer, list_methods

METHODS = list_methods()
T, N = 3, 200


def scaler_of(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


def state_of(opt: MTLOptimizer) -> str:
    return opt.state_dict()["param_groups"][0]["mtl"].partition('"state"')[2]


@pytest.mark.parametrize("name", METHODS)
def test_a_scale_is_not_seen_by_the_method(name: str) -> None:
    """Losses come unscaled, and ``.grad`` is scaled; step for step the same weights, state and parameters."""
    models, scaler = [Toy(), Toy()], scaler_of()
    plain, scaled = (optimizer(model, name, 0.05, seed=3) for model in models)
    for step in range(3):
        x = batch(seed=step)
        for opt in (plain, scaled):
            opt.zero_grad()
        plain.backward(models[0].losses(x), **samples(models[0], name, x))
        scaled.backward(models[1].losses(x), scaler=scaler, **samples(models[1], name, x))
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q.grad, 1024 * p.grad, rtol=1e-9, atol=1e-9)  # pyright: ignore
        plain.step()
        scaler.step(scaled)
        scaler.update()
    torch.testing.assert_close(flat(list(models[1].parameters())), flat(list(models[0].parameters())))
    assert scaler.get_scale() == 1024


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", METHODS)
def test_an_overflow_is_skipped_and_forgotten(name: str, bad: float) -> None:
    models, scaler = [Toy(), Toy()], scaler_of()
    calm, struck = (optimizer(model, name, 0.05, seed=3) for model in models)
    x = batch()
    calm.step(models[0].losses(x), **samples(models[0], name, x))
    struck.backward(models[1].losses(x), scaler=scaler, **samples(models[1], name, x))
    scaler.step(struck)
    scaler.update()
    before, state = flat(list(models[1].parameters())).clone(), state_of(struck)
    struck.zero_grad()
    losses = models[1].losses(x)
    struck.backward([losses[0] * bad, *losses[1:]], scaler=scaler, **samples(models[1], name, x))
    scaler.step(struck)
    scaler.update()
    assert torch.equal(flat(list(models[1].parameters())), before)
    assert scaler.get_scale() == 512
    after = state_of(struck)
    # Random numbers that were drawn stay drawn.
    assert after.partition('"random"')[0] == state.partition('"random"')[0]


class Given(nn.Module):
    """Losses whose gradients are rows that bfloat16 holds exactly, of one shared parameter."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.rows = torch.randn(T, N, generator=generator).bfloat16()
        self.rows[1] = (-self.rows[0].float() + 0.5 * self.rows[1].float()).bfloat16()
        self.p = nn.Parameter(torch.ones(N, dtype=dtype))

    def losses(self, shift: float = 0.0) -> list[Tensor]:
        # Far from 0, as some methods take its logarithm or a ratio.
        return [
            20.0 + t + (self.p.double() * row.double().roll(int(shift))).sum() / N for t, row in enumerate(self.rows)
        ]


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_parameters_get_the_rounded_direction(name: str) -> None:
    """Inner products, weights and sums are of the width of float32 at least, and one rounding comes last."""
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        model = Given(dtype)
        opt = MTLOptimizer(torch.optim.SGD(model.parameters(), 0.0), name, [model.p], seed=3)
        for shift in (0, 1):
            opt.zero_grad()
            more = independent(name, model.losses(3 + shift), model.losses(5 + shift))
            opt.backward(model.losses(shift), **more)
        assert model.p.grad is not None and model.p.grad.dtype == dtype
        found[dtype] = model.p.grad.double()
    exact = found[torch.float64]
    # One rounding of the sum to eight bits, beside that of rows divided by N.
    torch.testing.assert_close(found[torch.bfloat16], exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_trains(name: str) -> None:
    model = Toy(dtype=torch.float32)
    opt = optimizer(model, name, 0.01, seed=3)
    x = batch(16, dtype=torch.float32)
    before = flat(list(model.parameters())).clone()
    for _ in range(3):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses, more = model.losses(x), samples(model, name, x)
        opt.step(losses, **more)
    after = flat(list(model.parameters()))
    assert after.isfinite().all() and not torch.equal(after, before)
    assert opt.info is not None and opt.info.losses.dtype == torch.float64
    assert opt.info.weights is None or opt.info.weights.dtype == torch.float64


def test_averaged_weights_are_those_of_the_steps() -> None:
    model, x = Toy(), batch()
    opt = optimizer(model, "cagrad", 0.05)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    expected = copy.deepcopy(flat([p.detach() for p in model.parameters()]))
    for step in range(4):
        opt.zero_grad()
        opt.step(model.losses(x))
        average.update_parameters(model)
        now = flat([p.detach() for p in model.parameters()])
        expected = now if step == 0 else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(flat([p.detach() for p in average.module.parameters()]), expected)  # pyright: ignore


class Checkpointed(Toy):
    """`Toy`, whose trunk is passed again in every backward."""

    reentrant = False

    def forward(self, x: Tensor) -> list[Tensor]:
        z: Any = checkpoint(self.trunk, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return [head(z) for head in self.heads]


@pytest.mark.parametrize("engine", ["sequential", "batched", "gramian", "representation", "auto"])
def test_checkpointed_activations_give_the_same_gradients(engine: str) -> None:
    models = [Toy(), Checkpointed()]
    for model in models:
        optimizer(model, "upgrad", engine=engine).backward(model.losses(batch()))
    plain, again = (flat([p.grad for p in model.parameters()]) for model in models)  # pyright: ignore
    torch.testing.assert_close(again, plain)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_reentrant_checkpoints_are_refused_in_our_words(engine: str) -> None:
    class Reentrant(Checkpointed):
        reentrant = True

    model = Reentrant()
    opt = optimizer(model, "upgrad", engine=engine)
    for call in (opt.backward, opt.combine):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            call(model.losses(batch()))
    assert all(p.grad is None for p in model.parameters())
