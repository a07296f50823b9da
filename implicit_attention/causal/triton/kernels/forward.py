"""The forward pass of one diagonal block in Triton, one program per sample. `causal/triton/README.md` derives it.

A program settles a block 16 rows at a time. It takes all heads of 16 rows together, since Omega_Q mixes the heads.
`work` is the program's scratch in global memory, which stays in the cache. Barriers separate the stores of one thread
from the loads of another.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.slow_rows import solve_rows
from implicit_attention.causal.triton.kernels.tiles import (
    ROWS,
    Constants,
    R,
    biases_from,
    columns_from,
    load_bias,
    load_key,
    load_own_bias,
    load_own_score,
    load_rows,
    load_scratch,
    load_value,
    query_map_from,
    store_rows,
    store_scratch,
    turned,
)

MOST_SWEEPS = tl.constexpr(32)  # then the 16 rows go to torch: twice the 16 sweeps that exact arithmetic needs
PATIENCE = tl.constexpr(8)  # as `diagonal.PATIENCE`


class Outputs(NamedTuple):
    """What is stored for the rows of a sample, which count from the block's first; see `settle_block`."""

    y: Any
    lse: Any
    query: Any
    inverse: Any
    residual: Any
    size: Any
    sweeps: Any
    before_y: Any
    before_lse: Any
    length: Any
    n: Any


class Scratch(NamedTuple):
    """A program's scratch. `weights` and `shares` have a half for the iterate and one for the next."""

    attended: Any  # [H, R, dp]: attention before the rows
    made_before: Any  # [G, H, R, dp]: Omega_Q applied to it, by head
    made_value: Any  # [G, H, R, dp]: Omega_Q applied to the rows' values
    swap: Any  # [R, dp]
    weights: Any  # [2, H, R, R]: of the rows on each other
    shares: Any  # [2, H, R]: of attention before
    merged: Any  # [H, R]: log-sum-exp before the rows
    start: Any  # [H, R]: scores of the own columns at y = v
    rests: Any  # [H, R]: log-sum-exp of all other columns
    totals: Any  # [H, R]: of all columns
    fractions: Any  # [H, R]: weight of all other columns
    factors: Any  # [H, R]: one over that
    grams: Any  # [G, hp hp + hp + 1]: quadratic forms of normed queries


class Iterate(NamedTuple):
    """An iterate, held as weights: `y = share a_0 + P V`."""

    weights: Any  # P, [H, R, R]
    shares: Any  # [H, R]


class Sweep(NamedTuple):
    """What a sweep finds out about its rows, `[R]` each."""

    error: Any  # max |F(y) - y|
    extent: Any  # max |F(y)|
    change: Any  # largest change of an own weight since y = v
    broken: Any  # number of outputs that are not finite


def scratch_size(heads: int, groups: int, dp: int, hp: int) -> int:
    """Return the elements of a program's scratch, in the order of `_layout`."""
    tiles = heads + 2 * groups * heads + 1
    return tiles * ROWS * dp + 2 * heads * ROWS * (ROWS + 1) + 6 * heads * ROWS + groups * (hp * hp + hp + 1)


@triton.jit
def _layout(work, constants):
    heads: tl.constexpr = constants.heads
    tile: tl.constexpr = R * constants.dp
    attended = work
    made_before = attended + heads * tile
    made_value = made_before + constants.groups * heads * tile
    swap = made_value + constants.groups * heads * tile
    weights = swap + tile
    shares = weights + 2 * heads * R * R
    merged = shares + 2 * heads * R
    start = merged + heads * R
    rests = start + heads * R
    totals = rests + heads * R
    fractions = totals + heads * R
    factors = fractions + heads * R
    grams = factors + heads * R
    return Scratch(
        attended, made_before, made_value, swap, weights, shares, merged, start, rests, totals, fractions, factors,
        grams,
    )  # fmt: skip


