"""Checkpoints that are whole or absent, and that hold all that a run needs to go on exactly.

One process writes one file, `save`. Several write a folder together, `save_together`, by
`torch.distributed.checkpoint`; any number of processes goes on from it, one among them.
"""

import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from gradsurgery.recipes.harness.benchmark import RecipeError
from gradsurgery.recipes.harness.processes import Part


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside `path`, flush to the disk, then rename: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save` wrote; nothing in the file is executed.

    Raises:
        RecipeError: the file is not a checkpoint, or is damaged.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise RecipeError(f"There is no checkpoint {path}.") from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {reason}). "
            f"Remove that file and run again to start this method anew."
        ) from error


def save_together(model: nn.Module, optimizer: Optimizer, record: dict[str, Any], folder: Path, part: Part) -> None:
    """Every process's part of model and optimizer, and a record of plain values that is the same in all of them."""
    new, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    if part.first:
        shutil.rmtree(new, ignore_errors=True)
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "record": json.dumps(record)}
    dcp.save({**content, f"random {part.rank}": torch.get_rng_state()}, checkpoint_id=new)
    if part.first:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def load_together(model: nn.Module, optimizer: Optimizer, folder: Path, part: Part) -> dict[str, Any]:
    """Fills model and optimizer from what `save_together` wrote, in as many processes as there are now.

    Random numbers go on where they were in a process of the same number, and anew in any other.

    Returns:
        The record.

    Raises:
        RecipeError: it is not a checkpoint, is damaged, or is another model's.
    """
    try:
        there = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        weights, state = get_state_dict(model, optimizer)
        for key, entry in there.items():
            prefix, _, name = key.partition("optimizer.state.")
            if not prefix and name.endswith(".mtl_rows"):
                # What a method remembers of a parameter has no place in an optimizer that has not stepped yet.
                state["state"][name.removesuffix(".mtl_rows")]["mtl_rows"] = torch.empty(entry.size)  # pyright: ignore
        content: dict[str, Any] = {"model": weights, "optimizer": state, "record": ""}
        mine = f"random {part.rank}"
        if mine in there:
            content[mine] = torch.get_rng_state()
        with warnings.catch_warnings():
            # One process may well go on with what several have written.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(content, checkpoint_id=folder)
    except Exception as error:
        raise RecipeError(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). Remove "
            "that folder and run again to start this method anew."
        ) from error
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    if mine in there:
        torch.set_rng_state(content[mine])
    return json.loads(content["record"])


def random_state() -> dict[str, Any]:
    """torch's (CPU and CUDA), NumPy's and Python's global generators, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
