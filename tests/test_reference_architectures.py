"""The architectures against naive readings of their papers, in float64 and with every parameter at random."""

import copy
import math
from collections.abc import Callable, Iterable
from itertools import pairwise, product

import pytest
import torch
from models import own_random_state  # noqa: F401  (an autouse fixture)
from reference import architectures as oracle
from scipy import stats
from torch import Tensor, nn

from gradsurgery.architectures import (
    CGC,
    ESMM,
    HPS,
    LTB,
    MTAN,
    NDDRCNN,
    PLE,
    AdaShare,
    Architecture,
    CrossStitch,
    DSelectK,
    MMoE,
    SegNet,
    SegNetMTAN,
    Sluice,
    Stages,
    segnet_head,
    split_stages,
)

TASKS = {"seg": 4, "depth": 1, "normal": 3}
WIDTHS = (4, 6, 8)
LAYOUTS = ("maps", "maps last", "tokens", "vectors")
MODES = ("train", "eval")
T = len(TASKS)


def grid(*values: Iterable) -> list[tuple]:
    return list(product(*values))


class Thin(nn.Module):
    """Every other position of maps (B, H, W, C)."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, ::2, ::2]


def block(layout: str, i: int, o: int, stride: int = 1) -> nn.Sequential:
    if layout == "maps":
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.Tanh())
    thin = [Thin()] if layout == "maps last" and stride == 2 else []
    return nn.Sequential(*thin, nn.Linear(i, o), nn.Tanh())


def encoder(layout: str = "maps", widths: tuple[int, ...] = WIDTHS, blocks: int = 2) -> Stages:
    """Stages of `blocks` blocks, of which the first halves the maps, after a stem of one block."""
    stages = [block(layout, 3, widths[0])]
    for i, o in pairwise(widths):
        stages.append(nn.Sequential(*(block(layout, o if b else i, o, 1 if b else 2) for b in range(blocks))))
    return Stages([nn.Sequential(stages[0]), *stages[1:]], layout="maps last" if layout == "maps last" else None)


def data(layout: str = "maps", batch: int = 3) -> Tensor:
    shape = {"maps": (3, 8, 6), "maps last": (8, 6, 3), "tokens": (5, 3), "vectors": (3,)}[layout]
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def channel(layout: str) -> int:
    return 1 if layout == "maps" else -1


def decoders(layout: str = "maps", widths: tuple[int, ...] = WIDTHS, tasks: dict[str, int] = TASKS) -> nn.ModuleDict:
    with torch.no_grad():
        entries = encoder(layout, widths).double().eval()(data(layout))[0].numel()
    return nn.ModuleDict({task: nn.Sequential(nn.Flatten(), nn.Linear(entries, out)) for task, out in tasks.items()})


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Float64, with every parameter and running statistic at random."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            fan = max(p[0].numel(), 1) if p.ndim > 1 else 1
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) * (1.5 / fan**0.5))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, dtype=b.dtype, generator=generator) * 0.5)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, dtype=b.dtype, generator=generator) + 0.5)
    return model


def make(
    cls: Callable[..., Architecture], layout: str = "maps", mode: str = "train", **options: object
) -> Architecture:
    tasks = options.pop("tasks", TASKS)
    model = cls(lambda: encoder(layout), dict(decoders(layout, tasks=tasks)), **options)
    return randomised(model).train(mode == "train")


def assert_same(model: Architecture, expected: dict[str, Tensor], x: Tensor) -> None:
    """Predictions from what the oracle computed for each task; nothing may be missing, nor be the same by chance."""
    out = model(x)
    assert list(out) == list(expected) == list(model.decoders)
    for task, z in expected.items():
        prediction = model.decoders[task](z)
        torch.testing.assert_close(out[task], prediction, rtol=1e-9, atol=1e-9)
        assert prediction.std() > 1e-5


def named(networks: nn.ModuleList, tasks: dict[str, int] = TASKS) -> dict[str, list[nn.Module]]:
    return {task: list(network) for task, network in zip(tasks, networks, strict=True)}


def linears(gates: nn.ModuleDict) -> dict[str, nn.Linear]:
    return {task: gate.linear for task, gate in gates.items()}


def size(*parts: nn.Module) -> int:
    return oracle.size(*parts)


# Mixtures of experts.


@pytest.mark.parametrize(("layout", "mode", "stem"), grid(LAYOUTS, MODES, (0, 1, 2)))
def test_mmoe(layout: str, mode: str, stem: int) -> None:
    model, x = make(MMoE, layout, mode, num_experts=4, stem=stem), data(layout)
    experts = model.experts
    expected = oracle.mmoe(x, experts.stem, list(experts.experts), linears(model.gates), channel(layout))
    assert_same(model, expected, x)
    z = model.representation(x)
    for task in TASKS:
        weights = oracle.gate(model.gates[task].linear, experts.stem(x), channel(layout))
        torch.testing.assert_close(model.gate_weights(z, task), weights)
        assert weights.std() > 0.01


@pytest.mark.parametrize(("layout", "mode", "stem"), grid(LAYOUTS, MODES, (0, 1)))
def test_cgc(layout: str, mode: str, stem: int) -> None:
    own = {"seg": 2, "depth": 0, "normal": 1}
    for task_experts in (own, 2):
        model = make(CGC, layout, mode, shared_experts=2, task_experts=task_experts, stem=stem)
        x, experts = data(layout), model.experts
        count = own if task_experts is own else dict.fromkeys(TASKS, 2)
        mine = {task: list(model.task_experts[task]) if count[task] else [] for task in TASKS}
        assert {task: len(experts) for task, experts in mine.items()} == count
        args = (experts.stem, list(experts.experts), mine, linears(model.gates), channel(layout))
        assert_same(model, oracle.cgc(x, *args), x)
        z = model.representation(x)
        for task in TASKS:
            weights = oracle.gate(model.gates[task].linear, experts.stem(x), channel(layout))
            torch.testing.assert_close(model.gate_weights(z, task), weights)


@pytest.mark.parametrize(("layout", "mode", "stem"), grid(LAYOUTS, MODES, (0, 1)))
@pytest.mark.parametrize(("shared", "own"), [(1, 1), (2, 3)])
def test_ple(layout: str, mode: str, stem: int, shared: int, own: int) -> None:
    model, x = make(PLE, layout, mode, stem=stem, shared_experts=shared, task_experts=own), data(layout)
    assert len(model.levels) == len(WIDTHS) - stem
    assert model.levels[-1].shared_gate is None
    assert_same(model, oracle.ple(x, model.stem, list(model.levels), channel(layout)), x)


def gate_linears(name: str) -> list[nn.Linear]:
    if name == "PLE":
        levels = make(PLE).levels
        return [gate.linear for level in levels for gate in level.gates.values()] + [levels[0].shared_gate.linear]
    return list(linears(make({"MMoE": MMoE, "CGC": CGC}[name]).gates).values())


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE"])
def test_gates_are_linear(name: str) -> None:
    """softmax(W x), W of n x d and nothing added: MMoE's Equation 7, the PLE paper's Equation 2."""
    assert all(linear.bias is None for linear in gate_linears(name))


def dselect_logits(model: DSelectK, task: str, x: Tensor, layout: str) -> tuple[list[Tensor], list[Tensor]]:
    gate = model.gates[task]
    read = oracle.mean(model.experts.stem(x), channel(layout))
    if not hasattr(gate.bits, "weight"):
        return [gate.bits.bias] * len(x), [gate.mixing.bias] * len(x)
    return [oracle.affine(gate.bits, v) for v in read], [oracle.affine(gate.mixing, v) for v in read]


@pytest.mark.parametrize(("gamma", "per_sample"), grid((1.0, 8.0), (True, False)))
@pytest.mark.parametrize(("E", "k"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 3), (5, 3), (8, 2)])
def test_dselect_k(E: int, k: int, gamma: float, per_sample: bool) -> None:
    layout, mode = LAYOUTS[E % 4], MODES[k % 2]
    options = {"num_experts": E, "k": k, "gamma": gamma, "per_sample": per_sample, "stem": int(E > 3)}
    model, x = make(DSelectK, layout, mode, **options), data(layout)
    assert all(gate.gamma == gamma for gate in model.gates.values())
    z, outputs = model.representation(x), [expert(model.experts.stem(x)) for expert in model.experts.experts]
    assert len(outputs) == E
    expected = {}
    for task in TASKS:
        bits, mixing = dselect_logits(model, task, x, layout)
        assert all(len(b) == k * math.ceil(math.log2(E)) and len(m) == k for b, m in zip(bits, mixing, strict=True))
        pairs = list(zip(bits, mixing, strict=True))
        weights = torch.stack([oracle.dselect_gate(b, m, E, gamma) for b, m in pairs])
        torch.testing.assert_close(model.gate_weights(z, task), weights)
        penalties = [oracle.dselect_penalty(b, k, E, gamma) for b in bits]
        assert gamma == 1 or all(map(math.isfinite, penalties))
        if all(map(math.isfinite, penalties)):
            penalty = torch.tensor(sum(penalties) / len(penalties), dtype=x.dtype)
            torch.testing.assert_close(model.penalty(z, task), penalty, rtol=1e-6, atol=1e-9)
        expected[task] = oracle.mixture(weights, outputs)
    out = model(x)
    for task, h in expected.items():
        torch.testing.assert_close(out[task], model.decoders[task](h), rtol=1e-9, atol=1e-9)


def test_dselect_k_chooses_one_expert_a_selector() -> None:
    """Bits beyond gamma / 2 are exact: weights of k experts at most, bit 0 the least significant."""
    model, x = make(DSelectK, "vectors", num_experts=8, k=2), data("vectors")
    gate = model.gates["seg"]
    for first, second in product(range(8), repeat=2):
        with torch.no_grad():
            gate.bits.weight.zero_()
            gate.mixing.weight.zero_()
            gate.mixing.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
            gate.bits.bias.copy_(torch.tensor([1.0 if e >> b & 1 else -1.0 for e in (first, second) for b in range(3)]))
        expected = torch.zeros(len(x), 8, dtype=x.dtype)
        expected[:, first] += 0.75
        expected[:, second] += 0.25
        torch.testing.assert_close(model.gate_weights(model.representation(x), "seg"), expected)


# A network a task.


def ordered(parts: nn.ModuleList | nn.ParameterList, stem: bool) -> list:
    """What follows each stage; nothing follows the first unless stem."""
    assert len(parts) == len(WIDTHS) - (not stem)
    return list(parts) if stem else [None, *parts]


@pytest.mark.parametrize(("layout", "mode", "stem"), grid(LAYOUTS, MODES, (False, True)))
def test_cross_stitch(layout: str, mode: str, stem: bool) -> None:
    model, x = make(CrossStitch, layout, mode, stem=stem), data(layout)
    stitches = ordered(model.stitches, stem)
    assert all(a is None or a.shape == (T, T, c) for a, c in zip(stitches, WIDTHS, strict=True))
    assert_same(model, oracle.cross_stitch(x, named(model.networks), stitches, channel(layout)), x)


@pytest.mark.parametrize("tasks", [2, 3])
def test_cross_stitch_starts_near_the_identity(tasks: int) -> None:
    model = CrossStitch(encoder, dict(decoders(tasks={f"t{t}": 1 for t in range(tasks)})))
    for stitch in model.stitches:
        for t, s in product(range(tasks), repeat=2):
            weight = 0.9 if t == s else 0.1 / (tasks - 1)
            torch.testing.assert_close(stitch[t, s], torch.full_like(stitch[t, s], weight))


@pytest.mark.parametrize(("layout", "mode", "stem"), grid(LAYOUTS, MODES, (False, True)))
def test_nddr_cnn(layout: str, mode: str, stem: bool) -> None:
    model, x = make(NDDRCNN, layout, mode, stem=stem), data(layout)
    fusions = [
        None if fusion is None else {task: fusion[task].module for task in TASKS}
        for fusion in ordered(model.fusions, stem)
    ]
    assert_same(model, oracle.nddr(x, named(model.networks), fusions, channel(layout)), x)


@pytest.mark.parametrize("tasks", [2, 3])
def test_nddr_cnn_starts_near_the_identity(tasks: int) -> None:
    names = [f"t{t}" for t in range(tasks)]
    model = NDDRCNN(encoder, dict(decoders(tasks=dict.fromkeys(names, 1))))
    for fusion, width in zip(model.fusions, WIDTHS[1:], strict=True):
        for t, task in enumerate(names):
            linear, norm = copy.deepcopy(fusion[task].module[:2]).requires_grad_(False)
            for row, s, c in product(range(width), range(tasks), range(width)):
                weight = (0.9 if s == t else 0.1 / (tasks - 1)) if row == c else 0.0
                assert float(linear.weight[row, s * width + c]) == pytest.approx(weight, abs=1e-7)
            assert bool((norm.weight == 1).all() and (norm.bias == 0).all())


@pytest.mark.parametrize(("layout", "mode", "G"), grid(LAYOUTS, MODES, (1, 2)))
def test_sluice(layout: str, mode: str, G: int) -> None:
    model, x = make(Sluice, layout, mode, subspaces=G), data(layout)
    assert all(alpha.shape == (T * G, T * G) for alpha in model.alphas)
    skips = {}
    for task in TASKS:
        assert model.betas[task].shape == (len(WIDTHS),)
        skips[task] = [skip.module for skip in list(model.skips[task])[: len(WIDTHS) - 1]]
        assert all(skip.channel_dim in (channel(layout), x.ndim + channel(layout)) for skip in model.skips[task][:2])
    args = (list(model.alphas), dict(model.betas), skips, channel(layout))
    assert_same(model, oracle.sluice(x, named(model.networks), *args), x)


def test_sluice_of_one_width_has_no_maps_between() -> None:
    widths = (4, 4, 4)
    model = randomised(Sluice(lambda: encoder("maps", widths), dict(decoders("maps", widths))))
    skips = {task: [None, None] for task in TASKS}
    x = data()
    assert_same(model, oracle.sluice(x, named(model.networks), list(model.alphas), dict(model.betas), skips), x)


@pytest.mark.parametrize(("layout", "G"), grid(("maps", "tokens"), (1, 2)))
def test_sluice_orthogonality(layout: str, G: int) -> None:
    model = make(Sluice, layout, subspaces=G)
    stages = [stage for network in model.networks for stage in network]
    weights = [[p for p in stage.parameters() if p.ndim >= 2][-1] for stage in stages]
    assert len(weights) == T * len(WIDTHS)
    penalty = model.orthogonality()
    torch.testing.assert_close(penalty.double(), torch.tensor(oracle.orthogonality(weights, G), dtype=torch.float64))
    assert (penalty.item() > 0) == (G > 1)


# One network.


@pytest.mark.parametrize(("layout", "mode", "blocks"), grid(("maps",), MODES, (1, 2, 3)))
def test_mtan(layout: str, mode: str, blocks: int) -> None:
    model = randomised(MTAN(lambda: encoder(layout, blocks=blocks), dict(decoders(layout)))).train(mode == "train")
    x, stages = data(layout), [list(stage) for stage in model.encoder]
    assert [len(stage) for stage in stages] == [1, blocks, blocks]
    masks = {task: [mask.module for mask in model.masks[task]] for task in TASKS}
    assert_same(model, oracle.mtan(x, stages, masks, list(model.between)), x)


@pytest.mark.parametrize("mode", MODES)
def test_mtan_of_four_stages(mode: str) -> None:
    """A second f, and a stage that does not halve the maps."""
    widths = (4, 6, 6, 8)
    model = randomised(MTAN(lambda: encoder("maps", widths), dict(decoders("maps", widths)), reduction=2))
    model.train(mode == "train")
    masks = {task: [mask.module for mask in model.masks[task]] for task in TASKS}
    assert [mask[0].out_features for mask in masks["seg"]] == [3, 3, 4]
    x = data()
    assert_same(model, oracle.mtan(x, [list(stage) for stage in model.encoder], masks, list(model.between)), x)


@pytest.mark.parametrize("mode", MODES)
def test_segnet_and_segnet_mtan(mode: str) -> None:
    widths = (4, 6, 8)
    heads = {task: segnet_head(out, 4) for task, out in TASKS.items()}
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    model = randomised(SegNetMTAN(heads, widths=widths)).train(mode == "train")
    assert_same(model, oracle.segnet_mtan(x, model), x)
    net = randomised(SegNet(widths)).train(mode == "train")
    torch.testing.assert_close(net(x), oracle.segnet_scales(net, x)[2][-1][1])


# Learned structure: LTB and AdaShare.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ltb_at_evaluation(layout: str) -> None:
    model, x = make(LTB, layout, "eval"), data(layout)
    assert model.logits.shape == (len(WIDTHS) - 1, T, T)
    model.anneal(10, 20)
    for _ in range(5):
        with torch.no_grad():
            model.logits.copy_(torch.randn(model.logits.shape))
        parents = oracle.parents(model.logits)
        assert model.branches().tolist() == parents
        assert_same(model, oracle.ltb(x, named(model.networks), oracle.one_hot(parents, T)), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ltb_in_its_warm_up(layout: str) -> None:
    model, x = make(LTB, layout, "train", warm_up=0.1), data(layout)
    uniform = [[[1 / T] * T] * T] * (len(WIDTHS) - 1)
    expected = oracle.ltb(x, named(model.networks), uniform)
    assert_same(model, expected, x)
    model.anneal(1, 20)
    assert_same(model, expected, x)
    model.anneal(2, 20)
    with pytest.raises(AssertionError):
        assert_same(model, expected, x)


def parent_reader(logits: list[list[float]], nodes: int) -> LTB:
    """Node t of the first stage says e_t, the second repeats what it is fed: z[t] is the weights that were drawn.

    Node t has the given logits t modulo their number, of the first parents, and draws no other.
    """
    task_decoders = {f"t{t}": nn.Identity() for t in range(nodes)}
    model = LTB(lambda: Stages([nn.Linear(1, nodes), nn.Linear(nodes, nodes)]), task_decoders).double()
    with torch.no_grad():
        for t, network in enumerate(model.networks):
            first, second = (next(m for m in stage.modules() if isinstance(m, nn.Linear)) for stage in network)
            first.weight.zero_()
            first.bias.copy_(torch.eye(nodes)[t])
            second.weight.copy_(torch.eye(nodes))
            second.bias.zero_()
        model.logits.fill_(-1e4)
        for t in range(nodes):
            row = torch.tensor(logits[t % len(logits)])
            model.logits[0, t, : len(row)] = row
    return model.train()


def test_ltb_draws_parents_by_their_softmax() -> None:
    logits, nodes, passes = [[0.0, 1.0, -1.0], [0.5, 0.5, 0.0], [2.0, 0.0, 0.3]], 24, 150
    model = parent_reader(logits, nodes)
    model.anneal(5, 100)
    counts, joint, x = torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(passes):
            weights = torch.cat(list(model(x).values()))
            torch.testing.assert_close(weights.max(1).values, weights.new_ones(nodes))
            torch.testing.assert_close(weights.abs().sum(1), weights.new_ones(nodes))
            parents = weights.argmax(1).tolist()
            for t, parent in enumerate(parents):
                counts[t % 3, parent] += 1
            for t in range(0, nodes, 3):
                joint[parents[t], parents[t + 1]] += 1
    for t in range(3):
        expected = [passes * nodes / 3 * float(p) for p in oracle.softmax(torch.tensor(logits[t]))]
        assert stats.chisquare(counts[t].tolist(), expected, sum_check=False).pvalue > 1e-3
    assert stats.chi2_contingency(joint.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("epoch", "epochs"), [(3, 100), (30, 60)])
def test_ltb_has_the_gradient_of_the_soft_sample_at_its_temperature(epoch: int, epochs: int) -> None:
    """d z_0 / d logit_0 = y_0 y_1 / tau of a sample y of two: tau log(y_0 / y_1) is logistic about the difference.

    LibMTL's temperature, epochs / 20 / sqrt(epoch + 1).
    """
    nodes, passes, tau = 24, 40, epochs / 20 / math.sqrt(epoch + 1)
    model, x = parent_reader([[0.7, 0.0]], nodes), torch.zeros(1, 1, dtype=torch.float64)
    model.anneal(epoch, epochs)
    upstream = torch.linspace(1, 2, nodes, dtype=x.dtype)
    samples = []
    for _ in range(passes):
        drawn = torch.cat(list(model(x).values()))[:, 0]
        (gradient,) = torch.autograd.grad((upstream * drawn).sum(), model.logits)
        torch.testing.assert_close(gradient[0, :, 0], -gradient[0, :, 1])
        assert float(gradient[0, :, 2:].abs().max()) < 1e-9
        for z, slope in zip(drawn.tolist(), (gradient[0, :, 0] / upstream).tolist(), strict=True):
            assert -1e-12 <= slope * tau <= 0.25 + 1e-12
            odds = (1 + math.sqrt(max(1 - 4 * slope * tau, 0))) / 2
            distance = tau * math.log(odds / (1 - odds)) if odds < 1 else math.inf
            samples.append(distance if z > 0.5 else -distance)
    assert stats.kstest(samples, stats.logistic(loc=0.7).cdf).pvalue > 1e-3


def skippable(model: AdaShare) -> int:
    return sum(len(stage) - 1 for stage in model.encoder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adashare_at_evaluation(layout: str) -> None:
    model = AdaShare(lambda: encoder(layout, blocks=4), dict(decoders(layout)))
    model, x = randomised(model).eval(), data(layout)
    stages = [list(stage) for stage in model.encoder]
    assert skippable(model) == 6
    for _ in range(5):
        with torch.no_grad():
            for logits in model.logits.values():
                logits.copy_(torch.randn(6, 2))
        model.logits["seg"].data[1] = 0.25
        assert_same(model, {task: oracle.adashare(x, stages, model.logits[task]) for task in TASKS}, x)
        for task in TASKS:
            run = torch.tensor(oracle.run_probability(model.logits[task]), dtype=x.dtype)
            torch.testing.assert_close(model.policy(task), run)
            torch.testing.assert_close(model.network(task)(x), model(x)[task])
        sparsity = torch.tensor(oracle.adashare_sparsity(model.logits), dtype=x.dtype)
        torch.testing.assert_close(model.sparsity(), sparsity)
        sharing = torch.tensor(oracle.adashare_sharing(model.logits), dtype=x.dtype)
        torch.testing.assert_close(model.sharing(), sharing)


@pytest.mark.parametrize("mode", MODES)
def test_adashare_hardened(mode: str) -> None:
    model = randomised(AdaShare(lambda: encoder("maps", blocks=4), dict(decoders())))
    logits, x = {task: model.logits[task].detach().clone() for task in TASKS}, data()
    stages = [list(stage) for stage in model.encoder]
    model.harden()
    model.train(mode == "train")
    assert_same(model, {task: oracle.adashare(x, stages, logits[task]) for task in TASKS}, x)
    for task in TASKS:
        assert model.policy(task).tolist() == [float(run >= skip) for run, skip in logits[task].tolist()]


class Add(nn.Module):
    """h + W h + e_b with W = 0."""

    def __init__(self, width: int, b: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.eye(width)[b])

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h)


def test_adashare_draws_at_its_temperature() -> None:
    """u f(h) + (1 - u) h with u = softmax((logits + Gumbel) / tau): tau logit(u) is logistic about the difference.

    f adds e_b for block b, so that z is the drawn u. The authors' temperature starts at 5 and falls by 0.965 an epoch.
    """
    blocks = 3
    first = nn.Linear(1, blocks)
    nn.init.zeros_(first.weight)
    nn.init.zeros_(first.bias)
    stages = Stages([nn.Linear(1, 1), nn.Sequential(first, *(Add(blocks, b) for b in range(blocks)))])
    model = AdaShare(stages, {"a": nn.Identity(), "b": nn.Identity()}).double().train()
    with torch.no_grad():
        model.logits["a"].copy_(torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.3, 0.3]]))
        model.logits["b"].copy_(torch.tensor([[-0.5, 0.0], [2.0, 1.0], [0.0, 0.0]]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    for epoch in (None, 0, 20):
        if epoch is not None:
            model.anneal(epoch, 100)
        tau = 5 * 0.965 ** (epoch or 0)
        with torch.no_grad():
            draws = [model(x) for _ in range(700)]
        flat = []
        for task in ("a", "b"):
            u = torch.cat([z[task] for z in draws])
            noise = tau * (u / (1 - u)).log() - (model.logits[task][:, 0] - model.logits[task][:, 1]).detach()
            flat.append(noise)
        noise = torch.cat(flat, 1)
        for column in noise.T:
            assert stats.kstest(column.numpy(), stats.logistic.cdf).pvalue > 1e-3
        correlation = torch.corrcoef(noise.T) - torch.eye(2 * blocks)
        assert float(correlation.abs().max()) < 0.15


# ESMM.


def test_esmm() -> None:
    model = randomised(ESMM(nn.Linear(3, 5), {"ctr": nn.Linear(5, 1), "cvr": nn.Linear(5, 1)}))
    x = 3 * data("vectors", 50)
    out, z = model(x), model.representation(x)
    ctr, cvr = model.decoders["ctr"](model.encoder(x)), model.conversion(z)
    torch.testing.assert_close(out["ctr"], ctr)
    torch.testing.assert_close(cvr, model.decoders["cvr"](model.encoder(x)))
    torch.testing.assert_close(out["ctcvr"].sigmoid(), ctr.sigmoid() * cvr.sigmoid())
    expected = [[oracle.ctcvr(a, b)] for (a,), (b,) in zip(ctr.tolist(), cvr.tolist(), strict=True)]
    torch.testing.assert_close(out["ctcvr"], torch.tensor(expected, dtype=x.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_esmm_of_large_logits(dtype: torch.dtype) -> None:
    values = (-100.0, -30.0, -3.0, 0.0, 3.0, 15.0, 30.0, 100.0)
    pairs = torch.tensor(list(product(values, values)), dtype=dtype, requires_grad=True)
    model = ESMM(nn.Identity(), {"ctr": Pick(0), "cvr": Pick(1)}).to(dtype)
    out = model(pairs)["ctcvr"].squeeze(-1)
    assert bool(out.isfinite().all())
    expected = torch.tensor([oracle.ctcvr(a, b) for a, b in pairs.tolist()], dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), pairs)
    assert bool(gradient.isfinite().all())
    slopes = torch.tensor([[ctcvr_slope(a, b), ctcvr_slope(b, a)] for a, b in pairs.tolist()], dtype=dtype)
    torch.testing.assert_close(gradient, slopes, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=1e-6)


class Pick(nn.Module):
    def __init__(self, column: int):
        super().__init__()
        self.column = column

    def forward(self, z: Tensor) -> Tensor:
        return z[:, self.column, None]


def ctcvr_slope(a: float, b: float) -> float:
    """d logit(p) / d a of p = sigmoid(a) sigmoid(b): (1 - sigmoid(a)) / (1 - p)."""
    n = math.log1p(math.exp(-a)) + math.log1p(math.exp(-b))
    return 1 / (1 + math.exp(a)) / -math.expm1(-n)


# Sizes.


def heads_size(model: Architecture) -> int:
    return size(model.decoders)


def sizes() -> list[int]:
    """Of the stages of `encoder()`: convolutions of 3x3 with bias and batch norms, counted by hand."""
    i, c, e, g = 3, *WIDTHS
    conv = oracle.conv_bn
    return [conv(i, c), conv(c, e) + conv(e, e), conv(e, g) + conv(g, g)]


def test_sizes_of_stages() -> None:
    assert [size(stage) for stage in encoder()] == sizes()


def total(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stem", [0, 1])
def test_sizes_of_mixtures(stem: int) -> None:
    """Gates without a bias, as the papers have them."""
    S, d = sizes(), (3, WIDTHS[0])[stem]
    common, expert = sum(S[:stem]), sum(S[stem:])
    model = make(MMoE, num_experts=5, stem=stem)
    assert total(model) - heads_size(model) == common + 5 * expert + T * d * 5
    model = make(CGC, shared_experts=3, task_experts=2, stem=stem)
    assert total(model) - heads_size(model) == common + (3 + 2 * T) * expert + T * d * (3 + 2)
    model = make(PLE, shared_experts=3, task_experts=2, stem=stem)
    read, expected = (3, *WIDTHS), common
    for level in range(stem, 3):
        expected += (3 + 2 * T) * S[level] + T * read[level] * (3 + 2)
        if level < 2:
            expected += read[level] * (3 + 2 * T)
    assert total(model) - heads_size(model) == expected


@pytest.mark.parametrize(("E", "m", "per_sample"), [(4, 2, True), (5, 3, True), (5, 3, False), (8, 3, False)])
def test_sizes_of_dselect_k(E: int, m: int, per_sample: bool) -> None:
    """k (m + 1) maps of the input with their biases, or the biases alone."""
    model = make(DSelectK, num_experts=E, k=2, per_sample=per_sample, stem=1)
    S, k = sizes(), 2
    gates = T * k * (m + 1) * (WIDTHS[0] + 1 if per_sample else 1)
    assert total(model) - heads_size(model) == S[0] + E * (S[1] + S[2]) + gates


@pytest.mark.parametrize("stem", [False, True])
def test_sizes_of_networks_side_by_side(stem: bool) -> None:
    mixed = WIDTHS if stem else WIDTHS[1:]
    model = make(CrossStitch, stem=stem)
    assert total(model) - heads_size(model) == T * sum(sizes()) + sum(T * T * c for c in mixed)
    model = make(NDDRCNN, stem=stem)
    assert total(model) - heads_size(model) == T * sum(sizes()) + sum(T * (T * c * c + 2 * c) for c in mixed)


def test_sizes_of_the_others() -> None:
    S, L = sizes(), len(WIDTHS)
    model = make(Sluice, subspaces=2)
    skips = sum(c * WIDTHS[-1] + WIDTHS[-1] for c in WIDTHS[:-1])
    assert total(model) - heads_size(model) == T * sum(S) + L * (2 * T) ** 2 + T * L + T * skips
    model = make(MTAN)
    c, conv = WIDTHS, oracle.conv_bn
    masks = conv(c[1], c[1], 1) + conv(c[1], c[1], 1) + conv(2 * c[2], c[2], 1) + conv(c[2], c[2], 1)
    assert total(model) - heads_size(model) == sum(S) + T * masks + conv(c[1], c[2])
    model = make(LTB)
    assert total(model) - heads_size(model) == T * sum(S) + (L - 1) * T * T
    model = make(AdaShare)
    assert total(model) - heads_size(model) == sum(S) + T * 2 * 2


def test_sizes_of_segnets() -> None:
    """NYUv2's 13 classes, depth and normals: 25.06 M in one SegNet, 44.23 M with attention, 44.12 M without heads."""
    heads = lambda: {"seg": segnet_head(13), "depth": segnet_head(1), "normal": segnet_head(3)}
    in_heads = sum(map(oracle.segnet_head_size, (13, 1, 3)))
    plain, attention = HPS(SegNet, heads()), SegNetMTAN(heads())
    assert total(plain) == oracle.segnet_size() + in_heads
    assert total(attention) == oracle.segnet_mtan_size(3) + in_heads
    shared = sum(p.numel() for p in attention.protocol_shared_parameters())
    assert shared == oracle.segnet_mtan_size(3)
    assert [round(n / 1e6, 2) for n in (total(plain), total(attention), shared)] == [25.06, 44.23, 44.12]


