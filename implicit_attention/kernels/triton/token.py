"""The row equation of one token per sample, one program each: what is left of a decode step after its attention.

All other columns are known, so attention over them is, and the token's output is `a + p (v - a)` per head. What Omega_Q
makes of both ends is found before, by a product of matrices. A program finds the row's equation, its root and the query.
Nothing is read by the host on the way.
"""

import triton
import triton.language as tl

from implicit_attention.kernels.triton.row_equation import add_group, evaluate, solve_row


@triton.jit
def settle_token(
    key, made, lse, p, moved, query, grams,
    eps: tl.constexpr, normed: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    dp: tl.constexpr, hp: tl.constexpr,
):  # fmt: skip
    """Solve the equation of one token per sample.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, in the type of the state, as are `made` and `lse`.
        made: The query before its norm as a linear map of `(1, p)`, `[B, G, 1 + H, d]`.
        lse: The log-sum-exp of all other columns, `[B, H]`.
        p: `[B, H]`, filled with the weights on the own column.
        moved: `[B, H]`, filled with how far one more step would move them; inf in samples that are not solved.
        query: `[B, G, d]`, filled with the query of the output before its rotation.
        grams: Scratch, `[B, G, hp hp + hp + 1]`.
        eps: Of the norm.
        normed: Whether queries are normed.
        heads: H.
        groups: G.
        dim: d.
        dp: d, padded to a power of two from 16 on.
        hp: H, padded likewise.
    """
    b = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = made.dtype.element_ty
    shared: tl.constexpr = heads // groups
    h = tl.arange(0, hp)
    at = tl.arange(0, dp)
    real = h < heads
    within = at < dim
    made += b * groups * (1 + heads) * dim
    grams += b * groups * (hp * hp + hp + 1)
    alpha = tl.zeros([hp], wide)
    beta = tl.zeros([hp, hp], wide)
    for g in range(groups):
        of = made + g * (1 + heads) * dim
        base = tl.load(of + at, mask=within, other=0.0)
        way = of + (1 + h)[:, None] * dim + at[None, :]
        ways = tl.load(way, mask=real[:, None] & within[None, :], other=0.0)
        mine = (real & (h // shared == g))[:, None] & within[None, :]
        own_key = tl.load(key + (b * heads + h)[:, None] * dim + at[None, :], mask=mine, other=0.0)
        alpha, beta = add_group(alpha, beta, base, ways, own_key, grams, g, 1.0, eps, normed, dim, hp)
    tl.debug_barrier()

    offset = -tl.load(lse + b * heads + h, mask=real, other=float("inf")).to(tl.float64)
    gram = None
    if normed:
        gram = grams
    alpha = alpha.to(tl.float64)
    beta = beta.to(tl.float64)
    root, solved = solve_row(alpha, beta, offset, gram, heads, groups, hp)
    target, _ = evaluate(alpha, beta, offset, gram, root, heads, groups, hp)
    off = tl.where(solved, tl.abs(target - root), float("inf"))
    tl.store(p + b * heads + h, root.to(wide), mask=real)
    tl.store(moved + b * heads + h, off.to(wide), mask=real)
    for g in range(groups):
        of = made + g * (1 + heads) * dim
        ways = of + (1 + h)[:, None] * dim + at[None, :]
        ways = tl.load(ways, mask=real[:, None] & within[None, :], other=0.0)
        q = tl.load(of + at, mask=within, other=0.0) + tl.sum(root.to(wide)[:, None] * ways, 0)
        if normed:
            q = q / tl.sqrt(tl.sum(q * q, 0) / dim + eps)
        tl.store(query + (b * groups + g) * dim + at, q, mask=within)
