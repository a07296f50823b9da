"""The row problem of one new token per sample, in one launch: what is left of a decode step after its attention.

All other columns come before the token, so attention over them is known, and its output is `a + p (v - a)` per head.
One program takes one sample: what Omega_Q makes of both ends, the row's equation, its root, the output, the query.
Nothing is read by the host on the way.
"""

import triton
import triton.language as tl

from implicit_attention.kernels.triton.row_equation import add_group, evaluate, solve_row


@triton.jit
def settle_token(
    key, a, step, lse, weight, fixed, p, moved, query, work, weight_o, slot,
    eps: tl.constexpr, normed: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    dp: tl.constexpr, hp: tl.constexpr, narrow: tl.constexpr,
):  # fmt: skip
    """Solve the equation of one token per sample.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, in the type of the state, as are `a`, `step` and `lse`.
        a: Attention over the columns before, `[B, H, d]`.
        step: The token's value less that, `[B, H, d]`.
        lse: The log-sum-exp of the columns before, `[B, H]`.
        weight: Omega_Q, `[G d, H d]`, rows contiguous.
        fixed: What is added to what it makes, `[B, G d]`, or None.
        p: `[B, H]`, filled with the weights on the own column.
        moved: `[B, H]`, filled with how far one more step would move them; inf in samples that are not solved.
        query: `[B, G, d]`, filled with the query of the output before its rotation.
        work: Scratch, `[B, slot]`.
        weight_o: Stride of the outputs of Omega_Q.
        slot: `G (hp dp + dp + hp hp + hp + 1)`.
        eps: Of the norm.
        normed: Whether queries are normed.
        heads: H.
        groups: G.
        dim: d.
        dp: d, padded to a power of two from 16 on.
        hp: H, padded likewise.
        narrow: Type of Omega_Q and of what it multiplies.
    """
    b = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = a.dtype.element_ty
    shared: tl.constexpr = heads // groups
    h = tl.arange(0, hp)
    at = tl.arange(0, dp)
    real = h < heads
    within = at < dim
    ends = work + b * slot  # [G, hp + 1, dp]: the query's way with each head's weight, and where it starts
    grams = ends + groups * (hp + 1) * dp  # [G, hp hp + hp + 1]
    alpha = tl.zeros([hp], wide)
    beta = tl.zeros([hp, hp], wide)
    for g in range(groups):
        base = tl.zeros([dp], wide)
        if fixed is not None:
            base += tl.load(fixed + (b * groups + g) * dim + at, mask=within, other=0.0).to(wide)
        ways = tl.zeros([hp, dp], wide)
        for of in range(heads):
            omega = weight + (g * dim + at)[:, None].to(tl.int64) * weight_o + (of * dim + at)[None, :]
            omega = tl.load(omega, mask=within[:, None] & within[None, :], other=0.0).to(wide)  # [d of q, d of y]
            start = tl.load(a + (b * heads + of) * dim + at, mask=within, other=0.0).to(narrow).to(wide)
            way = tl.load(step + (b * heads + of) * dim + at, mask=within, other=0.0).to(narrow).to(wide)
            base += tl.sum(omega * start[None, :], 1)
            ways += tl.where((h == of)[:, None], tl.sum(omega * way[None, :], 1)[None, :], 0.0)
        tl.store(ends + (g * (hp + 1) + h)[:, None] * dp + at[None, :], ways)
        tl.store(ends + (g * (hp + 1) + hp) * dp + at, base)
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
        ways = tl.load(ends + (g * (hp + 1) + h)[:, None] * dp + at[None, :])
        q = tl.load(ends + (g * (hp + 1) + hp) * dp + at) + tl.sum(root.to(wide)[:, None] * ways, 0)
        if normed:
            q = q / tl.sqrt(tl.sum(q * q, 0) / dim + eps)
        tl.store(query + (b * groups + g) * dim + at, q, mask=within)
