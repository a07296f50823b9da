"""Row equations of the forward pass with one program per sample: stage 3 of `forward.settle_block`."""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.row_equation import add_group, solve_row
from implicit_attention.causal.triton.kernels.tiles import R, load_scratch


@triton.jit
def _row_problem(columns, query_map, scratch, iterate, at_row, i, constants):
    """The row equation of row i: scores of the query of `y = a + p (v - a)` with the row's key.

    The quadratic forms of normed queries are stored in `scratch.grams`.

    Returns:
        alpha `[hp]` and beta `[hp, hp]`.
    """
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    hp: tl.constexpr = constants.hp
    wide: tl.constexpr = scratch.made_before.dtype.element_ty
    h = tl.arange(0, hp)
    at = tl.arange(0, dp)
    earlier = tl.arange(0, R)
    real = h < heads
    inside = real[:, None] & (at < dim)[None, :]
    key = columns.key + at_row * columns.key_n
    factors = scratch.factors
    share = tl.load(iterate.shares + h * R + i, mask=real, other=0.0)
    share *= tl.load(factors + h * R + i, mask=real, other=0.0)
    shared: tl.constexpr = heads // groups
    alpha = tl.zeros([hp], wide)
    beta = tl.zeros([hp, hp], wide)
    for g in range(groups):
        tiles = (g * heads + h)[:, None] * (R * dp) + at[None, :]
        others = share[:, None] * tl.load(scratch.made_before + tiles + i * dp, mask=real[:, None], other=0.0)
        for of in range(heads):
            made = load_scratch(scratch.made_value + (g * heads + of) * R * dp, dp)
            weight = tl.load(iterate.weights + i * R + of * R * R + earlier)
            weight = tl.where(earlier < i, weight, 0.0) * tl.load(factors + of * R + i)
            others += tl.where((h == of)[:, None], tl.sum(weight[:, None] * made, 0)[None, :], 0.0)
        base = tl.sum(others, 0)
        if query_map.constant is not None:
            base += tl.load(query_map.constant + g * dim + at, mask=at < dim, other=0.0).to(wide)
        if query_map.added is not None:
            added = query_map.added + at_row * groups * dim
            base += tl.load(added + g * dim + at, mask=at < dim, other=0.0).to(wide)
        ways = tl.load(scratch.made_value + tiles + i * dp, mask=real[:, None], other=0.0) - others  # [hp, dp]
        mine = inside & (h // shared == g)[:, None]
        own_key = tl.load(key + h[:, None] * columns.key_h + at[None, :], mask=mine, other=0.0).to(wide)
        if query_map.turn is not None:
            half: tl.constexpr = dim // 2
            partner = tl.where(at < half, at + half, at - half)
            other = tl.load(key + h[:, None] * columns.key_h + partner[None, :], mask=mine, other=0.0).to(wide)
            angle = query_map.turn + at_row * half + tl.where(at < half, at, at - half)
            cos = tl.load(angle, mask=at < dim, other=0.0)
            sin = tl.load(angle + query_map.turn_half, mask=at < dim, other=0.0)
            own_key = own_key * cos[None, :] + other * (sin * tl.where(at < half, 1.0, -1.0))[None, :]
        alpha, beta = add_group(
            alpha, beta, base, ways, own_key, scratch.grams, g,
            constants.scale, constants.eps, constants.normed, dim, hp,
        )  # fmt: skip
    return alpha, beta


@triton.jit
def _own_root(alpha, beta, biases, scratch, at_row, i, constants):
    """The root of row i's row equation, `[hp]` in float64, and whether it was found."""
    heads: tl.constexpr = constants.heads
    hp: tl.constexpr = constants.hp
    h = tl.arange(0, hp)
    real = h < heads
    rest = tl.load(scratch.rests + h * R + i, mask=real, other=0.0).to(tl.float64)
    sees = tl.load(scratch.fractions + h * R + i, mask=real, other=1.0) != 0.0
    own = tl.zeros([hp], tl.float64)
    if biases.strict is not None:
        strict = biases.strict + h * biases.strict_h
        own = tl.load(strict + at_row * (biases.n + 1), mask=real, other=0.0).to(tl.float64)
    blind = (own == -float("inf")) | (real == 0)
    finite = tl.where(blind, 0.0, own) - tl.where(sees, rest, 0.0)
    offset = tl.where(blind, -float("inf"), tl.where(sees, finite, float("inf")))
    gram = None
    if constants.normed:
        gram = scratch.grams
    return solve_row(alpha.to(tl.float64), beta.to(tl.float64), offset, gram, heads, constants.groups, hp)


@triton.jit
def _move(iterate, fractions, p, i, constants):
    """Set the own weights of row i to `p` `[hp]`, and scale its other weights to match."""
    h = tl.arange(0, constants.hp)
    columns = tl.arange(0, R)
    real = h < constants.heads
    rest = tl.load(fractions + h * R + i, mask=real, other=0.0)
    moves = real & (rest != 0.0)
    factor = (1.0 - p).to(rest.dtype) / tl.where(moves, rest, 1.0)
    row = iterate.weights + h[:, None] * (R * R) + i * R + columns[None, :]
    old = tl.load(row, mask=moves[:, None], other=0.0)
    new = tl.where(columns[None, :] == i, p.to(rest.dtype)[:, None], old * factor[:, None])
    tl.store(row, new, mask=moves[:, None])
    share = tl.load(iterate.shares + h * R + i, mask=moves, other=0.0)
    tl.store(iterate.shares + h * R + i, share * factor, mask=moves)


@triton.jit
def _own_weights(iterate, i, constants):
    h = tl.arange(0, constants.hp)
    return tl.load(iterate.weights + h * (R * R) + i * (R + 1), mask=h < constants.heads, other=0.0)


@triton.jit
def solve_rows(columns, biases, query_map, scratch, new, wanted, verdict, same_root, s, m, constants):
    """Set the own weights of `wanted` rows to the roots of their row equations.

    Rows of settled blocks (`verdict` 1) are moved only if they are at another root.

    Returns:
        1; 0 if a row was at another root; -1 if a root was not found.
    """
    rows = tl.arange(0, R)
    result = 1
    for i in range(m):
        here = tl.sum(tl.where(rows == i, wanted, 0), 0)
        if here > 0:
            alpha, beta = _row_problem(columns, query_map, scratch, new, s + i, i, constants)
            tl.debug_barrier()
            p, solved = _own_root(alpha, beta, biases, scratch, s + i, i, constants)
            own = _own_weights(new, i, constants)
            off = tl.max(tl.abs(p.to(own.dtype) - own), 0)
            tl.debug_barrier()
            if solved == 0:
                result = -1
            elif (verdict == 0) | (off > same_root):
                _move(new, scratch.fractions, p, i, constants)
                if off > same_root:
                    result = tl.minimum(result, 0)
            tl.debug_barrier()
    return result
