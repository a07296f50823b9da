"""The adjoint of one diagonal block in Triton, one program per sample. `causal/triton/README.md` derives it.

A program solves 16 rows at a time, from the last to the first. If sweeps contract too slowly, it solves the own columns
exactly. An own column has rank one per head (Sherman, Morrison and Woodbury).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.row_equation import eliminate
from implicit_attention.causal.triton.kernels.tiles import (
    ROWS,
    Constants,
    R,
    biases_from,
    columns_from,
    load_bias,
    load_key,
    load_own_score,
    load_rows,
    load_scratch,
    load_value,
    query_map_from,
    store_rows,
    store_scratch,
    turned,
)

# Three times the 16 corrections that exact arithmetic needs; then the block goes to torch.
MOST_SWEEPS = tl.constexpr(48)
STALLED = tl.constexpr(0.5)  # ratio of residuals, after 16 exact corrections, that shows that only rounding is left


class Equilibrium(NamedTuple):
    """The solution of a sample and what is asked of it. Its rows, like those below, count from the block's first."""

    y: Any  # [n, H, d]
    query: Any  # [n, G, d]
    inverse: Any  # factors of the norm [n, G], or None
    lse: Any  # [H, n], heads `length` apart
    grad: Any  # cotangent of y
    later: Any  # cotangent of the queries from rows after the block
    length: Any


class Cotangents(NamedTuple):
    """What is stored for the rows of a sample; see `solve_block`."""

    lam: Any
    d_made: Any
    d_key: Any
    d_value: Any
    own: Any
    suspect: Any
    gain: Any
    n: Any


class Scratch(NamedTuple):
    """A program's scratch."""

    from_later: Any  # [G, R, dp]: cotangents of the queries from later rows
    after: Any  # [G, R, dp]: of the linear map's output
    now: Any  # [H, R, dp]: lam
    out: Any  # [H, R, dp]: grad + J^T lam
    through: Any  # [H, R, dp]: gradients of the own scores by the linear map's output
    us: Any  # [H, R, dp]: u = p (v - y), derivative of the output by its own score
    ascent: Any  # [H, H, R, dp]: gradients of the own scores by outputs
    swap: Any  # [R, dp]
    pairs: Any  # [H, R, R]: weights of the rows on each other
    matrices: Any  # [R, hp, hp]: Jacobians of the own scores
    inverses: Any  # [R, hp, hp]
    right: Any  # [R, hp]


def scratch_size(heads: int, groups: int, dp: int, hp: int) -> int:
    """Return the elements of a program's scratch, in the order of `_layout`."""
    tiles = 2 * groups + 4 * heads + heads * heads + 1
    return tiles * ROWS * dp + heads * ROWS * ROWS + ROWS * hp * (2 * hp + 1)


@triton.jit
def _layout(work, constants):
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    hp: tl.constexpr = constants.hp
    tile: tl.constexpr = R * constants.dp
    from_later = work
    after = from_later + groups * tile
    now = after + groups * tile
    out = now + heads * tile
    through = out + heads * tile
    us = through + heads * tile
    ascent = us + heads * tile
    swap = ascent + heads * heads * tile
    pairs = swap + tile
    matrices = pairs + heads * R * R
    inverses = matrices + R * hp * hp
    right = inverses + R * hp * hp
    return Scratch(from_later, after, now, out, through, us, ascent, swap, pairs, matrices, inverses, right)


@triton.jit
def _before_map(d_query, query_map, at, swap, g, s, m, constants):
    """The cotangent of the linear map's output from that of a group's queries `[R, dp]`."""
    groups: tl.constexpr = constants.groups
    dim: tl.constexpr = constants.dim
    rows = tl.arange(0, R)
    if at.inverse is not None:
        q = load_rows(at.query + g * dim, groups * dim, s, m, dim, constants.dp).to(d_query.dtype)
        scale = tl.load(at.inverse + g + (s + rows) * groups, mask=rows < m, other=0.0)
        along = tl.sum(d_query * q, 1) / dim
        d_query = (d_query - q * along[:, None]) * scale[:, None]
    if query_map.turn is not None:
        d_query = turned(d_query, query_map, swap, s, m, True, constants)
    return d_query


