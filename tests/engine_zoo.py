"""Small multi-task models that engines get wrong: shared weights, odd operators, odd graphs, the user's hooks.

A case is a network whose forward returns a loss a task; every network is built twice from one seed, so that the truth
is taken on a twin and no step can lean on another's forward.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

TASKS = 3

Data = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A model and its batches.

    Attributes:
        build: makes the network.
        data: inputs of a batch of n.
        vmap: whether a vmap over tasks gets the gradients right; None where either answer will do.
        dtype: of parameters and inputs.
        tolerance: relative error of an engine that is right.
        hub: whether every task is a head on the trunk's one output.
    """

    build: Callable[[], "Net"]
    data: Data
    vmap: bool | None = True
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    hub: bool = False

    def make(self) -> "Net":
        torch.manual_seed(0)
        return self.build().to(self.dtype)

    def batch(self, n: int, seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(100 + seed)
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in self.data(n))


class Net(nn.Module):
    """Losses of the tasks; `representation` is what the last forward passed to the heads, where there is such."""

    representation: Tensor | tuple[Tensor, ...] | None = None

    def shared(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def task_specific(self) -> list[nn.Parameter]:
        shared = {id(p) for p in self.shared()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in shared]


class Hub(Net):
    """A trunk, whose output every head reads; targets of opposite signs make the tasks conflict."""

    def __init__(self, trunk: nn.Module, example: tuple[Tensor, ...], scales: tuple[float, ...] = (1.0, 2.0, 3.0)):
        super().__init__()
        self.trunk, self.scales = trunk, scales
        width = trunk(*example).flatten(1).shape[1]
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in scales])

    def forward(self, *inputs: Tensor) -> Any:
        z = self.trunk(*inputs)
        self.representation = z
        outputs = [head(z.flatten(1)) for head in self.heads]
        return [
            s * (y - 3 * (-1) ** t).square().mean() for t, (s, y) in enumerate(zip(self.scales, outputs, strict=True))
        ]

    def shared(self) -> list[nn.Parameter]:
        return [p for p in self.trunk.parameters() if p.requires_grad]


class Wired(nn.Module):
    """A trunk made of members and a function of (itself, inputs)."""

    def __init__(self, wire: Callable[..., Tensor], **members: Any):
        super().__init__()
        self.wire = wire
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.wire(self, *inputs)


class Tasks(Net):
    """Members, and a function of (itself, inputs) that returns the losses; members whose names start with ``own``
    belong to one task each."""

    def __init__(self, wire: Callable[..., Any], **members: Any):
        super().__init__()
        self.wire = wire
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.wire(self, *inputs)

    def shared(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("own") and p.requires_grad]


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def mse(y: Tensor, target: float) -> Tensor:
    return (y - target).square().mean()


def linears(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(n, 1) for n in sizes])


ZOO: dict[str, Case] = {}


def add(name: str, build: Callable[[], Net], data: Data, **options: Any) -> None:
    assert name not in ZOO
    ZOO[name] = Case(build, data, **options)


def hub(
    name: str, trunk: Callable[[], nn.Module], data: Data, *, scales: Any = (1.0, 2.0, 3.0), **options: Any
) -> None:
    add(name, lambda: Hub(trunk(), data(2), scales), data, hub=True, **options)


def normal(*shape: int) -> Data:
    return lambda n: (torch.randn(n, *shape),)


def indices(high: int, *shape: int) -> Data:
    return lambda n: (torch.randint(high, (n, *shape)),)


# Linear layers, and weights that are used more than once or other than by their module.

hub("mlp", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()), normal(4))
hub("one linear", lambda: nn.Linear(4, 5), normal(4))
hub("tokens", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), normal(3, 4))
hub("long tokens", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), normal(9, 2))
hub("four axes", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(2, 2, 3))
hub("no bias", lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False)), normal(4))
hub(
    "transposed input",
    lambda: Wired(
        lambda m, x: m.b(m.a(x.transpose(1, 2)).tanh().transpose(1, 2)), a=nn.Linear(3, 5), b=nn.Linear(4, 2)
    ),
    normal(3, 4),
)


