"""Inner products layer by layer, and one ordinary backward of the weighted sum: J is never whole in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from gradsurgery import kernels
from gradsurgery.distributed import Ranks
from gradsurgery.engines.check import Checked, project
from gradsurgery.engines.cut import Cut, cut
from gradsurgery.engines.engine import Batch, Measurement, RowMap, accumulate, flat, spread
from gradsurgery.engines.flow import flow, tap
from gradsurgery.engines.layout import Layout
from gradsurgery.engines.rules import LayerRule, cheaper_rule_of
from gradsurgery.engines.sequential import Sequential
from gradsurgery.graph import Graph
from gradsurgery.stats import Needs

# What is to be done with the rows (K, *shape) of the layout's parameter n.
Visit = Callable[[int, Tensor], None]
# Operators that a weight may pass on its way into a layer: inner products of gradients stay as they are.
ISOMETRIES = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "ToCopyBackward0"}
# Elements. Rows that are shorter wait, and are measured together.
SMALL = 1 << 12


class Gramian(Checked):
    """Inner products of task gradients from one pass with all tasks' gradients at once, layer by layer, and ``.grad``
    from one ordinary backward of the weighted sum.

    A layer's weight gradients live until their inner products are taken; where its rule (`gramian_rule`) is cheaper,
    they are never formed. Heads are passed once. Rows are formed a second time, instead of the last backward, for
    methods that work column by column and for several blocks.

    The first step, and now and then a later one, is compared with `Sequential`, which takes over, with a warning, where
    vmap is wrong or fails.

    Args:
        quiet: no warning where `Sequential` takes over, and it does so too where vmap would loop over an operator.
    """

    name: ClassVar[str] = "gramian"
    holds: ClassVar[bool] = False

    def __init__(self, *, quiet: bool = False):
        super().__init__(Sequential(), quiet=quiet)

    def refuse(self, needs: Needs, name: str, *, blocks: bool) -> None:
        if needs & (Needs.TRACKED | Needs.CROSS):
            what = "remembers T x d numbers" if needs & Needs.TRACKED else "compares gradients of different batches"
            raise ValueError(
                f"{name} {what}, and engine='gramian' never holds a batch's gradients. Use engine='sequential' or "
                "'batched'."
            )

    def refuse_ranks(self, ranks: Ranks) -> None:
        raise ValueError(
            "engine='gramian' never holds the task gradients that ranks must average. Use engine='sequential', "
            "'batched', 'representation' or 'auto'."
        )

    def _measure(self, batch: Batch, held: Measurement | None, graph: Graph) -> Streamed:
        return Streamed(cut(batch, graph), batch.layout, retain=batch.retain, fallback=not self._quiet)

    def _fault(self, measured: Streamed, batch: Batch, expected: Tensor, tolerance: Tensor) -> str | None:
        return measured.fault(expected, tolerance)


@dataclass(frozen=True)
class Site:
    """A layer whose parameters nothing else uses, with the rule for it, and their positions in the layout."""

    node: Node
    rule: LayerRule
    weight: int
    bias: int | None

    @property
    def covered(self) -> list[int]:
        """Parameters whose gradients need not be formed."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class Streamed(Measurement):
    """Per-task gradients that come by layer after layer, and are gone.

    Args:
        parts: the batch.
        layout: the shared parameters and their blocks.
        retain: whether the graph is wanted once more.
        fallback: whether an operator that vmap has no rule for is looped over, or an error.
    """

    engine = "gramian"

    def __init__(self, parts: Cut, layout: Layout, *, retain: bool, fallback: bool = True):
        self._cut, self._layout, self._retain, self._fallback = parts, layout, retain, fallback
        self._K = len(parts.present)
        self._place = {p: n for n, p in enumerate(layout.params)}
        self._sites = find_sites(parts, layout, self._place)

    def gramian(self, of: RowMap | None = None) -> Tensor:
        assert of is None
        return spread(self._inner_products(self._sites), self._cut.present, self._cut.T, axes=(1, 2))

    def cross_gramian(self, other: Measurement) -> Tensor:
        raise NotImplementedError  # `Gramian.refuse` keeps such methods away.

    def write(self, weights: Tensor, head_weights: Tensor | None, of: RowMap | None = None) -> None:
        assert of is None
        self._cut.write_heads(head_weights)
        # A hook that clips makes of the sum of gradients something else than of each.
        if len(weights) == 1 and not any(p._backward_hooks for p in self._layout.params):
            self._cut.pull(self._cut.weighted(weights[0]), self._layout.params, retain=self._retain)
        else:
            w = [self._cut.weighted(weight) for weight in weights]
            self._write_rows(lambda n, rows: w[self._layout.block_of[n] if len(w) > 1 else 0](rows))

    def write_columns(self, columns: Callable[[Tensor], Tensor]) -> None:
        direct = self._cut.by_columns(columns)
        self._cut.write_heads(None)
        self._write_rows(lambda n, rows: direct(rows))

    def _write_rows(self, direct: Callable[[int, Tensor], Tensor]) -> None:
        directions: dict[int, Tensor] = {}

        def visit(n: int, rows: Tensor) -> None:
            directions[n] = direct(n, rows)

        self._stream(visit, retain=self._retain)
        accumulate((self._layout.params[n], g) for n, g in sorted(directions.items(), key=lambda entry: entry[0]))

    def _inner_products(self, sites: Sequence[Site], watch: Visit | None = None) -> Tensor:
        """(B, K, K) float64, by the rules of ``sites`` there and of rows elsewhere; ``watch`` sees those rows, too."""
        blocks = self._layout.block_of
        total = torch.zeros(self._layout.blocks, self._K, self._K, dtype=torch.float64, device=self._layout.device)
        small: dict[int, list[Tensor]] = {}

        def visit(n: int, rows: Tensor) -> None:
            if watch is not None:
                watch(n, rows)
            rows = flat(rows)
            if rows.shape[1] < SMALL:
                small.setdefault(blocks[n], []).append(rows.to(self._layout.dtype, copy=True))
            else:
                total[blocks[n]] += kernels.block_gramian(rows)

        def apply(site: Site, D: Tensor) -> None:
            total[blocks[site.weight]] += site.rule.gramian(site.node, D)
            if site.bias is not None:
                visit(site.bias, site.rule.bias_rows(D))

        self._stream(visit, sites, apply, retain=True)
        for block, rows in small.items():
            total[block] += kernels.block_gramian(torch.cat(rows, dim=1))
        return (total + total.mT) / 2

    def fault(self, expected: Tensor, tolerance: Tensor) -> str | None:
        """See `Checked`: of the rows, of the rules, and of the last pass, which must be linear in what enters it."""
        seen = torch.zeros_like(expected)

        def watch(n: int, rows: Tensor) -> None:
            seen[:, n] = project(n, list(rows))

        plain = self._inner_products((), watch)
        if bool(((seen - expected).abs() > tolerance[:, None]).any()):
            return "its gradients differ from plain ones."
        norm = plain.sum(dim=0).diagonal().sqrt()
        slack = 2 * tolerance[:, None] * norm + 1e-12 * norm[:, None] * norm
        if self._sites and bool(((self._inner_products(self._sites) - plain).abs() > slack + slack.mT).any()):
            return "inner products by the rules of its layers differ from those of its gradients."
        if bool(((self._mean() - expected.mean(dim=0)).abs() > tolerance.mean()).any()):
            return "a backward pass of it is not linear (a hook clips or replaces gradients, perhaps)."
        return None

    def _mean(self) -> Tensor:
        """`project` (P,) of the tasks' mean gradient, by one backward."""
        params, inside = self._layout.params, self._inside()
        seeds = [seed.mean(dim=0) for seed in self._cut.seeds]
        found = {p: direct.mean(dim=0) for p, direct in self._cut.direct.items()}
        if inside:
            passed = torch.autograd.grad(self._cut.edges, inside, seeds, retain_graph=True, allow_unused=True)  # pyright: ignore
            for p, g in zip(inside, passed, strict=True):
                if g is not None:
                    found[p] = found[p] + g if p in found else g
        zero = torch.zeros((), dtype=torch.float64, device=self._layout.device)
        return torch.stack([project(n, [found[p]])[0] if p in found else zero for n, p in enumerate(params)])

    def _inside(self) -> list[Tensor]:
        """Shared parameters in the shared part of the graph."""
        return [p for p in self._cut.trunk.leaves.values() if p in self._place]

    def _stream(
        self,
        visit: Visit,
        sites: Sequence[Site] = (),
        apply: Callable[[Site, Tensor], None] | None = None,
        *,
        retain: bool,
    ) -> None:
        """Shows each shared parameter's rows (K, *shape) once, or, in its stead, what arrives at its site."""
        direct, seen = self._cut.direct, set[int]()
        covered = {n for site in sites for n in site.covered}
        formed = [p for p in self._inside() if self._place[p] not in covered]

        def see(n: int, rows: Tensor) -> None:
            p = self._layout.params[n]
            seen.add(n)
            visit(n, rows + direct[p] if p in direct else rows)

        passed, ends = plan(self._cut.trunk, formed, sites)
        handles: list[RemovableHandle] = []
        try:
            handles += [p.register_hook(self._hook(functools.partial(see, self._place[p]))) for p in formed]
            if apply is not None:
                handles += [s.node.register_prehook(self._prehook(functools.partial(apply, s))) for s in passed]
            inputs = [*formed, *(GradientEdge(site.node, 0) for site in ends)]
            found = flow(self._cut.edges, self._cut.seeds, inputs, retain=retain, fallback=self._fallback)
        finally:
            for handle in handles:
                handle.remove()
        for site, D in zip(ends, found[len(formed) :], strict=True):
            if D is not None and apply is not None:
                apply(site, D)
        for p, rows in direct.items():
            if self._place[p] not in seen:
                visit(self._place[p], rows)

    def _hook(self, see: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
        return lambda g: tap(g, see, self._K)

    def _prehook(self, see: Callable[[Tensor], None]) -> Callable[[Sequence[Tensor | None]], None]:
        def show(gradients: Sequence[Tensor | None]) -> None:
            if gradients[0] is not None:
                tap(gradients[0], see, self._K)

        return show


def plan(trunk: Graph, formed: Sequence[Tensor], sites: Sequence[Site]) -> tuple[list[Site], list[Site]]:
    """The sites that a backward to ``formed`` and to the others passes, and those others, at which it ends."""
    wanted, by_node = {id(p) for p in formed}, {site.node: site for site in sites}
    leading = {node for node, p in trunk.leaves.items() if id(p) in wanted}
    passed, ends = [], []
    for node in reversed(trunk.next):
        leads = node in leading or any(target in leading for target, _ in trunk.next[node])
        if node in by_node:
            (passed if leads else ends).append(by_node[node])
        if leads or node in by_node:
            leading.add(node)
    return passed, ends


def find_sites(parts: Cut, layout: Layout, place: dict[Tensor, int]) -> list[Site]:
    """The layers of the shared part whose rule costs less than their weight gradients."""
    trunk, uses = parts.trunk, dict[Node, int]()
    for target in (*(target for edges in trunk.next.values() for target, _ in edges), *(e.node for e in parts.edges)):
        uses[target] = uses.get(target, 0) + 1

    def parameter(node: Node, nr: int) -> int | None:
        """The layout's parameter that is this input of a node, if it is nothing else's."""
        target = node.next_functions[nr][0] if nr < len(node.next_functions) else None
        while target is not None and uses[target] == 1:
            p = trunk.leaves.get(target)
            if p is not None:
                return None if p._backward_hooks or p in parts.direct else place.get(p)
            if target.name() not in ISOMETRIES:
                return None
            target = target.next_functions[0][0]
        return None

    sites = []
    for node in trunk.next:
        rule = cheaper_rule_of(node, len(parts.present))
        weight = None if rule is None else parameter(node, rule.weight)
        if rule is not None and weight is not None:
            bias = None if rule.bias is None else parameter(node, rule.bias)
            if bias is not None and layout.params[bias].shape != (node._input_metadata[0].shape[rule.channels],):
                bias = None
            sites.append(Site(node, rule, weight, bias))
    return sites
