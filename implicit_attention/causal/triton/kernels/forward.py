"""The forward pass of one diagonal block in Triton, one program per sample. `causal/triton/README.md` derives it.

A program settles a block 16 rows at a time. It takes all heads of 16 rows together, since Omega_Q mixes the heads.
`work` is the program's scratch in global memory, which stays in the cache. Barriers separate the stores of one thread
from the loads of another.
"""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.row_equation import add_group, solve_row
from implicit_attention.causal.triton.kernels.tiles import (
    ROWS,
    R,
    load_bias,
    load_rows,
    load_scratch,
    store_rows,
    store_scratch,
    turned,
)

MOST_SWEEPS = tl.constexpr(32)  # then the 16 rows go to torch: twice the 16 sweeps that exact arithmetic needs
PATIENCE = tl.constexpr(8)  # as `diagonal.PATIENCE`


def scratch_size(heads: int, groups: int, dp: int, hp: int) -> int:
    """Return the elements of a program's scratch, in the order of `settle_block`."""
    tiles = heads + 2 * groups * heads + 1
    return tiles * ROWS * dp + 2 * heads * ROWS * (ROWS + 1) + 6 * heads * ROWS + groups * (hp * hp + hp + 1)


@triton.jit
def _attend_before(
    key, query, value, value_n, strict, before, old, s, n,
    scale: tl.constexpr, query_n: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr,
    operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Merge attention over the block's columns before `s` into `before` of rows `s .. s + R`: `[R, dp]` and `[R]`."""
    wide: tl.constexpr = before.dtype
    peak = old
    total = tl.where(old == -float("inf"), 0.0, 1.0).to(wide)
    out = before * total[:, None]
    for j in range(0, s, R):
        column = load_rows(query, query_n, j, R, dim, dp).to(operand)
        scores = tl.dot(key, tl.trans(column), input_precision=precision).to(wide) * scale
        if strict is not None:
            scores += load_bias(strict, s, j, n, n, wide)
        top = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        shrink = tl.exp(tl.where(peak == -float("inf"), safe, peak) - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(value, value_n, j, R, dim, dp).to(wide)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision=precision)
        peak = top
    seen = total > 0.0
    out = out / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), -float("inf"))


@triton.jit
def _make(
    inputs, weight, weight_o, made, narrow: tl.constexpr, g, h,
    dim: tl.constexpr, dp: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Apply Omega_Q to a head's rows `[R, dp]`, for one group's queries; store the result in a tile of scratch."""
    if weight is None:  # one head, whose key has absorbed Omega_Q
        store_scratch(made, inputs, dp)
    else:
        at = tl.arange(0, dp)
        inside = (at < dim)[:, None] & (at < dim)[None, :]
        omega = weight + (g * dim + at)[None, :].to(tl.int64) * weight_o + (h * dim + at)[:, None]
        omega = tl.load(omega, mask=inside, other=0.0).to(operand)  # [d of y, d of q]
        out = tl.dot(inputs.to(narrow).to(operand), omega, input_precision=precision)
        store_scratch(made, out.to(inputs.dtype), dp)


@triton.jit
def _fixed(constant, added, first, m, g, wide: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr):
    """The part of a group's queries that does not depend on y, `[R, dp]`."""
    fixed = tl.zeros([R, dp], wide)
    if constant is not None:
        at = tl.arange(0, dp)
        fixed += tl.load(constant + g * dim + at, mask=at < dim, other=0.0).to(wide)[None, :]
    if added is not None:
        fixed += load_rows(added + g * dim, groups * dim, first, m, dim, dp).to(wide)
    return fixed


@triton.jit
def _normed_and_turned(
    q, turn, swap, turn_half, first, m, eps: tl.constexpr, normed: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr
):
    """A group's queries `[R, dp]`, normed and rotated, and the factor of the norm, `[R]`."""
    inverse = tl.full([R], 1.0, q.dtype)
    if normed:
        inverse = 1.0 / tl.sqrt(tl.sum(q * q, 1) / dim + eps)
        q = q * inverse[:, None]
    if turn is not None:
        q = turned(q, turn, swap, turn_half, first, m, False, dim, dp)
    return q, inverse


@triton.jit
def _own_scores(scores, given, strict, s, n):
    """Scores of the rows with their own columns, `[R]`, biases included; from `given`, or the diagonal of `scores`."""
    rows = tl.arange(0, R)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)
    if given is not None:
        own = tl.load(given + rows, mask=s + rows < n, other=0.0).to(scores.dtype)
        if strict is not None:
            own += tl.load(strict + (s + rows) * (n + 1), mask=s + rows < n, other=0.0).to(scores.dtype)
    return own


