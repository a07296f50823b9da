"""One decoded token per sample: the part of a decode step beside matrix products and one attention call.

All other columns are known, so attention a over them is known, and the token's output is `a + p (v - a)` per head.
Omega_Q is applied to a and to v - a by matrix products. One program per sample makes the row equation and computes its
root, the output and the query. The host reads nothing in between.
"""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.row_equation import add_group, evaluate, solve_row


@triton.jit
def _turned(q, other, turn, at, dim: tl.constexpr):
    """Rotate `[h, d]` by cosines and sines `turn` `[2, d / 2]`; `other` holds each number's partner in the pair."""
    half: tl.constexpr = dim // 2
    low = at < half
    place = tl.where(low, at, at - half)
    cos = tl.load(turn + place, mask=at < dim, other=0.0)
    sin = tl.load(turn + half + place, mask=at < dim, other=0.0)
    return q * cos[None, :] + other * tl.where(low, -sin, sin)[None, :]


@triton.jit
def prepare_keys(
    made, temperature, turn, key, scaled, turn_b, scale: tl.constexpr, eps: tl.constexpr, dim: tl.constexpr,
    dp: tl.constexpr, heads: tl.constexpr,
):  # fmt: skip
    """Apply norm, temperature and rotation to one head's key of a sample.

    Args:
        made: `[B, H, d]`, contiguous.
        temperature: `[H]` in the dtype of `made`; None for neither norm nor temperature.
        turn: Cosines and sines of each sample, `[1 or B, 2, d / 2]`, or None.
        key: As `made`, filled with the key as it enters scores.
        scaled: `[B, H, d]`, filled with the key before its rotation times `scale`.
    """
    b = tl.program_id(0).to(tl.int64)  # the dimension that has room for any batch
    h = tl.program_id(1)
    wide: tl.constexpr = scaled.dtype.element_ty
    narrow: tl.constexpr = key.dtype.element_ty
    at = tl.arange(0, dp)
    real = at < dim
    half: tl.constexpr = dim // 2
    of = (b * heads + h) * dim
    other = tl.where(at < half, at + half, at - half)
    k = tl.load(made + of + at, mask=real, other=0.0).to(wide)
    swapped = tl.load(made + of + other, mask=real & (other < dim), other=0.0).to(wide)
    if temperature is not None:
        norm = 1.0 / tl.sqrt(tl.sum(k * k, 0) / dim + eps)
        warmth = tl.load(temperature + h).to(wide)
        k = ((k * norm).to(narrow).to(wide) * warmth).to(narrow).to(wide)
        swapped = ((swapped * norm).to(narrow).to(wide) * warmth).to(narrow).to(wide)
    tl.store(scaled + of + at, k * scale, mask=real)
    if turn is not None:
        k = tl.reshape(_turned(k[None, :], swapped[None, :], turn + b * turn_b, at, dim), [dp])
    tl.store(key + of + at, k.to(narrow), mask=real)


