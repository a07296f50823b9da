"""Row equations of single rows in a settled block: list the rows, gather their equations, compare their roots.

`attend_rows` marks rows whose own weight is far from that at y = v. `list_rows` lists them, `own_equations` gathers
their equations, `token.settle_token` finds the roots, and `compare_roots` compares them with the settled state.
"""

import triton
import triton.language as tl

from implicit_attention.causal.triton.kernels.sweep import SPAN, rotated

SAME, ELSEWHERE, LOST = 0, 1, 2  # the sweeps ended at the row's root; at another one; or no root was found
_ELSEWHERE, _LOST = tl.constexpr(ELSEWHERE), tl.constexpr(LOST)


@triton.jit(do_not_specialize=["batch", "n", "count"])
def list_rows(far, status, counts, listed, batch, n, count, samples_: tl.constexpr):
    """List the rows that are far, sample by sample.

    Args:
        far: As in `sweep.attend_rows`.
        status: As `sweep.judge_rows` leaves it.
        counts: Likewise.
        listed: `[2, count]`, filled with samples and with rows of the block.
        count: The sum of `counts`.
    """
    b = tl.program_id(0).to(tl.int64)
    state = tl.load(status + b)
    if state > -2:
        return
    every = tl.arange(0, samples_)
    begin = tl.sum(tl.load(counts + every, mask=every < b, other=0), 0)
    far += ((-2 - state) * batch + b) * n
    for i in range(0, n, SPAN):
        at = i + tl.arange(0, SPAN)
        marked = tl.load(far + at, mask=at < n, other=0)
        into = listed + begin + tl.cumsum(marked, 0) - 1
        tl.store(into, b.to(tl.int32) + at * 0, mask=marked > 0)
        tl.store(into + count, at, mask=marked > 0)
        begin += tl.sum(marked, 0)


@triton.jit(do_not_specialize=["batch", "n", "count", "length"])
def own_equations(
    listed, status, key, value, query, strict, turn, state, lse, keys, ends, sums, weights,
    key_b, key_h, key_n, value_b, value_g, value_n, strict_b, strict_h, turn_b, turn_half,
    batch, length, where, n, count,
    scale: tl.constexpr, least: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """Gather one head's part of the row equation of a listed row.

    Args:
        listed: As `list_rows` leaves it.
        status: As there.
        key: As in `sweep.attend_rows`, like all arguments that are not listed.
        value: `[B, G, N, d]`.
        query: `[B, N, G, d]`.
        strict: `[1 or B, 1 or H, n, n]` or None.
        turn: As in `sweep.make_queries`.
        state: `[2, B, n, H, d]`.
        lse: `[B, H, n]`.
        keys: `[count, H, d]`, filled with the row's keys before their rotation, times the scale.
        ends: `[2, count, H, d]`, filled with attention a to all other columns, and with value - a.
        sums: `[count, H]`, filled with the log-sum-exp of the other columns minus the bias of the own column.
        weights: `[count, H]`, filled with the weights on the own column.
        count: Number of listed rows.
        least: Lower bound of the weight of all other columns, one rounding: a divides by that weight.
    """
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    g = h // (heads // groups)
    b = tl.load(listed + r).to(tl.int64)
    i = tl.load(listed + count + r).to(tl.int64)
    place = tl.load(where) + i
    at = tl.arange(0, dim)
    k = tl.load(key + b * key_b + h * key_h + place * key_n + at).to(wide)
    q = tl.load(query + ((b * length + place) * groups + g) * dim + at).to(wide)
    own = tl.sum(k * q, 0) * scale
    bias = own * 0.0
    if strict is not None:
        bias = tl.load(strict + b * strict_b + h * strict_h + i * (n + 1))
    total = tl.load(lse + (b * heads + h) * n + i)
    p = tl.exp(own + bias - total)
    others = tl.maximum(1.0 - p, least)
    v = tl.load(value + b * value_b + g * value_g + place * value_n + at).to(wide)
    settled_at = -2 - tl.load(status + b)
    new = (1 - settled_at % 2) * batch.to(tl.int64) + b  # the half of `state` that holds F of the iterate
    y = tl.load(state + ((new * n + i) * heads + h) * dim + at)
    a = (y - p * v) / others
    if turn is not None:
        there = place + tl.zeros([1], tl.int64)
        k = rotated(tl.reshape(k, [1, 1, dim]), turn + b * turn_b, turn_half, there, there >= 0, True, 1, dim // 2)
        k = tl.reshape(k, [dim])
    into = (r * heads + h) * dim + at
    tl.store(keys + into, k * scale)
    tl.store(ends + into, a)
    tl.store(ends + count.to(tl.int64) * heads * dim + into, v - a)
    tl.store(sums + r * heads + h, total + tl.log(others) - bias)
    tl.store(weights + r * heads + h, p)


@triton.jit
def compare_roots(weights, roots, moved, outcome, same: tl.constexpr, heads: tl.constexpr, hp: tl.constexpr):
    """Compare the own weights of the sweeps with the roots of the row equations.

    Args:
        weights: Own weights of the sweeps, `[count, H]`.
        roots: Roots, `[count, H]`.
        moved: Residuals of the roots, `[count, H]`, not finite if no root was found.
        outcome: `[count]`, filled with SAME, ELSEWHERE or LOST.
        same: Largest difference of equal weights.
    """
    r = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, hp)
    real = h < heads
    at = r * heads + h
    apart = tl.abs(tl.load(roots + at, mask=real, other=0.0) - tl.load(weights + at, mask=real, other=0.0))
    lost = tl.where(tl.abs(tl.load(moved + at, mask=real, other=0.0)) < float("inf"), 0, 1)
    found = tl.where(tl.max(apart, 0) > same, _ELSEWHERE, 0)
    tl.store(outcome + r, tl.where(tl.sum(lost, 0) > 0, _LOST, found))
