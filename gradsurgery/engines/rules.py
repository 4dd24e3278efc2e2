"""Gramians of layers whose weight gradients are never formed.

A layer's weight gradient is a product of what went into it and of the gradient at its output, and so are the inner
products of several tasks' weight gradients (Goodfellow, arXiv 1510.01799, for norms; Rochette et al., 1912.06015, for
convolutions). A rule belongs to an operator, since that is what a graph knows: it holds for a module and for a
functional call alike.

With N positions (batch, sequence or image), activations ``A (N, a)`` and output gradients ``D_t (N, b)``, the weight
gradient is ``D_t^T A`` and ``<D_s^T A, D_t^T A> = sum(D_s * (A A^T D_t))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery import kernels

# Elements of output gradients that the CPU has in float64 at a time, and in its cache.
STRIP = 1 << 19

Costs = tuple[float, float, float]


@dataclass(frozen=True)
class LayerRule:
    """What an operator's node tells of its weight's Gramian.

    Attributes:
        weight: which of the node's inputs the weight is.
        bias: which the bias is; None where there is none.
        channels: the axis of the output (from the left, the batch being 0) that a bias runs along.
        takes: whether the rule holds for that node.
        costs: (node, K) -> multiply-adds of a weight gradient, elements of it, and multiply-adds of the Gramian of K
            tasks by the rule.
        gramian: (node, D (K, *output)) -> (K, K) float64.
    """

    weight: int
    bias: int | None
    channels: int
    takes: Callable[[Any], bool]
    costs: Callable[[Any, int], Costs]
    gramian: Callable[[Any, Tensor], Tensor]

    def bias_rows(self, D: Tensor) -> Tensor:
        """Gradients (K, b) of the bias, of output gradients D (K, *output)."""
        axis = self.channels % (D.ndim - 1) + 1
        return D.sum([n for n in range(1, D.ndim) if n != axis])


RULES: dict[str, LayerRule] = {}


def gramian_rule(
    operator: str,
    *,
    weight: int,
    bias: int | None = None,
    channels: int = -1,
    takes: Callable[[Any], bool],
    costs: Callable[[Any, int], Costs],
) -> Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]:
    """Registers a function as the rule of an operator; see `LayerRule` for the arguments.

    Args:
        operator: the name of its node, such as ``"AddmmBackward0"``.

    Raises:
        ValueError: it has one.

    Example:
        >>> @gramian_rule("MmBackward0", weight=1, takes=..., costs=...)  # doctest: +SKIP
        ... def matrix_product(node, D):
        ...     return products(node._saved_self, D)
    """

    def register(gramian: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        if operator in RULES:
            raise ValueError(f"There is a rule for {operator} already.")
        RULES[operator] = LayerRule(weight, bias, channels, takes, costs, gramian)
        return gramian

    return register


def rule_of(node: Any) -> LayerRule | None:
    """The rule of a node, if it holds there."""
    rule = RULES.get(node.name())
    # A real weight that was cast keeps the real part of its complex gradient.
    if rule is None or node._input_metadata[0].dtype.is_complex or not rule.takes(node):
        return None
    return rule


def cheaper_rule_of(node: Any, K: int) -> LayerRule | None:
    """The same, if it costs less than K weight gradients and their Gramian."""
    rule = rule_of(node)
    if rule is None:
        return None
    formed, elements, ruled = rule.costs(node, K)
    return rule if ruled < K * (formed + K * elements) else None


def saved(node: Any, *names: str) -> bool:
    """Whether the node holds those tensors as they are. Unpacking what a hook packed (checkpointing, offloading) is the
    backward pass's own affair, and a frozen weight has none saved."""

    def held(name: str) -> bool:
        raw = getattr(node, f"_raw_saved_{name}", None)
        return getattr(raw, "unpack_hook", raw) is None and getattr(node, f"_saved_{name}") is not None

    return all(held(name) for name in names)


