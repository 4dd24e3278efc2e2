"""What every kernel is made of: one T x T matrix as a BLOCK x BLOCK tile of float64 registers, padded with zeros.

A padded row is a zero row, which the scaling of every solver sets apart already. Loops that depend on data run on the
device, and no branch leaves them early, which Triton does not have.
"""

# What Triton tells a type checker of its tensors is not what they are.
# pyright: reportOperatorIssue=false, reportArgumentType=false

import triton
import triton.language as tl

# A pivot below this part of a unit diagonal is rounding: its row depends on the rows before it.
PIVOT = tl.constexpr(1e-15)


@triton.jit
def load_matrix(matrix, T, BLOCK: tl.constexpr):
    """The tile of the T x T matrix at a pointer."""
    i = tl.arange(0, BLOCK)
    inside = (i[:, None] < T) & (i[None, :] < T)
    return tl.load(matrix + i[:, None] * T + i[None, :], mask=inside, other=0.0)


@triton.jit
def load_norm(matrix, T, BLOCK: tl.constexpr):
    """Row norms (BLOCK,), 1 for a zero row, and their inverses, 0 for a zero row."""
    i = tl.arange(0, BLOCK)
    square = tl.load(matrix + i * (T + 1), mask=i < T, other=0.0)
    norm = tl.sqrt(tl.where(square > 0, square, 1.0))
    return norm, tl.where(square > 0, 1 / norm, 0.0)


@triton.jit
def load_cosines(matrix, inverse, T, BLOCK: tl.constexpr):
    """The cosines of the Gramian at a pointer, 0 with a zero row, from the inverse norms.

    They are loaded anew wherever they are needed, since a second tile would not fit into the registers at 128 tasks.
    """
    return load_matrix(matrix, T, BLOCK) * inverse[:, None] * inverse[None, :]


@triton.jit
def times(M, v):
    """The product (BLOCK,) of a tile and a vector."""
    return tl.sum(M * v[None, :], axis=1)


@triton.jit
def at(v, k, BLOCK: tl.constexpr):
    """Entry k of a vector."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == k, v, 0.0), axis=0)


@triton.jit
def first(chosen, BLOCK: tl.constexpr):
    """The least position where a vector of bits is set, BLOCK where none is."""
    return tl.min(tl.where(chosen, tl.arange(0, BLOCK), BLOCK), axis=0)


@triton.jit
def some(chosen):
    """Whether any bit of a vector is set."""
    return tl.max(chosen.to(tl.int32), axis=0) > 0


@triton.jit
def flag(condition):
    """A scalar condition that may meet vectors of bits: the interpreter spreads a comparison of floats as floats."""
    return condition.to(tl.int32) != 0


@triton.jit
def not_finite(matrix, T, BLOCK: tl.constexpr):
    """0, or NaN where an entry is not finite, to be added to what is returned: comparisons swallow a NaN."""
    G = load_matrix(matrix, T, BLOCK)
    return tl.sum(tl.sum(G - G, axis=1), axis=0)


@triton.jit
def factor(M, diagonal, wanted, BLOCK: tl.constexpr):
    """Inverts the block of a symmetric positive semidefinite tile that belongs to the wanted rows.

    Gauss-Jordan elimination in place, by principal pivots of which the largest comes first; a row that depends on those
    before it is left out.

    Args:
        M, diagonal: the tile, and its diagonal (BLOCK,), of order 1.
        wanted: (BLOCK,) bits.

    Returns:
        The tile, with the inverse in the rows and columns of the basis, and the basis: the wanted rows not left out.
    """
    i = tl.arange(0, BLOCK)
    basis = wanted & (i < 0)
    pivot = tl.max(tl.where(wanted, diagonal, 0.0), axis=0)
    step = 0
    while (pivot > PIVOT) & (step < BLOCK):
        k = first(wanted & (basis == 0) & (diagonal == pivot), BLOCK)
        column = tl.sum(tl.where(i[None, :] == k, M, 0.0), axis=1)
        # Pivoting keeps the tile symmetric, but for the sign between a row in the basis and one outside.
        row = tl.where(basis, -column, column) / pivot
        diagonal = diagonal - column * row
        # With these entries at k, one update of rank one writes the pivot's row and column too.
        column = tl.where(i == k, pivot + 1.0, column)
        row = tl.where(i == k, (pivot - 1.0) / pivot, row)
        M = M - column[:, None] * row[None, :]
        basis = basis | (i == k)
        step += 1
        pivot = tl.max(tl.where(wanted & (basis == 0), diagonal, 0.0), axis=0)
    return M, basis