@triton.jit
def _attend_before(columns, biases, outputs, h, s, m, constants):
    """Merge attention over the block's columns before `s` into that of rows `s .. s + R` before the block.

    Returns:
        The attention `[R, dp]` and its log-sum-exp `[R]`.
    """
    wide: tl.constexpr = outputs.y.dtype.element_ty
    groups: tl.constexpr = constants.groups
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    precision: tl.constexpr = constants.precision
    rows = tl.arange(0, R)
    g = h // (constants.heads // groups)
    key = load_key(columns, h, s, m, constants).to(constants.operand)
    peak = tl.load(outputs.lse + h * outputs.length + s + rows, mask=rows < m, other=-float("inf"))
    before = load_rows(outputs.y + h * dim, constants.heads * dim, s, m, dim, dp)
    total = tl.where(peak == -float("inf"), 0.0, 1.0).to(wide)
    out = before * total[:, None]
    for j in range(0, s, R):
        column = load_rows(outputs.query + g * dim, groups * dim, j, R, dim, dp).to(constants.operand)
        scores = tl.dot(key, tl.trans(column), input_precision=precision).to(wide) * constants.scale
        if biases.strict is not None:
            scores += load_bias(biases, h, s, j, wide)
        top = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        shrink = tl.exp(tl.where(peak == -float("inf"), safe, peak) - safe)
        weights = tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = load_value(columns, g, j, R, constants).to(wide)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision=precision)
        peak = top
    seen = total > 0.0
    out = out / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, peak + tl.log(tl.where(seen, total, 1.0)), -float("inf"))


@triton.jit
def _apply_map(inputs, query_map, made, g, h, constants):
    """Apply Omega_Q to a head's rows `[R, dp]`, for one group's queries; store the result in the tile `made`."""
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    if query_map.weight is None:  # one head, whose key has absorbed Omega_Q
        store_scratch(made, inputs, dp)
    else:
        at = tl.arange(0, dp)
        inside = (at < dim)[:, None] & (at < dim)[None, :]
        omega = query_map.weight + (g * dim + at)[None, :].to(tl.int64) * query_map.weight_o + (h * dim + at)[:, None]
        omega = tl.load(omega, mask=inside, other=0.0).to(constants.operand)  # [d of y, d of q]
        out = tl.dot(inputs.to(constants.narrow).to(constants.operand), omega, input_precision=constants.precision)
        store_scratch(made, out.to(inputs.dtype), dp)


@triton.jit
def _fixed(query_map, first, m, g, wide: tl.constexpr, constants):
    """The part of a group's queries that does not depend on y, `[R, dp]`."""
    dim: tl.constexpr = constants.dim
    fixed = tl.zeros([R, constants.dp], wide)
    if query_map.constant is not None:
        at = tl.arange(0, constants.dp)
        fixed += tl.load(query_map.constant + g * dim + at, mask=at < dim, other=0.0).to(wide)[None, :]
    if query_map.added is not None:
        added = query_map.added + g * dim
        fixed += load_rows(added, constants.groups * dim, first, m, dim, constants.dp).to(wide)
    return fixed


@triton.jit
def _normed_and_turned(q, query_map, swap, first, m, constants):
    """A group's queries `[R, dp]`, normed and rotated, and the factor of the norm, `[R]`."""
    inverse = tl.full([R], 1.0, q.dtype)
    if constants.normed:
        inverse = 1.0 / tl.sqrt(tl.sum(q * q, 1) / constants.dim + constants.eps)
        q = q * inverse[:, None]
    if query_map.turn is not None:
        q = turned(q, query_map, swap, first, m, False, constants)
    return q, inverse


@triton.jit
def _own_scores(scores, biases, h, s, m):
    """Scores of the rows with their own columns, `[R]`, biases included; given, or the diagonal of `scores`."""
    rows = tl.arange(0, R)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)
    if biases.given is not None:
        own = load_own_score(biases, h, s, m, scores.dtype)
    return own


@triton.jit
def _iterate(scratch, parity, constants):
    """One half of the rows' weights."""
    heads: tl.constexpr = constants.heads
    return Iterate(scratch.weights + parity * heads * R * R, scratch.shares + parity * heads * R)


