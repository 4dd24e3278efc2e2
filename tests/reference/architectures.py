"""Multi-task architectures the slow way: loops over samples, tasks, experts, channels and positions.

Stages, experts and blocks are given and called; all that an architecture adds to them is spelt out. Features are
(B, C, *positions) unless a channel_dim says otherwise; tasks are in the order of the dict that holds their parts.

MMoE: Jiaqi Ma et al., KDD 2018, Equations 6-7. CGC, PLE: Hongyan Tang et al., RecSys 2020, Equations 1-6.
Cross-stitch: Ishan Misra et al., CVPR 2016, https://arxiv.org/abs/1604.03539, Equation 1.
NDDR-CNN: Yuan Gao et al., CVPR 2019, https://arxiv.org/abs/1801.08297, Sections 3.1-3.3.
Sluice networks: Sebastian Ruder et al., AAAI 2019, https://arxiv.org/abs/1705.08142, Section 2.
MTAN: Shikun Liu, Edward Johns, Andrew Davison, CVPR 2019, https://arxiv.org/abs/1803.10704, Section 3.2.
DSelect-k: Hussein Hazimeh et al., NeurIPS 2021, https://arxiv.org/abs/2106.03760, Section 3.
Learning to Branch: Pengsheng Guo, Chen-Yu Lee, Daniel Ulbricht, ICML 2020, https://arxiv.org/abs/2006.01895, Section 3.
AdaShare: Ximeng Sun et al., NeurIPS 2020, https://arxiv.org/abs/1911.12423, Section 3.
ESMM: Xiao Ma et al., SIGIR 2018, https://arxiv.org/abs/1804.07931, Equation 1.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor, nn

Module = Callable[[Tensor], Tensor]


def chain(modules: Iterable[Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def softmax(v: Tensor) -> Tensor:
    """e^v_i / sum_j e^v_j of one vector."""
    powers = [math.e ** (v[i] - v.max()) for i in range(len(v))]
    return torch.stack([p / sum(powers) for p in powers])


def affine(linear: nn.Linear, v: Tensor) -> Tensor:
    """W v + b of one vector, without b where there is none. A 1x1 convolution's W does as well."""
    entries = [(row * v).sum() for row in linear.weight.flatten(1)]
    if linear.bias is not None:
        entries = [e + b for e, b in zip(entries, linear.bias, strict=True)]
    return torch.stack(entries)


def positions(h: Tensor, channel_dim: int = 1) -> Tensor:
    """(B, P, C) of features (B, ..., C, ...)."""
    h = h.movedim(channel_dim, -1)
    return h.reshape(h.shape[0], -1, h.shape[-1])


def mean(h: Tensor, channel_dim: int = 1) -> Tensor:
    """(B, C) mean over the positions."""
    return torch.stack([sum(sample) / len(sample) for sample in positions(h, channel_dim)])


def everywhere(function: Module, h: Tensor, channel_dim: int = 1) -> Tensor:
    """A map of vectors, position by position: what a 1x1 convolution is."""
    rows = positions(h, channel_dim)
    rows = torch.stack([torch.stack([function(v) for v in sample]) for sample in rows])
    size = h.movedim(channel_dim, -1).shape
    return rows.reshape(*size[:-1], rows.shape[-1]).movedim(-1, channel_dim)


