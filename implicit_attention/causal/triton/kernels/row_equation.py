"""The row equation of one row in float64, inside a program: the methods of `rows.solve_rows` before the curve.

Vectors over heads have `hp` entries, a power of two. The padding heads have slope 0 and offset -inf, hence p = 0.
"""

import triton
import triton.language as tl

NEWTON_STEPS = tl.constexpr(8)  # these four as in `rows`, so that both find the same roots
DAMPED_STEPS = tl.constexpr(20)
BRACKET_STEPS = tl.constexpr(100)
FINE = tl.constexpr(1e-12)
STEEPEST = tl.constexpr(700.0)  # exp overflows float64 beyond 709


@triton.jit
def sigmoid(x, offset):
    """The sigmoid of `x + offset`, exactly 0 or 1 for an infinite offset."""
    inner = tl.minimum(tl.maximum(x + tl.where(tl.abs(offset) == float("inf"), 0.0, offset), -STEEPEST), STEEPEST)
    inside = 1.0 / (1.0 + tl.exp(-inner))
    return tl.where(offset == float("inf"), 1.0, tl.where(offset == -float("inf"), 0.0, inside))


@triton.jit
def evaluate(alpha, beta, offset, gram, p, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr):
    """Return `sigmoid(score(p) + offset)` `[hp]` and the scores' Jacobian `[hp, hp]`.

    `gram` points to `[hp, hp]`, `[hp]` and `[1]` of each group: the quadratic, linear and constant part of the mean
    square of the group's query. It is None for linear scores.
    """
    h = tl.arange(0, hp)
    score = alpha + tl.sum(beta * p[None, :], 1)
    slope = beta
    if gram is not None:
        shared: tl.constexpr = heads // groups
        inverse = tl.full([hp], 1.0, tl.float64)
        halves = tl.zeros([hp, hp], tl.float64)
        for g in range(groups):
            of = gram + g * (hp * hp + hp + 1)
            quadratic = tl.load(of + h[:, None] * hp + h[None, :]).to(tl.float64)
            linear = tl.load(of + hp * hp + h).to(tl.float64)
            half = linear + tl.sum(quadratic * p[None, :], 1)
            square = tl.load(of + hp * hp + hp).to(tl.float64) + tl.sum(linear * p, 0) + tl.sum(half * p, 0)
            mine = h // shared == g
            inverse = tl.where(mine, 1.0 / tl.sqrt(square), inverse)
            halves = tl.where(mine[:, None], half[None, :], halves)
        score *= inverse
        slope = (beta - (score * inverse)[:, None] * halves) * inverse[:, None]
    return sigmoid(score, offset), slope


@triton.jit
def eliminate(matrix, right, size: tl.constexpr, padded: tl.constexpr):
    """Solve `matrix x = right` `[padded, c]` for the first `size` unknowns, by Gauss-Jordan elimination with pivots.

    Returns:
        The solution with rows in the order of the pivots, and the unknown of each row, -1 for padding.
    """
    i = tl.arange(0, padded)
    place = tl.full([padded], -1, tl.int32)
    for k in range(size):
        column = tl.sum(tl.where(i[None, :] == k, matrix, 0.0), 1)
        best = tl.argmax(tl.where((place < 0) & (i < size), tl.abs(column), -1.0), 0)
        chosen = i == best
        pivot = tl.sum(tl.where(chosen, column, 0.0), 0)
        pivot = tl.where(pivot == 0.0, 1e-30, pivot)  # singular: the huge solution fails every later test
        row = tl.sum(tl.where(chosen[:, None], matrix, 0.0), 0) / pivot
        entry = tl.sum(tl.where(chosen[:, None], right, 0.0), 0) / pivot
        matrix = tl.where(chosen[:, None], row[None, :], matrix - column[:, None] * row[None, :])
        right = tl.where(chosen[:, None], entry[None, :], right - column[:, None] * entry[None, :])
        place = tl.where(chosen, k, place)
    return right, place


@triton.jit
def _newton(target, slope, p, heads: tl.constexpr, hp: tl.constexpr):
    """The Newton step: `(I - Jacobian) step = target - p`."""
    h = tl.arange(0, hp)
    eye = tl.where(h[:, None] == h[None, :], 1.0, 0.0).to(tl.float64)
    matrix = eye - (target * (1.0 - target))[:, None] * slope
    found, place = eliminate(matrix, (target - p)[:, None], heads, hp)
    return tl.sum(tl.where(place[:, None] == h[None, :], found, 0.0), 0)


@triton.jit
def _clamp(p):
    return tl.minimum(tl.maximum(p, 0.0), 1.0)


@triton.jit
def _largest(step):
    return tl.max(tl.abs(step), 0)


@triton.jit
def _settle(alpha, beta, offset, gram, p, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr):
    """Three Picard steps from p = 1, then Newton if they contract."""
    target, slope = evaluate(alpha, beta, offset, gram, p, heads, groups, hp)
    before = _largest(target - p)
    inside = before < float("inf")
    p = target
    for _ in range(2):
        target, slope = evaluate(alpha, beta, offset, gram, p, heads, groups, hp)
        length = _largest(target - p)
        inside = inside & (length <= tl.maximum(0.5 * before, FINE))
        before = length
        p = target
    start = p
    reach = tl.maximum(before, FINE)
    target, slope = evaluate(alpha, beta, offset, gram, p, heads, groups, hp)
    residual = _largest(target - p)
    step = 0
    while (step < NEWTON_STEPS) & inside & (residual > FINE):
        p = _clamp(p + _newton(target, slope, p, heads, hp))
        inside = _largest(p - start) <= reach
        target, slope = evaluate(alpha, beta, offset, gram, p, heads, groups, hp)
        residual = _largest(target - p)
        step += 1
    return p, inside & (residual <= FINE)


