"""Pseudoinverses of Gramians, with a cutoff that their rounding calls for."""

import torch
from torch import Tensor

from gradsurgery.stats import cosines

# An eigenvalue below this part of the largest is rounding of a float64 Gramian: its rows are dependent.
RTOL = 1e-12


def eigen(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (..., T), ascending, eigenvectors (..., T, T) and which of them (..., T) are not rounding."""
    values, vectors = torch.linalg.eigh(G)
    return values, vectors, values > RTOL * values[..., -1:]


def equalizer(G: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The combination of the unit gradients that has given projections on them, as nearly as they allow.

    Args:
        G: (..., T, T) float64 Gramians, C its cosines.
        wanted: (T,) projections p, of the order of 1.

    Returns:
        x = C^+ p (..., T), 0 for a zero row, and the projections C x (..., T): p where the unit gradients are
        independent, or agree as duplicates do. Both are 0 where the unit gradients cancel out.
    """
    values, vectors, kept = eigen(cosines(G))
    component = torch.where(kept, vectors.mT @ wanted, 0.0)
    component = torch.where(component.abs() > 1e-10, component, 0.0)
    x = vectors @ (component / torch.where(kept, values, 1.0)).unsqueeze(-1)
    projection = vectors @ component.unsqueeze(-1)
    present = G.diagonal(dim1=-2, dim2=-1) > 0
    return torch.where(present, x.squeeze(-1), 0.0), torch.where(present, projection.squeeze(-1), 0.0)


def inverse_norms(G: Tensor) -> Tensor:
    """1 / norm of every row (..., T), 0 for a zero row."""
    norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.where(norm > 0, 1 / norm, 0.0)
