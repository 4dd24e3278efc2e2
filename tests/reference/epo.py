"""Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent (EPO Search).

Debabrata Mahapatra, Vaibhav Rajan. ICML 2020. https://proceedings.mlr.press/v119/mahapatra20a.html, Algorithm 1 in the
form of the authors' code (dbmptr/EPOSearch, EPO_LP). With l_hat = r * L / sum(r * L), the non-uniformity
mu = sum l_hat log(T l_hat) and the adjustment a = r (log(T l_hat) - mu), let C = J J^T; alpha on the simplex solves

- balance (mu > eps = 1e-4): max alpha.C a such that (C alpha)_j >= b_j, with b_j = 0 for the tasks of largest r_j L_j,
  no bound where (C a)_j > 0 otherwise, and (C a)_j elsewhere; if no (C a)_j > 0, every b_j = 0;
- dominance: max sum(C alpha) such that C alpha >= 0 and alpha.C a >= min(0, max C a).

The weights are T alpha (sum scale), as the authors' training loops apply it. In terms of rows, (C v)_j = g_j.(v @ J).

Conventions. r is scaled to sum to T (the authors take it as given; the size of r matters to b alone). Where the program
is infeasible, alpha = r / sum(r), as in the authors' loops. The authors' optional relaxed dominance, which they take at
random, is not. Solutions need not be unique: compare `value`, and hold rivals to `constraints`. Losses must be > 0.
"""

import cvxpy as cp
import numpy as np

EPS = 1e-4


def adjustment(losses: np.ndarray, r: np.ndarray) -> tuple[float, np.ndarray]:
    """The non-uniformity mu >= 0 of r * losses, and the adjustment a (T,)."""
    share = r * losses / (r * losses).sum()
    mu = float(sum(s * np.log(len(share) * s) for s in share))
    return mu, r * (np.log(len(share) * share) - mu)


def constraints(
    J: np.ndarray, losses: np.ndarray, preference: np.ndarray | None = None
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """The program on the simplex, max c.alpha such that A alpha >= b: its name, c (T,), A (N, T) and b (N,).

    J is divided by the norm of its largest row, which changes neither solutions nor feasibility.
    """
    J, L = np.asarray(J, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    X = J / (np.linalg.norm(J, axis=1).max() or 1.0)
    T = len(J)
    r = np.ones(T) if preference is None else T * np.asarray(preference, dtype=np.float64) / np.sum(preference)
    mu, a = adjustment(L, r)
    C, gains = X @ X.T, X @ (a @ X)
    if mu <= EPS:
        return "dominance", C.sum(axis=0), np.vstack([C, gains]), np.append(np.zeros(T), min(0.0, gains.max()))
    worst = r * L == (r * L).max()
    b = np.where(worst, 0.0, np.where(gains > 0, -np.inf, gains))
    if not (gains > 0).any():
        b = np.zeros(T)
    bounded = np.isfinite(b)
    return "balance", gains, C[bounded], b[bounded]


def alphas(J: np.ndarray, losses: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray | None:
    """(T,) a solution on the simplex; None if the program is infeasible."""
    _, c, A, b = constraints(J, losses, preference)
    alpha = cp.Variable(len(c))
    problem = cp.Problem(cp.Maximize(c @ alpha), [alpha >= 0, cp.sum(alpha) == 1, A @ alpha >= b])
    problem.solve(solver=cp.HIGHS)
    return alpha.value if problem.status == "optimal" else None


def value(J: np.ndarray, losses: np.ndarray, preference: np.ndarray | None, w: np.ndarray) -> tuple[float, float]:
    """The objective at the weights w (T,) = T alpha, and by how much they break the constraints (0 if they do not)."""
    _, c, A, b = constraints(J, losses, preference)
    alpha = w / len(w)
    broken = max(0.0, (b - A @ alpha).max(initial=0.0), -alpha.min(), abs(alpha.sum() - 1))
    return float(c @ alpha), float(broken)


def weights(J: np.ndarray, losses: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(T,) weights, summing to T, of the rows of J (T, d), for the losses (T,) > 0 and the preference (T,) > 0."""
    T = len(J)
    alpha = alphas(J, losses, preference)
    if alpha is None:
        alpha = np.full(T, 1 / T) if preference is None else np.asarray(preference) / np.sum(preference)
    return T * alpha


def direction(J: np.ndarray, losses: np.ndarray, preference: np.ndarray | None = None) -> np.ndarray:
    """(d,) weights @ J."""
    return weights(J, losses, preference) @ np.asarray(J, dtype=np.float64)
