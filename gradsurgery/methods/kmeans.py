"""k-means on a line, solved exactly: sorted, its groups are runs, and dynamic programming finds the best runs."""

import torch
from torch import Tensor


def group_means(x: Tensor, groups: int) -> Tensor:
    """Every number replaced by the mean of its group, of the grouping with the least sum of squared distances.

    Args:
        x: (..., T), finite.
        groups: how many, at least 1; with T or more every number is its own.

    Returns:
        (..., T). Of equally good groupings the one with the smaller lower groups. T^3 numbers of memory an index.
    """
    T, K = x.shape[-1], min(groups, x.shape[-1])
    ordered, order = x.sort(dim=-1)
    n = torch.arange(T, device=x.device)
    run = (n[:, None, None] <= n) & (n <= n[None, :, None])  # run[i, j, k]: i <= k <= j
    centre = (run * ordered[..., None, None, :]).sum(dim=-1) / run.sum(dim=-1).clamp(min=1)
    cost = (run * (ordered[..., None, None, :] - centre.unsqueeze(-1)).square()).sum(dim=-1)
    cost = torch.where(n[:, None] <= n, cost, torch.inf)
    best, starts = cost[..., 0, :], []  # best[j]: least cost of the first j + 1 numbers in the groups so far
    for _ in range(K - 1):
        best, start = (best[..., :-1, None] + cost[..., 1:, :]).min(dim=-2)
        starts.append(start + 1)
    label, end = torch.zeros_like(order), torch.full_like(order[..., :1], T - 1)
    for start in reversed(starts):
        first = start.gather(-1, end)
        label, end = label + (n >= first), first - 1
    member = label.unsqueeze(-1) == torch.arange(K, device=x.device)
    mean = (member * ordered.unsqueeze(-1)).sum(dim=-2, keepdim=True) / member.sum(dim=-2, keepdim=True)
    return torch.empty_like(x).scatter(-1, order, (member * mean).sum(dim=-1))
