"""Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout (GradDrop).

Zhao Chen, Jiquan Ngiam, Yanping Huang, Thang Luong, Henrik Kretzschmar, Yuning Chai, Dragomir Anguelov. NeurIPS 2020.
https://arxiv.org/abs/2010.06808, Equation 1 and Algorithm 1, per coordinate: P = (1 + sum_i g_i / sum_i |g_i|) / 2;
with U uniform on (0, 1), positive entries are kept if P > U and negative ones if P < U; an entry not kept is multiplied
by the leak. The direction is the sum over the tasks (sum scale).

Conventions. On gradients of shared parameters, as in CAGrad's code; the paper applies it to a representation, with the
batch summed and the signs of the activations as weights. f is the identity and one leak serves all tasks. The
inequalities are strict, as in the paper, so that U = P keeps nothing. A coordinate of zeros stays zero (no epsilon).
"""

import numpy as np


def direction(J: np.ndarray, uniforms: np.ndarray, leak: float = 0.0) -> np.ndarray:
    """(d,) for the rows of J (T, d) and one uniform draw a coordinate (d,); 0 <= leak <= 1."""
    J = np.asarray(J, dtype=np.float64)
    u = np.zeros(J.shape[1])
    for k in range(J.shape[1]):
        g = J[:, k]
        total = np.abs(g).sum()
        if total == 0:
            continue
        P = (1 + g.sum() / total) / 2
        for entry in g:
            kept = (entry > 0 and uniforms[k] < P) or (entry < 0 and uniforms[k] > P)
            u[k] += entry if kept else leak * entry
    return u