def tied(wire: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        trunk = Wired(wire, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        trunk.b.weight = trunk.a.weight
        return trunk

    return build


hub("tied weights", tied(lambda m, x: m.b(m.a(x).tanh())), normal(4))
hub("tied weights over tokens", tied(lambda m, x: m.b(m.a(x).tanh())), normal(3, 4))
hub(
    "tied transpose",
    lambda: Wired(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.t()), a=nn.Linear(4, 6)),
    normal(4),
)
hub("module used three times", lambda: Wired(lambda m, x: m.a(m.a(m.a(x).tanh()).tanh()), a=nn.Linear(4, 4)), normal(4))
hub(
    "module used at two lengths",
    lambda: Wired(lambda m, x: torch.cat([m.a(x).mean(1), m.a(x[:, 0])], 1).tanh(), a=nn.Linear(4, 3)),
    normal(5, 4),
)
hub(
    "parent uses its child's weight",
    lambda: Wired(lambda m, x: m.a(x) + F.linear(x.tanh(), m.a.weight), a=nn.Linear(4, 5)),
    normal(4),
)
hub(
    "child never called",
    lambda: Wired(lambda m, x: F.linear(x, m.a.weight, m.a.bias).tanh(), a=nn.Linear(4, 5)),
    normal(4),
)
hub(
    "slices of a weight",
    lambda: Wired(lambda m, x: F.linear(F.linear(x, m.w[:4]).tanh(), m.w[4:]), w=weight(8, 4)),
    normal(4),
)
hub(
    "view of a weight",
    lambda: Wired(lambda m, x: F.linear(F.linear(x, m.w.view(6, 4)).tanh(), m.w.view(4, 6)), w=weight(24)),
    normal(4),
)
hub(
    "masked weight",
    lambda: Wired(lambda m, x: F.linear(x, m.w * (m.w.detach().abs() > 0.1)), w=weight(5, 4)),
    normal(4),
)
hub(
    "broadcast parameters",
    lambda: Wired(
        lambda m, x: (x * m.scale + m.shift).tanh() * m.gain, scale=weight(4), shift=weight(1), gain=weight()
    ),
    normal(3, 4),
)
hub("bilinear", lambda: Wired(lambda m, x: m.a(x, x.tanh()), a=nn.Bilinear(3, 3, 4)), normal(3))
hub("prelu", lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 4), nn.PReLU()), normal(4))
hub(
    "einsum",
    lambda: Wired(lambda m, x: torch.einsum("nij,jk,il->nlk", x, m.a, m.b), a=weight(4, 3), b=weight(3, 2)),
    normal(3, 4),
)


def frozen() -> nn.Module:
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    trunk[2].requires_grad_(False)
    trunk[4].bias.requires_grad_(False)
    return trunk


hub("frozen middle", frozen, normal(4))
hub("unused module", lambda: Wired(lambda m, x: m.a(x).tanh(), a=nn.Linear(4, 5), b=nn.Linear(4, 5)), normal(4))

# Norms.

hub("batch norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)), normal(4))
hub(
    "batch norm without affine",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 2, 2)),
    normal(2, 5, 5),
)
hub(
    "batch norm without statistics",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()),
    normal(4),
)
hub("batch norm, eval", lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).eval(), normal(4))
hub("layer norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4)), normal(3, 4))
hub(
    "group and instance norm",
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.InstanceNorm2d(4, affine=True)
    ),
    normal(2, 6, 6),
)
hub("rms norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 4)), normal(4))

# Convolutions.

hub(
    "conv",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2)),
    normal(2, 6, 6),
)
hub("dilated conv", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, dilation=2, padding=2), nn.Tanh()), normal(2, 5, 5))
hub("grouped conv", lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh()), normal(4, 5, 5))
hub(
    "depthwise separable conv",
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.Tanh(), nn.Conv2d(6, 2, 1)),
    normal(3, 4, 4),
)
hub(
    "circular conv",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()),
    normal(2, 4, 4),
)
hub(
    "transposed conv",
    lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), nn.Tanh(), nn.Conv2d(3, 2, 4)),
    normal(2, 3, 3),
)
hub(
    "conv 1d", lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2)), normal(2, 9)
)
hub("conv 3d", lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh()), normal(1, 3, 3, 3))
hub(
    "channels last",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2)).to(memory_format=torch.channels_last),
    lambda n: (torch.randn(n, 3, 5, 5).to(memory_format=torch.channels_last),),
)
hub(
    "conv used twice",
    lambda: Wired(lambda m, x: m.a(m.a(x).tanh()), a=nn.Conv2d(2, 2, 3, padding=1)),
    normal(2, 4, 4),
)
hub(
    "pool and upsample",
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 3)
    ),
    normal(2, 6, 6),
)
hub("pixel shuffle", lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.PixelShuffle(2), nn.Conv2d(1, 2, 3)), normal(1, 3, 3))

