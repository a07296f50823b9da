"""Sweeps over a block of many rows in Triton, each on the whole device. `causal/triton/README.md` says why.

A sweep is two launches: queries from outputs, then attention within the block, merged with attention before the block.
The device decides whether a sample goes on: programs of a settled sample return at once.
"""

import triton
import triton.language as tl

from implicit_attention.equilibrium.residual_kernel import bits

SPAN = tl.constexpr(512)  # residuals that are read together
LOG2_E = tl.constexpr(1.4426950408889634)  # scores times this are exponents of 2: exp2 is one instruction, exp is not
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def settled(found, sweep, b, batch, n, rtol, atol, wide: tl.constexpr, larger: tl.constexpr = False):
    """Whether all rows of a sample were within tolerance at a sweep; false before the first sweep.

    Args:
        found: Bits of residuals and of sizes, `[sweeps, 2, B, n]`; zeros in sweeps that were not done.
        sweep: The sweep.
        b: The sample.
        wide: Type of what the bits are of.
        larger: Whether the tolerance is the larger of `atol` and `rtol size` instead of their sum.

    Returns:
        True or false. A settled sample is not swept again and leaves zeros, so it stays settled.
    """
    outside = 1
    if sweep >= 0:
        outside = 0
        residuals = found + (2 * sweep * batch + b) * n
        for i in range(0, n, SPAN):
            at = i + tl.arange(0, SPAN)
            off = tl.load(residuals + at, mask=at < n, other=0).to(wide, bitcast=True)
            size = tl.load(residuals + batch * n + at, mask=at < n, other=0).to(wide, bitcast=True)
            allowed = atol + rtol * size
            if larger:
                allowed = tl.maximum(atol, rtol * size)
            outside += tl.sum(tl.where((off <= allowed) & (off < float("inf")), 0, 1), 0)  # NaN is not within
    return outside == 0


@triton.jit
def rotated(q, turn, turn_half, place, mask, back: tl.constexpr, span: tl.constexpr, half: tl.constexpr):
    """Rotate queries `[rows, span, 2 half]` by the angles of the positions `place`, or back."""
    rows_: tl.constexpr = q.shape[0]
    low, high = tl.split(tl.permute(tl.reshape(q, [rows_, span, 2, half]), (0, 1, 3, 2)))
    angle = turn + (place * half)[:, None] + tl.arange(0, half)[None, :]
    cos = tl.load(angle, mask=mask[:, None], other=0.0)[:, None, :]
    sin = tl.load(angle + turn_half, mask=mask[:, None], other=0.0)[:, None, :]
    if back:
        sin = -sin
    both = tl.join(low * cos - high * sin, high * cos + low * sin)
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [rows_, span, 2 * half])


