"""Multi-Task Learning as Multi-Objective Optimization (MGDA).

Ozan Sener, Vladlen Koltun. NeurIPS 2018. https://arxiv.org/abs/1810.04650, Equation 3: the point of least norm in the
convex hull of the gradients; after Jean-Antoine Desideri, Multiple-gradient descent algorithm (MGDA), C. R. Math. 2012.
Weights are on the simplex (mean scale).

Solved exactly, not by Frank-Wolfe: the least-norm point lies in the relative interior of a simplex of affinely
independent rows, so every such subset is tried (2^T - 1 of them) and the one of least duality gap is taken.

Normalisation (in the authors' code, not in the paper): weights are solved for the rows g_i / s_i, with s_i = ||g_i||
("l2"), L_i ("loss") or L_i ||g_i|| ("loss+"), and are then applied to the raw gradients, as the authors' training
loop does; LibMTL applies them to the normalised ones. Where s_i = 0 belongs to a zero gradient the row stays zero
(theirs divides by zero); losses must be positive.

Dependent rows can make w non-unique. The least-norm point, so the direction for "none", is unique all the same; with a
normalisation the direction is not (collinear gradients of unequal norm under "l2"), and the first solution is returned.
"""

from itertools import combinations

import numpy as np


def min_norm_weights(V: np.ndarray) -> np.ndarray:
    """(T,) point of the simplex that minimises ||w @ V||."""
    T, d = V.shape
    scale = np.linalg.norm(V, axis=1).max()
    if scale == 0:
        return np.full(T, 1 / T)
    X = V / scale
    best_gap, best_w = np.inf, None
    for size in range(1, min(T, d + 1) + 1):
        for support in combinations(range(T), size):
            P = X[list(support)]
            edges = P[1:] - P[0]
            if size > 1:
                moves, _, rank, _ = np.linalg.lstsq(edges.T, -P[0], rcond=1e-12)
                if rank < size - 1:
                    continue
            else:
                moves = np.zeros(0)
            barycentric = np.concatenate([[1 - moves.sum()], moves])
            if barycentric.min() < -1e-9:
                continue
            w = np.zeros(T)
            w[list(support)] = np.clip(barycentric, 0, None)
            w /= w.sum()
            gap = duality_gap(X, w)
            if gap < best_gap:
                best_gap, best_w = gap, w
    return best_w


def duality_gap(V: np.ndarray, w: np.ndarray) -> float:
    """||u||^2 - min_i g_i.u at u = w @ V: zero only at the optimum, and at least ||u - u*||^2."""
    u = w @ V
    return float(u @ u - (V @ u).min())


def normalisers(J: np.ndarray, normalization: str, losses: np.ndarray | None) -> np.ndarray:
    """(T,) the s_i by which the rows are divided before solving."""
    if normalization not in ("none", "l2", "loss", "loss+"):
        raise ValueError(f"normalization must be none, l2, loss or loss+: got {normalization!r}")
    s = np.ones(len(J))
    if normalization in ("loss", "loss+"):
        s = s * np.asarray(losses, dtype=np.float64)
        if not (s > 0).all():
            raise ValueError(f"losses must be positive to normalise by them: got {losses}")
    if normalization in ("l2", "loss+"):
        norms = np.linalg.norm(J, axis=1)
        s = s * np.where(norms > 0, norms, 1.0)
    return s


def weights(J: np.ndarray, normalization: str = "none", losses: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights on the simplex for the raw rows of J (T, d); losses (T,) > 0 where the normalisation wants them."""
    J = np.asarray(J, dtype=np.float64)
    return min_norm_weights(J / normalisers(J, normalization, losses)[:, None])


def direction(J: np.ndarray, normalization: str = "none", losses: np.ndarray | None = None) -> np.ndarray:
    """(d,) the weights applied to the raw rows; for "none" the least-norm point itself."""
    return weights(J, normalization, losses) @ np.asarray(J, dtype=np.float64)
