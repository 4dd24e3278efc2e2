"""Checkpoints that are whole or absent, and that hold all that a run needs to go on exactly."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsurgery.recipes.harness.benchmark import RecipeError


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