@triton.jit
def _row_problem(
    key, key_h, made_before, made_value, weights, shares, factors, constant, added, turn, turn_half, grams,
    i, scale: tl.constexpr, eps: tl.constexpr, normed: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr, hp: tl.constexpr,
):  # fmt: skip
    """The row equation of row i: scores of the query of `y = a + p (v - a)` with the row's key.

    `key`, `added` and `turn` point to the row. The quadratic forms of normed queries are stored in `grams`.

    Returns:
        alpha `[hp]` and beta `[hp, hp]`.
    """
    wide: tl.constexpr = made_before.dtype.element_ty
    h = tl.arange(0, hp)
    at = tl.arange(0, dp)
    columns = tl.arange(0, R)
    real = h < heads
    inside = real[:, None] & (at < dim)[None, :]
    share = tl.load(shares + h * R + i, mask=real, other=0.0) * tl.load(factors + h * R + i, mask=real, other=0.0)
    shared: tl.constexpr = heads // groups
    alpha = tl.zeros([hp], wide)
    beta = tl.zeros([hp, hp], wide)
    for g in range(groups):
        tiles = (g * heads + h)[:, None] * (R * dp) + at[None, :]
        others = share[:, None] * tl.load(made_before + tiles + i * dp, mask=real[:, None], other=0.0)
        for of in range(heads):
            made = load_scratch(made_value + (g * heads + of) * R * dp, dp)
            weight = tl.load(weights + i * R + of * R * R + columns)
            weight = tl.where(columns < i, weight, 0.0) * tl.load(factors + of * R + i)
            others += tl.where((h == of)[:, None], tl.sum(weight[:, None] * made, 0)[None, :], 0.0)
        base = tl.sum(others, 0)
        if constant is not None:
            base += tl.load(constant + g * dim + at, mask=at < dim, other=0.0).to(wide)
        if added is not None:
            base += tl.load(added + g * dim + at, mask=at < dim, other=0.0).to(wide)
        ways = tl.load(made_value + tiles + i * dp, mask=real[:, None], other=0.0) - others  # [hp, dp]
        mine = inside & (h // shared == g)[:, None]
        own_key = tl.load(key + h[:, None] * key_h + at[None, :], mask=mine, other=0.0).to(wide)
        if turn is not None:
            half: tl.constexpr = dim // 2
            partner = tl.where(at < half, at + half, at - half)
            other = tl.load(key + h[:, None] * key_h + partner[None, :], mask=mine, other=0.0).to(wide)
            angle = turn + tl.where(at < half, at, at - half)
            cos = tl.load(angle, mask=at < dim, other=0.0)
            sin = tl.load(angle + turn_half, mask=at < dim, other=0.0)
            own_key = own_key * cos[None, :] + other * (sin * tl.where(at < half, 1.0, -1.0))[None, :]
        alpha, beta = add_group(alpha, beta, base, ways, own_key, grams, g, scale, eps, normed, dim, hp)
    return alpha, beta


@triton.jit
def _own_root(
    alpha, beta, rests, fractions, strict, strict_h, grams, i, at_row, n,
    normed: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr,
):  # fmt: skip
    """The root of row i's row equation, `[hp]` in float64, and whether it was found."""
    h = tl.arange(0, hp)
    real = h < heads
    rest = tl.load(rests + h * R + i, mask=real, other=0.0).to(tl.float64)
    sees = tl.load(fractions + h * R + i, mask=real, other=1.0) != 0.0
    own = tl.zeros([hp], tl.float64)
    if strict is not None:
        own = tl.load(strict + h * strict_h + at_row * (n + 1), mask=real, other=0.0).to(tl.float64)
    blind = (own == -float("inf")) | (real == 0)
    finite = tl.where(blind, 0.0, own) - tl.where(sees, rest, 0.0)
    offset = tl.where(blind, -float("inf"), tl.where(sees, finite, float("inf")))
    gram = None
    if normed:
        gram = grams
    return solve_row(alpha.to(tl.float64), beta.to(tl.float64), offset, gram, heads, groups, hp)


@triton.jit
def _move(weights, shares, fractions, p, i, heads: tl.constexpr, hp: tl.constexpr):
    """Set the own weights of row i in the next iterate to `p` `[hp]`, and scale its other weights to match."""
    h = tl.arange(0, hp)
    columns = tl.arange(0, R)
    real = h < heads
    rest = tl.load(fractions + h * R + i, mask=real, other=0.0)
    moves = real & (rest != 0.0)
    factor = (1.0 - p).to(rest.dtype) / tl.where(moves, rest, 1.0)
    row = weights + h[:, None] * (R * R) + i * R + columns[None, :]
    old = tl.load(row, mask=moves[:, None], other=0.0)
    new = tl.where(columns[None, :] == i, p.to(rest.dtype)[:, None], old * factor[:, None])
    tl.store(row, new, mask=moves[:, None])
    share = tl.load(shares + h * R + i, mask=moves, other=0.0)
    tl.store(shares + h * R + i, share * factor, mask=moves)


@triton.jit
def _own_weights(weights, i, heads: tl.constexpr, hp: tl.constexpr):
    h = tl.arange(0, hp)
    return tl.load(weights + h * (R * R) + i * (R + 1), mask=h < heads, other=0.0)


@triton.jit(do_not_specialize=["first", "n", "rtol", "atol"])
def settle_block(
    key, value, weight, constant, added, turn, given, strict,
    y, lse, query, inverse, residual, size, sweeps, before_y, before_lse, status, work,
    key_b, key_h, key_n, value_b, value_g, value_n, weight_o, turn_b, turn_half, strict_b, strict_h,
    length, first, n, slot, rtol, atol, far, same_root, slow_ratio,
    eps: tl.constexpr, normed: tl.constexpr, scale: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr, hp: tl.constexpr,
    operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Settle rows `first .. first + n` of each sample, up to the first 16 with a row that goes to torch.

    A program takes 16 rows at a time through four stages:

    1. Attend to all columns before them: `a_0` and its log-sum-exp `l_0`. Apply Omega_Q to `a_0` and the values `V`.
    2. Sweep. An iterate is held as weights, `y = share a_0 + P V`. So sweeps need no other product with Omega_Q:
       `q = norm_and_rotate(share Omega_Q a_0 + P Omega_Q V + ...)`, `(share, P)' = softmax(l_0, K q^T)`.
    3. Solve the row equations of slow rows, `p = sigmoid(alpha + beta p - log-sum-exp of other columns)`; at the end
       also those of rows whose p is far from that at y = v, since they may be at another root.
    4. Store the rows. The next 16 rows attend to them.

    Args:
        key: `[B, H, N, d]`, rows contiguous.
        value: `[B, G, N, d]`, rows contiguous.
        weight: Omega_Q `[G d, H d]`, rows contiguous; None for one head whose key has absorbed it.
        constant: Bias of the query map `[G d]`, or None.
        added: Input of the query map, added to the linear map's output, `[B, N, G d]`, or None.
        turn: Cosines and sines `[2, 1 or B, N, d / 2]`, or None.
        given: Scores of the own columns `[B, H, N]`; None if they depend on the rows' own outputs.
        strict: Biases within the block `[1 or B, 1 or H, n, n]`, or None.
        y: `[B, N, H, d]`; attention over the columns before the block, replaced by the outputs.
        lse: `[B, H, N]`; its log-sum-exp, replaced by that of the whole row.
        query: `[B, N, G, d]`, filled with the queries of the outputs.
        inverse: `[B, N, G]`, filled with the factors of the norm; None without a norm.
        residual: `[B, N]`, filled with `max |F(y) - y|`.
        size: `[B, N]`, filled with `max |F(y)|`.
        sweeps: `[B, N]`, filled with the number of sweeps.
        before_y: `[B, n, H, d]`, filled with the old `y` of settled rows.
        before_lse: `[B, H, n]`, filled with the old `lse` of settled rows.
        status: `[B]`, filled with the first row that is not settled, counted in the block; n if all are settled.
        work: Scratch, `[B, slot]`.
        far: As `call.FAR`.
        same_root: As `diagonal.SAME_ROOT`.
        slow_ratio: As `diagonal.SLOW`.
    """
    b = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = y.dtype.element_ty
    narrow: tl.constexpr = query.dtype.element_ty
    shared: tl.constexpr = heads // groups
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    diagonal = rows[:, None] == rows[None, :]
    square = rows[:, None] * R + rows[None, :]

    attended = work + b * slot  # [H, R, dp]: attention before the rows
    made_before = attended + heads * tile  # [G, H, R, dp]: Omega_Q applied to it, by head
    made_value = made_before + groups * heads * tile  # [G, H, R, dp]: Omega_Q applied to the rows' values
    swap = made_value + groups * heads * tile  # [R, dp]
    weights = swap + tile  # [2, H, R, R]: of the rows on each other, at the iterate and at the next
    shares = weights + 2 * heads * R * R  # [2, H, R]: of attention before
    merged = shares + 2 * heads * R  # [H, R]: log-sum-exp before the rows
    start = merged + heads * R  # [H, R]: scores of the own columns at y = v
    rests = start + heads * R  # [H, R]: log-sum-exp of all other columns
    totals = rests + heads * R  # [H, R]: of all columns
    fractions = totals + heads * R  # [H, R]: weight of all other columns
    factors = fractions + heads * R  # [H, R]: one over that
    grams = factors + heads * R  # [G, hp hp + hp + 1]

    key += b * key_b + first.to(tl.int64) * key_n
    value += b * value_b + first.to(tl.int64) * value_n
    key_h = tl.cast(key_h, tl.int64)  # the heads of a sample may be more than 2^31 numbers apart
    value_g = tl.cast(value_g, tl.int64)
    y += (b * length + first) * heads * dim
    query += (b * length + first) * groups * dim
    lse += b * heads * length + first
    before_y += b * n * heads * dim
    before_lse += b * heads * n
    if added is not None:
        added += (b * length + first) * groups * dim
    if turn is not None:
        turn += b * turn_b + first * (dim // 2)
    if given is not None:
        given += b * heads * length + first
    if strict is not None:
        strict += b * strict_b

    s = 0
    going = 1
    while (s < n) & (going == 1):
        m = tl.minimum(R, n - s)
        real = rows < m

        # Stage 1: a_0 and l_0, and Omega_Q applied to a_0 and to the rows' values.
        for h in range(heads):
            g = h // shared
            k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(operand)
            old = tl.load(lse + h * length + s + rows, mask=real, other=-float("inf"))
            before = load_rows(y + h * dim, heads * dim, s, m, dim, dp)
            bias = strict
            if strict is not None:
                bias = strict + h * strict_h
            out, before_now = _attend_before(
                k, query + g * dim, value + g * value_g, value_n, bias, before, old, s, n,
                scale, groups * dim, dim, dp, operand, precision,
            )  # fmt: skip
            store_scratch(attended + h * tile, out, dp)
            tl.store(merged + h * R + rows, before_now)
        tl.debug_barrier()
        # The first iterate is y = a_0 (share 1, P = 0); a row that sees nothing before starts from its value.
        for h in range(heads):
            sees = tl.load(merged + h * R + rows) != -float("inf")
            tl.store(shares + h * R + rows, tl.where(sees, 1.0, 0.0).to(wide))
            alone = tl.where(diagonal & (sees == 0)[:, None], 1.0, 0.0).to(wide)
            tl.store(weights + h * R * R + square, alone)
            out = load_scratch(attended + h * tile, dp)
            v = load_rows(value + (h // shared) * value_g, value_n, s, m, dim, dp).to(wide)
            for g in range(groups):
                into = (g * heads + h) * tile
                _make(out, weight, weight_o, made_before + into, narrow, g, h, dim, dp, operand, precision)
                _make(v, weight, weight_o, made_value + into, narrow, g, h, dim, dp, operand, precision)
        tl.debug_barrier()

        # Scores of the own columns at the start y = v, where p is compared with the rows' later p.
        if given is None:
            for g in range(groups):
                q = _fixed(constant, added, s, m, g, wide, groups, dim, dp)
                for h in range(heads):
                    q += load_scratch(made_value + (g * heads + h) * tile, dp)
                q, _ = _normed_and_turned(q, turn, swap, turn_half, s, m, eps, normed, dim, dp)
                for h in range(g * shared, (g + 1) * shared):
                    k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(wide)
                    own = tl.sum(k * q, 1) * scale
                    if strict is not None:
                        at = strict + h * strict_h + (s + rows) * (n + 1)
                        own += tl.load(at, mask=real, other=0.0).to(wide)
                    tl.store(start + h * R + rows, own)
            tl.debug_barrier()

        # Stage 2: sweeps. Halves `parity` and `1 - parity` of `weights` and `shares` hold an iterate and the next one.
        verdict = 0  # 1: settled; -1: to torch
        parity = 0
        slow = tl.zeros([R], tl.int32)
        error_before = tl.full([R], float("inf"), wide)
        error = tl.zeros([R], wide)
        extent = tl.zeros([R], wide)
        sweep = 0
        while (sweep < MOST_SWEEPS) & (verdict == 0):
            last_weights = weights + parity * heads * R * R
            last_shares = shares + parity * heads * R
            new_weights = weights + (1 - parity) * heads * R * R
            new_shares = shares + (1 - parity) * heads * R
            error = tl.zeros([R], wide)
            extent = tl.zeros([R], wide)
            change = tl.zeros([R], wide)
            broken = tl.zeros([R], tl.int32)
            for g in range(groups):
                q = _fixed(constant, added, s, m, g, wide, groups, dim, dp)
                for h in range(heads):
                    share = tl.load(last_shares + h * R + rows)
                    p = tl.load(last_weights + h * R * R + square)
                    into = (g * heads + h) * tile
                    q += share[:, None] * load_scratch(made_before + into, dp)
                    q += tl.dot(p, load_scratch(made_value + into, dp), input_precision=precision)
                q, norm = _normed_and_turned(q, turn, swap, turn_half, s, m, eps, normed, dim, dp)
                q = q.to(narrow)
                store_rows(query + g * dim, groups * dim, s, m, q, dim, dp)
                if inverse is not None:
                    tl.store(inverse + (b * length + first + s + rows) * groups + g, norm, mask=real)
                v = load_rows(value + g * value_g, value_n, s, m, dim, dp).to(wide)
                for h in range(g * shared, (g + 1) * shared):
                    k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(operand)
                    scores = tl.dot(k, tl.trans(q.to(operand)), input_precision=precision).to(wide) * scale
                    bias = strict
                    if strict is not None:
                        bias = strict + h * strict_h
                        scores += load_bias(bias, s, s, n, n, wide)
                    known = given
                    if given is not None:
                        known = given + h * length + s
                    own = _own_scores(scores, known, bias, s, n)
                    below = tl.where(rows[None, :] < rows[:, None], scores, -float("inf"))
                    old = tl.load(merged + h * R + rows)
                    first_own = own
                    if given is None:
                        first_own = tl.load(start + h * R + rows)
                    # The softmax over l_0, `below` and `own`: share' and P', with the own weight on its diagonal.
                    peak = tl.maximum(tl.maximum(tl.max(below, 1), old), tl.maximum(own, first_own))
                    peak = tl.where(peak == -float("inf"), 0.0, peak)
                    p = tl.exp(below - peak[:, None])
                    share = tl.exp(old - peak)
                    own_part = tl.exp(own - peak)
                    rest = tl.sum(p, 1) + share
                    total = rest + own_part
                    scaled = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
                    p = tl.where(diagonal, own_part[:, None], p) * scaled[:, None]
                    share = share * scaled
                    first_part = tl.exp(first_own - peak)
                    at_start = first_part / tl.where(rest + first_part == 0.0, 1.0, rest + first_part)
                    moved = tl.where(own == -float("inf"), 0.0, tl.abs(at_start - own_part * scaled))
                    change = tl.maximum(change, moved)

                    # The residual F(y) - y = (share' - share) a_0 + (P' - P) V, and the size of F(y).
                    last = tl.load(last_weights + h * R * R + square)
                    last_share = tl.load(last_shares + h * R + rows)
                    before = load_scratch(attended + h * tile, dp)
                    delta = (share - last_share)[:, None] * before
                    delta += tl.dot(p - last, v, input_precision=precision)
                    out = share[:, None] * before + tl.dot(p, v, input_precision=precision)
                    error = tl.maximum(error, tl.max(tl.abs(delta), 1))
                    extent = tl.maximum(extent, tl.max(tl.abs(out), 1))
                    broken += tl.sum(tl.where(tl.abs(out) < float("inf"), 0, 1), 1)
                    tl.store(new_weights + h * R * R + square, p)
                    tl.store(new_shares + h * R + rows, share)
                    seen = rest > 0.0
                    log_rest = tl.log(tl.where(seen, rest, 1.0)) + peak
                    tl.store(rests + h * R + rows, tl.where(seen, log_rest, -float("inf")))
                    tl.store(fractions + h * R + rows, rest * scaled)
                    tl.store(factors + h * R + rows, tl.where(seen, total / tl.where(seen, rest, 1.0), 0.0))
                    log_total = tl.log(tl.where(total > 0.0, total, 1.0)) + peak
                    tl.store(totals + h * R + rows, tl.where(total > 0.0, log_total, -float("inf")))
            tl.debug_barrier()

            error = tl.where(real, error, 0.0)
            outside = real & (error > atol + rtol * extent)
            if tl.sum(tl.where(real, broken, 0), 0) > 0:
                verdict = -1
            elif tl.sum(tl.where(outside, 1, 0), 0) == 0:
                verdict = 1
            slow = tl.where(outside & (sweep >= PATIENCE) & (error > slow_ratio * error_before), 1, slow)
            error_before = error

            # Stage 3: row equations of slow rows, and of rows whose own weight is far from that at y = v.
            if given is None:
                wanted = tl.where(outside, slow, 0)
                if (verdict == 1) | (sweep == 0):
                    wanted = tl.where(real & (change > far), 1, slow)
                if (verdict >= 0) & (tl.sum(wanted, 0) > 0):
                    result = 1
                    for i in range(m):
                        here = tl.sum(tl.where(rows == i, wanted, 0), 0)
                        if here > 0:
                            row_added = added
                            if added is not None:
                                row_added = added + (s + i) * groups * dim
                            row_turn = turn
                            if turn is not None:
                                row_turn = turn + (s + i) * (dim // 2)
                            alpha, beta = _row_problem(
                                key + (s + i) * key_n, key_h, made_before, made_value, new_weights, new_shares,
                                factors, constant, row_added, row_turn, turn_half, grams, i, scale, eps, normed,
                                heads, groups, dim, dp, hp,
                            )  # fmt: skip
                            tl.debug_barrier()
                            p, solved = _own_root(
                                alpha, beta, rests, fractions, strict, strict_h, grams, i, s + i, n,
                                normed, heads, groups, hp,
                            )  # fmt: skip
                            own = _own_weights(new_weights, i, heads, hp)
                            off = tl.max(tl.abs(p.to(wide) - own), 0)
                            tl.debug_barrier()
                            if solved == 0:
                                result = -1
                            elif (verdict == 0) | (off > same_root):
                                _move(new_weights, new_shares, fractions, p, i, heads, hp)
                                if off > same_root:
                                    result = tl.minimum(result, 0)
                            tl.debug_barrier()
                    if (verdict == 1) | (tl.sum(slow, 0) > 0):
                        verdict = tl.minimum(verdict, result)
            sweep += 1
            if verdict == 0:
                parity = 1 - parity

        # Stage 4: store the iterate at which the map was evaluated. Residual, queries and log-sum-exp belong to it.
        if verdict == 1:
            for h in range(heads):
                last_share = tl.load(shares + (parity * heads + h) * R + rows)
                last = tl.load(weights + (parity * heads + h) * R * R + square)
                v = load_rows(value + (h // shared) * value_g, value_n, s, m, dim, dp).to(wide)
                out = last_share[:, None] * load_scratch(attended + h * tile, dp)
                out += tl.dot(last, v, input_precision=precision)
                old = load_rows(y + h * dim, heads * dim, s, m, dim, dp)
                old_lse = tl.load(lse + h * length + s + rows, mask=real, other=0.0)
                store_rows(before_y + h * dim, heads * dim, s, m, old, dim, dp)
                tl.store(before_lse + h * n + s + rows, old_lse, mask=real)
                tl.debug_barrier()
                store_rows(y + h * dim, heads * dim, s, m, out, dim, dp)
                tl.store(lse + h * length + s + rows, tl.load(totals + h * R + rows), mask=real)
            tl.store(residual + b * length + first + s + rows, error, mask=real)
            tl.store(size + b * length + first + s + rows, extent, mask=real)
            tl.store(sweeps + b * length + first + s + rows, tl.zeros([R], tl.int64) + sweep, mask=real)
            tl.debug_barrier()
            s += R
        else:
            going = 0
    tl.store(status + b, tl.minimum(s, n).to(tl.int64))
