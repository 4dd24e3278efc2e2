"""The probability simplex: its projection, and task weights on it of which some tasks may be absent."""

import torch
from torch import Tensor


def project(v: Tensor) -> Tensor:
    """The nearest point (..., T) of the simplex, for v (..., T).

    Source: Held, Wolfe, Crowder. Math. Programming 6, 1974.
    """
    # A common shift changes nothing, and keeps the 1 from drowning in large numbers.
    v = v - v.amax(dim=-1, keepdim=True)
    descending = v.sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    excess = (descending.cumsum(dim=-1) - 1) / count
    # The support is the largest one that stays positive; its excess is the largest of all.
    w = (v - excess.amax(dim=-1, keepdim=True)).clamp(min=0)
    return w / w.sum(dim=-1, keepdim=True)


def renormalized(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (..., T) >= 0 made to sum to 1, equal where all are 0, and the sum (..., 1) that they had."""
    total = w.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, w / torch.where(total > 0, total, 1.0), 1 / w.shape[-1]), total