@triton.jit
def _through_map(made, query_map, g, h, constants):
    """The cotangent of a head's outputs from that of a group's linear output, `[R, dp]` both: times Omega_Q."""
    dim: tl.constexpr = constants.dim
    if query_map.weight is None:
        out = made
    else:
        at = tl.arange(0, constants.dp)
        inside = (at < dim)[:, None] & (at < dim)[None, :]
        omega = query_map.weight + (g * dim + at)[:, None].to(tl.int64) * query_map.weight_o + (h * dim + at)[None, :]
        omega = tl.load(omega, mask=inside, other=0.0).to(constants.operand)  # [d of q, d of y]
        narrow = made.to(constants.narrow).to(constants.operand)
        out = tl.dot(narrow, omega, input_precision=constants.precision).to(made.dtype)
    return out


@triton.jit
def _seen(at, h, s, m):
    """The log-sum-exp of a head's rows `[R]`, 0 in rows that see no column."""
    rows = tl.arange(0, R)
    found = tl.load(at.lse + h * at.length + s + rows, mask=rows < m, other=0.0)
    return tl.where(found == -float("inf"), 0.0, found)


@triton.jit
def _slopes(lam, y, v, weights, precision: tl.constexpr):
    """The cotangent of scores `[R, R]`, from their weights, outputs `[R, dp]` and values `[R, dp]`."""
    along = tl.sum(lam * y, 1)
    return weights * (tl.dot(lam, tl.trans(v), input_precision=precision) - along[:, None])


@triton.jit
def _slopes_of_head(lam, v, biases, at, pairs, h, s, m, constants):
    """Of the 16 rows' scores on each other: weights, cotangents, and cotangents that reach queries and keys."""
    dim: tl.constexpr = constants.dim
    rows = tl.arange(0, R)
    known = load_rows(at.y + h * dim, constants.heads * dim, s, m, dim, constants.dp)
    p = tl.load(pairs + h * R * R + rows[:, None] * R + rows[None, :])
    slope = _slopes(lam, known, v, p, constants.precision)
    reaching = slope
    if biases.given is not None:
        reaching = tl.where(rows[:, None] == rows[None, :], 0.0, slope)
    return p, slope, reaching


