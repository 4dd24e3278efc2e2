"""What goes with every result: the machine, the versions, the commit; and where results are kept."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, object]:
    """What a number depends on."""
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "waiting threads": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchjd": _version("torchjd"),
        "commit": commit(RESULTS.parent),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def commit(folder: Path) -> str:
    """The abbreviated commit of a checkout; empty where there is none."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(name: str, content: dict[str, Any]) -> None:
    """Keeps a result as ``results/name.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read(name: str) -> dict[str, Any] | None:
    """What `write` kept, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def in_words(error: BaseException | Warning) -> str:
    """The first line of an error, without paths of this machine."""
    line = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: " + re.sub(r"(?<!\w)(/[\w.+-]+){2,}", "...", line)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(what: str, figure: float, bound: float, *, least: bool = False) -> str:
    """One line: whether ``figure`` keeps to ``bound``, the most (or ``least``) that it may be."""
    held = figure >= bound if least else figure <= bound
    return f"{'held  ' if held else 'MISSED'} {what}: {figure:.3g} ({'>=' if least else '<='} {bound:.3g})"
