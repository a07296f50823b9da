"""What the one-program kernels share: tiles of 16 rows, and the rotation of the query map."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

ROWS = 16  # rows that are settled together: the smallest tile of `tl.dot`, since sweeps grow with the rows
R = tl.constexpr(ROWS)
# One stage, so no software pipeline: it would move loads ahead of the barriers that guard the scratch.
LAUNCH = {"num_warps": 4, "num_stages": 1}


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    heads: Any  # H
    groups: Any  # heads of the queries and values, G
    dim: Any  # of a head, d
    dp: Any  # d, padded to a power of two
    hp: Any  # H, padded
    scale: Any  # of the scores
    eps: Any  # of the norm
    normed: Any  # whether queries are
    narrow: Any  # type in which Omega_Q is applied
    operand: Any  # type of what the products with queries and keys take
    precision: Any  # of products in float32


class Columns(NamedTuple):
    """Keys and values of a sample, whose rows count from the block's first."""

    key: Any
    key_h: Any
    key_n: Any
    value: Any
    value_g: Any
    value_n: Any


class Biases(NamedTuple):
    """What is known of a sample's scores within a block of n rows."""

    given: Any  # scores of the own columns [H, n], or None; `given_h` apart
    given_h: Any
    strict: Any  # biases [H, n, n], or None; `strict_h` apart
    strict_h: Any
    n: Any


class QueryMap(NamedTuple):
    """The query map of a sample, whose rows count from the block's first."""

    weight: Any  # Omega_Q, or None
    weight_o: Any
    constant: Any  # the bias; None if there is none, or if it does not matter
    added: Any  # the input's part [n, G d]; None likewise
    turn: Any  # cosines [n, d / 2], or None; sines are `turn_half` numbers after them
    turn_half: Any


@triton.jit
def columns_from(key, key_b, key_h, key_n, value, value_b, value_g, value_n, b, first):
    """The columns of sample b."""
    # The heads of a sample may be more than 2^31 numbers apart.
    return Columns(
        key + b * key_b + first.to(tl.int64) * key_n, tl.cast(key_h, tl.int64), key_n,
        value + b * value_b + first.to(tl.int64) * value_n, tl.cast(value_g, tl.int64), value_n,
    )  # fmt: skip


@triton.jit
def biases_from(given, strict, strict_b, strict_h, b, first, n, heads: tl.constexpr, length):
    """The biases of sample b."""
    if given is not None:
        given += b * heads * length + first
    if strict is not None:
        strict += b * strict_b
    return Biases(given, length, strict, strict_h, n)


@triton.jit
def query_map_from(weight, weight_o, constant, added, turn, turn_b, turn_half, b, first, length, constants):
    """The query map of sample b."""
    if added is not None:
        added += (b * length + first) * constants.groups * constants.dim
    if turn is not None:
        turn += b * turn_b + first * (constants.dim // 2)
    return QueryMap(weight, weight_o, constant, added, turn, turn_half)


@triton.jit
def load_rows(tensor, stride, first, valid, dim: tl.constexpr, dp: tl.constexpr):
    """Rows `first .. first + R` of a matrix with contiguous columns, `[R, dp]`, zero outside."""
    rows = tl.arange(0, R)
    at = tl.arange(0, dp)
    inside = (rows < valid)[:, None] & (at < dim)[None, :]
    return tl.load(tensor + (first + rows).to(tl.int64)[:, None] * stride + at[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(tensor, stride, first, valid, tile, dim: tl.constexpr, dp: tl.constexpr):
    """Store rows `first .. first + R`, the counterpart of `load_rows`."""
    rows = tl.arange(0, R)
    at = tl.arange(0, dp)
    inside = (rows < valid)[:, None] & (at < dim)[None, :]
    pointers = tensor + (first + rows).to(tl.int64)[:, None] * stride + at[None, :]
    tl.store(pointers, tile.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def load_scratch(scratch, dp: tl.constexpr):
    """Load a tile `[R, dp]` of scratch."""
    return tl.load(scratch + tl.arange(0, R)[:, None] * dp + tl.arange(0, dp)[None, :])


@triton.jit
def store_scratch(scratch, tile, dp: tl.constexpr):
    """Store a tile `[R, dp]` of scratch."""
    tl.store(scratch + tl.arange(0, R)[:, None] * dp + tl.arange(0, dp)[None, :], tile)


@triton.jit
def load_key(columns, h, first, valid, constants):
    """A head's keys `[R, dp]`."""
    return load_rows(columns.key + h * columns.key_h, columns.key_n, first, valid, constants.dim, constants.dp)


@triton.jit
def load_value(columns, g, first, valid, constants):
    """A group's values `[R, dp]`."""
    return load_rows(columns.value + g * columns.value_g, columns.value_n, first, valid, constants.dim, constants.dp)


@triton.jit
def load_bias(biases, h, first, column, wide: tl.constexpr):
    """The biases `[R, R]` of rows from `first` on and columns from `column` on."""
    rows = first + tl.arange(0, R)
    columns = column + tl.arange(0, R)
    inside = (rows < biases.n)[:, None] & (columns < biases.n)[None, :]
    strict = biases.strict + h * biases.strict_h
    return tl.load(strict + rows[:, None] * biases.n + columns[None, :], mask=inside, other=0.0).to(wide)


@triton.jit
def load_own_bias(biases, h, first, valid, wide: tl.constexpr):
    """The biases of rows with their own columns, `[R]`."""
    rows = tl.arange(0, R)
    strict = biases.strict + h * biases.strict_h
    return tl.load(strict + (first + rows) * (biases.n + 1), mask=rows < valid, other=0.0).to(wide)


@triton.jit
def load_own_score(biases, h, first, valid, wide: tl.constexpr):
    """The given scores of rows with their own columns, `[R]`, biases included."""
    rows = tl.arange(0, R)
    own = tl.load(biases.given + h * biases.given_h + first + rows, mask=rows < valid, other=0.0).to(wide)
    if biases.strict is not None:
        own += load_own_bias(biases, h, first, valid, wide)
    return own


@triton.jit
def turned(tile, query_map, swap, first, valid, back: tl.constexpr, constants):
    """Rotate rows `[R, dp]` by the angles of their positions, or `back`; `swap` is a tile of scratch."""
    dim: tl.constexpr = constants.dim
    dp: tl.constexpr = constants.dp
    rows = tl.arange(0, R)
    at = tl.arange(0, dp)
    half: tl.constexpr = dim // 2
    tl.debug_barrier()  # all threads have read the last contents of `swap`
    store_scratch(swap, tile, dp)
    tl.debug_barrier()
    partner = tl.where(at < half, at + half, tl.where(at < dim, at - half, at))
    other = tl.load(swap + rows[:, None] * dp + partner[None, :])
    inside = (rows < valid)[:, None] & (at < dim)[None, :]
    angle = query_map.turn + (first + rows)[:, None] * half + tl.where(at < half, at, at - half)[None, :]
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + query_map.turn_half, mask=inside, other=0.0)
    sign = tl.where((at < half) == back, 1.0, -1.0)
    return tile * cos + other * sin * sign[None, :]