@triton.jit
def _prepare_own(columns, query_map, at, scratch, s, m, constants):
    """The gradients `w` of own scores by the rows' outputs, and the own Jacobians `M_gh = w_gh . u_h`, `[R, H, H]`."""
    heads: tl.constexpr = constants.heads
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    hp: tl.constexpr = constants.hp
    wide: tl.constexpr = scratch.pairs.dtype.element_ty
    shared: tl.constexpr = heads // constants.groups
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    for h in range(heads):
        g = h // shared
        k = load_key(columns, h, s, m, constants).to(wide) * constants.scale
        k = _before_map(k, query_map, at, scratch.swap, g, s, m, constants)
        store_scratch(scratch.through + h * tile, k, dp)
        v = load_value(columns, g, s, m, constants).to(wide)
        out = load_rows(at.y + h * dim, heads * dim, s, m, dim, dp)
        p = tl.load(scratch.pairs + rows * (R + 1) + h * R * R)
        store_scratch(scratch.us + h * tile, p[:, None] * (v - out), dp)
    tl.debug_barrier()
    for of in range(heads):
        made = load_scratch(scratch.through + of * tile, dp)
        for into in range(heads):
            w = _through_map(made, query_map, of // shared, into, constants)
            store_scratch(scratch.ascent + (of * heads + into) * tile, w, dp)
            along = tl.sum(w * load_scratch(scratch.us + into * tile, dp), 1)
            tl.store(scratch.matrices + rows * (hp * hp) + (of * hp + into), along)
    tl.debug_barrier()


@triton.jit
def _invert_own(scratch, found, s, m, near_singular: tl.constexpr, constants):
    """Invert `I - M^T` of each row in float64; store M if one of its eigenvalues may be close to 1."""
    heads: tl.constexpr = constants.heads
    hp: tl.constexpr = constants.hp
    h = tl.arange(0, hp)
    real = (h < heads)[:, None] & (h < heads)[None, :]
    eye = tl.where(h[:, None] == h[None, :], 1.0, 0.0).to(tl.float64)
    for i in range(m):
        matrix = tl.load(scratch.matrices + i * (hp * hp) + h[:, None] * hp + h[None, :], mask=real, other=0.0)
        inverse, place = eliminate(eye - tl.trans(matrix).to(tl.float64), eye, heads, hp)
        inverse = tl.where((place >= 0)[:, None], inverse, 0.0)
        # An eigenvalue at distance e from 1 makes the norm of the inverse at least 1 / e.
        size = tl.sum(tl.sum(inverse * inverse, 1), 0) * (near_singular * near_singular)
        if (size < 1.0) == 0:
            tl.store(found.suspect + s + i, 1)
            gain = found.gain + (s + i) * heads * heads
            tl.store(gain + h[:, None] * heads + h[None, :], matrix, mask=real)
        into = scratch.inverses + i * (hp * hp) + place[:, None] * hp + h[None, :]
        tl.store(into, inverse.to(scratch.inverses.dtype.element_ty), mask=(place >= 0)[:, None])
    tl.debug_barrier()


@triton.jit
def _correct(scratch, m, constants):
    """`lam = F(lam) + sum_h z_h w_h` with `(I - M^T) z = u . (F(lam) - lam)`."""
    heads: tl.constexpr = constants.heads
    dp: tl.constexpr = constants.dp
    hp: tl.constexpr = constants.hp
    tile: tl.constexpr = R * dp
    rows = tl.arange(0, R)
    h = tl.arange(0, hp)
    for of in range(heads):
        off = load_scratch(scratch.out + of * tile, dp) - load_scratch(scratch.now + of * tile, dp)
        tl.store(scratch.right + rows * hp + of, tl.sum(off * load_scratch(scratch.us + of * tile, dp), 1))
    tl.debug_barrier()
    real = (rows < m)[:, None] & (h < heads)[None, :]
    residual = tl.load(scratch.right + rows[:, None] * hp + h[None, :], mask=real, other=0.0)
    for into in range(heads):
        lam = load_scratch(scratch.out + into * tile, dp)
        for of in range(heads):
            place = scratch.inverses + rows[:, None] * (hp * hp) + (of * hp + h)[None, :]
            z = tl.sum(tl.load(place, mask=real, other=0.0) * residual, 1)
            lam += z[:, None] * load_scratch(scratch.ascent + (of * heads + into) * tile, dp)
        store_scratch(scratch.now + into * tile, lam, dp)
    tl.debug_barrier()


@triton.jit
def _pull_later(columns, biases, at, found, scratch, s, m, constants):
    """Stage 1: cotangents from solved rows of the block, of these 16 queries and values and of the solved keys."""
    groups: tl.constexpr = constants.groups
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    operand: tl.constexpr = constants.operand
    precision: tl.constexpr = constants.precision
    wide: tl.constexpr = at.y.dtype.element_ty
    shared: tl.constexpr = constants.heads // groups
    for g in range(groups):
        total = load_rows(at.later + g * dim, groups * dim, s, m, dim, dp)
        q = load_rows(at.query + g * dim, groups * dim, s, m, dim, dp)
        v = load_value(columns, g, s, m, constants).to(wide)
        d_v = tl.zeros([R, dp], wide)
        for h in range(g * shared, (g + 1) * shared):
            for i in range(s + R, found.n, R):
                count = tl.minimum(R, found.n - i)
                k = load_key(columns, h, i, count, constants)
                scores = tl.dot(k.to(operand), tl.trans(q.to(operand)), input_precision=precision).to(wide)
                scores = scores * constants.scale
                if biases.strict is not None:
                    scores += load_bias(biases, h, i, s, wide)
                p = tl.exp(scores - _seen(at, h, i, count)[:, None])
                solved = load_rows(found.lam + h * dim, constants.heads * dim, i, count, dim, dp)
                known = load_rows(at.y + h * dim, constants.heads * dim, i, count, dim, dp)
                slope = _slopes(solved, known, v, p, precision)
                total += tl.dot(tl.trans(slope), k.to(wide), input_precision=precision) * constants.scale
                d_v += tl.dot(tl.trans(p), solved, input_precision=precision)
                into = found.d_key + h * found.n * dim
                d_k = load_rows(into, dim, i, count, dim, dp)
                d_k += tl.dot(slope, q.to(wide), input_precision=precision) * constants.scale
                tl.debug_barrier()
                store_rows(into, dim, i, count, d_k, dim, dp)
        store_scratch(scratch.from_later + g * R * dp, total, dp)
        store_rows(found.d_value + g * found.n * dim, dim, s, m, d_v, dim, dp)


@triton.jit
def _begin(columns, biases, at, scratch, s, m, constants):
    """Stage 2: the rows' weights on each other; lam starts from grad."""
    groups: tl.constexpr = constants.groups
    heads: tl.constexpr = constants.heads
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    operand: tl.constexpr = constants.operand
    wide: tl.constexpr = at.y.dtype.element_ty
    rows = tl.arange(0, R)
    for h in range(heads):
        k = load_key(columns, h, s, m, constants).to(operand)
        q = load_rows(at.query + (h // (heads // groups)) * dim, groups * dim, s, m, dim, dp).to(operand)
        scores = tl.dot(k, tl.trans(q), input_precision=constants.precision).to(wide) * constants.scale
        if biases.strict is not None:
            scores += load_bias(biases, h, s, s, wide)
        if biases.given is not None:
            known = load_own_score(biases, h, s, m, wide)
            scores = tl.where(rows[:, None] == rows[None, :], known[:, None], scores)
        visible = (rows[None, :] <= rows[:, None]) & (rows < m)[:, None]
        scores = tl.where(visible, scores - _seen(at, h, s, m)[:, None], -float("inf"))
        tl.store(scratch.pairs + h * R * R + rows[:, None] * R + rows[None, :], tl.exp(scores))
        start = load_rows(at.grad + h * dim, heads * dim, s, m, dim, dp).to(wide)
        store_scratch(scratch.now + h * R * dp, start, dp)
    tl.debug_barrier()


@triton.jit
def _sweep(columns, biases, query_map, at, scratch, s, m, constants):
    """Stage 3: `out = grad + J^T now`.

    Returns:
        The residual `max |out - now|`, and the number of entries that are not finite.
    """
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    shared: tl.constexpr = heads // groups
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    tile: tl.constexpr = R * dp
    precision: tl.constexpr = constants.precision
    wide: tl.constexpr = at.y.dtype.element_ty
    # dq + dS^T K of each group, back through norm and rotation.
    for g in range(groups):
        d_query = load_scratch(scratch.from_later + g * tile, dp)
        v = load_value(columns, g, s, m, constants).to(wide)
        for h in range(g * shared, (g + 1) * shared):
            lam = load_scratch(scratch.now + h * tile, dp)
            _, _, slope = _slopes_of_head(lam, v, biases, at, scratch.pairs, h, s, m, constants)
            k = load_key(columns, h, s, m, constants).to(wide)
            d_query += tl.dot(tl.trans(slope), k, input_precision=precision) * constants.scale
        d_query = _before_map(d_query, query_map, at, scratch.swap, g, s, m, constants)
        store_scratch(scratch.after + g * tile, d_query, dp)
    tl.debug_barrier()
    # Through Omega_Q.
    error = tl.zeros([], wide)
    broken = 0
    for h in range(heads):
        new = load_rows(at.grad + h * dim, heads * dim, s, m, dim, dp).to(wide)
        for g in range(groups):
            new += _through_map(load_scratch(scratch.after + g * tile, dp), query_map, g, h, constants)
        off = tl.abs(new - load_scratch(scratch.now + h * tile, dp))
        error = tl.maximum(error, tl.max(tl.max(off, 1), 0))
        broken += tl.sum(tl.sum(tl.where(off < float("inf"), 0, 1), 1), 0)
        store_scratch(scratch.out + h * tile, new, dp)
    tl.debug_barrier()
    return error, broken


@triton.jit
def _take(scratch, constants):
    """The next iterate without a correction: `now = out`."""
    dp: tl.constexpr = constants.dp
    for h in range(constants.heads):
        new = load_scratch(scratch.out + h * R * dp, dp)
        store_scratch(scratch.now + h * R * dp, new, dp)
    tl.debug_barrier()


@triton.jit
def _store(columns, biases, at, found, scratch, s, m, constants):
    """Stage 4: store the solution and its gradients."""
    groups: tl.constexpr = constants.groups
    shared: tl.constexpr = constants.heads // groups
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    precision: tl.constexpr = constants.precision
    wide: tl.constexpr = at.y.dtype.element_ty
    n = found.n
    rows = tl.arange(0, R)
    diagonal = rows[:, None] == rows[None, :]
    for g in range(groups):
        made = load_scratch(scratch.after + g * R * dp, dp)
        store_rows(found.d_made + g * dim, groups * dim, s, m, made, dim, dp)
        q = load_rows(at.query + g * dim, groups * dim, s, m, dim, dp).to(wide)
        v = load_value(columns, g, s, m, constants).to(wide)
        d_v = load_rows(found.d_value + g * n * dim, dim, s, m, dim, dp)
        for h in range(g * shared, (g + 1) * shared):
            solved = load_scratch(scratch.now + h * R * dp, dp)
            store_rows(found.lam + h * dim, constants.heads * dim, s, m, solved, dim, dp)
            p, slope, reaching = _slopes_of_head(solved, v, biases, at, scratch.pairs, h, s, m, constants)
            own = tl.sum(tl.where(diagonal, slope, 0.0), 1)
            tl.store(found.own + h * n + s + rows, own, mask=rows < m)
            d_k = tl.dot(reaching, q, input_precision=precision) * constants.scale
            store_rows(found.d_key + h * n * dim, dim, s, m, d_k, dim, dp)
            d_v += tl.dot(tl.trans(p), solved, input_precision=precision)
        tl.debug_barrier()
        store_rows(found.d_value + g * n * dim, dim, s, m, d_v, dim, dp)
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
    narrow: tl.constexpr = key.dtype.element_ty
    normed: tl.constexpr = inverse is not None
    constants: tl.constexpr = Constants(heads, groups, dim, dp, hp, scale, 0.0, normed, narrow, operand, precision)
    start = b * length + first  # the block's first row among all rows of all samples
    columns = columns_from(key, key_b, key_h, key_n, value, value_b, value_g, value_n, b, first)
    biases = biases_from(given, strict, strict_b, strict_h, b, first, n, heads, length)
    query_map = query_map_from(
        weight, weight_o, None, None, turn, turn_b, turn_half, b, first, length, constants,
    )  # fmt: skip
    at = Equilibrium(
        y + start * heads * dim, query + start * groups * dim, None if inverse is None else inverse + start * groups,
        lse + b * heads * length + first, grad + start * heads * dim, later + start * groups * dim, length,
    )  # fmt: skip
    found = Cotangents(
        lam + b * n * heads * dim, d_made + b * n * groups * dim, d_key + b * heads * n * dim,
        d_value + b * groups * n * dim, own + b * heads * n, suspect + b * n, gain + b * n * heads * heads, n,
    )  # fmt: skip
    scratch = _layout(work + b * slot, constants)
    limit = tl.load(allowed + b)

    s = (n - 1) // R * R
    going = 1
    worst = limit * 0.0
    most = 0
    while (s >= 0) & (going == 1):
        m = tl.minimum(R, n - s)
        _pull_later(columns, biases, at, found, scratch, s, m, constants)
        _begin(columns, biases, at, scratch, s, m, constants)

        state = 0  # 1: solved; -1: lost
        sweep = 0
        corrections = 0
        before = limit * 0.0 + float("inf")
        error = limit * 0.0
        while (sweep < MOST_SWEEPS) & (state == 0):
            sweep += 1
            error, broken = _sweep(columns, biases, query_map, at, scratch, s, m, constants)
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
                        _prepare_own(columns, query_map, at, scratch, s, m, constants)
                        _invert_own(scratch, found, s, m, near_singular, constants)
                        corrections = 1
                if given is None and corrections > 0:
                    corrections += 1
                    _correct(scratch, m, constants)
                else:
                    _take(scratch, constants)
            before = error

        if state == 1:
            worst = tl.maximum(worst, error)
            most = tl.maximum(most, sweep)
            _store(columns, biases, at, found, scratch, s, m, constants)
            s -= R
        else:
            going = 0
    tl.store(status + b, going)
    tl.store(residual + b, worst)
    tl.store(sweeps + b, most)
