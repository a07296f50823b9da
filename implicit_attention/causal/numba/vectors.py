"""Loops over vectors by pointer, which the compiler turns into vector instructions."""

from typing import Any

from implicit_attention.causal.numba.machine import bits, compiled, exact, exp_of, fast, number_of, shifted


@fast
def dot(a: Any, b: Any, n: int, total: Any) -> Any:
    """`total + a . b`."""
    for i in range(n):
        total += a[i] * b[i]
    return total


@compiled({"nnan", "nsz"})
def peak_of(a: Any, n: int, peak: Any) -> Any:
    """The largest entry, or `peak` if that is larger."""
    for i in range(n):
        peak = a[i] if a[i] > peak else peak
    return peak


@fast
def scale_and_add(a: Any, n: int, scale: Any, bias: Any, biased: bool) -> None:
    """`a = scale a + bias`."""
    if biased:
        for i in range(n):
            a[i] = a[i] * scale + bias[i]
    else:
        for i in range(n):
            a[i] = a[i] * scale


@fast
def exponentials(a: Any, n: int, peak: Any, total: Any) -> Any:
    """`a = exp(a - peak)`; their sum, and `total`."""
    for i in range(n):
        a[i] = exp_of(a[i] - peak)
        total += a[i]
    return total


@fast
def mix(out: Any, n: int, weight: Any, other: Any, share: Any) -> None:
    """`out = weight out + share other`."""
    for i in range(n):
        out[i] = weight * out[i] + share * other[i]


@fast
def add(out: Any, n: int, other: Any, share: Any) -> None:
    """`out += share other`."""
    for i in range(n):
        out[i] += share * other[i]


@fast
def add_both(out: Any, n: int, a: Any, b: Any) -> None:
    """`out += a + b`."""
    for i in range(n):
        out[i] += a[i] + b[i]


@fast
def copy(out: Any, other: Any, n: int) -> None:
    """`out = other`."""
    for i in range(n):
        out[i] = other[i]


@fast
def fill(out: Any, n: int, value: Any) -> None:
    """`out = value`."""
    for i in range(n):
        out[i] = value


@fast
def combine(out: Any, share: Any, before: Any, p: Any, value: Any, stride: int, n: int) -> None:
    """`out = share before + sum_j p_j value_j` over four rows of values."""
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    v1, v2, v3 = shifted(value, stride), shifted(value, 2 * stride), shifted(value, 3 * stride)
    for i in range(n):
        out[i] = share * before[i] + p0 * value[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]


@compiled({"nnan", "nsz", "reassoc", "contract"})
def moved(y: Any, share: Any, before: Any, p: Any, value: Any, stride: int, n: int, zero: Any) -> tuple[Any, Any]:
    """The largest entries of `x = share before + sum_j p_j value_j` over four rows of values, and of `y + x`."""
    p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
    v1, v2, v3 = shifted(value, stride), shifted(value, 2 * stride), shifted(value, 3 * stride)
    far, size = zero, zero
    for i in range(n):
        x = share * before[i] + p0 * value[i] + p1 * v1[i] + p2 * v2[i] + p3 * v3[i]
        z = abs(y[i] + x)
        x = abs(x)
        far = x if x > far else far
        size = z if z > size else size
    return far, size


@exact
def largest(a: Any, n: int) -> Any:
    """The largest modulus; NaN if there is one."""
    best = bits(abs(a[0]))
    for i in range(n):
        best = max(best, bits(abs(a[i])))
    return number_of(best)


@exact
def largest_difference(a: Any, b: Any, n: int) -> Any:
    """The largest modulus of `a - b`; NaN if there is one."""
    best = bits(abs(a[0] - b[0]))
    for i in range(n):
        best = max(best, bits(abs(a[i] - b[i])))
    return number_of(best)


@fast
def turn(q: Any, cos: Any, sin: Any, half: int) -> None:
    """Rotate a query in place."""
    other = shifted(q, half)
    for i in range(half):
        a, b = q[i], other[i]
        q[i] = a * cos[i] - b * sin[i]
        other[i] = a * sin[i] + b * cos[i]


@fast
def unturn(q: Any, cos: Any, sin: Any, half: int) -> None:
    """Undo `turn`."""
    other = shifted(q, half)
    for i in range(half):
        a, b = q[i], other[i]
        q[i] = a * cos[i] + b * sin[i]
        other[i] = b * cos[i] - a * sin[i]