# Tables.

hub("embedding", lambda: nn.Embedding(5, 3, padding_idx=0), indices(5, 4))
hub("embedding by frequency", lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), indices(5, 4))
hub("embedding with a norm limit", lambda: nn.Embedding(5, 3, max_norm=1.0), indices(5, 4))
hub(
    "embedding, reused", lambda: Wired(lambda m, i: m.a(i) * m.a(i.flip(1)).tanh(), a=nn.Embedding(5, 3)), indices(5, 4)
)
hub("embedding bag", lambda: nn.EmbeddingBag(5, 3, mode="mean"), indices(5, 4))
hub("embedding bag, max", lambda: nn.EmbeddingBag(5, 3, mode="max"), indices(5, 4))
hub(
    "weighted embedding bag",
    lambda: Wired(lambda m, i, w: m.a(i, per_sample_weights=w), a=nn.EmbeddingBag(5, 3, mode="sum")),
    lambda n: (torch.randint(5, (n, 4)), torch.rand(n, 4)),
)
hub("sparse embedding", lambda: nn.Embedding(5, 3, sparse=True), indices(5, 4), vmap=False)
hub(
    "gather and scatter",
    lambda: Wired(
        lambda m, x, i: torch.zeros(len(x), 3).to(x).index_add(1, i, m.a(x)[:, [3, 0, 0, 2]]).tanh() * m.a(x)[:, i[:3]],
        a=nn.Linear(4, 5),
    ),
    lambda n: (torch.randn(n, 4), torch.randint(3, (4,))),
)


def language() -> Net:
    def wire(m: Any, i: Tensor) -> list[Tensor]:
        z = m.mix(m.table(i).tanh()).tanh()
        logits = F.linear(z, m.table.weight)
        return [
            F.cross_entropy(logits[:, :-1].flatten(0, 1), i[:, 1:].flatten()),
            mse(m.own0(z), 1),
            mse(m.own1(z), -1),
        ]

    return Tasks(wire, table=nn.Embedding(6, 4), mix=nn.Linear(4, 4), own0=nn.Linear(4, 1), own1=nn.Linear(4, 1))


add("tied embedding and output", language, indices(6, 4))

# Recurrence and attention.

hub("gru", lambda: Wired(lambda m, x: m.a(x)[0], a=nn.GRU(3, 4, batch_first=True)), normal(4, 3))
hub(
    "lstm", lambda: Wired(lambda m, x: m.a(x)[1][0].transpose(0, 1), a=nn.LSTM(3, 4, 2, batch_first=True)), normal(4, 3)
)
hub(
    "bidirectional gru",
    lambda: Wired(lambda m, x: m.a(x)[0][:, -1], a=nn.GRU(3, 3, bidirectional=True, batch_first=True, bias=False)),
    normal(4, 3),
)


def unrolled(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), 4)
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
    return h


hub("unrolled cell", lambda: Wired(unrolled, cell=nn.GRUCell(3, 4)), normal(5, 3))
hub(
    "multi-head attention",
    lambda: Wired(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(4, 2, batch_first=True)),
    normal(3, 4),
)
hub(
    "scaled dot product attention",
    lambda: Wired(
        lambda m, x: m.out(F.scaled_dot_product_attention(*m.qkv(x).unsqueeze(1).chunk(3, -1), is_causal=True)),
        qkv=nn.Linear(4, 12),
        out=nn.Linear(4, 2),
    ),
    normal(3, 4),
)
hub("transformer layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), normal(3, 4))

# Randomness, parametrisation, recomputation, work in place.

hub(
    "dropout",
    lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4), nn.Dropout(0.2)),
    normal(4),
)
hub(
    "weight norm",
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 4)),
    normal(4),
)
hub(
    "spectral norm",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(6, 4))),
    normal(4),
)


class Block(nn.Module):
    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(5, 5), nn.Linear(5, 5), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.drop(self.a(x).tanh()))


def checkpointed(drop: float) -> Callable[[], nn.Module]:
    return lambda: Wired(
        lambda m, x: m.last(checkpoint(m.block, m.first(x), use_reentrant=False)),
        first=nn.Linear(4, 5),
        block=Block(drop),
        last=nn.Linear(5, 4),
    )