@triton.jit(do_not_specialize=["batch"])
def prepare_ends(
    a, value, ends, value_b, value_g, a_b, a_h, batch, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    dp: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Lay out attention a over the columns before, and value - a, for the product with Omega_Q by head.

    Args:
        a: `[B, H, d]`.
        value: `[B, G, d]`.
        ends: `[H, 2 B, d]`, filled.
        wide: Type in which the way is taken.
    """
    b = tl.program_id(0).to(tl.int64)  # the dimension that has room for any batch
    h = tl.program_id(1)
    at = tl.arange(0, dp)
    real = at < dim
    start = tl.load(a + b * a_b + h * a_h + at, mask=real, other=0.0).to(wide)
    v = tl.load(value + b * value_b + (h // (heads // groups)) * value_g + at, mask=real, other=0.0).to(wide)
    into = ends + (h * 2 * batch + b) * dim + at
    tl.store(into, start.to(ends.dtype.element_ty), mask=real)
    tl.store(into + batch * dim, (v - start).to(ends.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["batch"])  # Triton makes a constant of 1, which has no `.to`
def settle_token(
    key, made, fixed, lse, a, value, turn, p, moved, query, held, y, judged, grams,
    fixed_b, value_b, value_g, a_b, a_h, turn_b, query_b, query_g, batch, rtol, atol,
    eps: tl.constexpr, normed: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    dp: tl.constexpr, hp: tl.constexpr,
):  # fmt: skip
    """Solve the equation of one token per sample.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, float32 or wider.
        made: Omega_Q applied to each head's a and to v - a, `[H, 2 B, G d]`.
        fixed: Part of the query that does not depend on y, `[1 or B, G d]`, or None.
        lse: The log-sum-exp of all other columns, `[B, H]`, in the dtype of `key`.
        a: Attention over them, `[B, H, d]`; this and the next two are read only with `y`.
        value: `[B, G, d]`.
        turn: Cosines and sines of each sample, `[1 or B, 2, d / 2]`, or None.
        p: `[B, H]`, filled with the weights on the own column, or None.
        moved: `[B, H]`, filled with their residuals, inf if no root was found; or None.
        query: `[B, G, d]`, filled with the query of the output, rotated; used with `y`.
        held: As `query`, filled with the values; or None.
        y: The output, `[B, H, d]`, filled, or None.
        judged: `[3, B]`, filled with the residual, the relative residual, and 1 if it is within tolerance, else 0.
        grams: Scratch, `[B, G, hp hp + hp + 1]`.
    """
    b = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = lse.dtype.element_ty
    shared: tl.constexpr = heads // groups
    half: tl.constexpr = dim // 2
    h = tl.arange(0, hp)
    at = tl.arange(0, dp)
    other = tl.where(at < half, at + half, at - half)
    real = h < heads
    within = at < dim
    every = real[:, None] & within[None, :]
    ends = made + (h.to(tl.int64) * 2 * batch + b)[:, None] * (groups * dim)
    ways = ends + batch.to(tl.int64) * groups * dim
    grams += b * groups * (hp * hp + hp + 1)
    alpha = tl.zeros([hp], wide)
    beta = tl.zeros([hp, hp], wide)
    for g in range(groups):
        base = tl.sum(tl.load(ends + g * dim + at[None, :], mask=every, other=0.0).to(wide), 0)
        if fixed is not None:
            base += tl.load(fixed + b * fixed_b + g * dim + at, mask=within, other=0.0).to(wide)
        way = tl.load(ways + g * dim + at[None, :], mask=every, other=0.0).to(wide)
        mine = (real & (h // shared == g))[:, None] & within[None, :]
        own_key = tl.load(key + (b * heads + h)[:, None] * dim + at[None, :], mask=mine, other=0.0)
        alpha, beta = add_group(alpha, beta, base, way, own_key, grams, g, 1.0, eps, normed, dim, hp)
    tl.debug_barrier()

    offset = -tl.load(lse + b * heads + h, mask=real, other=float("inf")).to(tl.float64)
    gram = None
    if normed:
        gram = grams
    alpha = alpha.to(tl.float64)
    beta = beta.to(tl.float64)
    root, solved = solve_row(alpha, beta, offset, gram, heads, groups, hp)
    target, _ = evaluate(alpha, beta, offset, gram, root, heads, groups, hp)
    off = tl.where(solved, tl.abs(target - root), float("inf")).to(wide)
    root = root.to(wide)
    if p is not None:
        tl.store(p + b * heads + h, root, mask=real)
        tl.store(moved + b * heads + h, off, mask=real)
    if y is not None:
        start = tl.load(a + b * a_b + (h * a_h)[:, None] + at[None, :], mask=every, other=0.0).to(wide)
        v = value + b * value_b + (h // shared * value_g)[:, None] + at[None, :]
        step = tl.load(v, mask=every, other=0.0).to(wide) - start
        out = start + root[:, None] * step
        tl.store(y + (b * heads + h)[:, None] * dim + at[None, :], out.to(y.dtype.element_ty), mask=every)
        size = tl.max(tl.max(tl.abs(out), 1), 0)
        residual = tl.max(tl.where(real, off * tl.max(tl.abs(step), 1), 0.0), 0)
        lost = tl.sum(tl.sum(tl.where(tl.abs(out) < float("inf"), 0, 1), 1), 0)
        fine = (residual <= atol + rtol * size) & (lost == 0) & (solved != 0)
        tl.store(judged + b, residual)
        tl.store(judged + batch + b, residual / tl.maximum(size, 1e-30))
        tl.store(judged + 2 * batch + b, tl.where(fine, 1.0, 0.0).to(wide))
        into = b * query_b  # 64 bits: a cache may hold more than 2^31 numbers
        for g in range(groups):
            q = tl.sum(tl.load(ends + g * dim + at[None, :], mask=every, other=0.0).to(wide), 0)
            q += tl.sum(root[:, None] * tl.load(ways + g * dim + at[None, :], mask=every, other=0.0).to(wide), 0)
            if fixed is not None:
                q += tl.load(fixed + b * fixed_b + g * dim + at, mask=within, other=0.0).to(wide)
            if normed:
                q = q / tl.sqrt(tl.sum(q * q, 0) / dim + eps)
            if turn is not None:
                halves = every & (other < dim)[None, :]
                swapped = tl.sum(tl.load(ends + g * dim + other[None, :], mask=halves, other=0.0).to(wide), 0)
                way = tl.load(ways + g * dim + other[None, :], mask=halves, other=0.0).to(wide)
                swapped += tl.sum(root[:, None] * way, 0)
                if fixed is not None:
                    at_other = fixed + b * fixed_b + g * dim + other
                    swapped += tl.load(at_other, mask=within & (other < dim), other=0.0).to(wide)
                if normed:
                    swapped = swapped / tl.sqrt(tl.sum(swapped * swapped, 0) / dim + eps)
                q = tl.reshape(_turned(q[None, :], swapped[None, :], turn + b * turn_b, at, dim), [dp])
            tl.store(query + into + at, q.to(query.dtype.element_ty), mask=within)
            if held is not None:
                tl.store(held + into + at, tl.load(value + b * value_b + g * value_g + at, mask=within), mask=within)
            into += query_g
