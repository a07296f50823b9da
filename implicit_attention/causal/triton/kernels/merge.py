"""The merge of two parts of a softmax by log-sum-exp, in one pass over memory."""

import triton
import triton.language as tl

MERGED = 32  # rows of a program


@triton.jit(do_not_specialize=["first", "count"])
def merge_rows(
    y, lse, out, out_lse, out_b, out_h, out_n, lse_b, lse_h, length, first, count,
    heads: tl.constexpr, dim: tl.constexpr, dp: tl.constexpr, rows_: tl.constexpr,
):  # fmt: skip
    """Merge attention over more columns into the rows `first .. first + count` of `y` and `lse`, in place.

    Args:
        y: `[B, N, H, d]`, contiguous.
        lse: `[B, H, N]`, contiguous.
        out: `[B, H, count, d]`, rows contiguous.
        out_lse: `[B, H, count]`, rows contiguous.
        first: The first row.
        count: Rows.
    """
    system = tl.program_id(0).to(tl.int64)
    b = system // heads
    h = system % heads
    i = tl.program_id(1) * rows_ + tl.arange(0, rows_)
    at = tl.arange(0, dp)
    real = i < count
    inside = real[:, None] & (at < dim)[None, :]
    place = lse + system * length + first + i
    old = tl.load(place, mask=real, other=-float("inf"))
    new = tl.load(out_lse + b * lse_b + h * lse_h + i, mask=real, other=-float("inf")).to(old.dtype)
    peak = tl.maximum(old, new)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.exp(old - peak) + tl.exp(new - peak)
    seen = total != 0.0  # NaN too
    total = tl.where(seen, total, 1.0)
    share = tl.exp(new - peak) / total
    tl.debug_barrier()  # all warps load `lse` before one of them stores it
    tl.store(place, tl.where(seen, peak + tl.log(total), -float("inf")), mask=real)
    target = y + ((b * length + first + i)[:, None] * heads + h) * dim + at[None, :]
    before = tl.load(target, mask=inside, other=0.0)
    more = tl.load(out + b * out_b + h * out_h + i.to(tl.int64)[:, None] * out_n + at[None, :], mask=inside, other=0.0)
    tl.store(target, before + share[:, None] * (more.to(before.dtype) - before), mask=inside)