# A recomputation inside of vmap may or may not be allowed to draw.
hub("checkpoint", checkpointed(0.0), normal(4), vmap=None)
hub("checkpoint with dropout", checkpointed(0.5), normal(4), vmap=None)
hub(
    "in-place relu",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True)),
    normal(4),
)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    h[:, 0] *= 2
    out = h.new_zeros(len(h), 6)
    out[:, 1:5] = m.b(h)
    return out.mul_(m.gain)


hub("work in place", lambda: Wired(in_place, a=nn.Linear(4, 4), b=nn.Linear(4, 4), gain=weight(6)), normal(4))


class Residual(nn.Module):
    """A ResNet block: its two paths meet, and one's parameters are ancestors of the other's."""

    def __init__(self, wide: int, out: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(wide, out, 3, padding=1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.na, self.nb, self.down = nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.Conv2d(wide, out, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.nb(self.b(self.relu(self.na(self.a(x))))) + self.down(x))


hub("resnet blocks", lambda: nn.Sequential(Residual(2, 3), Residual(3, 2)), normal(2, 4, 4))
hub(
    "densely connected",
    lambda: Wired(
        lambda m, x: m.c(torch.cat([x, m.a(x).tanh(), m.b(torch.cat([x, m.a(x)], 1))], 1)),
        a=nn.Linear(3, 4),
        b=nn.Linear(7, 2),
        c=nn.Linear(9, 4),
    ),
    normal(3),
)
hub(
    "fourier",
    lambda: Wired(lambda m, x: torch.fft.irfft(torch.fft.rfft(m.a(x)) * m.w).tanh(), a=nn.Linear(4, 8), w=weight(5)),
    normal(4),
)
hub(
    "complex",
    lambda: Wired(lambda m, x: (torch.view_as_complex(m.a(x).view(-1, 3, 2)) ** 2).abs(), a=nn.Linear(4, 6)),
    normal(4),
)
hub(
    "cumulative",
    lambda: Wired(lambda m, x: m.a(x).cumsum(1).sort(1).values.logsumexp(2), a=nn.Linear(4, 3)),
    normal(5, 4),
)
hub("task scales far apart", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh()), normal(4), scales=(1.0, 1e-5, 1e-10))
hub("one task", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh()), normal(4), scales=(1.0,))
hub(
    "seven tasks",
    lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)),
    normal(4),
    scales=(1, 2, 3, 1, 2, 1, 3),
)

# What vmap fails on, or gets wrong.

hub(
    "cdist",
    lambda: Wired(lambda m, x: torch.cdist(m.a(x), m.points), a=nn.Linear(4, 3), points=weight(5, 3)),
    normal(4),
    vmap=False,
)
hub(
    "cdist in a small task",
    lambda: Wired(lambda m, x: torch.cdist(m.a(x), m.points), a=nn.Linear(4, 3), points=weight(5, 3)),
    normal(4),
    vmap=False,
    scales=(1e6, 1.0, 1e-6),
)


class Clipped(torch.autograd.Function):
    """A backward that asks the host: longer gradients than 1 are cut to it, as nothing linear would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore
        return g / max(1.0, g.norm().item())


class Reversed(torch.autograd.Function):
    """Gradient reversal, in the old form without ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore
        return -ctx.factor * g, None


