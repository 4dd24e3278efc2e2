"""Sluice networks: one network a task, whose activations' subspaces are mixed after each stage, and whose stages are.

Ruder, Bingel, Augenstein, Sogaard, "Latent Multi-task Architecture Learning", AAAI 2019,
https://arxiv.org/abs/1705.08142: alpha mixes all subspaces of all tasks (eq. 3), beta the layers of a task (eq. 4), and
a penalty keeps a layer's subspaces apart (eq. 5), which is the caller's to add. The paper's layers are of one shape;
here a stage of another width enters by a linear map over its channels, and one of other positions is pooled.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, by_task, check_count, decoders_of
from gradsurgery.architectures.cross_stitch import near_identity
from gradsurgery.architectures.positions import PerPosition, resized
from gradsurgery.architectures.stages import Encoder, fresh_stages


@final
class Sluice(Architecture):
    """A network a task, mixed subspace by subspace after every stage; each task reads a mixture of its stages.

    All networks run on the input of any task, and each task has a z of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts; a function makes networks with weights of their own, a module
            is copied.
        decoders: task -> any module from that task's features to its prediction.
        subspaces: G, that a stage's channels are cut into.
        own_weight: what a subspace weighs for itself at first; the others' weights add up to the rest.

    Raises:
        ValueError: widths that can't be cut into so many subspaces.
    """

    def __init__(
        self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, subspaces: int = 2, own_weight: float = 0.9
    ) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("Sluice", decoders)
        networks = fresh_stages(encoder, len(decoders))
        check_count("subspaces", subspaces)
        widths, dim = networks[0].widths, networks[0].channel_dim
        if uneven := [width for width in widths if width % subspaces]:
            raise ValueError(f"Stages of {uneven} channels can't be cut into {subspaces} equal subspaces.")
        self.subspaces, self.channel_dim = subspaces, dim
        self.networks = nn.ModuleList(networks)
        alpha = near_identity(subspaces * len(decoders), own_weight)
        self.alphas = nn.ParameterList(alpha.clone() for _ in widths)
        self.betas = nn.ParameterDict({task: torch.full((len(widths),), 1 / len(widths)) for task in decoders})
        self.skips = by_task({task: nn.ModuleList(_skip(w, widths[-1], dim) for w in widths) for task in decoders})

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, list[Tensor]]:
        networks: Any = self.networks
        hs: list[Any] = [x] * len(self.tasks)
        passed: dict[str, list[Tensor]] = {task: [] for task in self.tasks}
        for alpha, *stages in zip(self.alphas, *networks, strict=True):
            hs = self._mixed(alpha, [stage(h) for stage, h in zip(stages, hs, strict=True)])
            for task, h in zip(self.tasks, hs, strict=True):
                passed[task].append(h)
        return passed

    def _mixed(self, alpha: Tensor, hs: Sequence[Tensor]) -> list[Tensor]:
        """h_t (B, C, ...) -> the same, each subspace a mixture of all subspaces of all tasks."""
        dim, G = self.channel_dim, self.subspaces
        parts = torch.stack([part for h in hs for part in h.chunk(G, dim)])
        new = torch.einsum("ts,s...->t...", alpha, parts)
        return [torch.cat(list(new[t * G : (t + 1) * G]), dim) for t in range(len(hs))]

    def predict(self, z: dict[str, list[Tensor]], task: str) -> Tensor:
        skips: Any = self.skips[task]
        last = z[task][-1]
        entering = [resized(skip(h), last, self.channel_dim) for skip, h in zip(skips, z[task], strict=True)]
        return self.decoders[task](torch.einsum("l,l...->...", self.betas[task], torch.stack(entering)))

    def task_parts(self, task: str) -> Iterable[Part]:
        beta: Any = self.betas[task]
        return beta, self.skips[task], self.decoders[task]

    def orthogonality(self) -> Tensor:
        """() `sum over tasks and stages of |W_1 W_2^T|^2`, over all pairs of subspaces of the weights W of a stage.

        W is a stage's last weight of two or more axes, cut by output channels into rows of each subspace.
        """
        total: list[Tensor] = []
        networks: Any = self.networks
        for network in networks:
            for stage in network:
                weight = [p for p in stage.parameters() if p.ndim > 1][-1]
                parts = weight.flatten(1).unflatten(0, (self.subspaces, -1))
                products = torch.einsum("gik,hjk->ghij", parts, parts).square().sum((-1, -2))
                total.append(products.triu(1).sum())
        return torch.stack(total).sum()


def _skip(width: int, to: int, channel_dim: int) -> nn.Module:
    return nn.Identity() if width == to else PerPosition(nn.Linear(width, to), channel_dim)
