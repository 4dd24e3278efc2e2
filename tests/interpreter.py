"""Kernels under Triton's interpreter, which wants processes of their own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def answers(problems: Mapping[str, tuple[str, tuple[Any, ...]]], folder: Path) -> dict[str, Any]:
    """What the kernels make of every problem (operator, arguments), by label; skips where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    labels = list(problems)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    workers = []
    for n in range(2):
        torch.save([problems[label] for label in labels[n::2]], folder / f"problems{n}.pt")
        files = [str(folder / f"{kind}{n}.pt") for kind in ("problems", "answers")]
        command = [sys.executable, "-W", "ignore::RuntimeWarning", str(ROOT / "tests" / "triton_worker.py"), *files]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [worker.communicate()[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "".join(errors)
    found = {}
    for n in range(2):
        found |= zip(labels[n::2], torch.load(folder / f"answers{n}.pt"), strict=True)
    return found