class Times(torch.autograd.Function):
    """A layer whose weight is an argument of a function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


hub(
    "backward with item",
    lambda: Wired(lambda m, x: Clipped.apply(m.a(x)).tanh(), a=nn.Linear(4, 5)),
    normal(4),
    vmap=False,
)
hub(
    "gradient reversal",
    lambda: Wired(lambda m, x: m.b(Reversed.apply(m.a(x).tanh(), 0.5)), a=nn.Linear(4, 5), b=nn.Linear(5, 4)),
    normal(4),
)
hub(
    "custom function",
    lambda: Wired(lambda m, x: Times.apply(m.a(x).tanh(), m.w), a=nn.Linear(4, 5), w=weight(5, 4)),
    normal(4),
)

# The user's hooks.


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def wire(m: Any, x: Tensor) -> Tensor:
        z = m.b(m.a(x).tanh())
        z.register_hook(hook)
        return z

    return wire


def with_hook(hook: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Wired(hooked(hook), a=nn.Linear(4, 5), b=nn.Linear(5, 4))


def parameter_hook(hook: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        trunk[0].weight.register_hook(hook)
        trunk[2].bias.register_hook(hook)
        return trunk

    return build


def module_hook() -> nn.Module:
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    trunk[2].register_full_backward_hook(lambda module, inputs, outputs: tuple(2 * g for g in inputs))
    trunk[3].register_full_backward_pre_hook(lambda module, outputs: tuple(3 * g for g in outputs))
    return trunk


hub("tensor hook", with_hook(lambda g: 2 * g), normal(4))
hub("tensor hook with item", with_hook(lambda g: g if g.sum().item() > 1e9 else 2 * g), normal(4), vmap=False)
hub("parameter hook", parameter_hook(lambda g: 2 * g), normal(4))
hub("module hooks", module_hook, normal(4), vmap=None)
# Row by row they are what autograd gives; one weighted pass, or a norm taken over all rows at once, is not.
hub("tensor hook that is not linear", with_hook(lambda g: g / (0.1 + g.norm())), normal(4), vmap=None)
hub("parameter hook that is not linear", parameter_hook(lambda g: g.clamp(-0.2, 0.2)), normal(4), vmap=None)

# Graphs that are no trunk with heads.


def depths() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        first = m.a(x).tanh()
        second = m.b(first).tanh()
        m.representation = (first, second)
        return [mse(m.own[0](first), 3), 2 * mse(m.own[1](second), -3), mse(m.own[2](torch.cat([first, second], 1)), 1)]

    return Tasks(wire, a=nn.Linear(4, 5), b=nn.Linear(5, 4), own=linears(5, 4, 9))


def mtan() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        first = m.a(x).relu()
        second = m.b(first).relu()
        m.representation = (first, second)
        losses = []
        for t in range(TASKS):
            one = m.own_first[t](first).sigmoid() * first
            two = m.own_second[t](torch.cat([second, m.own_between[t](one)], 1)).sigmoid() * second
            losses.append((t + 1) * mse(m.own_heads[t](two), 3 * (-1) ** t))
        return losses

    def each(a: int, b: int) -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(a, b) for _ in range(TASKS)])

    own = {"own_first": each(6, 6), "own_between": each(6, 6), "own_second": each(12, 6), "own_heads": each(6, 1)}
    return Tasks(wire, a=nn.Linear(4, 6), b=nn.Linear(6, 6), **own)


def partial() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        left, right = m.a(x).tanh(), m.b(x).tanh()
        return [mse(m.own[0](left), 3), 2 * mse(m.own[1](torch.cat([left, right], 1)), -3), mse(m.own[2](right), 1)]

    return Tasks(wire, a=nn.Linear(4, 5), b=nn.Linear(4, 4), own=linears(5, 9, 4))


def uncertainty() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        z = m.a(x).tanh()
        return [mse(m.own[t](z), 3 * (-1) ** t) * (-m.s[t]).exp() + m.s.sum() * m.s[t] for t in range(TASKS)]

    return Tasks(wire, a=nn.Linear(4, 5), s=weight(TASKS), own=linears(5, 5, 5))


def nested_losses() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        z = m.a(x).tanh()
        first = mse(m.own[0](z), 3)
        second = first.sqrt() - 2 * m.own[1](z).mean()
        return [first, second, (1 + second.square() + first).log() + mse(m.own[2](z), -1)]

    return Tasks(wire, a=nn.Linear(4, 5), own=linears(5, 5, 5))


def vector(join: Callable[[list[Tensor]], Any]) -> Callable[[], Net]:
    def wire(m: Any, x: Tensor) -> Any:
        z = m.a(x).tanh()
        return join([mse(m.own[t](z), 3 * (-1) ** t) for t in range(TASKS)])

    return lambda: Tasks(wire, a=nn.Linear(4, 5), own=linears(5, 5, 5))


def one_reduction() -> Net:
    def wire(m: Any, x: Tensor) -> Any:
        return (m.own(m.a(x).tanh()) - torch.tensor([3.0, -3.0, 1.0]).to(x)).square().mean(0)

    return Tasks(wire, a=nn.Linear(4, 5), own=nn.Linear(5, TASKS))


def chunks() -> Net:
    def wire(m: Any, x: Tensor) -> list[Tensor]:
        z = m.a(x).tanh().chunk(3, 1)
        m.representation = z
        return [mse(m.own[0](z[0]), 3), mse(m.own[1](z[1] + z[0]), -3), 2 * mse(m.own[2](z[2] * z[1]), 1)]

    return Tasks(wire, a=nn.Linear(4, 6), own=linears(2, 2, 2))


def own_inputs() -> Net:
    """Every task brings its own batch; the trunk runs once a task."""

    def wire(m: Any, x: Tensor) -> list[Tensor]:
        return [mse(m.own[t](m.a(x[:, t]).tanh()), 3 * (-1) ** t) for t in range(TASKS)]

    return Tasks(wire, a=nn.Linear(4, 5), own=linears(5, 5, 5))


def more_samples() -> Net:
    """One task has samples besides those of all."""

    def wire(m: Any, x: Tensor) -> list[Tensor]:
        z, more = (m.b(m.a(one).tanh()).tanh() for one in (x, 2 * x.flip(1)))
        return [mse(m.own[0](z), 3) + mse(m.own[0](more), -1), 2 * mse(m.own[1](z), -3), mse(m.own[2](z), 1)]

    return Tasks(wire, a=nn.Linear(4, 5), b=nn.Linear(5, 5), own=linears(5, 5, 5))


def physics() -> Net:
    """A PINN: one loss is made of derivatives of the network."""

    def wire(m: Any, x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        u = m.own(m.b(m.a(x).tanh()).tanh())
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        return [(ddu[:, 0] + u[:, 0]).square().mean(), mse(u, 1), (du[:, 1] - 1).square().mean()]

    return Tasks(wire, a=nn.Linear(2, 5), b=nn.Linear(5, 4), own=nn.Linear(4, 1))


def detached() -> Net:
    """One task learns from the other's representation without moving it there, one looks at it twice."""

    def wire(m: Any, x: Tensor) -> list[Tensor]:
        z = m.a(x).tanh()
        with torch.no_grad():
            target = m.a(x.flip(0))
        return [
            mse(m.own[0](z.detach() * z), 3),
            (z - target).square().sum(),
            2 * mse(m.own[1](z) + m.own[1](z.square()), 1),
        ]

    return Tasks(wire, a=nn.Linear(4, 5), own=linears(5, 5))


