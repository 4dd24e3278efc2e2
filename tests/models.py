"""Tiny multi-task models and losses for the tests."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import MTLOptimizer, get_method
from gradsurgery.stats import Needs


class Toy(nn.Module):
    """A shared trunk and a linear head a task, float64, with losses of quite different sizes."""

    def __init__(self, tasks: int = 3, width: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(tasks)])
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]

    def losses(self, x: Tensor) -> list[Tensor]:
        outputs = self(x)
        return [((t + 1) * (y - (-1) ** t * x[:, :1] * (t + 1))).square().mean() for t, y in enumerate(outputs)]


def batch(n: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def jacobian(model: Toy, x: Tensor) -> Tensor:
    """Per-task gradients (T, d) of the trunk, the plain way."""
    params = list(model.trunk.parameters())
    return torch.stack([flat(torch.autograd.grad(model.losses(x)[t], params)) for t in range(len(model.heads))])


def optimizer(model: Toy, method: object = "cagrad", lr: float = 0.0, **options: object) -> MTLOptimizer:
    options.setdefault("shared_params", list(model.trunk.parameters()))
    return MTLOptimizer(torch.optim.SGD(model.parameters(), lr=lr), method, **options)  # pyright: ignore


def independent(name: str, first: object, second: object) -> dict[str, Any]:
    """The keyword that methods which learn from two independent batches ask for; nothing for the others."""
    return {"independent": (first, second)} if Needs.CROSS in get_method(name).needs else {}


def samples(model: Toy, name: str, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """The same, of `Toy` on two batches made of x."""
    return independent(name, *([scale * loss for loss in model.losses(y)] for y in (x.roll(1, 1), 1 - x)))


def trunk_gradient(model: Toy) -> Tensor:
    return flat([p.grad for p in model.trunk.parameters() if p.grad is not None])


TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A shared trunk and three heads whose targets disagree, so that the tasks' gradients conflict."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.heads = nn.ModuleDict({t: nn.Linear(2, 1) for t in TASKS})
        for head in self.heads.values():
            nn.init.ones_(head.weight)

    def forward(self, x):
        z = self.trunk(x)
        return {t: head(z).squeeze(-1) for t, head in self.heads.items()}


@pytest.fixture(autouse=True)
def own_random_state():
    """Every test starts from one seed and leaves the process's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
