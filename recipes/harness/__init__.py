"""The harness that every recipe shares; data flows Benchmark -> train -> evaluate -> checkpoint -> report."""

from gradsurgery.recipes.harness.benchmark import Benchmark, Metric, RecipeError, Row, Task
from gradsurgery.recipes.harness.compare import Options, compare
from gradsurgery.recipes.harness.evaluate import evaluate
from gradsurgery.recipes.harness.train import Run, Surgery, train

__all__ = [
    "Benchmark",
    "Metric",
    "Options",
    "RecipeError",
    "Row",
    "Run",
    "Surgery",
    "Task",
    "compare",
    "evaluate",
    "train",
]