add("tasks leave at different depths", depths, normal(4))
add("attention per task on two stages", mtan, normal(4))
add("tasks reach parts of the trunk", partial, normal(4))
add("parameter used by the heads", uncertainty, normal(4))
add("loss inside another loss", nested_losses, normal(4))
add("unbound stack", vector(lambda losses: list(torch.stack(losses).unbind())), normal(4))
add("stack", vector(torch.stack), normal(4))
add("cat", vector(lambda losses: torch.cat([loss[None] for loss in losses])), normal(4))
add("losses of shape (1,)", vector(lambda losses: [loss[None] for loss in losses]), normal(4))
add("one reduction for all losses", one_reduction, normal(4))
add("chunks of one output", chunks, normal(4))
add("every task its own batch", own_inputs, normal(TASKS, 4))
add("one task has more samples", more_samples, normal(4))
add("derivatives in the loss", physics, normal(2))
add("detached parts", detached, normal(4))

# Whole models, and half precision.


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=6)


@functools.cache
def initialized() -> nn.Module:
    model = torchvision.models.resnet18(num_classes=6)
    for p in model.parameters():  # nine tenths of its weights, and of the time, are in few convolutions
        p.requires_grad_(p.numel() < 500_000)
    return model


def resnet(*, train: bool) -> nn.Module:
    return copy.deepcopy(initialized()).train(train)


SINGLE: dict[str, Any] = {"dtype": torch.float32, "tolerance": 1e-4}
hub("resnet18, train", lambda: resnet(train=True), normal(3, 32, 32), scales=(1.0, 2.0), **SINGLE)
hub("resnet18, eval", lambda: resnet(train=False), normal(3, 32, 32), scales=(1.0, 2.0), **SINGLE)
hub("vision transformer", vit, normal(3, 16, 16), **SINGLE)
hub("single precision", lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)), normal(4), **SINGLE)


def half(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(m.a(x).tanh()).float()


hub(
    "autocast",
    lambda: Wired(half, a=nn.Linear(4, 8), b=nn.Linear(8, 8)),
    normal(4),
    dtype=torch.float32,
    tolerance=3e-2,
)
