"""The adjoint of one diagonal block in Triton, one program per sample. `causal/triton/README.md` derives it.

A program solves 16 rows at a time, from the last to the first. If sweeps contract too slowly, it solves the own columns
exactly. An own column has rank one per head (Sherman, Morrison and Woodbury).
"""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.row_equation import eliminate
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

MOST_SWEEPS = tl.constexpr(
    48
)  # then the block goes to torch: three times the 16 corrections that exact arithmetic needs
STALLED = tl.constexpr(0.5)  # ratio of residuals, after 16 exact corrections, that shows that only rounding is left


def scratch_size(heads: int, groups: int, dp: int, hp: int) -> int:
    """Return the elements of a program's scratch, in the order of `solve_block`."""
    tiles = 2 * groups + 4 * heads + heads * heads + 1
    return tiles * ROWS * dp + heads * ROWS * ROWS + ROWS * hp * (2 * hp + 1)


@triton.jit
def _before_map(
    d_query, query, inverse, groups: tl.constexpr, turn, swap, turn_half, s, m, dim: tl.constexpr, dp: tl.constexpr
):
    """The cotangent of the linear map's output from that of a group's queries `[R, dp]`."""
    rows = tl.arange(0, R)
    if inverse is not None:
        q = load_rows(query, groups * dim, s, m, dim, dp).to(d_query.dtype)
        scale = tl.load(inverse + (s + rows) * groups, mask=rows < m, other=0.0)
        along = tl.sum(d_query * q, 1) / dim
        d_query = (d_query - q * along[:, None]) * scale[:, None]
    if turn is not None:
        d_query = turned(d_query, turn, swap, turn_half, s, m, True, dim, dp)
    return d_query


