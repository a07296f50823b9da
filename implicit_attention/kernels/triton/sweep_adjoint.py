"""The adjoint of a block of many rows by sweeps in Triton; the counterpart of `sweep`.

A sweep is two launches: cotangents of the queries from those of the outputs, then these back through Omega_Q. An
argument that is None is one that the map does not have.
"""

import triton
import triton.language as tl

from implicit_attention.kernels.triton.sweep import rotated
from implicit_attention.kernels.triton.tiles import bits


@triton.jit
def solved(found, allowed, sweep, b, batch, wide: tl.constexpr):
    """Whether a sample's residual was within tolerance at a sweep, never before the first; it stays so once it was.

    Args:
        found: Bits of residuals, `[sweeps, B]`, zeros where nothing was swept.
        allowed: Tolerance, `[B]`.
        sweep: Which.
        b: The sample.
        batch: B.
        wide: Type of what the bits are of.
    """
    done = False
    if sweep >= 0:
        done = tl.load(found + sweep * batch + b).to(wide, bitcast=True) <= tl.load(allowed + b)  # NaN is not
    return done


@triton.jit
def _all_solved(status, batch, samples_: tl.constexpr):
    every = tl.arange(0, samples_)
    return tl.min(tl.load(status + every, mask=every < batch, other=0), 0) >= 0


@triton.jit
def _slopes(k, q, v, lam, y, lse, given, bias, scale: tl.constexpr, rows, columns, real, operand: tl.constexpr,
            precision: tl.constexpr):  # fmt: skip
    """Weights and the cotangents of the scores, `[rows, columns]`, of a tile of the block."""
    wide: tl.constexpr = lse.dtype
    scores = tl.dot(k, tl.trans(q), input_precision=precision).to(wide) * scale
    if bias is not None:
        scores += bias
    diagonal = rows[:, None] == columns[None, :]
    if given is not None:
        scores = tl.where(diagonal, given[:, None], scores)
    visible = (columns[None, :] <= rows[:, None]) & real[:, None]
    p = tl.exp(tl.where(visible, scores - lse[:, None], -float("inf")))
    along = tl.sum(lam.to(wide) * y.to(wide), 1)
    return p, p * (tl.dot(lam, tl.trans(v), input_precision=precision).to(wide) - along[:, None])