# One task, one expert: the plain network.

ONE = {"only": 2}


def assert_plain(model: Architecture, modules: list[nn.Module], x: Tensor) -> None:
    z = oracle.chain(modules, x)
    torch.testing.assert_close(model(x), {"only": model.decoders["only"](z)}, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mode", "stem"), grid(MODES, (0, 1)))
def test_one_expert_is_the_plain_network(mode: str, stem: int) -> None:
    x = data()
    model = make(MMoE, mode=mode, stem=stem, num_experts=1, tasks=ONE)
    assert_plain(model, [model.experts.stem, model.experts.experts[0]], x)
    model = make(CGC, mode=mode, stem=stem, shared_experts=1, task_experts=0, tasks=ONE)
    assert_plain(model, [model.experts.stem, model.experts.experts[0]], x)


@pytest.mark.parametrize("mode", MODES)
def test_one_task_is_the_plain_network(mode: str) -> None:
    x = data()
    model = make(LTB, mode=mode, tasks=ONE)
    assert_plain(model, list(model.networks[0]), x)
    model.anneal(50, 100)
    assert_plain(model, list(model.networks[0]), x)
    model = CrossStitch(encoder, dict(decoders(tasks=ONE))).double().train(mode == "train")
    assert_plain(model, list(model.networks[0]), x)
    model = make(AdaShare, mode=mode, tasks=ONE)
    with torch.no_grad():
        model.logits["only"].copy_(torch.tensor([[1.0, -1.0]] * 2))
    model.harden()
    assert_plain(model, list(model.encoder), x)


# Stages of torchvision's encoders.

torchvision = pytest.importorskip("torchvision")


def vit(layers: int = 12, width: int = 48) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, layers, 4, width, 2 * width)


