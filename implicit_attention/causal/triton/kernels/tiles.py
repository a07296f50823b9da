"""What the one-program kernels share: tiles of 16 rows, and the rotation of the query map."""

import triton
import triton.language as tl

ROWS = 16  # rows that are settled together: the smallest tile of `tl.dot`, since sweeps grow with the rows
R = tl.constexpr(ROWS)
# One stage, so no software pipeline: it would move loads ahead of the barriers that guard the scratch.
LAUNCH = {"num_warps": 4, "num_stages": 1}


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
def load_bias(strict, first, column, stride, n, wide: tl.constexpr):
    """The biases `[R, R]` of rows from `first` on and columns from `column` on, in a block of n rows."""
    rows = first + tl.arange(0, R)
    columns = column + tl.arange(0, R)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(strict + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(wide)


@triton.jit
def turned(tile, turn, swap, turn_half, first, valid, back: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr):
    """Rotate rows `[R, dp]` by the angles of their positions, or `back`; `swap` is a tile of scratch.

    `turn` points to the sample's cosines `[N, d / 2]`; the sines are `turn_half` numbers after them.

    Returns:
        The rotated rows.
    """
    rows = tl.arange(0, R)
    at = tl.arange(0, dp)
    half: tl.constexpr = dim // 2
    tl.debug_barrier()  # all threads have read the last contents of `swap`
    store_scratch(swap, tile, dp)
    tl.debug_barrier()
    partner = tl.where(at < half, at + half, tl.where(at < dim, at - half, at))
    other = tl.load(swap + rows[:, None] * dp + partner[None, :])
    inside = (rows < valid)[:, None] & (at < dim)[None, :]
    angle = turn + (first + rows)[:, None] * half + tl.where(at < half, at, at - half)[None, :]
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + turn_half, mask=inside, other=0.0)
    sign = tl.where((at < half) == back, 1.0, -1.0)
    return tile * cos + other * sin * sign[None, :]
