"""The residual of an iterate and the size it is judged by, in one pass over both."""

import triton
import triton.language as tl

SPAN = 4096  # numbers of a program


@triton.jit
def _bits(x):
    """The bits of moduli: integers in their order, Inf above every number and NaN above Inf."""
    whole = tl.int64 if x.dtype == tl.float64 else tl.int32
    return tl.abs(x).to(whole, bitcast=True)


@triton.jit(do_not_specialize=["length", "count"])
def largest_in_rows(y, f, found, length, count, span: tl.constexpr):
    """Raise `found` to the largest `|f - y|` and the largest `|f|` of each row; the order of programs is of no matter.

    Args:
        y: `[count, length]`, contiguous.
        f: The same.
        found: Bits of moduli `[2, count]`, zeros.
        length: Numbers of a row.
        count: Rows.
        span: Numbers of a program.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * span + tl.arange(0, span)
    inside = at < length
    before = tl.load(y + row * length + at, mask=inside, other=0.0)
    after = tl.load(f + row * length + at, mask=inside, other=0.0)
    tl.atomic_max(found + row, tl.max(_bits(after - before), 0))
    tl.atomic_max(found + count + row, tl.max(_bits(after), 0))