@triton.jit(do_not_specialize=["first", "n", "length"])
def begin_adjoint(
    grad, state, narrow, length, first, n, heads: tl.constexpr, dim: tl.constexpr, rows_: tl.constexpr
):  # fmt: skip
    """Start from the cotangent of the outputs.

    Args:
        grad: `[B, N, H, d]`.
        state: `[2, B, n, H, d]`; the first is filled.
        narrow: The same in the type of the inputs; the first is filled.
        length: N.
        first: The block's first row.
        n: Its rows.
        heads: H.
        dim: d, a power of two.
        rows_: Rows of a program.
    """
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    at = tl.arange(0, dim)
    real = (rows < n)[:, None]
    start = grad + ((b * length + first + rows)[:, None] * heads + h) * dim + at[None, :]
    start = tl.load(start, mask=real, other=0.0)
    into = ((b * n + rows)[:, None] * heads + h) * dim + at[None, :]
    tl.store(state + into, start.to(state.dtype.element_ty), mask=real)
    tl.store(narrow + into, start.to(narrow.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["first", "n", "length", "batch", "sweep"])
def pull_queries(
    key, value, query, inverse, turn, given, strict, y, lse, narrow, later, made, found, allowed,
    key_b, key_h, key_n, value_b, value_g, value_n, turn_b, turn_half, strict_b, strict_h,
    batch, length, first, n, sweep,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """From the cotangents of the block's outputs to those of what Omega_Q made.

    Args:
        key: As in `sweep.attend_rows`, as are `value`, `given`, `strict` and all strides.
        value: `[B, G, N, d]`.
        query: The equilibrium's, `[B, N, G, d]`.
        inverse: `[B, N, G]`, or None without a norm.
        turn: As in `sweep.make_queries`.
        given: `[B, H, N]` or None.
        strict: `[1 or B, 1 or H, n, n]` or None.
        y: The equilibrium, `[B, N, H, d]`.
        lse: `[B, H, N]`.
        narrow: Cotangents of the outputs, this sweep's and the next's, `[2, B, n, H, d]`.
        later: Cotangents of the queries from rows after the block, `[B, N, G, d]`.
        made: `[B, N, G d]`, the block's rows filled.
        found: As in `solved`.
        allowed: As there.
        key_b: Stride.
        key_h: Stride.
        key_n: Stride.
        value_b: Stride.
        value_g: Stride.
        value_n: Stride.
        turn_b: Stride.
        turn_half: Stride.
        strict_b: Stride.
        strict_h: Stride.
        batch: B.
        length: N.
        first: The block's first row.
        n: Its rows.
        sweep: Which sweep, from 0.
        scale: Factor on the scores.
        heads: H.
        groups: G.
        dim: d, a power of two.
        rows_: Rows that are taken together; divides `columns_`.
        columns_: Columns of a program.
        wide: Type of what is accumulated.
        operand: Type in which tensors enter products.
        precision: Of the products of float32 tensors.
    """
    b = tl.program_id(2).to(tl.int64)
    if solved(found, allowed, sweep - 1, b, batch, wide):
        return
    g = tl.program_id(1)
    shared: tl.constexpr = heads // groups
    to: tl.constexpr = narrow.dtype.element_ty
    columns = tl.program_id(0) * columns_ + tl.arange(0, columns_)
    real_columns = columns < n
    there = (first + columns).to(tl.int64)
    at = tl.arange(0, dim)
    column = real_columns[:, None] & (at < dim)[None, :]
    q = tl.load(query + ((b * length + there)[:, None] * groups + g) * dim + at[None, :], mask=column, other=0.0)
    q = q.to(operand)
    v = value + b * value_b + g * value_g + (there * value_n)[:, None] + at[None, :]
    v = tl.load(v, mask=column, other=0.0).to(operand)
    narrow += (sweep % 2) * batch.to(tl.int64) * n * heads * dim
    total = tl.zeros([columns_, dim], wide)
    for s in range(shared):
        h = g * shared + s
        for i in range(tl.program_id(0) * columns_, n, rows_):
            rows = i + tl.arange(0, rows_)
            real = rows < n
            place = (first + rows).to(tl.int64)
            row = real[:, None] & (at < dim)[None, :]
            k = key + b * key_b + h * key_h + (place * key_n)[:, None] + at[None, :]
            k = tl.load(k, mask=row, other=0.0).to(operand)
            lam = tl.load(narrow + ((b * n + rows)[:, None] * heads + h) * dim + at[None, :], mask=row, other=0.0)
            known = tl.load(y + ((b * length + place)[:, None] * heads + h) * dim + at[None, :], mask=row, other=0.0)
            total_lse = tl.load(lse + (b * heads + h) * length + place, mask=real, other=0.0)
            total_lse = tl.where(total_lse == -float("inf"), 0.0, total_lse)
            bias = strict
            own = given
            if strict is not None:
                bias = strict + b * strict_b + h * strict_h
                pairs = real[:, None] & real_columns[None, :]
                bias = tl.load(bias + rows[:, None] * n + columns[None, :], mask=pairs, other=0.0)
            if given is not None:
                own = tl.load(given + (b * heads + h) * length + place, mask=real, other=0.0).to(wide)
                if strict is not None:
                    own += tl.load(strict + b * strict_b + h * strict_h + rows * (n + 1), mask=real, other=0.0)
            _, slope = _slopes(k, q, v, lam.to(operand), known, total_lse, own, bias, scale, rows, columns, real,
                               operand, precision)  # fmt: skip
            if given is not None:
                slope = tl.where(rows[:, None] == columns[None, :], 0.0, slope)
            slope = tl.trans(slope).to(to).to(operand)
            total += tl.dot(slope, k, input_precision=precision).to(wide)
    into = ((b * length + there)[:, None] * groups + g) * dim + at[None, :]
    total = total * scale + tl.load(later + into, mask=column, other=0.0)
    if inverse is not None:
        norm = tl.load(inverse + (b * length + there) * groups + g, mask=real_columns, other=0.0)
        along = tl.sum(total * q.to(wide), 1) / dim
        total = (total - q.to(wide) * along[:, None]) * norm[:, None]
    if turn is not None:
        total = tl.reshape(total, [columns_, 1, dim])
        total = rotated(total, turn + b * turn_b, turn_half, there, real_columns, True, 1, dim // 2)
        total = tl.reshape(total, [columns_, dim])
    tl.store(made + into, total.to(made.dtype.element_ty), mask=column)


@triton.jit(do_not_specialize=["first", "n", "length", "batch", "sweep"])
def through_map(
    made, weight, grad, state, narrow, found, allowed, weight_o, batch, length, first, n, sweep,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, span: tl.constexpr, rows_: tl.constexpr,
    depth: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """From the cotangents of what Omega_Q made to the next ones of the outputs, `grad + made Omega_Q`.

    Args:
        made: As in `pull_queries`.
        weight: Omega_Q, `[G d, H d]`, rows contiguous.
        grad: `[B, N, H, d]`.
        state: This sweep's cotangents and the next, which are filled, `[2, B, n, H, d]`.
        narrow: The same in the type of the inputs.
        found: As in `solved`; this sweep's is raised.
        allowed: As there.
        weight_o: Stride of the outputs of Omega_Q.
        batch: B.
        length: N.
        first: The block's first row.
        n: Its rows.
        sweep: Which sweep, from 0.
        heads: H.
        groups: G.
        dim: d, a power of two.
        span: Heads of a program.
        rows_: Rows of a program.
        depth: How many of a row's numbers are multiplied together.
        wide: Type of what is accumulated.
        operand: Type in which tensors enter products.
        precision: Of the products of float32 tensors.
    """
    b = tl.program_id(2).to(tl.int64)
    if solved(found, allowed, sweep - 1, b, batch, wide):
        return
    to: tl.constexpr = narrow.dtype.element_ty
    rows = tl.program_id(0) * rows_ + tl.arange(0, rows_)
    real = rows < n
    place = (first + rows).to(tl.int64)
    out = tl.program_id(1) * (span * dim) + tl.arange(0, span * dim)
    known = out < heads * dim
    lam = tl.zeros([rows_, span * dim], wide)
    for c in range(0, groups * dim, depth):
        into = c + tl.arange(0, depth)
        within = into < groups * dim
        u = made + ((b * length + place) * (groups * dim))[:, None] + into[None, :]
        u = tl.load(u, mask=real[:, None] & within[None, :], other=0.0).to(to).to(operand)
        omega = weight + (into.to(tl.int64) * weight_o)[:, None] + out[None, :]
        omega = tl.load(omega, mask=within[:, None] & known[None, :], other=0.0).to(operand)
        lam += tl.dot(u, omega, input_precision=precision).to(wide)
    both = real[:, None] & known[None, :]
    at = ((b * length + place) * (heads * dim))[:, None] + out[None, :]
    lam += tl.load(grad + at, mask=both, other=0.0).to(wide)
    into = ((b * n + rows) * (heads * dim))[:, None] + out[None, :]
    extent = batch.to(tl.int64) * n * heads * dim
    last = tl.load(state + (sweep % 2) * extent + into, mask=both, other=0.0)
    into += (1 - sweep % 2) * extent
    tl.store(state + into, lam, mask=both)
    tl.store(narrow + into, lam.to(to), mask=both)
    off = bits(tl.where(both, lam - last, 0.0))
    tl.atomic_max(found + sweep * batch + b, tl.max(tl.max(off, 1), 0))


@triton.jit(do_not_specialize=["batch", "sweeps"])
def judge_adjoint(found, allowed, status, residual, batch, sweeps, wide: tl.constexpr):
    """The sweep at which a sample was solved, -1 if it is not.

    Args:
        found: As in `solved`.
        allowed: As there.
        status: `[B]`, filled.
        residual: `[B]`, filled where it is solved.
        batch: B.
        sweeps: How many there were.
        wide: Type of what the bits in `found` are of.
    """
    b = tl.program_id(0).to(tl.int64)
    at_last = -1
    for i in range(sweeps):
        sweep = sweeps - 1 - i
        if solved(found, allowed, sweep, b, batch, wide):
            at_last = sweep
    tl.store(status + b, at_last)
    if at_last >= 0:
        tl.store(residual + b, tl.load(found + at_last * batch + b).to(wide, bitcast=True))


@triton.jit(do_not_specialize=["first", "n", "length", "batch"])
def pull_values(
    key, value, query, given, strict, y, lse, narrow, d_value, own, status,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h, batch, length, first, n,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, samples_: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add to the values' gradients what the block gives them, and store its own scores'; nothing unless all is solved.

    Args:
        key: As in `pull_queries`, as are all that are not named here.
        value: `[B, G, N, d]`.
        query: `[B, N, G, d]`.
        given: `[B, H, N]` or None.
        strict: `[1 or B, 1 or H, n, n]` or None.
        y: `[B, N, H, d]`.
        lse: `[B, H, N]`.
        narrow: `[2, B, n, H, d]`.
        d_value: `[B, G, N, d]`, added to.
        own: `[B, H, N]`, the block's filled, or None.
        status: As `judge_adjoint` leaves it.
        key_b: Stride.
        key_h: Stride.
        key_n: Stride.
        value_b: Stride.
        value_g: Stride.
        value_n: Stride.
        strict_b: Stride.
        strict_h: Stride.
        batch: B.
        length: N.
        first: The block's first row.
        n: Its rows.
        scale: Factor on the scores.
        heads: H.
        groups: G.
        dim: d.
        samples_: B, padded to a power of two.
        rows_: Rows that are taken together.
        columns_: Columns of a program.
        wide: Type of what is accumulated.
        operand: Type in which tensors enter products.
        precision: Of the products of float32 tensors.
    """
    if not _all_solved(status, batch, samples_):
        return
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1)
    shared: tl.constexpr = heads // groups
    to: tl.constexpr = narrow.dtype.element_ty
    columns = tl.program_id(0) * columns_ + tl.arange(0, columns_)
    real_columns = columns < n
    there = (first + columns).to(tl.int64)
    at = tl.arange(0, dim)
    column = real_columns[:, None] & (at < dim)[None, :]
    q = tl.load(query + ((b * length + there)[:, None] * groups + g) * dim + at[None, :], mask=column, other=0.0)
    q = q.to(operand)
    v = value + b * value_b + g * value_g + (there * value_n)[:, None] + at[None, :]
    v = tl.load(v, mask=column, other=0.0).to(operand)
    narrow += (tl.load(status + b) % 2) * batch.to(tl.int64) * n * heads * dim
    total = tl.zeros([columns_, dim], wide)
    for s in range(shared):
        h = g * shared + s
        d_own = tl.zeros([columns_], wide)
        for i in range(tl.program_id(0) * columns_, n, rows_):
            rows = i + tl.arange(0, rows_)
            real = rows < n
            place = (first + rows).to(tl.int64)
            row = real[:, None] & (at < dim)[None, :]
            k = key + b * key_b + h * key_h + (place * key_n)[:, None] + at[None, :]
            k = tl.load(k, mask=row, other=0.0).to(operand)
            lam = tl.load(narrow + ((b * n + rows)[:, None] * heads + h) * dim + at[None, :], mask=row, other=0.0)
            lam = lam.to(operand)
            known = tl.load(y + ((b * length + place)[:, None] * heads + h) * dim + at[None, :], mask=row, other=0.0)
            total_lse = tl.load(lse + (b * heads + h) * length + place, mask=real, other=0.0)
            total_lse = tl.where(total_lse == -float("inf"), 0.0, total_lse)
            bias = strict
            known_own = given
            if strict is not None:
                bias = strict + b * strict_b + h * strict_h
                pairs = real[:, None] & real_columns[None, :]
                bias = tl.load(bias + rows[:, None] * n + columns[None, :], mask=pairs, other=0.0)
            if given is not None:
                known_own = tl.load(given + (b * heads + h) * length + place, mask=real, other=0.0).to(wide)
                if strict is not None:
                    known_own += tl.load(strict + b * strict_b + h * strict_h + rows * (n + 1), mask=real, other=0.0)
            p, slope = _slopes(k, q, v, lam, known, total_lse, known_own, bias, scale, rows, columns, real,
                               operand, precision)  # fmt: skip
            total += tl.dot(tl.trans(p).to(to).to(operand), lam, input_precision=precision).to(wide)
            if own is not None:
                d_own += tl.sum(tl.where(rows[:, None] == columns[None, :], slope, 0.0), 0)
        if own is not None:
            tl.store(own + (b * heads + h) * length + there, d_own, mask=real_columns)
    into = d_value + ((b * groups + g) * length + there)[:, None] * dim + at[None, :]
    tl.store(into, tl.load(into, mask=column, other=0.0) + total, mask=column)


@triton.jit(do_not_specialize=["first", "n", "length", "batch"])
def pull_keys(
    key, value, query, given, strict, y, lse, state, narrow, d_key, lam, status,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h, batch, length, first, n,
    scale: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, samples_: tl.constexpr,
    rows_: tl.constexpr, columns_: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add to the keys' gradients what the block gives them, and hand the solution over; nothing unless all is solved.

    Args:
        key: As in `pull_values`, as are all that are not named here.
        value: `[B, G, N, d]`.
        query: `[B, N, G, d]`.
        given: `[B, H, N]` or None.
        strict: `[1 or B, 1 or H, n, n]` or None.
        y: `[B, N, H, d]`.
        lse: `[B, H, N]`.
        state: `[2, B, n, H, d]`.
        narrow: `[2, B, n, H, d]`.
        d_key: `[B, H, N, d]`, added to.
        lam: `[B, N, H, d]`, the block's rows filled.
        status: As `judge_adjoint` leaves it.
        key_b: Stride.
        key_h: Stride.
        key_n: Stride.
        value_b: Stride.
        value_g: Stride.
        value_n: Stride.
        strict_b: Stride.
        strict_h: Stride.
        batch: B.
        length: N.
        first: The block's first row.
        n: Its rows.
        scale: Factor on the scores.
        heads: H.
        groups: G.
        dim: d.
        samples_: B, padded to a power of two.
        rows_: Rows of a program.
        columns_: Columns that are taken together.
        wide: Type of what is accumulated.
        operand: Type in which tensors enter products.
        precision: Of the products of float32 tensors.
    """
    if not _all_solved(status, batch, samples_):
        return
    b = tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    g = h // (heads // groups)
    to: tl.constexpr = narrow.dtype.element_ty
    rows = tile * rows_ + tl.arange(0, rows_)
    real = rows < n
    place = (first + rows).to(tl.int64)
    at = tl.arange(0, dim)
    row = real[:, None] & (at < dim)[None, :]
    k = key + b * key_b + h * key_h + (place * key_n)[:, None] + at[None, :]
    k = tl.load(k, mask=row, other=0.0).to(operand)
    parity = (tl.load(status + b) % 2) * batch.to(tl.int64) * n * heads * dim
    of = ((b * n + rows)[:, None] * heads + h) * dim + at[None, :]
    into = ((b * length + place)[:, None] * heads + h) * dim + at[None, :]
    rounded = tl.load(narrow + parity + of, mask=row, other=0.0).to(operand)
    tl.store(lam + into, tl.load(state + parity + of, mask=row, other=0.0), mask=row)
    known = tl.load(y + into, mask=row, other=0.0)
    total_lse = tl.load(lse + (b * heads + h) * length + place, mask=real, other=0.0)
    total_lse = tl.where(total_lse == -float("inf"), 0.0, total_lse)
    own = given
    if strict is not None:
        strict += b * strict_b + h * strict_h
    if given is not None:
        own = tl.load(given + (b * heads + h) * length + place, mask=real, other=0.0).to(wide)
        if strict is not None:
            own += tl.load(strict + rows * (n + 1), mask=real, other=0.0)
    total = tl.zeros([rows_, dim], wide)
    for c in range(0, tl.minimum((tile + 1) * rows_, n), columns_):
        columns = c + tl.arange(0, columns_)
        there = (first + columns).to(tl.int64)
        column = (columns < n)[:, None] & (at < dim)[None, :]
        q = tl.load(query + ((b * length + there)[:, None] * groups + g) * dim + at[None, :], mask=column, other=0.0)
        q = q.to(operand)
        v = value + b * value_b + g * value_g + (there * value_n)[:, None] + at[None, :]
        v = tl.load(v, mask=column, other=0.0).to(operand)
        bias = strict
        if strict is not None:
            pairs = real[:, None] & (columns < n)[None, :]
            bias = tl.load(strict + rows[:, None] * n + columns[None, :], mask=pairs, other=0.0)
        _, slope = _slopes(k, q, v, rounded, known, total_lse, own, bias, scale, rows, columns, real,
                           operand, precision)  # fmt: skip
        if given is not None:
            slope = tl.where(rows[:, None] == columns[None, :], 0.0, slope)
        total += tl.dot(slope.to(to).to(operand), q, input_precision=precision).to(wide)
    into = d_key + ((b * heads + h) * length + place)[:, None] * dim + at[None, :]
    tl.store(into, tl.load(into, mask=row, other=0.0) + total * scale, mask=row)
