"""AdaShare: one network, of which each task learns the blocks to skip.

Sun, Panda, Feris, Saenko, "AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning", NeurIPS 2020,
https://arxiv.org/abs/1911.12423, section 3: a select-or-skip decision for each block and task, drawn by the
Gumbel-softmax (eq. 2), and two penalties, for few blocks (eq. 4) and for the same ones in early layers (eq. 5), which
are the caller's to add. The first stage, the first block of each, which may change shapes, and blocks without weights
always run. The paper's two phases are the caller's too: train weights and policies, then `harden()` and train on.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.architectures.architecture import Architecture, Part, decoders_of
from gradsurgery.architectures.stages import Encoder, fresh_stages, has_weights


@final
class AdaShare(Architecture):
    """Every task's own way through one network's blocks.

    A block f that is skipped with probability 1 - u gives `u f(h) + (1 - u) h`. Each task has a z of its own, from a
    pass of its own.

    Args:
        encoder: staged, or one that `split_stages` cuts, of residual blocks.
        decoders: task -> any module from the task's features to that task's prediction.
        temperature: of the Gumbel-softmax at first.

    Raises:
        ValueError: stages of one block each, of which none can be skipped.
    """

    temperature: Tensor
    hardened: Tensor
    decided: Tensor

    def __init__(self, encoder: Encoder, decoders: Mapping[str, nn.Module], *, temperature: float = 5.0) -> None:
        super().__init__(decoders)
        self.decoders = decoders_of("AdaShare", decoders)
        (self.encoder,) = fresh_stages(encoder, 1)
        self.skippable = tuple(
            tuple(_can_be_skipped(i, j, block) for j, block in enumerate(stage)) for i, stage in enumerate(self.encoder)
        )
        blocks = sum(map(sum, self.skippable))
        if not blocks:
            raise ValueError(
                "There is nothing to skip: the first stage and the first block of each always run, and there is no "
                "other block with weights."
            )
        self.logits = nn.ParameterDict({task: torch.zeros(blocks, 2) for task in decoders})
        self.start = float(temperature)
        self.register_buffer("temperature", torch.tensor(self.start))
        self.register_buffer("hardened", torch.tensor(False))
        self.register_buffer("decided", torch.zeros(len(decoders), blocks, dtype=torch.bool))

    def anneal(self, epoch: int, epochs: int) -> None:
        """Sets the temperature of epoch 0, 1, ...: 0.965 times the one before, as the authors' code has it, to 0.01."""
        self.temperature.fill_(max(self.start * 0.965**epoch, 0.01))

    def policy(self, task: str) -> Tensor:
        """(blocks,) probabilities that the task runs each block that can be skipped."""
        return self._settled(task, self.logits[task].softmax(-1)[:, 0])

    def harden(self) -> None:
        """Fixes every policy at its likeliest decisions, whatever happens to its logits from here on."""
        for decided, task in zip(self.decided, self.tasks, strict=True):
            decided.copy_(_likeliest(self.logits[task]))
        self.hardened.fill_(True)

    def features(self, x: Any, tasks: Sequence[str]) -> dict[str, Tensor]:
        return {task: self._way(x, task) for task in tasks}

    def _way(self, x: Any, task: str) -> Tensor:
        logits = self.logits[task]
        if self.training:
            runs = F.gumbel_softmax(logits, tau=self.temperature)[:, 0]  # pyright: ignore[reportArgumentType]
        else:
            runs = _likeliest(logits).to(logits.dtype)
        h, decisions = x, iter(self._settled(task, runs))
        for stage, skippable in zip(self.encoder, self.skippable, strict=True):
            for block, may in zip(stage, skippable, strict=True):
                y = block(h)
                if may:
                    u = next(decisions)
                    y = u * y + (1 - u) * h
                h = y
        return h

    def _settled(self, task: str, runs: Tensor) -> Tensor:
        """(blocks,) as given, or what `harden` has decided."""
        return torch.where(self.hardened, self.decided[self.tasks.index(task)].to(runs.dtype), runs)

    def network(self, task: str) -> nn.Sequential:
        """What a task runs at evaluation, with its decoder: the model's own modules, without the skipped blocks."""
        decisions = iter((self.policy(task) >= 0.5).tolist())
        blocks = [block for stage in self.encoder for block in stage]
        pairs = zip(blocks, chain.from_iterable(self.skippable), strict=True)
        return nn.Sequential(*(block for block, may in pairs if not may or next(decisions)), self.decoders[task])

    def sparsity(self) -> Tensor:
        """() `sum log u` over blocks and tasks, with u the probability that a block is run."""
        return torch.stack([self.logits[task].log_softmax(-1)[:, 0].sum() for task in self.tasks]).sum()

    def sharing(self) -> Tensor:
        """() `sum (L - l) / L |u_l of one task - u_l of another|` over blocks l = 1..L and pairs of tasks (eq. 5; the
        authors' code weighs by l / L, which asks for the same blocks late instead of early)."""
        policies = [self.policy(task) for task in self.tasks]
        L = len(policies[0])
        weights = torch.arange(L - 1, -1, -1, device=policies[0].device) / L
        pairs = [(weights * (a - b).abs()).sum() for a, b in combinations(policies, 2)]
        return torch.stack(pairs).sum() if pairs else policies[0].new_zeros(())

    def predict(self, z: dict[str, Tensor], task: str) -> Tensor:
        return self.decoders[task](z[task])

    def task_parts(self, task: str) -> Iterable[Part]:
        logits: Any = self.logits[task]
        return logits, self.decoders[task]


def _likeliest(logits: Tensor) -> Tensor:
    """(blocks,) bool: run rather than skip."""
    return logits[:, 0] >= logits[:, 1]


def _can_be_skipped(stage: int, place: int, block: nn.Module) -> bool:
    return stage > 0 and place > 0 and has_weights(block)
