"""The adjoint of a block of many rows by sweeps in Triton, the counterpart of `sweep`.

A sweep is two launches: cotangents of the queries from those of the outputs, then back through Omega_Q. If own columns
make sweeps slow, they are solved exactly in two more launches (`own_columns`).
"""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.solved import all_solved, solved
from implicit_attention.causal.triton.kernels.sweep import LOG2_E, rotated
from implicit_attention.equilibrium.residual_kernel import bits


@triton.jit
def _tile(tensor, places, stride, real, dim: tl.constexpr):
    """Rows of a matrix with contiguous columns, `[places, dim]`, zero in rows beyond the block."""
    at = tl.arange(0, dim)
    return tl.load(tensor + (places * stride)[:, None] + at[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _slopes(
    k, q, v, lam, lse, delta, strict, given, rows, columns, n, turned: tl.constexpr, edge: tl.constexpr,
    strictly: tl.constexpr, scale: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Compute the weights of a tile and the cotangents of its scores, 0 in rows beyond the block.

    With `edge` the tile is on the diagonal: a row sees no later columns. With `strictly` it does not see its own column
    either. `given` points to the head's scores of own columns if they do not depend on the outputs. `lse` is base 2.

    Returns:
        Both, `[rows, columns]`; or `[columns, rows]` if `turned`, the layout that the next product needs on its left.
    """
    wide: tl.constexpr = lse.dtype
    if turned:
        r, c, sums, along = rows[None, :], columns[:, None], lse[None, :], delta[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=precision).to(wide) * (scale * LOG2_E)
    else:
        r, c, sums, along = rows[:, None], columns[None, :], lse[:, None], delta[:, None]
        scores = tl.dot(k, tl.trans(q), input_precision=precision).to(wide) * (scale * LOG2_E)
    if edge and given is not None:
        own = tl.load(given + r, mask=r < n, other=0.0).to(wide) * LOG2_E
        scores = tl.where(r == c, own, scores)
    if strict is not None:
        scores += tl.load(strict + r * n + c, mask=(r < n) & (c < n), other=0.0) * LOG2_E
    if edge:
        behind: tl.constexpr = 1 if strictly else 0
        scores = tl.where(c + behind <= r, scores, -float("inf"))
    p = tl.exp2(scores - sums)
    if turned:
        slope = tl.dot(v, tl.trans(lam), input_precision=precision).to(wide)
    else:
        slope = tl.dot(lam, tl.trans(v), input_precision=precision).to(wide)
    return p, p * (slope - along)


@triton.jit
def _row_tile(key, narrow, lse, delta, rows, n, key_n, lam_n, dim: tl.constexpr, operand: tl.constexpr):
    """Keys, cotangents, base-2 log-sum-exps and `lam . y` of some rows; the pointers start at the block."""
    real = rows < n
    k = _tile(key, rows, key_n, real, dim).to(operand)
    lam = _tile(narrow, rows, lam_n, real, dim).to(operand)
    total = tl.load(lse + rows, mask=real, other=0.0) * LOG2_E
    return k, lam, tl.where(total == -float("inf"), 0.0, total), tl.load(delta + rows, mask=real, other=0.0)


@triton.jit
def _before_map(
    total, q, inverse, turn, turn_half, place, real, groups: tl.constexpr, dim: tl.constexpr, rows_: tl.constexpr
):  # fmt: skip
    """The cotangents of the linear map's output from those of a group's queries, `[rows, dim]`."""
    if inverse is not None:
        norm = tl.load(inverse + place * groups, mask=real, other=0.0)
        along = tl.sum(total * q, 1) / dim
        total = (total - q * along[:, None]) * norm[:, None]
    if turn is not None:
        total = tl.reshape(total, [rows_, 1, dim])
        total = tl.reshape(rotated(total, turn, turn_half, place, real, True, 1, dim // 2), [rows_, dim])
    return total


@triton.jit(do_not_specialize=["n", "length"])
def begin_adjoint(
    grad, y, state, narrow, delta, length, where, n, heads: tl.constexpr, dim: tl.constexpr, rows_: tl.constexpr
):  # fmt: skip
    """Start the sweeps with lam = grad.

    Args:
        grad: `[B, N, H, d]`.
        y: The equilibrium, `[B, N, H, d]`.
        state: lam, `[2, B, n, H, d]`; the first half is filled, as in the next two.
        narrow: lam in the dtype of the inputs.
        delta: `lam . y` with the narrow lam, `[2, B, H, n]`.
    """
    first = tl.load(where).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    real = rows < n
    wide: tl.constexpr = state.dtype.element_ty
    at = ((b * length + first) * heads + h) * dim
    start = _tile(grad + at, rows, heads * dim, real, dim)
    known = _tile(y + at, rows, heads * dim, real, dim).to(wide)
    rounded = start.to(narrow.dtype.element_ty)
    into = ((b * n + rows)[:, None] * heads + h) * dim + tl.arange(0, dim)[None, :]
    tl.store(state + into, start.to(wide), mask=real[:, None])
    tl.store(narrow + into, rounded, mask=real[:, None])
    tl.store(delta + (b * heads + h) * n + rows, tl.sum(rounded.to(wide) * known, 1), mask=real)


@triton.jit(do_not_specialize=["n", "length", "batch", "sweep"])
def pull_queries(
    key, value, query, inverse, turn, strict, lse, narrow, delta, later, made, found, allowed,
    key_b, key_h, key_n, value_b, value_g, value_n, turn_b, turn_half, strict_b, strict_h,
    batch, length, where, n, sweep, rtol,
    scale: tl.constexpr, strictly: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The cotangents of the linear map's output from those of the block's outputs.

    Args:
        key: As in `sweep.attend_rows`, as are `value`, `strict` and all strides.
        value: `[B, G, N, d]`.
        query: Queries at the equilibrium, `[B, N, G, d]`.
        inverse: `[B, N, G]`, or None without a norm.
        turn: As in `sweep.make_queries`.
        strict: `[1 or B, 1 or H, n, n]` or None.
        lse: `[B, H, N]`.
        narrow: Cotangents of the outputs for this sweep and the next, `[2, B, n, H, d]`.
        delta: `lam . y` of both, `[2, B, H, n]`.
        later: Cotangents of the queries from rows after the block, `[B, N, G, d]`.
        made: Cotangents of the linear map's output, `[B, N, G d]`, filled in the block's rows.
        found: As in `solved`.
        strictly: Whether the rows' own columns are left out.
        rows_: Rows that are taken together; divides `columns_`.
        columns_: Columns of a program.
    """
    first = tl.load(where).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if solved(found, allowed, sweep - 1, b, batch, n, rtol, wide):
        return
    g = tl.program_id(1).to(tl.int64)
    shared: tl.constexpr = heads // groups
    to: tl.constexpr = narrow.dtype.element_ty
    begin = tl.program_id(0) * columns_
    columns = begin + tl.arange(0, columns_)
    real = columns < n
    by_group = (b * length + first) * groups + g
    q = _tile(query + by_group * dim, columns, groups * dim, real, dim).to(operand)
    v = _tile(value + b * value_b + g * value_g + first * value_n, columns, value_n, real, dim).to(operand)
    parity = sweep % 2
    narrow += (parity * batch.to(tl.int64) + b) * n * heads * dim
    delta += (parity * batch.to(tl.int64) + b) * heads * n
    total = tl.zeros([columns_, dim], wide)
    for s in range(shared):
        h = g * shared + s
        keys = key + b * key_b + h * key_h + first * key_n
        sums = lse + (b * heads + h) * length + first
        bias = strict
        if strict is not None:
            bias = strict + b * strict_b + h * strict_h
        for beyond in tl.static_range(2):  # rows next to the diagonal, then those that see all of the columns
            low = begin + beyond * columns_
            high = n if beyond else tl.minimum(begin + columns_, n)
            for i in range(low, high, rows_):
                rows = i + tl.arange(0, rows_)
                k, lam, known, along = _row_tile(
                    keys, narrow + h * dim, sums, delta + h * n, rows, n, key_n, heads * dim, dim, operand
                )  # fmt: skip
                _, slope = _slopes(
                    k, q, v, lam, known, along, bias, None, rows, columns, n, True, beyond == 0, strictly, scale,
                    operand, precision,
                )  # fmt: skip
                total += tl.dot(slope.to(to).to(operand), k, input_precision=precision).to(wide)
    total = total * scale + _tile(later + by_group * dim, columns, groups * dim, real, dim)
    norm = inverse
    if inverse is not None:
        norm = inverse + by_group
    angle = turn
    if turn is not None:
        angle = turn + b * turn_b + first * (dim // 2)
    total = _before_map(total, q.to(wide), norm, angle, turn_half, columns, real, groups, dim, columns_)
    into = made + by_group * dim + (columns * (groups * dim))[:, None] + tl.arange(0, dim)[None, :]
    tl.store(into, total.to(made.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["n", "length", "batch", "sweep"])
def through_map(
    made, weight, grad, y, state, narrow, delta, found, allowed, weight_o, batch, length, where, n, sweep, rtol,
    raises: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, span: tl.constexpr,
    rows_: tl.constexpr, depth: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The next cotangents of the outputs, `grad + made Omega_Q`.

    Args:
        made: As in `pull_queries`.
        weight: Omega_Q, `[G d, H d]`, rows contiguous.
        grad: `[B, N, H, d]`.
        y: `[B, N, H, d]`; read only if `narrow` is not None.
        state: Cotangents of this sweep and of the next, which are filled, `[2, B, n, H, d]`.
        narrow: The same in the dtype of the inputs, or None.
        delta: As in `pull_queries`; the next sweep's are filled if `narrow` is not None.
        found: As in `solved`; this sweep's is raised if `raises`.
        raises: Whether the difference between the two in `state` is the residual.
        span: Heads of a program.
        depth: How many of a row's numbers are multiplied together.
    """
    first = tl.load(where).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if solved(found, allowed, sweep - 1, b, batch, n, rtol, wide):
        return
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    real = (rows < n)[:, None]
    stride: tl.constexpr = heads * dim
    begin = tl.program_id(1) * (span * dim)
    out = begin + tl.arange(0, span * dim)
    known = (out < stride)[None, :]
    lam = tl.zeros([rows_, span * dim], wide)
    made += (b * length + first) * (groups * dim)
    for c in range(0, groups * dim, depth):
        into = c + tl.arange(0, depth)
        within = into < groups * dim
        u = tl.load(made + (rows * (groups * dim))[:, None] + into[None, :], mask=real & within[None, :], other=0.0)
        omega = weight + (into.to(tl.int64) * weight_o)[:, None] + out[None, :]
        omega = tl.load(omega, mask=within[:, None] & known, other=0.0).to(operand)
        lam += tl.dot(u.to(operand), omega, input_precision=precision).to(wide)
    extent = batch.to(tl.int64) * n * stride
    ahead = (1 - sweep % 2) * extent + b * n * stride
    now = state + sweep % 2 * extent + b * n * stride
    new = state + ahead
    at = (rows * stride)[:, None] + out[None, :]
    lam += tl.load(grad + (b * length + first) * stride + at, mask=real & known, other=0.0).to(wide)
    tl.store(new + at, lam, mask=real & known)
    tl.debug_barrier()

    # Reload the sum a few columns at a time: together with the product this would exceed the registers.
    some: tl.constexpr = 64 if dim > 64 else dim
    y += (b * length + first) * stride
    off = found + (2 * sweep * batch + b) * n + rows
    left = bits(tl.zeros([rows_], wide))
    size = left
    for s in range(span):
        along = tl.zeros([rows_], wide)
        for c in range(0, dim, some):
            columns = begin + s * dim + c + tl.arange(0, some)
            both = real & (columns < stride)[None, :]
            there = (rows * stride)[:, None] + columns[None, :]
            part = tl.load(new + there, mask=both, other=0.0)
            size = tl.maximum(size, tl.max(bits(part), 1))
            if raises:
                left = tl.maximum(left, tl.max(bits(part - tl.load(now + there, mask=both, other=0.0)), 1))
            if narrow is not None:
                rounded = part.to(narrow.dtype.element_ty)
                tl.store(narrow + ahead + there, rounded, mask=both)
                along += tl.sum(rounded.to(wide) * tl.load(y + there, mask=both, other=0.0).to(wide), 1)
        head = begin // dim + s
        if narrow is not None:
            into = delta + (((1 - sweep % 2) * batch.to(tl.int64) + b) * heads + head) * n + rows
            tl.store(into, along, mask=(rows < n) & (head < heads))
    if raises:
        tl.atomic_max(off, left, mask=rows < n, sem="relaxed")
    tl.atomic_max(off + batch * n, size, mask=rows < n, sem="relaxed")


@triton.jit(do_not_specialize=["n", "length", "batch", "sweep"])
def own_columns(
    f, us, inverses, key, query, inverse, turn, made, found, allowed, key_b, key_h, key_n, turn_b, turn_half,
    batch, length, where, n, sweep, rtol,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, hp: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """The part of the own columns in the cotangents of the linear map's output; `f` lacks it.

    `z = (I - M^T)^-1 (u . f)` per row; the queries get `sum_h z_h k_h` (Sherman, Morrison and Woodbury).

    Args:
        f: The f of the last sweep and of this one, `[2, B, n, H, d]`.
        us: `p (v - y)`, `[B, n, H, d]`.
        inverses: `(I - M^T)^-1`, `[B, n, H, H]`.
        key: As in `pull_queries`, as are `query`, `inverse` and `turn` and all strides.
        query: `[B, N, G, d]`.
        inverse: `[B, N, G]` or None.
        turn: `[2, 1 or B, N, d / 2]` or None.
        made: The parts for this sweep and for the next, which are filled, `[2, B, n, G d]`.
        found: As in `solved`.
    """
    first = tl.load(where).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    if solved(found, allowed, sweep - 1, b, batch, n, rtol, wide):
        return
    i = tl.program_id(0)
    shared: tl.constexpr = heads // groups
    head = tl.arange(0, hp)
    real = head < heads
    at = tl.arange(0, dim)
    new = 1 - sweep % 2
    row = (new * batch.to(tl.int64) + b) * n + i
    every = (head * dim)[:, None] + at[None, :]
    now = tl.load(f + row * heads * dim + every, mask=real[:, None], other=0.0)
    u = tl.load(us + (b * n + i) * heads * dim + every, mask=real[:, None], other=0.0)
    right = tl.sum(now * u, 1)
    pairs = real[:, None] & real[None, :]
    turned_back = inverses + (b * n + i) * heads * heads + (head * heads)[:, None] + head[None, :]
    z = tl.sum(tl.load(turned_back, mask=pairs, other=0.0) * right[None, :], 1) * scale
    place = (first + i).to(tl.int64) + tl.zeros([1], tl.int64)
    k = key + b * key_b + (first + i).to(tl.int64) * key_n + (head.to(tl.int64) * key_h)[:, None] + at[None, :]
    k = tl.load(k, mask=real[:, None], other=0.0).to(wide) * z[:, None]
    for g in range(groups):
        total = tl.sum(tl.where((head // shared == g)[:, None], k, 0.0), 0)[None, :]
        q = tl.load(query + ((b * length + place) * groups + g)[:, None] * dim + at[None, :]).to(wide)
        norm = inverse
        if inverse is not None:
            norm = inverse + b * length * groups + g
        angle = turn
        if turn is not None:
            angle = turn + b * turn_b
        total = _before_map(total, q, norm, angle, turn_half, place, place >= 0, groups, dim, 1)
        into = made + (row * groups + g) * dim + at[None, :]
        tl.store(into, total.to(made.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "length", "batch"])
def pull_values(
    key, value, query, given, strict, lse, narrow, delta, d_value, own, status,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h, batch, length, where, n,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, samples_: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add the block's part to the gradients of the values, and store those of its own scores, once all is solved.

    Args:
        key: As in `pull_queries`, like all arguments that are not listed.
        value: `[B, G, N, d]`.
        query: `[B, N, G, d]`.
        given: Scores of the own columns if they do not depend on the outputs, `[B, H, N]`, else None.
        strict: `[1 or B, 1 or H, n, n]` or None.
        lse: `[B, H, N]`.
        narrow: `[2, B, n, H, d]`.
        delta: `[2, B, H, n]`.
        d_value: `[B, G, N, d]`, added to.
        own: `[B, H, N]`, filled in the block's rows, or None.
        status: As filled by `judge_adjoint`.
        rows_: Rows that are taken together.
        columns_: Columns of a program.
    """
    first = tl.load(where).to(tl.int64)
    if not all_solved(status, batch, samples_):
        return
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    shared: tl.constexpr = heads // groups
    to: tl.constexpr = narrow.dtype.element_ty
    begin = tl.program_id(0) * columns_
    columns = begin + tl.arange(0, columns_)
    real = columns < n
    q = _tile(query + ((b * length + first) * groups + g) * dim, columns, groups * dim, real, dim).to(operand)
    v = _tile(value + b * value_b + g * value_g + first * value_n, columns, value_n, real, dim).to(operand)
    parity = tl.load(status + b) % 2
    narrow += (parity * batch.to(tl.int64) + b) * n * heads * dim
    delta += (parity * batch.to(tl.int64) + b) * heads * n
    total = tl.zeros([columns_, dim], wide)
    for s in range(shared):
        h = g * shared + s
        keys = key + b * key_b + h * key_h + first * key_n
        by_head = (b * heads + h) * length + first
        sums = lse + by_head
        d_own = tl.zeros([columns_], wide)
        bias = strict
        if strict is not None:
            bias = strict + b * strict_b + h * strict_h
        scores = given
        if given is not None:
            scores = given + by_head
        for beyond in tl.static_range(2):  # as in `pull_queries`
            low = begin + beyond * columns_
            high = n if beyond else tl.minimum(begin + columns_, n)
            for i in range(low, high, rows_):
                rows = i + tl.arange(0, rows_)
                k, lam, known, along = _row_tile(
                    keys, narrow + h * dim, sums, delta + h * n, rows, n, key_n, heads * dim, dim, operand
                )  # fmt: skip
                p, slope = _slopes(
                    k, q, v, lam, known, along, bias, scores, rows, columns, n, True, beyond == 0, False, scale,
                    operand, precision,
                )  # fmt: skip
                total += tl.dot(p.to(to).to(operand), lam, input_precision=precision).to(wide)
                if beyond == 0:
                    d_own += tl.sum(tl.where(rows[None, :] == columns[:, None], slope, 0.0), 1)
        if own is not None:
            tl.store(own + by_head + columns, d_own, mask=real)
    into = d_value + ((b * groups + g) * length + first) * dim
    into += (columns * dim)[:, None] + tl.arange(0, dim)[None, :]
    tl.store(into, tl.load(into, mask=real[:, None], other=0.0) + total, mask=real[:, None])


@triton.jit(do_not_specialize=["n", "length", "batch"])
def pull_keys(
    key, value, query, strict, lse, state, narrow, delta, d_key, lam, status, latest, largest,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h, batch, length, where, n,
    scale: tl.constexpr, strictly: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    samples_: tl.constexpr, rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Add the block's part to the gradients of the keys, and store the solution, once all samples are solved.

    Args:
        key: As in `pull_values`, like all arguments that are not listed.
        value: `[B, G, N, d]`.
        query: `[B, N, G, d]`.
        strict: `[1 or B, 1 or H, n, n]` or None.
        lse: `[B, H, N]`.
        state: `[2, B, n, H, d]`.
        narrow: `[2, B, n, H, d]`.
        delta: `[2, B, H, n]`.
        d_key: `[B, H, N, d]`, added to.
        lam: `[B, N, H, d]`, filled in the block's rows.
        status: As filled by `judge_adjoint`.
        latest: As filled by `judge_adjoint`.
        largest: Largest residual of all blocks, `[B]`, raised.
        strictly: Whether scores of own columns do not depend on the keys.
        rows_: Rows of a program, a multiple of `columns_`.
        columns_: Columns that are taken together.
    """
    first = tl.load(where).to(tl.int64)
    if not all_solved(status, batch, samples_):
        return
    b = tl.program_id(2).to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * rows_
    h = tl.program_id(1).to(tl.int64)
    g = h // (heads // groups)
    to: tl.constexpr = narrow.dtype.element_ty
    if (begin == 0) & (h == 0):
        tl.store(largest + b, tl.maximum(tl.load(largest + b), tl.load(latest + b)))
    rows = begin + tl.arange(0, rows_)
    real = rows < n
    at = tl.arange(0, dim)
    parity = tl.load(status + b) % 2
    narrow += (parity * batch.to(tl.int64) + b) * n * heads * dim
    state += (parity * batch.to(tl.int64) + b) * n * heads * dim
    delta += (parity * batch.to(tl.int64) + b) * heads * n
    k, rounded, known, along = _row_tile(
        key + b * key_b + h * key_h + first * key_n, narrow + h * dim, lse + (b * heads + h) * length + first,
        delta + h * n, rows, n, key_n, heads * dim, dim, operand,
    )  # fmt: skip
    into = lam + ((b * length + first) * heads + h) * dim + (rows * (heads * dim))[:, None] + at[None, :]
    tl.store(into, _tile(state + h * dim, rows, heads * dim, real, dim), mask=real[:, None])
    if strict is not None:
        strict += b * strict_b + h * strict_h
    queries = query + ((b * length + first) * groups + g) * dim
    values = value + b * value_b + g * value_g + first * value_n
    total = tl.zeros([rows_, dim], wide)
    for edge in tl.static_range(2):  # columns that all of the rows see, then those next to the diagonal
        low = edge * begin
        high = tl.minimum(begin + rows_, n) if edge else begin
        for c in range(low, high, columns_):
            columns = c + tl.arange(0, columns_)
            q = _tile(queries, columns, groups * dim, columns < n, dim).to(operand)
            v = _tile(values, columns, value_n, columns < n, dim).to(operand)
            _, slope = _slopes(
                k, q, v, rounded, known, along, strict, None, rows, columns, n, False, edge, strictly, scale, operand,
                precision,
            )  # fmt: skip
            total += tl.dot(slope.to(to).to(operand), q, input_precision=precision).to(wide)
    into = d_key + ((b * heads + h) * length + first) * dim + (rows * dim)[:, None] + at[None, :]
    tl.store(into, tl.load(into, mask=real[:, None], other=0.0) + total * scale, mask=real[:, None])
