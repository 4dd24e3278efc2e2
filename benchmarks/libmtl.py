"""LibMTL from a checkout, whose packages are opened without running their ``__init__``: those import data loaders and
solvers that no weighting and no architecture needs."""

import importlib
import sys
import types
import warnings
from pathlib import Path
from typing import Any


def module(checkout: Path, name: str) -> Any:
    """``LibMTL.name``, as in ``weighting.UPGrad``."""
    package = name.split(".")[0]
    for full, folder in (("LibMTL", "LibMTL"), (f"LibMTL.{package}", f"LibMTL/{package}")):
        opened = types.ModuleType(full)
        opened.__path__ = [str(checkout / folder)]
        sys.modules[full] = opened
    # Its sources have escapes that Python warns of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"LibMTL.{name}")
