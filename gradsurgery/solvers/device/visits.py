"""The visits of `gradsurgery.methods.pcgrad` and `gradsurgery.methods.gradvac` on the device, one program a Gramian.

Row i of a tile is task i's gradient as changed so far, by its inner products with the task gradients; at every visit it
is moved along one row of the Gramian, which is read from memory again.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.solvers.device.launch import launch
from gradsurgery.solvers.device.tile import load_matrix


@triton.jit
def load_visited(matrix, visited, T, BLOCK: tl.constexpr):
    """The tile whose row i is row visited[i] of the matrix at a pointer."""
    i = tl.arange(0, BLOCK)
    inside = (i[:, None] < T) & (i[None, :] < T)
    return tl.load(matrix + visited[:, None] * T + i[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["T"])
def pcgrad_kernel(gramian, orders, solution, T, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    square = tl.load(matrix + i * (T + 1), mask=i < T, other=0.0)
    # Nothing is projected off a zero row.
    inverse = tl.where(square > 0, 1 / tl.where(square > 0, square, 1.0), 0.0)
    inner = load_matrix(matrix, T, BLOCK)
    weights = tl.where(i < T, 1.0, square * 0.0)
    for visit in range(T - 1):
        visited = tl.load(orders + i * (T - 1) + visit, mask=i < T, other=0)
        chosen = (i[None, :] == visited[:, None]) & (i < T)[:, None]
        step = tl.sum(tl.where(chosen, tl.minimum(inner, 0.0) * inverse[None, :], 0.0), axis=1)
        inner -= step[:, None] * load_visited(matrix, visited, T, BLOCK)
        weights -= tl.sum(tl.where(chosen, step[:, None], 0.0), axis=0)
    tl.store(solution + n * T + i, weights, mask=i < T)


@triton.jit(do_not_specialize=["T"])
def gradvac_kernel(gramian, target, orders, solution, moved, T, BLOCK: tl.constexpr, BETA: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    matrix = gramian + n * T * T
    norm = tl.sqrt(tl.maximum(tl.load(matrix + i * (T + 1), mask=i < T, other=0.0), 0.0))
    inner = load_matrix(matrix, T, BLOCK)
    targets = load_matrix(target + n * T * T, T, BLOCK)
    coefficients = tl.where((i[:, None] == i[None, :]) & (i < T)[:, None], 1.0, inner * 0.0)
    for visit in range(T - 1):
        visited = tl.load(orders + i * (T - 1) + visit, mask=i < T, other=0)
        chosen = (i[None, :] == visited[:, None]) & (i < T)[:, None]
        product = tl.sum(tl.where(chosen, inner, 0.0), axis=1)
        length = tl.sqrt(tl.maximum(tl.sum(coefficients * inner, axis=1), 0.0))
        against = tl.sum(tl.where(chosen, norm[None, :], 0.0), axis=1)
        there = (length > 0) & (against > 0)
        phi = product / tl.where(there, length, 1.0) / tl.where(there, against, 1.0)
        phi = tl.where(there, tl.minimum(tl.maximum(phi, -1.0), 1.0), 0.0)
        rho = tl.sum(tl.where(chosen, targets, 0.0), axis=1)
        # Targets stay 1e-6 away from 1, where the coefficient is infinite.
        rho = tl.where(rho > 1 - 1e-6, 1 - 1e-6, tl.where(rho < -1 + 1e-6, -1 + 1e-6, rho))
        sine = tl.sqrt(1 - rho * rho)
        turn = (rho * tl.sqrt(tl.maximum(1 - phi * phi, 0.0)) - phi * sine) / sine
        step = tl.where(there & (phi < rho), turn * length / tl.where(there, against, 1.0), 0.0)
        coefficients += tl.where(chosen, step[:, None], 0.0)
        targets += tl.where(chosen, (BETA * (phi - rho))[:, None], 0.0)
        inner += step[:, None] * load_visited(matrix, visited, T, BLOCK)
    tl.store(solution + n * T + i, tl.sum(coefficients, axis=0), mask=i < T)
    inside = (i[:, None] < T) & (i[None, :] < T)
    tl.store(moved + n * T * T + i[:, None] * T + i[None, :], targets, mask=inside)


def pcgrad(gramian: Tensor, orders: Tensor) -> Tensor:
    """The weights of `gradsurgery.methods.pcgrad.pcgrad`, for float64 Gramians."""
    solution = gramian.new_empty(gramian.shape[:-1])
    launch(pcgrad_kernel, gramian, orders.contiguous(), solution)
    return solution


def gradvac(gramian: Tensor, target: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Weights and moved targets of `gradsurgery.methods.gradvac.gradvac`, for float64 Gramians."""
    solution, moved = gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(gramian.shape)
    launch(gradvac_kernel, gramian, target.contiguous(), orders.contiguous(), solution, moved, BETA=beta)
    return solution, moved