def batch_norm(norm: nn.Module, h: Tensor, channel_dim: int = 1) -> Tensor:
    """(h - m) / sqrt(v + eps) w + b, channel by channel; m and v (biased) of the batch in training, else the kept."""
    columns = []
    for c in range(h.shape[channel_dim]):
        column = h.select(channel_dim, c)
        m, v = norm.running_mean[c], norm.running_var[c]
        if norm.training:
            m = column.mean()
            v = (column - m).square().mean()
        columns.append((column - m) / (v + norm.eps).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(columns, channel_dim)


def max_pool(h: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *size): entry i of n, along an axis of N, is the maximum of floor(i N / n) .. ceil((i + 1) N / n) - 1."""
    if not size:
        return h
    out = h.new_empty(*h.shape[:2], *size)
    for place in product(*map(range, size)):
        window = h
        for axis, (i, n, N) in enumerate(zip(place, size, h.shape[2:], strict=True), 2):
            start, stop = i * N // n, -(-(i + 1) * N // n)
            window = window.narrow(axis, start, stop - start)
        out[(..., *place)] = window.flatten(2).amax(2)
    return out


# Mixtures of experts.


def gate(linear: nn.Linear, h: Tensor, channel_dim: int = 1) -> Tensor:
    """(B, n) softmax(W h), sample by sample, of the mean over positions."""
    return torch.stack([softmax(affine(linear, v)) for v in mean(h, channel_dim)])


def mixture(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """sum_i w_i f_i, sample by sample."""
    samples = []
    for b, w in enumerate(weights):
        assert len(w) == len(outputs)
        samples.append(sum(w[i] * outputs[i][b] for i in range(len(outputs))))
    return torch.stack(samples)


def mmoe(
    x: Tensor, stem: Module, experts: Sequence[Module], gates: Mapping[str, nn.Linear], channel_dim: int = 1
) -> dict[str, Tensor]:
    """f^k = sum_i softmax(W_k h)_i f_i(h) with h = stem(x). KDD 2018, Equations 6-7."""
    h = stem(x)
    outputs = [expert(h) for expert in experts]
    return {task: mixture(gate(linear, h, channel_dim), outputs) for task, linear in gates.items()}


def cgc(
    x: Tensor,
    stem: Module,
    shared: Sequence[Module],
    own: Mapping[str, Sequence[Module]],
    gates: Mapping[str, nn.Linear],
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    """g^k = softmax(W_k h) S^k, S^k the outputs of the shared experts and of task k's own. Section 3.1."""
    h = stem(x)
    common = [expert(h) for expert in shared]
    return {
        task: mixture(gate(linear, h, channel_dim), common + [expert(h) for expert in own[task]])
        for task, linear in gates.items()
    }


def ple(x: Tensor, stem: Module, levels: Sequence[object], channel_dim: int = 1) -> dict[str, Tensor]:
    """g^{k,j} = w^{k,j}(g^{k,j-1}) S^{k,j}; the shared path's S holds every expert of the level. Equations 4-6.

    A level has shared, experts[task], gates[task].linear and shared_gate.linear (no shared gate: no shared path on).
    """
    shared_path = stem(x)
    paths = dict.fromkeys(levels[0].gates, shared_path)
    for level in levels:
        shared = [expert(shared_path) for expert in level.shared]
        own = {task: [expert(path) for expert in level.experts[task]] for task, path in paths.items()}
        weights = {task: gate(level.gates[task].linear, path, channel_dim) for task, path in paths.items()}
        if level is not levels[-1]:
            everything = shared + [output for task in paths for output in own[task]]
            shared_path = mixture(gate(level.shared_gate.linear, shared_path, channel_dim), everything)
        paths = {task: mixture(weights[task], shared + own[task]) for task in paths}
    return paths


def smooth_step(t: float, gamma: float) -> float:
    """0, -2 t^3 / gamma^3 + 3 t / (2 gamma) + 1/2 between -gamma/2 and gamma/2, 1."""
    if t <= -gamma / 2:
        return 0.0
    return 1.0 if t >= gamma / 2 else -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def selectors(bits: Tensor, k: int, E: int, gamma: float) -> Tensor:
    """(k, E) r(z^i)_e, the product over the bits of e of S(z) where it is 1 and 1 - S(z) where it is 0; bits (k m)."""
    bits, m = bits.detach(), len(bits) // k
    assert len(bits) == k * m and 2 ** (m - 1) < E <= 2**m
    r = torch.ones(k, E, dtype=bits.dtype)
    for i, e, b in product(range(k), range(E), range(m)):
        s = smooth_step(float(bits[i * m + b]), gamma)
        r[i, e] *= s if (e // 2**b) % 2 == 1 else 1 - s
    return r


def dselect_gate(bits: Tensor, mixing: Tensor, E: int, gamma: float) -> Tensor:
    """(E,) q = sum_i softmax(mixing)_i r(z^i), of one sample."""
    k = len(mixing)
    alpha, r = softmax(mixing), selectors(bits, k, E, gamma)
    return sum(alpha[i] * r[i] for i in range(k))


def dselect_penalty(bits: Tensor, k: int, E: int, gamma: float) -> float:
    """sum_i H(r(z^i)), and 1 / sum_e r(z^i)_e where E is no power of 2, of one sample."""
    total = 0.0
    for r in selectors(bits, k, E, gamma).tolist():
        total += -sum(p * math.log(p) for p in r if p > 0)
        if E & (E - 1):
            total += 1 / sum(r) if sum(r) else math.inf
    return total


# A network a task.


def mix_channels(alpha: Tensor, features: Sequence[Tensor], channel_dim: int = 1) -> list[Tensor]:
    """h_t <- sum_s alpha[t, s, c] h_s, channel by channel."""
    mixed = []
    for t in range(len(features)):
        columns = [
            sum(alpha[t, s, c] * features[s].select(channel_dim, c) for s in range(len(features)))
            for c in range(features[0].shape[channel_dim])
        ]
        mixed.append(torch.stack(columns, channel_dim))
    return mixed


def cross_stitch(
    x: Tensor,
    networks: Mapping[str, Sequence[Module]],
    stitches: Sequence[Tensor | None],
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    """After stage l, h_t <- sum_s alpha_l[t, s] h_s; None where there is no stitch. Equation 1."""
    features = [x for _ in networks]
    for stage, alpha in zip(zip(*networks.values(), strict=True), stitches, strict=True):
        features = [module(h) for module, h in zip(stage, features, strict=True)]
        if alpha is not None:
            features = mix_channels(alpha, features, channel_dim)
    return dict(zip(networks, features, strict=True))


def nddr(
    x: Tensor,
    networks: Mapping[str, Sequence[Module]],
    fusions: Sequence[Mapping[str, Sequence[nn.Module]] | None],
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    """After stage l, h_t <- ReLU(BN_t(W_t [h_1; ...; h_T])) at every position. Section 3.1 and Figure 1.

    A fusion is {task: (linear without bias, norm, ReLU)}.
    """
    features = [x for _ in networks]
    for stage, fusion in zip(zip(*networks.values(), strict=True), fusions, strict=True):
        features = [module(h) for module, h in zip(stage, features, strict=True)]
        if fusion is not None:
            together = torch.cat(features, channel_dim)
            fused = []
            for task in networks:
                linear, norm = fusion[task][0], fusion[task][1]
                assert linear.bias is None
                h = batch_norm(norm, everywhere(lambda v, W=linear: affine(W, v), together, channel_dim), channel_dim)
                fused.append(h * (h > 0))
            features = fused
    return dict(zip(networks, features, strict=True))


def mix_subspaces(alpha: Tensor, features: Sequence[Tensor], channel_dim: int = 1) -> list[Tensor]:
    """Channels in G equal parts: part i of all T*G <- sum_j alpha[i, j] part j. Sluice's alpha."""
    G = len(alpha) // len(features)
    parts = [part for h in features for part in h.chunk(G, channel_dim)]
    assert len(parts) == len(alpha) == len(alpha.T)
    mixed = [sum(alpha[i, j] * parts[j] for j in range(len(parts))) for i in range(len(parts))]
    return [torch.cat(mixed[t * G : (t + 1) * G], channel_dim) for t in range(len(features))]


def sluice(
    x: Tensor,
    networks: Mapping[str, Sequence[Module]],
    alphas: Sequence[Tensor],
    betas: Mapping[str, Tensor],
    skips: Mapping[str, Sequence[nn.Linear | None]],
    channel_dim: int = 1,
) -> dict[str, Tensor]:
    """sum_l beta[t, l] pool(skip_tl(h_tl)), h_tl the mixed output of stage l."""
    features = [x for _ in networks]
    layers = {task: [] for task in networks}
    for stage, alpha in zip(zip(*networks.values(), strict=True), alphas, strict=True):
        features = mix_subspaces(alpha, [module(h) for module, h in zip(stage, features, strict=True)], channel_dim)
        for task, h in zip(networks, features, strict=True):
            layers[task].append(h.movedim(channel_dim, 1))
    out = {}
    for task, outputs in layers.items():
        size, total = outputs[-1].shape[2:], torch.zeros_like(outputs[-1])
        for layer, h in enumerate(outputs):
            linear = skips[task][layer] if layer < len(outputs) - 1 else None
            if linear is not None:
                h = everywhere(lambda v, W=linear: affine(W, v), h)
            total = total + betas[task][layer] * max_pool(h, size)
        out[task] = total.movedim(1, channel_dim)
    return out


def orthogonality(weights: Iterable[Tensor], G: int) -> float:
    """sum of ||W_g W_h^T||_F^2 over weights and pairs g < h of their rows' G parts. Sluice's penalty."""
    total = 0.0
    for weight in weights:
        rows = weight.detach().reshape(len(weight), -1)
        part = [i * G // len(rows) for i in range(len(rows))]
        for i, j in product(range(len(rows)), repeat=2):
            if part[i] < part[j]:
                total += float(rows[i] @ rows[j]) ** 2
    return total


# One network.


def attention(mask: Sequence[nn.Module], h: Tensor) -> Tensor:
    """sigmoid(BN(W2 ReLU(BN(W1 h)))) at every position: MTAN's h(g(.))."""
    h = batch_norm(mask[1], everywhere(lambda v: affine(mask[0], v), h))
    h = batch_norm(mask[4], everywhere(lambda v: affine(mask[3], v), h * (h > 0)))
    return 1 / (1 + math.e**-h)


def mtan(
    x: Tensor,
    stages: Sequence[Sequence[Module]],
    masks: Mapping[str, Sequence[Sequence[nn.Module]]],
    between: Sequence[Sequence[nn.Module]],
) -> dict[str, Tensor]:
    """a_s = mask_s([u_s; pool(f(a_{s-1}))]) * p_s, f shared by tasks; the first mask reads u alone.

    stages[0] is shared as it is. u is p where all but a stage's last block is of another width than p. f is (3x3
    convolution, norm, ReLU).
    """
    h = chain(stages[0], x)
    attended: dict[str, Tensor] = {}
    for s, stage in enumerate(stages[1:]):
        u = chain(stage[:-1], h)
        p = stage[-1](u)
        u = u if len(stage) > 1 and u.shape[1] == p.shape[1] else p
        for task in masks:
            entry = u
            if s > 0:
                f = batch_norm(between[s - 1][1], between[s - 1][0](attended[task]))
                entry = torch.cat([u, max_pool(f * (f > 0), u.shape[2:])], 1)
            attended[task] = attention(masks[task][s], entry) * p
        h = p
    return attended


def ltb(
    x: Tensor, networks: Mapping[str, Sequence[Module]], weights: Sequence[Sequence[Sequence[float]]]
) -> dict[str, Tensor]:
    """Node t of stage l is fed sum_s weights[l - 1][t][s] h_s: one-hot rows make a tree. Section 3.2."""
    features = [x for _ in networks]
    for layer, stage in enumerate(zip(*networks.values(), strict=True)):
        if layer:
            features = [sum(w * h for w, h in zip(row, features, strict=True)) for row in weights[layer - 1]]
        features = [module(h) for module, h in zip(stage, features, strict=True)]
    return dict(zip(networks, features, strict=True))


def parents(logits: Tensor) -> list[list[int]]:
    """[stage][task] the likeliest parent, of logits (L - 1, T, T)."""
    return [[max(range(len(row)), key=row.__getitem__) for row in stage] for stage in logits.tolist()]


def one_hot(indices: Sequence[Sequence[int]], T: int) -> list[list[list[float]]]:
    return [[[float(s == parent) for s in range(T)] for parent in stage] for stage in indices]


def adashare(x: Tensor, stages: Sequence[Sequence[Module]], logits: Tensor) -> Tensor:
    """Blocks after the first of each stage, in order, are left out where logits[b] = (run, skip) prefers skip."""
    b = 0
    for stage in stages:
        for place, block in enumerate(stage):
            if place:
                if not logits[b, 1] > logits[b, 0]:
                    x = block(x)
                b += 1
            else:
                x = block(x)
    assert b == len(logits)
    return x


def run_probability(logits: Tensor) -> list[float]:
    return [1 / (1 + math.exp(skip - run)) for run, skip in logits.tolist()]


def adashare_sparsity(logits: Mapping[str, Tensor]) -> float:
    """sum over tasks and blocks of log u. AdaShare's L_sparsity."""
    return sum(math.log(u) for task in logits for u in run_probability(logits[task]))


def adashare_sharing(logits: Mapping[str, Tensor]) -> float:
    """sum over pairs of tasks and l = 1..L of (L - l) / L |u_l^a - u_l^b|. AdaShare's L_sharing."""
    u = [run_probability(logits[task]) for task in logits]
    total = 0.0
    for a in range(len(u)):
        for b in range(a + 1, len(u)):
            for layer in range(1, len(u[0]) + 1):
                total += (len(u[0]) - layer) / len(u[0]) * abs(u[a][layer - 1] - u[b][layer - 1])
    return total


def ctcvr(ctr: float, cvr: float) -> float:
    """log(p / (1 - p)) of p = sigmoid(ctr) sigmoid(cvr), by n = -log p. ESMM, Equation 1."""
    n = math.log1p(math.exp(-ctr)) + math.log1p(math.exp(-cvr))
    return -n - math.log(-math.expm1(-n))


def segnet_scales(net: object, x: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, list[tuple[Tensor, Tensor]]]:
    """Down: (entered, deepened) a scale, the finest first; the bottom; up: (unpooled, refined), the coarsest first."""
    down, places = [], []
    for enter, deepen in zip(net.enter, net.deepen, strict=True):
        entered = enter(x)
        down.append((entered, deepen(entered)))
        x, place = nn.functional.max_pool2d(down[-1][1], 2, return_indices=True)
        places.append(place)
    bottom, up = x, []
    for scale in reversed(range(len(down))):
        unpooled = nn.functional.max_unpool2d(x, places[scale], 2)
        x = net.refine[scale](net.rise[scale](unpooled))
        up.append((unpooled, x))
    return down, bottom, up


def segnet_mtan(x: Tensor, model: object) -> dict[str, Tensor]:
    """Masks on the way down read [entered; a of the finer scale], on the way up [unpooled; a of the coarser].

    The authors' code: a = mask * deepened, f, pooling; up, bilinear with aligned corners, f, a = mask * refined.
    """
    down, _, up = segnet_scales(model.net, x)
    attended = {}
    for task in model.down_masks:
        a = None
        for scale, (entered, deepened) in enumerate(down):
            entry = entered if a is None else torch.cat([entered, a], 1)
            a = model.down_between[scale](attention(model.down_masks[task][scale], entry) * deepened)
            a = max_pool(a, [n // 2 for n in a.shape[2:]])
        for scale, (unpooled, refined) in zip(reversed(range(len(down))), up, strict=True):
            a = nn.functional.interpolate(a, scale_factor=2, mode="bilinear", align_corners=True)
            a = model.up_between[scale](a)
            a = attention(model.up_masks[task][scale], torch.cat([unpooled, a], 1)) * refined
        attended[task] = a
    return attended


# Sizes.


def size(*modules: nn.Module) -> int:
    """Entries of the parameters of given parts."""
    return sum(p.numel() for module in modules for p in module.parameters())


def conv_bn(i: int, o: int, kernel: int = 3) -> int:
    """A convolution with bias and a batch norm with weight and bias."""
    return kernel**2 * i * o + o + 2 * o


SEGNET = (3, 64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)


def segnet_size() -> int:
    """VGG-16's 13 convolutions down, mirrored up to 64 channels, a batch norm after each. MTAN, Section 3.2.1."""
    down = [(i, o) for (a, o), n in zip(pairwise(SEGNET), DEPTHS, strict=True) for i in [a] + [o] * (n - 1)]
    up = []
    for (a, o), n in zip(pairwise(SEGNET), DEPTHS, strict=True):
        a = max(a, 64)
        up += [(o, a)] + [(a, a)] * (n - 1)
    return sum(conv_bn(i, o) for i, o in down + up)


def segnet_head_size(classes: int) -> int:
    """3x3 convolution 64 -> 64, 1x1 convolution 64 -> classes: the authors' code."""
    return 9 * 64 * 64 + 64 + 64 * classes + classes


def segnet_mtan_size(tasks: int) -> int:
    """SegNet, an attention module a task in each of the 10 blocks, a shared 3x3 convolution after or before each one.

    The mask of an encoder's block of c channels reads 2 c, that of a decoder's the c + c' of the upsampled and its own.
    """
    c = SEGNET[1:]
    total = segnet_size()
    masks = conv_bn(c[0], c[0], 1) + conv_bn(c[0], c[0], 1)
    masks += sum(conv_bn(2 * o, o, 1) + conv_bn(o, o, 1) for o in c[1:])
    masks += sum(conv_bn(i + o, o, 1) + conv_bn(o, o, 1) for o, i in [(c[0], c[0]), *pairwise(c)])
    between = sum(conv_bn(i, o) for i, o in [*pairwise(c), (c[-1], c[-1])])
    between += sum(conv_bn(i, o) for o, i in [(c[0], c[0]), *pairwise(c)])
    return total + tasks * masks + between
