"""Several processes that train one model, as `torchrun` starts them: each takes its share of every batch.

Process 0 alone prints and writes; what it decides (the folder of the results, whether to stop) holds for all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from gradsurgery.recipes.harness.benchmark import RecipeError

Decision = TypeVar("Decision")
# What others wait for may be the rendering of a data set, or an evaluation.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Part:
    """This process among those of its kind."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def decide(self, decision: Decision) -> Decision:
        """Process 0's, in all of them."""
        if self.size == 1:
            return decision
        box = [decision]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of them."""
        if self.size == 1:
            return flag
        # Gloo's own: a flag on a GPU would wait for all that the step has launched.
        flags: list[bool] = [False] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Process 0 goes first and the others follow, so that they find what it has made."""
        if self.size > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.size > 1 and self.first:
                dist.barrier()


ALONE = Part()


@contextmanager
def started(device: torch.device) -> Iterator[tuple[Part, torch.device]]:
    """This process among those that `torchrun` started, and its device; alone where it did not.

    Raises:
        RecipeError: a device was named that all of them would share.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield ALONE, device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise RecipeError(f"--device {device} would be shared by all processes: --device cuda gives each its own.")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Part(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
