"""Exact solvers on T x T Gramians: float64, scale-free, each a torch custom operator that returns its residual."""

from gradsurgery.solvers.cagrad import cagrad_multipliers
from gradsurgery.solvers.conic import conic
from gradsurgery.solvers.dual_cone import dual_cone, dual_projection
from gradsurgery.solvers.fair import fair, nash
from gradsurgery.solvers.linear_program import linear_program
from gradsurgery.solvers.min_norm import min_norm

__all__ = ["cagrad_multipliers", "conic", "dual_cone", "dual_projection", "fair", "linear_program", "min_norm", "nash"]
