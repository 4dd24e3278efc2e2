"""Train one network on several losses: gradient surgery and loss weighting around any ``torch.optim`` optimizer."""

from pathlib import Path

# A checkout keeps `architectures/` and `recipes/` beside the core: uninstalled or shadowing, it finds them here.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "architectures" / "__init__.py").is_file():
    __path__.append(str(_root))

from gradsurgery.compiled import compile_backward  # noqa: E402
from gradsurgery.functional import aggregate  # noqa: E402
from gradsurgery.losses import Absent  # noqa: E402
from gradsurgery.optimizer import MTLOptimizer, backward  # noqa: E402
from gradsurgery.registry import get_method, list_methods  # noqa: E402
from gradsurgery.stats import StepInfo  # noqa: E402

__all__ = [
    "Absent",
    "MTLOptimizer",
    "StepInfo",
    "aggregate",
    "backward",
    "compile_backward",
    "get_method",
    "list_methods",
]