@triton.jit
def _damped(alpha, beta, offset, gram, p, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr):
    """Newton from p = 1; each step takes the first of the lengths 1, 1/2, 1/4 at which the residual falls enough."""
    target, slope = evaluate(alpha, beta, offset, gram, p, heads, groups, hp)
    residual = _largest(target - p)
    falls = residual < float("inf")
    step = 0
    while (step < DAMPED_STEPS) & falls & (residual > FINE):
        change = _newton(target, slope, p, heads, hp)
        falls = residual < 0.0
        length = residual * 0.0 + 1.0
        before = residual
        at = p
        for _ in range(3):
            if (falls == 0) & (_largest(change) < float("inf")):
                trial = _clamp(at + length * change)
                new_target, new_slope = evaluate(alpha, beta, offset, gram, trial, heads, groups, hp)
                rest = _largest(new_target - trial)
                if rest <= (1.0 - 0.25 * length) * before:
                    falls = rest <= before
                    p, target, slope, residual = trial, new_target, new_slope, rest
                length = 0.5 * length
        step += 1
    return p, residual <= FINE


@triton.jit
def _largest_root(beta, c, infinite):
    """One head, linear score: Newton in a bracket that holds only the largest root; all are float64 scalars."""
    steep = tl.maximum(beta, 4.0)
    # Where beta > 4, sigmoid(c + beta p) - p falls, rises and falls: it turns where the sigmoid's slope is 1 / beta.
    root = 1.0 + tl.sqrt(1.0 - 4.0 / steep)
    turn = tl.log(root * root * steep * 0.25)
    peak = (turn - c) / steep
    bent = (beta > 4.0) & (peak > 0.0)
    above = bent & (peak < 1.0) & (1.0 / (1.0 + tl.exp(-turn)) >= peak)
    low = tl.where(above, peak, 0.0)
    high = tl.where(bent & (above == 0), tl.minimum(tl.maximum((-turn - c) / steep, 0.0), 1.0), 1.0)
    aim = tl.maximum(0.25 * 2.220446049250313e-16 * (4.0 + tl.abs(beta) + tl.abs(c)), 0.1 * FINE)
    p = high
    before = p * 0.0 + 2.0
    size = before
    step = 0
    while (step < BRACKET_STEPS) & (size > aim) & (infinite == 0):
        inner = tl.minimum(tl.maximum(c + beta * p, -STEEPEST), STEEPEST)
        value = 1.0 / (1.0 + tl.exp(-inner))
        excess = value - p
        size = tl.abs(excess)
        if size > aim:
            low = tl.where(excess > 0.0, p, low)
            high = tl.where(excess < 0.0, p, high)
            slope = value * (1.0 - value) * beta - 1.0
            trial = p - excess / tl.where(slope == 0.0, 1.0, slope)
            trusted = (trial >= low) & (trial <= high) & (size <= 0.5 * before) & (slope != 0.0)
            p = tl.where(trusted, trial, 0.5 * (low + high))
            before = size
        step += 1
    return p, (size <= aim) | infinite


@triton.jit
def solve_row(alpha, beta, offset, gram, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr):
    """Return the root that `rows.solve_rows` describes, `[hp]`, and whether it was found without the curve.

    alpha and offset `[hp]` and beta `[hp, hp]` are float64; `gram` is as in `evaluate`.
    """
    h = tl.arange(0, hp)
    ones = tl.where(h < heads, 1.0, 0.0).to(tl.float64)
    if heads == 1 and gram is None:
        first = tl.sum(tl.where(h == 0, offset, 0.0), 0)
        infinite = tl.abs(first) == float("inf")
        c = tl.sum(alpha, 0) + tl.where(infinite, 0.0, first)
        root, solved = _largest_root(tl.sum(tl.sum(beta, 1), 0), c, infinite)
        p = tl.where(infinite, tl.where(first > 0.0, ones, 0.0), root * ones)
    else:
        p, solved = _settle(alpha, beta, offset, gram, ones, heads, groups, hp)
        if solved == 0:
            p, solved = _damped(alpha, beta, offset, gram, ones, heads, groups, hp)
    return p, solved


@triton.jit
def add_group(
    alpha, beta, base, ways, own_key, grams, g, scale: tl.constexpr, eps: tl.constexpr, normed: tl.constexpr,
    dim: tl.constexpr, hp: tl.constexpr,
):  # fmt: skip
    """Add the part of one group's query `base + sum_h p_h ways_h` to a row equation: scores and mean square.

    Args:
        alpha: Sum over earlier groups, `[hp]`.
        beta: Sum over earlier groups, `[hp, hp]`.
        base: Query at p = 0, `[dp]`.
        ways: Derivative of the query by each head's p, `[hp, dp]`.
        own_key: The row's keys before their rotation, `[hp, dp]`, zero in the heads of other groups.
        grams: The quadratic forms for `evaluate`; this group's is filled.
        g: The group.

    Returns:
        alpha and beta.
    """
    h = tl.arange(0, hp)
    alpha += tl.sum(own_key * base[None, :], 1) * scale
    beta += tl.dot(own_key, tl.trans(ways), input_precision="ieee") * scale
    if normed:
        of = grams + g * (hp * hp + hp + 1)
        quadratic = tl.dot(ways, tl.trans(ways), input_precision="ieee") / dim
        tl.store(of + h[:, None] * hp + h[None, :], quadratic)
        tl.store(of + hp * hp + h, tl.sum(ways * base[None, :], 1) / dim)
        tl.store(of + hp * hp + hp, tl.sum(base * base, 0) / dim + eps)
    return alpha, beta
