"""The residual of an iterate and the size it is judged by, in one pass over both."""

import triton
import triton.language as tl

SPAN = 4096  # numbers of a program


@triton.jit
def bits(x):
    """The bits of moduli: integers in their order, Inf above every number and NaN, of either sign, above Inf."""
    if x.dtype == tl.float64:
        found = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        found = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return found


@triton.jit(do_not_specialize=["length", "count"])
def largest_in_rows(y, f, found, length, count, span: tl.constexpr):
    """Raise `found` to the largest `|f - y|` and the largest `|f|` of each row; the order of programs is of no matter.

    Args:
        y: `[count, length]`, contiguous.
        f: The same.
        found: Bits of moduli `[2, count]`, zeros.
        length: Numbers of a row.
        count: Rows.
        span: Numbers of a program; each row has as many programs as it takes, one row after another.
    """
    parts = tl.cdiv(length, span)
    row = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts).to(tl.int64) * span + tl.arange(0, span)
    inside = at < length
    before = tl.load(y + row * length + at, mask=inside, other=0.0)
    after = tl.load(f + row * length + at, mask=inside, other=0.0)
    tl.atomic_max(found + row, tl.max(bits(after - before), 0), sem="relaxed")
    tl.atomic_max(found + count + row, tl.max(bits(after), 0), sem="relaxed")
