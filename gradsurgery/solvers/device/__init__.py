"""The solvers as Triton kernels: one launch, one program a Gramian, no round trip to the host.

The same mathematics as the NumPy bodies beside it, in float64. Where rows are dependent, the weights of a solution are
not unique and may be others than the CPU's; the direction is the same. `BODIES` has them by the name of their operator:
float64 tensors ``gramian (..., T, T)`` with T <= 128 in, as the operator's arguments are. The solvers of EPO and
ConicGrad have none. CAGrad's has no road on a root of the Gramian (see `gradsurgery.solvers.cagrad_root`), and on rows
within 1e-3 of opposite a larger residual than the CPU's; nor has that of `fair` the CPU's way to an alpha far from 1.
This package needs Triton, and nothing else imports it before it is asked for.
"""

from gradsurgery.solvers.device.cagrad import cagrad_multipliers
from gradsurgery.solvers.device.dual_cone import dual_cone, dual_projection
from gradsurgery.solvers.device.fair import fair, nash
from gradsurgery.solvers.device.min_norm import min_norm
from gradsurgery.solvers.device.visits import gradvac, pcgrad

__all__ = ["BODIES", "gradvac", "pcgrad"]

BODIES = {
    "cagrad": cagrad_multipliers,
    "dual_cone": dual_cone,
    "dual_projection": dual_projection,
    "fair": fair,
    "min_norm": min_norm,
    "nash": nash,
}