def captured(net: nn.Module, part: nn.Module, x: Tensor, entering: bool = False) -> Tensor:
    """What leaves (enters) a part as the net runs on x."""
    kept = []
    handle = part.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0] if entering else output))
    net(x)
    handle.remove()
    return kept[0]


NETS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[nn.Module], tuple[nn.Module, bool]], tuple[str, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(), 1, lambda net: (net.avgpool, True), ("fc",)),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 1, lambda net: (net.avgpool, True), ("classifier",)),
    "efficientnet_b0": (
        lambda: torchvision.models.efficientnet_b0(),
        1,
        lambda net: (net.avgpool, True),
        ("classifier",),
    ),
    "swin_t": (lambda: torchvision.models.swin_t(), -1, lambda net: (net.norm, False), ("head",)),
    "vit": (vit, -1, lambda net: (net.encoder, False), ("heads",)),
}


@pytest.mark.parametrize("name", NETS)
def test_split_stages(name: str) -> None:
    factory, dim, where, head = NETS[name]
    net = factory().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in [*net.named_parameters(), *net.named_buffers()]:
            if key.endswith("running_var"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            elif p.is_floating_point() and p.ndim < 2:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    side = 32 if name == "vit" else 64
    x = torch.randn(2, 3, side, side, generator=generator)
    part, entering = where(net)
    with torch.no_grad():
        expected = captured(net, part, x, entering)
        stages = split_stages(net).eval()
        h, widths = x, []
        for stage in stages:
            h = stage(h)
            widths.append(h.shape[dim])
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stages(x), expected, rtol=1e-5, atol=1e-5)
    assert list(stages.widths) == widths
    assert stages.channel_dim in (dim, h.ndim + dim)
    assert expected.std() > 1e-3
    kept = {id(p) for p in stages.parameters()}
    body = {id(p) for key, p in net.named_parameters() if key.split(".")[0] not in head}
    assert kept == body
    modules = {id(m) for m in net.modules()}
    library = [m for m in stages.modules() if type(m).__module__.startswith(("torch.nn.", "torchvision."))]
    assert all(id(m) in modules for m in library if list(m.parameters(recurse=False)))


def test_split_stages_of_a_vit_in_other_groups() -> None:
    net = vit(5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net.encoder(torch.cat([net.class_token.expand(2, -1, -1), net._process_input(x)], 1))
        for groups in (1, 3, 5):
            stages = split_stages(net, groups).eval()
            torch.testing.assert_close(stages(x), expected, rtol=1e-5, atol=1e-5)


def test_split_stages_of_torchvisions_vit_b_16() -> None:
    with torch.device("meta"):
        net = torchvision.models.vit_b_16()
    stages = split_stages(net)
    assert set(stages.widths) == {768}
    assert {id(p) for p in stages.parameters()} == {id(p) for p in net.parameters()} - {
        id(p) for p in net.heads.parameters()
    }