@triton.jit(do_not_specialize=["n", "length"])
def begin_rows(
    y, lse, value, state, narrow, value_b, value_g, value_n, length, where, n,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, rows_: tl.constexpr,
):  # fmt: skip
    """Start from attention before the block, or from the values in rows without a column before the block.

    Args:
        y: Attention to the columns before the block, `[B, N, H, d]`.
        lse: Its log-sum-exp, `[B, H, N]`.
        value: `[B, G, N, d]`, rows contiguous.
        state: `[2, B, n, H, d]`; the first is filled.
        narrow: `[B, n, H, d]`, filled with the same in the type of the inputs.
    """
    first = tl.load(where)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    place = (first + rows).to(tl.int64)
    at = tl.arange(0, dim)
    real = (rows < n)[:, None]
    seen = tl.load(lse + (b * heads + h) * length + place, mask=rows < n, other=0.0) != -float("inf")
    before = tl.load(y + ((b * length + place)[:, None] * heads + h) * dim + at[None, :], mask=real, other=0.0)
    own = value + b * value_b + (h // (heads // groups)) * value_g + place[:, None] * value_n + at[None, :]
    start = tl.where(seen[:, None], before, tl.load(own, mask=real, other=0.0).to(before.dtype))
    into = ((b * n + rows)[:, None] * heads + h) * dim + at[None, :]
    tl.store(state + into, start, mask=real)
    tl.store(narrow + into, start.to(narrow.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["n", "length", "batch", "sweep"])
def make_queries(
    source, weight, bias, added, turn, key, query, inverse, start, found,
    source_b, source_g, source_n, weight_o, turn_b, turn_half, key_b, key_h, key_n,
    batch, length, where, n, sweep, rtol, atol, eps,
    scale: tl.constexpr, normed: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    span: tl.constexpr, rows_: tl.constexpr, depth: tl.constexpr,
    wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The queries of the block's rows; or, if `start` is given, the scores of their own columns at y = v.

    Args:
        source: The outputs, `[B, n, H, d]`, or with `start` the values `[B, G, N, d]`, in the type of the inputs.
        weight: Omega_Q, `[G d, H d]`, rows contiguous.
        bias: `[G d]` or None.
        added: `[B, N, G d]` or None.
        turn: Cosines and sines, `[2, 1 or B, N, d / 2]`, or None.
        key: `[B, H, N, d]`, rows contiguous; read with `start` alone.
        query: `[B, N, G, d]`, filled unless `start`.
        inverse: Inverse root mean square before the norm, `[B, N, G]`, filled unless `start`; or None.
        start: `[B, H, N]`, filled; or None.
        found: As in `settled`; read unless `start`.
        span: Groups of a program.
        depth: Numbers of a row that one product takes, a power of two.
    """
    first = tl.load(where)
    b = tl.program_id(2).to(tl.int64)
    if start is None and settled(found, sweep - 1, b, batch, n, rtol, atol, wide):
        return
    narrow: tl.constexpr = query.dtype.element_ty
    shared: tl.constexpr = heads // groups
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    real = rows < n
    place = (first + rows).to(tl.int64)
    out = tl.program_id(1) * (span * dim) + tl.arange(0, span * dim)
    known = out < groups * dim
    q = tl.zeros([rows_, span * dim], wide)
    for c in range(0, heads * dim, depth):
        into = c + tl.arange(0, depth)
        within = into < heads * dim
        if start is None:
            at = source + ((b * n + rows) * (heads * dim))[:, None] + into[None, :]
        else:
            of = (into // dim // shared).to(tl.int64) * source_g + into % dim
            at = source + b * source_b + (place * source_n)[:, None] + of[None, :]
        u = tl.load(at, mask=real[:, None] & within[None, :], other=0.0).to(operand)
        omega = weight + (out.to(tl.int64) * weight_o)[:, None] + into[None, :]
        omega = tl.load(omega, mask=known[:, None] & within[None, :], other=0.0).to(operand)
        q += tl.dot(u, tl.trans(omega), input_precision=precision).to(wide)
    if bias is not None:
        q += tl.load(bias + out, mask=known, other=0.0).to(wide)[None, :]
    if added is not None:
        at = added + ((b * length + place) * (groups * dim))[:, None] + out[None, :]
        q += tl.load(at, mask=real[:, None] & known[None, :], other=0.0).to(wide)
    q = tl.reshape(q, [rows_, span, dim])
    group = tl.program_id(1) * span + tl.arange(0, span)
    of = real[:, None] & (group < groups)[None, :]
    if normed:
        norm = 1.0 / tl.sqrt(tl.sum(q * q, 2) / dim + eps)
        q = q * norm[:, :, None]
        if start is None:
            tl.store(inverse + ((b * length + place) * groups)[:, None] + group[None, :], norm, mask=of)
    if turn is not None:
        q = rotated(q, turn + b * turn_b, turn_half, place, real, False, span, dim // 2)
    if start is None:
        at = query + ((b * length + place) * (groups * dim))[:, None] + out[None, :]
        q = tl.reshape(q, [rows_, span * dim]).to(narrow)
        tl.store(at, q, mask=real[:, None] & known[None, :])
    else:
        q = q.to(narrow).to(wide)
        at = tl.arange(0, dim)
        for s in range(shared):
            head = (group * shared + s).to(tl.int64)
            k = key + b * key_b + (place * key_n)[:, None, None] + (head * key_h)[None, :, None] + at[None, None, :]
            own = tl.sum(tl.load(k, mask=of[:, :, None], other=0.0).to(wide) * q, 2) * scale
            tl.store(start + ((b * heads + head) * length)[None, :] + place[:, None], own, mask=of)


@triton.jit
def _attend_tile(
    k, queries, values, strict, out, total, peak, rows, columns, value_n, n, edge: tl.constexpr,
    groups: tl.constexpr, dim: tl.constexpr, scale: tl.constexpr, to: tl.constexpr, operand: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Attend to one more tile of columns, on the diagonal if `edge` (a row sees earlier columns); `peak` is base 2."""
    wide: tl.constexpr = out.dtype
    real = (columns < n)[:, None]
    at = tl.arange(0, dim)
    q = tl.load(queries + (columns * (groups * dim))[:, None] + at[None, :], mask=real, other=0.0).to(operand)
    v = tl.load(values + (columns * value_n)[:, None] + at[None, :], mask=real, other=0.0).to(operand)
    scores = tl.dot(k, tl.trans(q), input_precision=precision).to(wide) * (scale * LOG2_E)
    if strict is not None:
        pairs = (rows < n)[:, None] & (columns < n)[None, :]
        scores += tl.load(strict + rows[:, None] * n + columns[None, :], mask=pairs, other=0.0) * LOG2_E
    if edge:
        scores = tl.where(columns[None, :] < rows[:, None], scores, -float("inf"))
    top = tl.maximum(peak, tl.max(scores, 1))
    safe = top
    if edge or strict is not None:
        safe = tl.where(top == -float("inf"), 0.0, top)
    shrink = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + tl.dot(weights.to(to).to(operand), v, input_precision=precision).to(wide)
    return out, total, top


@triton.jit(do_not_specialize=["n", "length", "batch", "sweep"])
def attend_rows(
    key, value, query, given, strict, start, before, before_lse, state, narrow, lse, found, far,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h,
    batch, length, where, n, sweep, rtol, atol, too_far,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The map at the block's iterate: attention within the block, merged with attention before the block.

    Args:
        key: `[B, H, N, d]`, rows contiguous.
        value: `[B, G, N, d]`, likewise.
        query: `[B, N, G, d]`.
        given: Scores of the own columns where they do not depend on the outputs, `[B, H, N]`; or None.
        strict: Biases, `[1 or B, 1 or H, n, n]`, or None.
        start: Scores of the own columns at y = v, without biases, `[B, H, N]`; None where they are given.
        before: Attention to the columns before the block, `[B, N, H, d]`.
        before_lse: Its log-sum-exp, `[B, H, N]`.
        state: The iterate and the next, which is filled, `[2, B, n, H, d]`.
        narrow: The next in the type of the inputs, `[B, n, H, d]`, filled.
        lse: Log-sum-exp of all columns, `[B, H, n]`, filled.
        found: As in `settled`; this sweep's entries are raised.
        far: `[sweeps, B, n]`, zeros; set to 1 if an own weight is further than `too_far` from that at y = v.
        too_far: As `call.FAR`.
        rows_: Rows of a program, a multiple of `columns_`.
        columns_: Columns of a tile.
    """
    first = tl.load(where).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if settled(found, sweep - 1, b, batch, n, rtol, atol, wide):
        return
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest programs first, so that short ones fill the end
    h = tl.program_id(1).to(tl.int64)
    g = h // (heads // groups)
    to: tl.constexpr = narrow.dtype.element_ty
    rows = tile * rows_ + tl.arange(0, rows_)
    real = rows < n
    at = tl.arange(0, dim)[None, :]
    inside = real[:, None]
    queries = query + ((b * length + first) * groups + g) * dim
    values = value + b * value_b + g * value_g + first * value_n
    by_head = (b * heads + h) * length + first
    k = key + b * key_b + h * key_h + first * key_n
    k = tl.load(k + (rows * key_n)[:, None] + at, mask=inside, other=0.0).to(operand)
    # The own column separately, in full precision: it decides the root of the row.
    if given is None:
        own = tl.load(queries + (rows * (groups * dim))[:, None] + at, mask=inside, other=0.0)
        own = tl.sum(own.to(wide) * k.to(wide), 1) * (scale * LOG2_E)
    else:
        own = tl.load(given + by_head + rows, mask=real, other=0.0).to(wide) * LOG2_E
    own_bias = own * 0.0
    if strict is not None:
        strict += b * strict_b + h * strict_h
        own_bias = tl.load(strict + rows * (n + 1), mask=real, other=0.0) * LOG2_E
    own += own_bias
    peak = tl.load(before_lse + by_head + rows, mask=real, other=-float("inf")) * LOG2_E
    out = before + ((b * length + first) * heads + h) * dim
    out = tl.load(out + (rows * (heads * dim))[:, None] + at, mask=inside, other=0.0)
    total = tl.where(peak == -float("inf"), 0.0, 1.0).to(wide)
    out = out * total[:, None]

    for edge in tl.static_range(2):  # columns that all of the rows see, then those next to the diagonal
        low = edge * tile * rows_
        high = tl.minimum((tile + 1) * rows_, n) if edge else tile * rows_
        for c in range(low, high, columns_):
            out, total, peak = _attend_tile(
                k, queries, values, strict, out, total, peak, rows, c + tl.arange(0, columns_), value_n, n, edge,
                groups, dim, scale, to, operand, precision,
            )  # fmt: skip

    v = tl.load(values + (rows * value_n)[:, None] + at, mask=inside, other=0.0).to(wide)
    top = tl.maximum(peak, own)
    top = tl.where(top == -float("inf"), 0.0, top)
    shrink = tl.exp2(peak - top)
    weight = tl.exp2(own - top)
    rest = total * shrink
    total = rest + weight
    seen = total != 0.0  # NaN too
    safe = tl.where(seen, total, 1.0)
    out = (out * shrink[:, None] + weight[:, None] * v) / safe[:, None]
    sums = tl.where(seen, top * LN_2 + tl.log(safe), -float("inf"))
    tl.store(lse + (b * heads + h) * n + rows, sums, mask=real)

    parity = sweep % 2
    extent = batch.to(tl.int64) * n * heads * dim
    of_head = (b * n * heads + h) * dim
    into = (rows * (heads * dim))[:, None] + at
    last = tl.load(state + parity * extent + of_head + into, mask=inside, other=0.0)
    tl.store(state + (1 - parity) * extent + of_head + into, out, mask=inside)
    tl.store(narrow + of_head + into, out.to(to), mask=inside)
    off = found + (2 * sweep * batch + b) * n + rows
    tl.atomic_max(off, tl.max(bits(out - last), 1), mask=real, sem="relaxed")
    tl.atomic_max(off + batch * n, tl.max(bits(out), 1), mask=real, sem="relaxed")
    if start is not None:
        first_own = tl.load(start + by_head + rows, mask=real, other=0.0) * LOG2_E + own_bias
        peak = tl.maximum(top, first_own)
        then = tl.exp2(first_own - peak)
        whole = rest * tl.exp2(top - peak) + then
        moved = tl.abs(then / tl.where(whole == 0.0, 1.0, whole) - weight / safe)
        moved = tl.where(real & (own != -float("inf")) & (moved > too_far), 1, 0)
        if tl.max(moved, 0) > 0:
            tl.atomic_max(far + (sweep * batch + b) * n + rows, moved, mask=real, sem="relaxed")


@triton.jit(do_not_specialize=["n", "batch", "sweeps"])
def judge_rows(found, far, status, counts, batch, n, sweeps, rtol, atol, wide: tl.constexpr):
    """The sweep t at which a sample settled; -2 - t if some of its rows may be at another root; -1 if not settled.

    Args:
        found: As in `settled`.
        far: As in `attend_rows`.
        status: `[B]`, filled.
        counts: Number of rows that may be at another root, `[B]`, filled.
        sweeps: Number of sweeps so far.
        wide: Type of what the bits in `found` are of.
    """
    b = tl.program_id(0).to(tl.int64)
    at_last = -1
    count = 0
    for i in range(sweeps):
        sweep = sweeps - 1 - i
        if settled(found, sweep, b, batch, n, rtol, atol, wide):
            at_last = sweep
    if at_last >= 0:
        for i in range(0, n, SPAN):
            at = i + tl.arange(0, SPAN)
            count += tl.sum(tl.load(far + (at_last * batch + b) * n + at, mask=at < n, other=0), 0)
        if count > 0:
            at_last = -2 - at_last
    tl.store(status + b, at_last)
    tl.store(counts + b, count)


@triton.jit(do_not_specialize=["n", "length", "batch"])
def hand_over_rows(
    status, state, new_lse, found, y, lse, residual, size, sweeps, batch, length, where, n,
    heads: tl.constexpr, dim: tl.constexpr, rows_: tl.constexpr, samples_: tl.constexpr, wide: tl.constexpr,
    checked: tl.constexpr,
):  # fmt: skip
    """Store the iterates at which the samples settled; do nothing if a sample has not settled.

    Args:
        status: As `judge_rows` leaves it.
        state: As in `attend_rows`.
        new_lse: As `lse` there.
        found: As in `settled`.
        y: `[B, N, H, d]`, filled in the block's rows, like the next four.
        lse: `[B, H, N]`.
        residual: `[B, N]`.
        size: `[B, N]`.
        sweeps: `[B, N]`.
        wide: Type of what the bits in `found` are of.
        checked: Whether rows that might have been at another root have been checked, and were not.
    """
    first = tl.load(where)
    every = tl.arange(0, samples_)
    least = tl.min(tl.load(status + every, mask=every < batch, other=0), 0)
    if least < 0 and not checked:
        return
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    sweep = tl.load(status + b)
    if checked:
        sweep = tl.where(sweep < -1, -2 - sweep, sweep)
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    real = rows < n
    place = first + rows
    at = tl.arange(0, dim)
    extent = batch.to(tl.int64) * n * heads * dim
    done = state + (sweep % 2) * extent + ((b * n + rows)[:, None] * heads + h) * dim + at[None, :]
    done = tl.load(done, mask=real[:, None], other=0.0)
    tl.store(y + ((b * length + place)[:, None] * heads + h) * dim + at[None, :], done, mask=real[:, None])
    total = tl.load(new_lse + (b * heads + h) * n + rows, mask=real, other=0.0)
    tl.store(lse + (b * heads + h) * length + place, total, mask=real)
    if h == 0:
        off = found + (2 * sweep * batch + b) * n + rows
        tl.store(residual + b * length + place, tl.load(off, mask=real, other=0).to(wide, bitcast=True), mask=real)
        extents = tl.load(off + batch * n, mask=real, other=0).to(wide, bitcast=True)
        tl.store(size + b * length + place, extents, mask=real)
        tl.store(sweeps + b * length + place, (sweep + 1).to(tl.int64) + tl.zeros([rows_], tl.int64), mask=real)
