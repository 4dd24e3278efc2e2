"""Exact solvers on T x T Gramians: float64, scale-free, each a torch custom operator that returns its residual."""

from gradsurgery.solvers.cagrad import cagrad_multipliers
from gradsurgery.solvers.dual_cone import dual_cone, dual_projection
from gradsurgery.solvers.fair import fair, nash
from gradsurgery.solvers.min_norm import min_norm

__all__ = ["cagrad_multipliers", "dual_cone", "dual_projection", "fair", "min_norm", "nash"]
