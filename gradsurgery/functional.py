"""The mathematics alone: `aggregate` on a matrix, and each method as a function, batched over leading axes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from gradsurgery import kernels
from gradsurgery.methods.aligned_mtl import aligned_mtl
from gradsurgery.methods.cagrad import cagrad
from gradsurgery.methods.config import config
from gradsurgery.methods.conicgrad import conicgrad
from gradsurgery.methods.cosmos import cosmos
from gradsurgery.methods.db_mtl import db_mtl
from gradsurgery.methods.dualproj import dualproj
from gradsurgery.methods.dwa import dwa
from gradsurgery.methods.epo import epo
from gradsurgery.methods.excess_mtl import excess_mtl
from gradsurgery.methods.fairgrad import fairgrad
from gradsurgery.methods.famo import famo
from gradsurgery.methods.gls import gls
from gradsurgery.methods.go4align import go4align
from gradsurgery.methods.graddrop import graddrop
from gradsurgery.methods.gradnorm import gradnorm
from gradsurgery.methods.gradvac import gradvac
from gradsurgery.methods.igb import igb
from gradsurgery.methods.imtl import imtl
from gradsurgery.methods.imtl_g import imtl_g
from gradsurgery.methods.imtl_l import imtl_l
from gradsurgery.methods.krum import krum
from gradsurgery.methods.metabalance import metabalance
from gradsurgery.methods.mgda import mgda
from gradsurgery.methods.moco import moco
from gradsurgery.methods.modo import modo
from gradsurgery.methods.nash_mtl import nash_mtl
from gradsurgery.methods.ntkmtl import ntkmtl
from gradsurgery.methods.pbi import pbi
from gradsurgery.methods.pcgrad import pcgrad
from gradsurgery.methods.pivrg import pivrg
from gradsurgery.methods.rlw import rlw
from gradsurgery.methods.sdmgrad import sdmgrad
from gradsurgery.methods.si import si
from gradsurgery.methods.stch import stch
from gradsurgery.methods.trimmed_mean import trimmed_mean
from gradsurgery.methods.upgrad import upgrad
from gradsurgery.methods.uw import uw
from gradsurgery.methods.uw_so import uw_so
from gradsurgery.registry import ColumnMethod, Method, TrackedMethod, build_method
from gradsurgery.stats import Needs, Stats, all_finite

__all__ = [
    "aggregate",
    "aligned_mtl",
    "cagrad",
    "config",
    "conicgrad",
    "cosmos",
    "db_mtl",
    "dualproj",
    "dwa",
    "epo",
    "excess_mtl",
    "fairgrad",
    "famo",
    "gls",
    "go4align",
    "graddrop",
    "gradnorm",
    "gradvac",
    "igb",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "metabalance",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "ntkmtl",
    "pbi",
    "pcgrad",
    "pivrg",
    "rlw",
    "sdmgrad",
    "si",
    "stch",
    "trimmed_mean",
    "upgrad",
    "uw",
    "uw_so",
]


def aggregate(
    jacobian: Tensor,
    method: str = "upgrad",
    *,
    losses: Tensor | None = None,
    independent: tuple[Tensor, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
    generator: Generator | None = None,
    **hparams: Any,
) -> Tensor:
    """A whole method on a matrix: no model, no optimizer, and for a stateful method its first step.

    Args:
        jacobian: (T, d), one task's gradient a row.
        method: a registered name.
        losses: (T,), for the methods that read them; ones if None.
        independent: two (T, d), from further draws of the batch, for the methods that learn from such (``sdmgrad``,
            ``modo``) and for no other.
        blocks: sizes of consecutive column blocks, which sum to d; one block if None.
        generator: source of random numbers; torch's own if None.
        **hparams: the method's hyperparameters.

    Returns:
        (d,), the direction that takes the place of the gradient, in the dtype of ``jacobian``; NaN where ``jacobian``
        or ``losses`` is not finite, or the square of a gradient's norm leaves the range of its dtype. Differentiable in
        ``jacobian`` where the method is (`pcgrad`, and those that need only losses); backward through a solver raises.

    Raises:
        ValueError: ``jacobian`` is not a matrix, ``losses``, ``independent`` or ``blocks`` do not fit it or the method,
            or the method is unknown.

    Example:
        >>> import torch
        >>> from gradsurgery import aggregate
        >>> aggregate(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), "upgrad")
        tensor([0.2500, 0.7500])
    """
    if jacobian.ndim != 2 or 0 in jacobian.shape:
        raise ValueError(f"jacobian must be a (T, d) matrix, one gradient a row; got shape {tuple(jacobian.shape)}.")
    T, d = jacobian.shape
    if losses is None:
        losses = jacobian.new_ones(T)
    if losses.shape != (T,):
        raise ValueError(f"losses must have shape ({T},), one a row of jacobian; got {tuple(losses.shape)}.")
    sizes = [d] if blocks is None else list(blocks)
    if sum(sizes) != d or min(sizes) < 0:
        raise ValueError(f"blocks must be sizes >= 0 that sum to the {d} columns of jacobian; got {sizes}.")
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    rule = build_method(method, hparams)
    _check_samples(independent, jacobian, method, wanted=Needs.CROSS in rule.needs)
    state = rule.init(T, len(sizes), dtype=torch.float64, device=jacobian.device)
    with torch.autocast(jacobian.device.type, enabled=False):
        if isinstance(rule, ColumnMethod):
            direction = rule.direction(jacobian, state, generator)
            return torch.where(all_finite(losses.double()), direction, torch.nan)
        assert isinstance(rule, Method)
        rows, measured = jacobian, jacobian
        if isinstance(rule, TrackedMethod):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            _, measured = rule.track(rows, torch.zeros_like(rows), losses.double(), state)
            rows = measured if rule.acts_on == "measured" else rows
        gramian = kernels.gramian(measured, bounds) if rule.needs & (Needs.GRAMIAN | Needs.TRACKED) else None
        cross = None if independent is None else kernels.gramian(independent[0], bounds, independent[1])
        stats, finite = Stats(losses.double(), gramian, cross).sanitized()
        w, _, _ = rule.weights(stats, state, generator)
        return kernels.combine(torch.where(finite, w, torch.nan), rows, bounds).to(jacobian.dtype)


def _check_samples(samples: Sequence[Tensor] | None, jacobian: Tensor, method: str, *, wanted: bool) -> None:
    if wanted and (samples is None or len(samples) != 2 or any(J.shape != jacobian.shape for J in samples)):
        raise ValueError(
            f"{method} learns its weights from independent batches: pass independent=(J_a, J_b), their gradients in "
            f"two matrices of shape {tuple(jacobian.shape)}."
        )
    if samples is not None and not wanted:
        raise ValueError(f"{method} has no use for independent batches; leave `independent` out.")