def products(A: Tensor, D: Tensor) -> Tensor:
    """Inner products (K, K) of ``D_t^T A``, for activations A (N, a) and output gradients D (K, N, b).

    In float64: where the gradients of single positions cancel, a weight gradient that is formed loses digits once, and
    these products would lose them twice.
    """
    A, total = A.double(), torch.zeros(len(D), len(D), dtype=torch.float64, device=D.device)
    inner = A @ A.mT
    columns = max(STRIP // D[..., 0].numel(), 1) if D.device.type == "cpu" else D.shape[2]
    for strip in D.split(columns, dim=2):
        strip = strip.double()
        total += kernels.block_gramian(strip.flatten(1), torch.matmul(inner, strip).flatten(1))
    return total


def product_costs(A: Sequence[int], b: int, K: int, device: torch.device) -> Costs:
    """`LayerRule.costs` of `products`, for activations of shape A = (N, a) and a weight (b, a)."""
    N, a = A
    return N * a * b, a * b, _double_costs(device) * (N * N * (a + K * b) + K * K * N * b)


def _double_costs(device: torch.device) -> float:
    """Of a multiply-add in float64, in float32 ones: half the rate, but for GPUs made for graphics."""
    graphics = device.type == "cuda" and torch.cuda.get_device_capability(device)[1] != 0
    return 64 if graphics else 2


def _costs(node: Any, A: Tensor, K: int) -> Costs:
    return product_costs(A.shape, node._input_metadata[0].shape[1], K, A.device)


@gramian_rule(
    "AddmmBackward0",
    weight=2,
    bias=0,
    takes=lambda node: node._saved_alpha == node._saved_beta == 1 and saved(node, "mat1"),
    costs=lambda node, K: _costs(node, node._saved_mat1, K),
)
def linear(node: Any, D: Tensor) -> Tensor:
    """``bias + A W``."""
    return products(node._saved_mat1, D)


@gramian_rule(
    "MmBackward0",
    weight=1,
    takes=lambda node: saved(node, "self"),
    costs=lambda node, K: _costs(node, node._saved_self, K),
)
def matrix_product(node: Any, D: Tensor) -> Tensor:
    """``A W``."""
    return products(node._saved_self, D)


def _is_plain_convolution(node: Any) -> bool:
    return (
        saved(node, "input")
        and node._saved_groups == 1
        and not node._saved_transposed
        and len(node._saved_stride) == 2
        and node._saved_input.ndim == 4
    )


def _convolution_costs(node: Any, K: int) -> Costs:
    out, weight = node._input_metadata[0].shape, node._saved_weight.shape
    positions, image = out[0] * out[2] * out[3], node._saved_input.shape
    a = weight[1] * weight[2] * weight[3]
    formed, elements, ruled = product_costs((positions, a), weight[0], K, node._saved_input.device)
    return formed, elements, ruled + image[0] * a * out[2] * out[3]


@gramian_rule(
    "ConvolutionBackward0",
    weight=1,
    bias=2,
    channels=1,
    takes=_is_plain_convolution,
    costs=_convolution_costs,
)
def convolution(node: Any, D: Tensor) -> Tensor:
    """A 2-D convolution of one group, as the product of its patches and its weight."""
    patches = torch.nn.functional.unfold(
        node._saved_input,
        node._saved_weight.shape[2:],
        dilation=node._saved_dilation,
        padding=node._saved_padding,
        stride=node._saved_stride,
    )
    A = patches.transpose(1, 2).flatten(0, 1)
    return products(A, D.flatten(3).transpose(2, 3).flatten(1, 2))


def _takes_embedding(node: Any) -> bool:
    return saved(node, "indices") and not node._saved_scale_grad_by_freq and not node._saved_sparse


def _embedding_costs(node: Any, K: int) -> Costs:
    words, width = node._saved_weight_sym_argsize_0, node._input_metadata[0].shape[-1]
    N = node._saved_indices.numel()
    return width * N, width * words, K * width * N * (1 + K)


@gramian_rule("EmbeddingBackward0", weight=0, takes=_takes_embedding, costs=_embedding_costs)
def embedding(node: Any, D: Tensor) -> Tensor:
    """A table look-up: rows that were looked up, summed by index; the others are zero in every weight gradient."""
    indices = node._saved_indices.flatten()
    D = kernels.accumulable(D).flatten(1, -2)
    # As many as there are look-ups, which needs no answer from the device; those beyond the distinct ones stay zero.
    order = indices.argsort()
    ordered = indices[order]
    place = torch.zeros_like(ordered)
    place[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    D = torch.where((ordered == node._saved_padding_idx)[:, None], 0.0, D[:, order])
    rows = torch.zeros_like(D).index_add_(1, place, D)
    return kernels.block_gramian(rows.flatten(1))
