"""The residual of an iterate, and the size that it is judged by, in one pass over memory, in Triton."""

import triton
import triton.language as tl

SPAN = 4096  # numbers of a program: enough to hide the launch, few enough that long rows fill the device


@triton.jit
def bits(x):
    """The bits of absolute values: integers in the order of the values, with NaN above Inf above every number."""
    if x.dtype == tl.float64:
        found = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        found = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return found


@triton.jit(do_not_specialize=["length", "count"])
def largest_in_rows(y, f, found, length, count, span: tl.constexpr):
    """Raise `found` to the largest `|f - y|` and the largest `|f|` of each row. The order of programs has no effect.

    Args:
        y: `[count, length]`, contiguous.
        f: The same.
        found: Bits of absolute values `[2, count]`; zeros before the call.
        length: Numbers of a row.
        count: Rows.
        span: Numbers of a program; each row takes `ceil(length / span)` programs.
    """
    parts = tl.cdiv(length, span)
    row = (tl.program_id(0) // parts).to(tl.int64)
    at = (tl.program_id(0) % parts).to(tl.int64) * span + tl.arange(0, span)
    inside = at < length
    before = tl.load(y + row * length + at, mask=inside, other=0.0)
    after = tl.load(f + row * length + at, mask=inside, other=0.0)
    tl.atomic_max(found + row, tl.max(bits(after - before), 0), sem="relaxed")
    tl.atomic_max(found + count + row, tl.max(bits(after), 0), sem="relaxed")