@triton.jit
def _through_map(
    made, weight, weight_o, narrow: tl.constexpr, g, h,
    dim: tl.constexpr, dp: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The cotangent of a head's outputs from that of a group's linear output, `[R, dp]` both: times Omega_Q."""
    if weight is None:
        out = made
    else:
        at = tl.arange(0, dp)
        inside = (at < dim)[:, None] & (at < dim)[None, :]
        omega = weight + (g * dim + at)[:, None].to(tl.int64) * weight_o + (h * dim + at)[None, :]
        omega = tl.load(omega, mask=inside, other=0.0).to(operand)  # [d of q, d of y]
        out = tl.dot(made.to(narrow).to(operand), omega, input_precision=precision).to(made.dtype)
    return out


@triton.jit
def _seen(lse, s, m):
    """The rows' log-sum-exp `[R]`, 0 in rows that see no column."""
    rows = tl.arange(0, R)
    found = tl.load(lse + s + rows, mask=rows < m, other=0.0)
    return tl.where(found == -float("inf"), 0.0, found)


@triton.jit
def _slopes(lam, y, v, weights, precision: tl.constexpr):
    """The cotangent of scores `[R, R]`, from their weights, outputs `[R, dp]` and values `[R, dp]`."""
    along = tl.sum(lam * y, 1)
    return weights * (tl.dot(lam, tl.trans(v), input_precision=precision) - along[:, None])


@triton.jit
def _prepare_own(
    key, key_h, key_n, value, value_g, value_n, weight, weight_o, y, query, inverse, turn, turn_half, swap,
    pairs, through, us, ascent, matrices, s, m, scale: tl.constexpr, narrow: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr, hp: tl.constexpr,
    operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradients `w` of own scores by the rows' outputs, and the own Jacobians `M_gh = w_gh . u_h`, `[R, H, H]`."""
    wide: tl.constexpr = pairs.dtype.element_ty
    shared: tl.constexpr = heads // groups
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    for h in range(heads):
        g = h // shared
        k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(wide) * scale
        norm = inverse
        if inverse is not None:
            norm = inverse + g
        k = _before_map(k, query + g * dim, norm, groups, turn, swap, turn_half, s, m, dim, dp)
        store_scratch(through + h * tile, k, dp)
        v = load_rows(value + g * value_g, value_n, s, m, dim, dp).to(wide)
        out = load_rows(y + h * dim, heads * dim, s, m, dim, dp)
        p = tl.load(pairs + rows * (R + 1) + h * R * R)
        store_scratch(us + h * tile, p[:, None] * (v - out), dp)
    tl.debug_barrier()
    for of in range(heads):
        made = load_scratch(through + of * tile, dp)
        for into in range(heads):
            w = _through_map(made, weight, weight_o, narrow, of // shared, into, dim, dp, operand, precision)
            store_scratch(ascent + (of * heads + into) * tile, w, dp)
            along = tl.sum(w * load_scratch(us + into * tile, dp), 1)
            tl.store(matrices + rows * (hp * hp) + (of * hp + into), along)
    tl.debug_barrier()


@triton.jit
def _invert_own(
    matrices, inverses, suspect, gain, m, near_singular: tl.constexpr, heads: tl.constexpr, hp: tl.constexpr
):
    """Invert `I - M^T` of each row in float64; store M if one of its eigenvalues may be close to 1."""
    h = tl.arange(0, hp)
    real = (h < heads)[:, None] & (h < heads)[None, :]
    eye = tl.where(h[:, None] == h[None, :], 1.0, 0.0).to(tl.float64)
    for i in range(m):
        matrix = tl.load(matrices + i * (hp * hp) + h[:, None] * hp + h[None, :], mask=real, other=0.0)
        found, place = eliminate(eye - tl.trans(matrix).to(tl.float64), eye, heads, hp)
        found = tl.where((place >= 0)[:, None], found, 0.0)
        # An eigenvalue at distance e from 1 makes the norm of the inverse at least 1 / e.
        size = tl.sum(tl.sum(found * found, 1), 0) * (near_singular * near_singular)
        if (size < 1.0) == 0:
            tl.store(suspect + i, 1)
            tl.store(gain + (i * heads + h)[:, None] * heads + h[None, :], matrix, mask=real)
        at = inverses + i * (hp * hp) + place[:, None] * hp + h[None, :]
        tl.store(at, found.to(inverses.dtype.element_ty), mask=(place >= 0)[:, None])
    tl.debug_barrier()


@triton.jit
def _correct(now, out, us, ascent, inverses, right, m, heads: tl.constexpr, dp: tl.constexpr, hp: tl.constexpr):
    """`lam = F(lam) + sum_h z_h w_h` with `(I - M^T) z = u . (F(lam) - lam)`."""
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    h = tl.arange(0, hp)
    for of in range(heads):
        off = load_scratch(out + of * tile, dp) - load_scratch(now + of * tile, dp)
        tl.store(right + rows * hp + of, tl.sum(off * load_scratch(us + of * tile, dp), 1))
    tl.debug_barrier()
    real = (rows < m)[:, None] & (h < heads)[None, :]
    residual = tl.load(right + rows[:, None] * hp + h[None, :], mask=real, other=0.0)
    for into in range(heads):
        lam = load_scratch(out + into * tile, dp)
        for of in range(heads):
            at = inverses + rows[:, None] * (hp * hp) + (of * hp + h)[None, :]
            z = tl.sum(tl.load(at, mask=real, other=0.0) * residual, 1)
            lam += z[:, None] * load_scratch(ascent + (of * heads + into) * tile, dp)
        store_scratch(now + into * tile, lam, dp)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "n"])
def solve_block(
    key, value, weight, turn, given, strict, y, query, inverse, lse, grad, later, allowed,
    lam, d_made, d_key, d_value, own, residual, sweeps, suspect, gain, status, work,
    key_b, key_h, key_n, value_b, value_g, value_n, weight_o, turn_b, turn_half, strict_b, strict_h,
    length, first, n, slot,
    near_singular: tl.constexpr, scale: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr, hp: tl.constexpr,
    operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Solve `lam = grad + J^T lam` on rows `first .. first + n` of each sample.

    A program takes 16 rows at a time, from the last to the first, through four stages. With weights P, the cotangent
    of the scores is `dS = P * (lam V^T - lam . y)`.

    1. Pull back from the solved rows after them: `dq += dS^T K`, `dv += P^T lam`; and `dk += dS q` for those rows.
    2. Compute the 16 rows' weights on each other, `P = exp(scores - lse)`. Start from `lam = grad`.
    3. Sweep `lam <- grad + Omega_Q^T (norm and rotation)^T (dq + dS^T K)`. If that is too slow, solve own columns
       exactly in each sweep: with `u_h = p_h (v - y_h)` and `w_h` the gradient of the own score by y, a row's part of
       J is `sum_h u_h w_h^T`, so `lam = F(lam) + sum_h z_h w_h` with `(I - M^T) z = u . (F(lam) - lam)`, `M = w u^T`.
    4. Store lam and the gradients of the 16 rows: `dk`, `dv`, and the cotangent of Omega_Q's output.

    Args:
        key: As in `forward.settle_block`, like all arguments that are not listed.
        value: `[B, G, N, d]`.
        weight: `[G d, H d]` or None.
        turn: `[2, 1 or B, N, d / 2]` or None.
        given: `[B, H, N]` or None.
        strict: `[1 or B, 1 or H, n, n]` or None.
        y: The equilibrium, `[B, N, H, d]`.
        query: Its queries `[B, N, G, d]`.
        inverse: `[B, N, G]`, or None without a norm.
        lse: `[B, H, N]`.
        grad: Cotangent of the outputs, `[B, N, H, d]`.
        later: Cotangent of the queries from rows after the block, `[B, N, G, d]`.
        allowed: Tolerance, `[B]`.
        lam: `[B, n, H, d]`, filled with the solution.
        d_made: `[B, n, G d]`, filled with the cotangent of the linear map's output.
        d_key: `[B, H, n, d]`, filled, like all arguments from here on.
        d_value: `[B, G, n, d]`.
        own: Cotangent of the own scores, `[B, H, n]`.
        residual: Residual of the adjoint equation, `[B]`.
        sweeps: Number of sweeps, `[B]`.
        suspect: `[B, n]`, 1 in rows whose own Jacobian may have an eigenvalue close to 1.
        gain: `[B, n, H, H]`, their own Jacobians.
        status: `[B]`, 1 if the sample is solved.
        work: Scratch.
        near_singular: As `diagonal_adjoint.NEAR_SINGULAR`.
    """
    b = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = y.dtype.element_ty
    narrow: tl.constexpr = key.dtype.element_ty
    shared: tl.constexpr = heads // groups
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    diagonal = rows[:, None] == rows[None, :]
    square = rows[:, None] * R + rows[None, :]

    from_later = work + b * slot  # [G, R, dp]: cotangents of the queries from later rows
    after = from_later + groups * tile  # [G, R, dp]: of the linear map's output
    now = after + groups * tile  # [H, R, dp]: lam
    out = now + heads * tile  # [H, R, dp]: grad + J^T lam
    through = out + heads * tile  # [H, R, dp]: gradients of the own scores by the linear map's output
    us = through + heads * tile  # [H, R, dp]: u = p (v - y), derivative of the output by its own score
    ascent = us + heads * tile  # [H, H, R, dp]: gradients of the own scores by outputs
    swap = ascent + heads * heads * tile  # [R, dp]
    pairs = swap + tile  # [H, R, R]: weights of the rows on each other
    matrices = pairs + heads * R * R  # [R, hp, hp]
    inverses = matrices + R * hp * hp  # [R, hp, hp]
    right = inverses + R * hp * hp  # [R, hp]

    key += b * key_b + first.to(tl.int64) * key_n
    value += b * value_b + first.to(tl.int64) * value_n
    key_h = tl.cast(key_h, tl.int64)  # the heads of a sample may be more than 2^31 numbers apart
    value_g = tl.cast(value_g, tl.int64)
    y += (b * length + first) * heads * dim
    grad += (b * length + first) * heads * dim
    query += (b * length + first) * groups * dim
    later += (b * length + first) * groups * dim
    lse += b * heads * length + first
    lam += b * n * heads * dim
    d_made += b * n * groups * dim
    d_key += b * heads * n * dim
    d_value += b * groups * n * dim
    own += b * heads * n
    suspect += b * n
    gain += b * n * heads * heads
    if inverse is not None:
        inverse += (b * length + first) * groups
    if turn is not None:
        turn += b * turn_b + first * (dim // 2)
    if given is not None:
        given += b * heads * length + first
    if strict is not None:
        strict += b * strict_b
    limit = tl.load(allowed + b)

    s = (n - 1) // R * R
    going = 1
    worst = limit * 0.0
    most = 0
    while (s >= 0) & (going == 1):
        m = tl.minimum(R, n - s)
        real = rows < m

        # Stage 1: cotangents from solved rows of the block, of these 16 queries and values and of the solved keys.
        for g in range(groups):
            total = load_rows(later + g * dim, groups * dim, s, m, dim, dp)
            q = load_rows(query + g * dim, groups * dim, s, m, dim, dp)
            v = load_rows(value + g * value_g, value_n, s, m, dim, dp).to(wide)
            d_v = tl.zeros([R, dp], wide)
            for h in range(g * shared, (g + 1) * shared):
                for i in range(s + R, n, R):
                    count = tl.minimum(R, n - i)
                    k = load_rows(key + h * key_h, key_n, i, count, dim, dp)
                    scores = tl.dot(k.to(operand), tl.trans(q.to(operand)), input_precision=precision).to(wide) * scale
                    if strict is not None:
                        scores += load_bias(strict + h * strict_h, i, s, n, n, wide)
                    p = tl.exp(scores - _seen(lse + h * length, i, count)[:, None])
                    solved = load_rows(lam + h * dim, heads * dim, i, count, dim, dp)
                    known = load_rows(y + h * dim, heads * dim, i, count, dim, dp)
                    slope = _slopes(solved, known, v, p, precision)
                    total += tl.dot(tl.trans(slope), k.to(wide), input_precision=precision) * scale
                    d_v += tl.dot(tl.trans(p), solved, input_precision=precision)
                    d_k = load_rows(d_key + h * n * dim, dim, i, count, dim, dp)
                    d_k += tl.dot(slope, q.to(wide), input_precision=precision) * scale
                    tl.debug_barrier()
                    store_rows(d_key + h * n * dim, dim, i, count, d_k, dim, dp)
            store_scratch(from_later + g * tile, total, dp)
            store_rows(d_value + g * n * dim, dim, s, m, d_v, dim, dp)

        # Stage 2: the rows' weights on each other; lam starts from grad.
        for h in range(heads):
            g = h // shared
            k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(operand)
            q = load_rows(query + g * dim, groups * dim, s, m, dim, dp).to(operand)
            scores = tl.dot(k, tl.trans(q), input_precision=precision).to(wide) * scale
            if strict is not None:
                scores += load_bias(strict + h * strict_h, s, s, n, n, wide)
            if given is not None:
                known = tl.load(given + h * length + s + rows, mask=real, other=0.0).to(wide)
                if strict is not None:
                    at = strict + h * strict_h + (s + rows) * (n + 1)
                    known += tl.load(at, mask=real, other=0.0).to(wide)
                scores = tl.where(diagonal, known[:, None], scores)
            visible = (rows[None, :] <= rows[:, None]) & real[:, None]
            scores = tl.where(visible, scores - _seen(lse + h * length, s, m)[:, None], -float("inf"))
            tl.store(pairs + h * R * R + square, tl.exp(scores))
            start = load_rows(grad + h * dim, heads * dim, s, m, dim, dp).to(wide)
            store_scratch(now + h * tile, start, dp)
        tl.debug_barrier()

        # Stage 3: sweeps.
        state = 0  # 1: solved; -1: lost
        sweep = 0
        corrections = 0
        before = limit * 0.0 + float("inf")
        error = limit * 0.0
        while (sweep < MOST_SWEEPS) & (state == 0):
            sweep += 1
            # dq + dS^T K of each group, back through norm and rotation.
            for g in range(groups):
                d_query = load_scratch(from_later + g * tile, dp)
                v = load_rows(value + g * value_g, value_n, s, m, dim, dp).to(wide)
                for h in range(g * shared, (g + 1) * shared):
                    known = load_rows(y + h * dim, heads * dim, s, m, dim, dp)
                    p = tl.load(pairs + h * R * R + square)
                    slope = _slopes(load_scratch(now + h * tile, dp), known, v, p, precision)
                    if given is not None:
                        slope = tl.where(diagonal, 0.0, slope)
                    k = load_rows(key + h * key_h, key_n, s, m, dim, dp).to(wide)
                    d_query += tl.dot(tl.trans(slope), k, input_precision=precision) * scale
                norm = inverse
                if inverse is not None:
                    norm = inverse + g
                d_query = _before_map(d_query, query + g * dim, norm, groups, turn, swap, turn_half, s, m, dim, dp)
                store_scratch(after + g * tile, d_query, dp)
            tl.debug_barrier()
            # out = grad + Omega_Q^T of that; the residual is the largest |out - lam|.
            error = limit * 0.0
            broken = 0
            for h in range(heads):
                new = load_rows(grad + h * dim, heads * dim, s, m, dim, dp).to(wide)
                for g in range(groups):
                    made = load_scratch(after + g * tile, dp)
                    new += _through_map(made, weight, weight_o, narrow, g, h, dim, dp, operand, precision)
                off = tl.abs(new - load_scratch(now + h * tile, dp))
                error = tl.maximum(error, tl.max(tl.max(off, 1), 0))
                broken += tl.sum(tl.sum(tl.where(off < float("inf"), 0, 1), 1), 0)
                store_scratch(out + h * tile, new, dp)
            tl.debug_barrier()
            if broken > 0:
                state = -1
            elif error <= limit:
                state = 1
            elif (corrections > R) & (error >= before * STALLED):
                state = 1  # only rounding is left, and the returned residual says how much
            else:
                if given is None:
                    # Four sweeps at this pace would not do, and own columns cost about four sweeps: solve for them.
                    pace = error / before
                    if (corrections == 0) & (sweep > 1) & (pace * pace * pace * pace * error > limit):
                        _prepare_own(
                            key, key_h, key_n, value, value_g, value_n, weight, weight_o, y, query, inverse, turn,
                            turn_half, swap, pairs, through, us, ascent, matrices, s, m, scale, narrow,
                            heads, groups, dim, dp, hp, operand, precision,
                        )  # fmt: skip
                        _invert_own(
                            matrices, inverses, suspect + s, gain + s * heads * heads, m, near_singular, heads, hp
                        )
                        corrections = 1
                if given is None and corrections > 0:
                    corrections += 1
                    _correct(now, out, us, ascent, inverses, right, m, heads, dp, hp)
                else:
                    for h in range(heads):
                        new = load_scratch(out + h * tile, dp)
                        store_scratch(now + h * tile, new, dp)
                    tl.debug_barrier()
            before = error

        # Stage 4: store the solution and its gradients.
        if state == 1:
            worst = tl.maximum(worst, error)
            most = tl.maximum(most, sweep)
            for g in range(groups):
                made = load_scratch(after + g * tile, dp)
                store_rows(d_made + g * dim, groups * dim, s, m, made, dim, dp)
                q = load_rows(query + g * dim, groups * dim, s, m, dim, dp).to(wide)
                v = load_rows(value + g * value_g, value_n, s, m, dim, dp).to(wide)
                d_v = load_rows(d_value + g * n * dim, dim, s, m, dim, dp)
                for h in range(g * shared, (g + 1) * shared):
                    solved = load_scratch(now + h * tile, dp)
                    store_rows(lam + h * dim, heads * dim, s, m, solved, dim, dp)
                    known = load_rows(y + h * dim, heads * dim, s, m, dim, dp)
                    p = tl.load(pairs + h * R * R + square)
                    slope = _slopes(solved, known, v, p, precision)
                    tl.store(own + h * n + s + rows, tl.sum(tl.where(diagonal, slope, 0.0), 1), mask=real)
                    if given is not None:
                        slope = tl.where(diagonal, 0.0, slope)
                    d_k = tl.dot(slope, q, input_precision=precision) * scale
                    store_rows(d_key + h * n * dim, dim, s, m, d_k, dim, dp)
                    d_v += tl.dot(tl.trans(p), solved, input_precision=precision)
                tl.debug_barrier()
                store_rows(d_value + g * n * dim, dim, s, m, d_v, dim, dp)
            tl.debug_barrier()
            s -= R
        else:
            going = 0
    tl.store(status + b, going)
    tl.store(residual + b, worst)
    tl.store(sweeps + b, most)
