"""What the adjoint kernel is told, and where its scratch lies."""

from typing import Any, NamedTuple

from implicit_attention.causal.numba.machine import exact, pointer_like, shifted

R = 4  # rows that are solved together

# What a call is told, by position in its array of integers: addresses, strides, sizes.
(
    KEY, VALUE, WEIGHT, TURN, Y, QUERY, INVERSE, LSE, GRAD, LATER, ALLOWED, STRICT, GIVEN, SCRATCH, NUMBERS,
    LAM, MADE, D_KEY, D_VALUE, OWN, GAIN, RESIDUAL, SUSPECT, SWEEPS, STATUS, BARRIER, THREAD,
    KEY_B, KEY_H, KEY_N, VALUE_B, VALUE_G, VALUE_N, TURN_B, TURN_HALF, STRICT_B, STRICT_H, SLOT,
    GRAD_B, GRAD_N, GRAD_H,
    TEAM, BATCH, HEADS, GROUPS, LENGTH, DIM, PADDED, WIDTH, VECTOR, FIRST, STOP, BLOCK, COUNT,
) = range(54)  # fmt: skip
SCALE, NORM, ZERO, ONE, INFINITY, INVERSE_DIM, NEAR_SINGULAR = range(7)


class Tensors(NamedTuple):
    """Pointers to tensors, and to one thread's or team's scratch."""

    key: Any
    value: Any
    weight: Any  # [H, G d, padded]
    turn: Any
    y: Any  # [B, N, H, d]
    query: Any  # [B, N, G, d]
    inverse: Any  # [B, N, G]
    lse: Any  # [B, H, N]
    grad: Any
    later: Any  # [B, N, G, d]
    allowed: Any  # [B]
    strict: Any
    given: Any
    numbers: Any
    lam: Any  # [B, n, H, d]
    made: Any  # [B, n, G d]
    d_key: Any  # [B, H, n, d]
    d_value: Any  # [B, G, n, d]
    own: Any  # [B, H, n]
    gain: Any  # [B, n, H, H]: the own Jacobians of suspects
    residual: Any  # [B]
    # Scratch
    keys: Any  # [H, n + R, padded], scaled
    keys_t: Any  # [H, d, width]
    lams: Any  # [H, n + R, padded]
    lams_t: Any  # [H, d, width]
    queries: Any  # [G, n + R, padded]
    weights: Any  # [H, R, width]: softmax weights of the rows on four columns
    slopes: Any  # [H, n + R, width]: transposed
    along: Any  # [H, n + R]: lam . y
    from_later: Any  # [G, R, padded]
    now: Any  # [H, R, padded]: lam of the four rows
    out: Any  # [H, R, padded]
    before: Any  # [R, G d]: the linear map's cotangent
    after: Any  # [R, G d]
    pairs: Any  # [H, R, R]: weights of the four rows on each other
    errors: Any  # [H]
    moves: Any  # [G, R]
    u: Any  # [H, R, padded]: how the four rows' outputs move with the logarithms of their own weights
    through: Any  # [H, R, padded]: the gradients of their own scores, by the linear map's output
    ascent: Any  # [H, H, R, padded]: by their outputs
    inverses: Any  # [R, H, H]: of I - M^T
    right: Any  # [R, H]


def scratch_sizes(heads: int, groups: int, dim: int, padded: int, width: int, block: int) -> tuple[int, ...]:
    """Return the elements of each part of the scratch, in the order of `Tensors`."""
    rows = block + R
    return (
        heads * rows * padded, heads * dim * width, heads * rows * padded, heads * dim * width,
        groups * rows * padded, heads * R * width, heads * rows * width, heads * rows, groups * R * padded,
        heads * R * padded, heads * R * padded, R * groups * dim, R * groups * dim, heads * R * R, heads, groups * R,
        heads * R * padded, heads * R * padded, heads * heads * R * padded, R * heads * heads, R * heads,
    )  # fmt: skip


@exact
def tensors(c: Any, f: Any, slot: int) -> Tensors:
    """Find everything, for the scratch in a slot."""
    heads, groups, d, padded, width, rows = c[HEADS], c[GROUPS], c[DIM], c[PADDED], c[WIDTH], c[BLOCK] + R
    keys = shifted(pointer_like(f, c[SCRATCH]), slot * c[SLOT])
    keys_t = shifted(keys, heads * rows * padded)
    lams = shifted(keys_t, heads * d * width)
    lams_t = shifted(lams, heads * rows * padded)
    queries = shifted(lams_t, heads * d * width)
    weights = shifted(queries, groups * rows * padded)
    slopes = shifted(weights, heads * R * width)
    along = shifted(slopes, heads * rows * width)
    from_later = shifted(along, heads * rows)
    now = shifted(from_later, groups * R * padded)
    out = shifted(now, heads * R * padded)
    before = shifted(out, heads * R * padded)
    after = shifted(before, R * groups * d)
    pairs = shifted(after, R * groups * d)
    errors = shifted(pairs, heads * R * R)
    moves = shifted(errors, heads)
    u = shifted(moves, groups * R)
    through = shifted(u, heads * R * padded)
    ascent = shifted(through, heads * R * padded)
    inverses = shifted(ascent, heads * heads * R * padded)
    right = shifted(inverses, R * heads * heads)
    return Tensors(
        pointer_like(f, c[KEY]), pointer_like(f, c[VALUE]), pointer_like(f, c[WEIGHT]), pointer_like(f, c[TURN]),
        pointer_like(f, c[Y]), pointer_like(f, c[QUERY]), pointer_like(f, c[INVERSE]), pointer_like(f, c[LSE]),
        pointer_like(f, c[GRAD]), pointer_like(f, c[LATER]), pointer_like(f, c[ALLOWED]), pointer_like(f, c[STRICT]),
        pointer_like(f, c[GIVEN]), f, pointer_like(f, c[LAM]), pointer_like(f, c[MADE]), pointer_like(f, c[D_KEY]),
        pointer_like(f, c[D_VALUE]), pointer_like(f, c[OWN]), pointer_like(f, c[GAIN]), pointer_like(f, c[RESIDUAL]),
        keys, keys_t, lams, lams_t, queries, weights, slopes, along, from_later, now, out, before, after, pairs,
        errors, moves, u, through, ascent, inverses, right,
    )  # fmt: skip