@triton.jit
def _begin(columns, biases, query_map, outputs, scratch, s, m, constants):
    """Stage 1: attention to earlier columns, Omega_Q applied to it and to the values, and the first iterate."""
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    dp: tl.constexpr = constants.dp
    tile: tl.constexpr = R * dp
    wide: tl.constexpr = outputs.y.dtype.element_ty
    rows = tl.arange(0, R)
    diagonal = rows[:, None] == rows[None, :]
    square = rows[:, None] * R + rows[None, :]
    for h in range(heads):
        out, before_now = _attend_before(columns, biases, outputs, h, s, m, constants)
        store_scratch(scratch.attended + h * tile, out, dp)
        tl.store(scratch.merged + h * R + rows, before_now)
    tl.debug_barrier()
    # The first iterate is y = a_0 (share 1, P = 0); a row that sees nothing before starts from its value.
    for h in range(heads):
        sees = tl.load(scratch.merged + h * R + rows) != -float("inf")
        tl.store(scratch.shares + h * R + rows, tl.where(sees, 1.0, 0.0).to(wide))
        alone = tl.where(diagonal & (sees == 0)[:, None], 1.0, 0.0).to(wide)
        tl.store(scratch.weights + h * R * R + square, alone)
        out = load_scratch(scratch.attended + h * tile, dp)
        v = load_value(columns, h // (heads // groups), s, m, constants).to(wide)
        for g in range(groups):
            into = (g * heads + h) * tile
            _apply_map(out, query_map, scratch.made_before + into, g, h, constants)
            _apply_map(v, query_map, scratch.made_value + into, g, h, constants)
    tl.debug_barrier()


@triton.jit
def _score_start(columns, biases, query_map, scratch, s, m, constants):
    """Store the scores of the own columns at y = v, where p is compared with the rows' later p."""
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    shared: tl.constexpr = heads // groups
    dp: tl.constexpr = constants.dp
    wide: tl.constexpr = scratch.start.dtype.element_ty
    rows = tl.arange(0, R)
    for g in range(groups):
        q = _fixed(query_map, s, m, g, wide, constants)
        for h in range(heads):
            q += load_scratch(scratch.made_value + (g * heads + h) * R * dp, dp)
        q, _ = _normed_and_turned(q, query_map, scratch.swap, s, m, constants)
        for h in range(g * shared, (g + 1) * shared):
            k = load_key(columns, h, s, m, constants).to(wide)
            own = tl.sum(k * q, 1) * constants.scale
            if biases.strict is not None:
                own += load_own_bias(biases, h, s, m, wide)
            tl.store(scratch.start + h * R + rows, own)
    tl.debug_barrier()


@triton.jit
def _make_queries(query_map, outputs, scratch, last, g, s, m, constants):
    """A group's queries of the iterate, `[R, dp]`, which are stored."""
    heads: tl.constexpr = constants.heads
    groups: tl.constexpr = constants.groups
    dp: tl.constexpr = constants.dp
    wide: tl.constexpr = outputs.y.dtype.element_ty
    rows = tl.arange(0, R)
    square = rows[:, None] * R + rows[None, :]
    q = _fixed(query_map, s, m, g, wide, constants)
    for h in range(heads):
        share = tl.load(last.shares + h * R + rows)
        p = tl.load(last.weights + h * R * R + square)
        into = (g * heads + h) * R * dp
        q += share[:, None] * load_scratch(scratch.made_before + into, dp)
        q += tl.dot(p, load_scratch(scratch.made_value + into, dp), input_precision=constants.precision)
    q, norm = _normed_and_turned(q, query_map, scratch.swap, s, m, constants)
    q = q.to(constants.narrow)
    store_rows(outputs.query + g * constants.dim, groups * constants.dim, s, m, q, constants.dim, dp)
    if outputs.inverse is not None:
        tl.store(outputs.inverse + (s + rows) * groups + g, norm, mask=rows < m)
    return q


@triton.jit
def _attend(q, v, columns, biases, scratch, last, new, found, h, s, m, constants):
    """Attention of a head's rows at queries `q`: their next weights are stored.

    Returns:
        `found`, with this head's part.
    """
    dp: tl.constexpr = constants.dp
    wide: tl.constexpr = v.dtype
    rows = tl.arange(0, R)
    diagonal = rows[:, None] == rows[None, :]
    square = rows[:, None] * R + rows[None, :]
    k = load_key(columns, h, s, m, constants).to(constants.operand)
    scores = (
        tl.dot(k, tl.trans(q.to(constants.operand)), input_precision=constants.precision).to(wide) * constants.scale
    )
    if biases.strict is not None:
        scores += load_bias(biases, h, s, s, wide)
    own = _own_scores(scores, biases, h, s, m)
    below = tl.where(rows[None, :] < rows[:, None], scores, -float("inf"))
    old = tl.load(scratch.merged + h * R + rows)
    first_own = own
    if biases.given is None:
        first_own = tl.load(scratch.start + h * R + rows)
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
    change = tl.maximum(found.change, moved)

    # The residual F(y) - y = (share' - share) a_0 + (P' - P) V, and the size of F(y).
    last_weights = tl.load(last.weights + h * R * R + square)
    last_share = tl.load(last.shares + h * R + rows)
    before = load_scratch(scratch.attended + h * R * dp, dp)
    delta = (share - last_share)[:, None] * before
    delta += tl.dot(p - last_weights, v, input_precision=constants.precision)
    out = share[:, None] * before + tl.dot(p, v, input_precision=constants.precision)
    error = tl.maximum(found.error, tl.max(tl.abs(delta), 1))
    extent = tl.maximum(found.extent, tl.max(tl.abs(out), 1))
    broken = found.broken + tl.sum(tl.where(tl.abs(out) < float("inf"), 0, 1), 1)

    tl.store(new.weights + h * R * R + square, p)
    tl.store(new.shares + h * R + rows, share)
    seen = rest > 0.0
    log_rest = tl.log(tl.where(seen, rest, 1.0)) + peak
    tl.store(scratch.rests + h * R + rows, tl.where(seen, log_rest, -float("inf")))
    tl.store(scratch.fractions + h * R + rows, rest * scaled)
    tl.store(scratch.factors + h * R + rows, tl.where(seen, total / tl.where(seen, rest, 1.0), 0.0))
    log_total = tl.log(tl.where(total > 0.0, total, 1.0)) + peak
    tl.store(scratch.totals + h * R + rows, tl.where(total > 0.0, log_total, -float("inf")))
    return Sweep(error, extent, change, broken)


@triton.jit
def _sweep(columns, biases, query_map, outputs, scratch, last, new, s, m, constants):
    """Stage 2: apply the map to the iterate `last`; its weights are `new`."""
    groups: tl.constexpr = constants.groups
    shared: tl.constexpr = constants.heads // groups
    wide: tl.constexpr = outputs.y.dtype.element_ty
    none = tl.zeros([R], wide)
    found = Sweep(none, none, none, tl.zeros([R], tl.int32))
    for g in range(groups):
        q = _make_queries(query_map, outputs, scratch, last, g, s, m, constants)
        v = load_value(columns, g, s, m, constants).to(wide)
        for h in range(g * shared, (g + 1) * shared):
            found = _attend(q, v, columns, biases, scratch, last, new, found, h, s, m, constants)
    tl.debug_barrier()
    return found


@triton.jit
def _store(columns, outputs, scratch, last, found, sweeps, s, m, constants):
    """Stage 4: store the iterate at which the map was evaluated. Residual, queries, log-sum-exp belong to it."""
    heads: tl.constexpr = constants.heads
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    wide: tl.constexpr = outputs.y.dtype.element_ty
    rows = tl.arange(0, R)
    real = rows < m
    square = rows[:, None] * R + rows[None, :]
    for h in range(heads):
        last_share = tl.load(last.shares + h * R + rows)
        weights = tl.load(last.weights + h * R * R + square)
        v = load_value(columns, h // (heads // constants.groups), s, m, constants).to(wide)
        out = last_share[:, None] * load_scratch(scratch.attended + h * R * dp, dp)
        out += tl.dot(weights, v, input_precision=constants.precision)
        old = load_rows(outputs.y + h * dim, heads * dim, s, m, dim, dp)
        old_lse = tl.load(outputs.lse + h * outputs.length + s + rows, mask=real, other=0.0)
        store_rows(outputs.before_y + h * dim, heads * dim, s, m, old, dim, dp)
        tl.store(outputs.before_lse + h * outputs.n + s + rows, old_lse, mask=real)
        tl.debug_barrier()
        store_rows(outputs.y + h * dim, heads * dim, s, m, out, dim, dp)
        total = tl.load(scratch.totals + h * R + rows)
        tl.store(outputs.lse + h * outputs.length + s + rows, total, mask=real)
    tl.store(outputs.residual + s + rows, found.error, mask=real)
    tl.store(outputs.size + s + rows, found.extent, mask=real)
    tl.store(outputs.sweeps + s + rows, tl.zeros([R], tl.int64) + sweeps, mask=real)
    tl.debug_barrier()


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
    constants: tl.constexpr = Constants(heads, groups, dim, dp, hp, scale, eps, normed, narrow, operand, precision)
    at = b * length + first  # the block's first row among all rows of all samples
    columns = columns_from(key, key_b, key_h, key_n, value, value_b, value_g, value_n, b, first)
    biases = biases_from(given, strict, strict_b, strict_h, b, first, n, heads, length)
    query_map = query_map_from(
        weight, weight_o, constant, added, turn, turn_b, turn_half, b, first, length, constants,
    )  # fmt: skip
    outputs = Outputs(
        y + at * heads * dim, lse + b * heads * length + first, query + at * groups * dim,
        None if inverse is None else inverse + at * groups, residual + at, size + at, sweeps + at,
        before_y + b * n * heads * dim, before_lse + b * heads * n, length, n,
    )  # fmt: skip
    scratch = _layout(work + b * slot, constants)
    rows = tl.arange(0, R)

    s = 0
    going = 1
    while (s < n) & (going == 1):
        m = tl.minimum(R, n - s)
        real = rows < m
        _begin(columns, biases, query_map, outputs, scratch, s, m, constants)
        if given is None:
            _score_start(columns, biases, query_map, scratch, s, m, constants)

        verdict = 0  # 1: settled; -1: to torch
        parity = 0
        slow = tl.zeros([R], tl.int32)
        none = tl.zeros([R], wide)
        error_before = tl.full([R], float("inf"), wide)
        found = Sweep(none, none, none, tl.zeros([R], tl.int32))
        sweep = 0
        while (sweep < MOST_SWEEPS) & (verdict == 0):
            new = _iterate(scratch, 1 - parity, constants)
            last = _iterate(scratch, parity, constants)
            found = _sweep(columns, biases, query_map, outputs, scratch, last, new, s, m, constants)
            error = tl.where(real, found.error, 0.0)
            outside = real & (error > atol + rtol * found.extent)
            if tl.sum(tl.where(real, found.broken, 0), 0) > 0:
                verdict = -1
            elif tl.sum(tl.where(outside, 1, 0), 0) == 0:
                verdict = 1
            slow = tl.where(outside & (sweep >= PATIENCE) & (error > slow_ratio * error_before), 1, slow)
            error_before = error

            if given is None:
                wanted = tl.where(outside, slow, 0)
                if (verdict == 1) | (sweep == 0):
                    wanted = tl.where(real & (found.change > far), 1, slow)
                if (verdict >= 0) & (tl.sum(wanted, 0) > 0):
                    result = solve_rows(
                        columns, biases, query_map, scratch, new, wanted, verdict, same_root, s, m, constants
                    )
                    if (verdict == 1) | (tl.sum(slow, 0) > 0):
                        verdict = tl.minimum(verdict, result)
            sweep += 1
            if verdict == 0:
                parity = 1 - parity

        if verdict == 1:
            _store(columns, outputs, scratch, _iterate(scratch, parity, constants), found, sweep, s, m, constants)
            s += R
        else:
            going = 0
    tl.store(status + b, tl.minimum(s, n).to(tl.int64))
