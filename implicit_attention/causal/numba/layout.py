"""What the forward kernel is told, and where its scratch lies."""

from typing import Any, NamedTuple

from implicit_attention.causal.numba.machine import exact, pointer_like, shifted

R = 4  # rows that are settled together

# What a call is told, by position in its array of integers: addresses, strides, sizes.
(
    KEY, VALUE, WEIGHT, CONSTANT, ADDED, TURN, Y, QUERY, INVERSE, LSE, RESIDUAL, SIZE, STRICT, GIVEN, SCRATCH,
    BEFORE_Y, BEFORE_LSE, NUMBERS, SWEEPS, STATUS, BARRIER, THREAD,
    KEY_B, KEY_H, KEY_N, VALUE_B, VALUE_G, VALUE_N, TURN_B, TURN_HALF, STRICT_B, STRICT_H, SLOT,
    TEAM, BATCH, HEADS, GROUPS, LENGTH, DIM, PADDED, WIDTH, VECTOR, FIRST, STOP, BLOCK, COUNT,
) = range(46)  # fmt: skip
SCALE, EPS, RTOL, ATOL, ZERO, ONE, INFINITY, INVERSE_DIM, NEAR, SAME_ROOT, SLOW = range(11)


class Tensors(NamedTuple):
    """Pointers to tensors, and to one thread's or team's scratch."""

    key: Any
    value: Any
    weight: Any  # [G, H, d, padded]
    constant: Any  # [G d]
    added: Any  # [B, N, G d]
    turn: Any  # [2, 1 or B, N, d / 2]
    y: Any  # [B, N, H, d]
    query: Any  # [B, N, G, d]
    inverse: Any  # [B, N, G]
    lse: Any  # [B, H, N]
    residual: Any  # [B, N]
    size: Any  # [B, N]
    strict: Any  # [1 or B, 1 or H, n, n]
    given: Any  # [B, H, N]
    numbers: Any
    before_y: Any  # [B, n, H, d]
    before_lse: Any  # [B, H, n]
    # Scratch
    values: Any  # [G, n + R, padded]
    columns: Any  # [G, d, width]
    inputs: Any  # [H, 2 R, d]
    made: Any  # [G, 2 R, H, padded]
    keys: Any  # [H, R, d]
    scores: Any  # [G, R width + H]
    queries: Any  # [G, R, padded]
    fixed: Any  # [G, R, padded]
    norms: Any  # [G, R]
    iterates: Any  # [H, R, d]
    weights: Any  # [2, R, R, H]
    shares: Any  # [2, R, H]
    pairs: Any  # [R, R, H]: scores of the rows on each other
    bounds: Any  # [2, R, H]: on how far a sweep moves outputs
    errors: Any  # [R, H]: how far it moves them
    sizes: Any  # [R, H]
    before_sizes: Any  # [R, H]: the largest entries of attention before the rows
    value_sizes: Any  # [R, H]: and of their values
    four: Any  # [H, R]
    merged_lse: Any  # [R, H]
    start: Any  # [R, H]
    lse_parts: Any  # [3, R, H]: what scores were measured from, the sum of exponentials, that without the own one
    changes: Any  # [R, H]: of the own weight since y = v
    base: Any  # [H + G + 2, padded]
    verdict: Any  # [1]


def scratch_sizes(heads: int, groups: int, dim: int, padded: int, width: int, block: int) -> tuple[int, ...]:
    """Return the elements of each part of the scratch, in the order of `Tensors`."""
    return (
        groups * (block + R) * padded, groups * dim * width, heads * 2 * R * dim, groups * 2 * R * heads * padded,
        heads * R * dim, groups * (R * width + heads), groups * R * padded, groups * R * padded, groups * R,
        heads * R * dim, 2 * R * R * heads, 2 * R * heads, R * R * heads, 2 * R * heads, R * heads, R * heads,
        R * heads, R * heads, R * heads, R * heads, R * heads, 3 * R * heads, R * heads,
        (heads + groups + 2) * padded, 1,
    )  # fmt: skip


@exact
def tensors(c: Any, f: Any, slot: int) -> Tensors:
    """Find everything, for the scratch in a slot."""
    s = pointer_like(f, c[SCRATCH])
    heads, groups, d, padded, width, block = c[HEADS], c[GROUPS], c[DIM], c[PADDED], c[WIDTH], c[BLOCK]
    values = shifted(s, slot * c[SLOT])
    columns = shifted(values, groups * (block + R) * padded)
    inputs = shifted(columns, groups * d * width)
    made = shifted(inputs, heads * 2 * R * d)
    keys = shifted(made, groups * 2 * R * heads * padded)
    scores = shifted(keys, heads * R * d)
    queries = shifted(scores, groups * (R * width + heads))
    fixed = shifted(queries, groups * R * padded)
    norms = shifted(fixed, groups * R * padded)
    iterates = shifted(norms, groups * R)
    weights = shifted(iterates, heads * R * d)
    shares = shifted(weights, 2 * R * R * heads)
    pairs = shifted(shares, 2 * R * heads)
    bounds = shifted(pairs, R * R * heads)
    errors = shifted(bounds, 2 * R * heads)
    sizes = shifted(errors, R * heads)
    before_sizes = shifted(sizes, R * heads)
    value_sizes = shifted(before_sizes, R * heads)
    four = shifted(value_sizes, R * heads)
    merged_lse = shifted(four, R * heads)
    start = shifted(merged_lse, R * heads)
    lse_parts = shifted(start, R * heads)
    changes = shifted(lse_parts, 3 * R * heads)
    base = shifted(changes, R * heads)
    verdict = shifted(base, (heads + groups + 2) * padded)
    return Tensors(
        pointer_like(f, c[KEY]), pointer_like(f, c[VALUE]), pointer_like(f, c[WEIGHT]), pointer_like(f, c[CONSTANT]),
        pointer_like(f, c[ADDED]), pointer_like(f, c[TURN]), pointer_like(f, c[Y]), pointer_like(f, c[QUERY]),
        pointer_like(f, c[INVERSE]), pointer_like(f, c[LSE]), pointer_like(f, c[RESIDUAL]), pointer_like(f, c[SIZE]),
        pointer_like(f, c[STRICT]), pointer_like(f, c[GIVEN]), f, pointer_like(f, c[BEFORE_Y]),
        pointer_like(f, c[BEFORE_LSE]), values, columns, inputs, made, keys, scores, queries, fixed, norms, iterates,
        weights, shares, pairs, bounds, errors, sizes, before_sizes, value_sizes, four, merged_lse, start, lse_parts,
        changes, base, verdict,
    )  # fmt: skip
