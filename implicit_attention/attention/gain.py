r"""How fast a map without a triangular structure contracts: a bound for any weights, and the factor made from it.

Row i of head h is `y_ih = sum_j P_ij v_jh`, with scores `s_ij = scale k_ih . (f Omega y_j + W_Q x_j) + bias_ij`. The
weights of a row sum to 1, so its derivative is `sum_j P_ij (v_jh - y_ih) (ds_ij - m)` for any m. In every direction u

    u . dy_ih <= max_j |ds_ij| sum_j P_ij |u . (v_jh - y_ih)| <= max_j |ds_ij| R_h,

where a ball of radius `R_h` holds the head's values: a mean absolute deviation is at most half the range. With
`|ds_ij| <= f scale |Omega_h^T k_ih| |dy_j|`, and heads put together, the map contracts by `f L` in the norm
`max_j |y_j|`:

    L = max_i sqrt(sum_h (R_h scale |Omega_h^T k_ih|)^2).

If rows belong to queries, all scores of a row move with its own `dy_i`. Tokens are systems of their own, a constant may
be taken from all keys, and `L = sqrt(sum_h (R_h scale max_j |Omega_h^T (k_j - c)|)^2)`.

The kernels round. Outputs are off by a few epsilons of their dtype, and weights by a few epsilons of float32 or float64
times the size of their scores, even where all values are equal. So the squares of these, times `|v|^2`, are added to
`R_h^2`. A few epsilons more keep the part of the scores that depends on y below `1 / sqrt(epsilon)`, where that holds.

`docs/choosing.md` says what masks, dropout and rotary positions change.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention.map import for_heads, split_heads

ROUNDINGS = 4.0  # of a pass over the values, in units of the machine epsilon of its dtype and of the largest value
_SQUARINGS = 5  # the bound of a norm is too large by a factor of at most d^(1 / 2^(_SQUARINGS + 2)), 3 % at d = 64


class Gain(NamedTuple):
    """A Lipschitz constant of the map in y, squared, in float32 or wider.

    Attributes:
        squared: Of each sample, `[B, 1]`; of each token's document, `[B, M]`, if samples hold several.
        rows: Of each row, `[B, M]`; None if rows belong to queries.
    """

    squared: Tensor
    rows: Tensor | None

    def factor(self, max_gain: float) -> Tensor:
        """Return `min(1, max_gain / L)`, of the shape of `squared`."""
        least = max(max_gain**2, torch.finfo(self.squared.dtype).tiny)
        factor: Tensor = max_gain * self.squared.clamp_min(least).rsqrt()
        return factor


def gain(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    scale: float,
    rows_are_keys: bool,
    rotated: bool = False,
    dropout: float = 0.0,
    hidden: Tensor | None = None,
    made: Tensor | None = None,
    starts: Tensor | None = None,
) -> Gain:
    """Return the bound for `f = 1`.

    Args:
        key: `[B, H, M, d]`, `[B, G, M, d]` if rows belong to queries; normed and rotated, if they are.
        value: `[B, G, M, d]`.
        weight: `Omega_Q`, `[G d, D]`, `[H d, D]` if rows belong to queries. The dtype of all three is the solve's.
        scale: Factor on the scores.
        rows_are_keys: As in `AttentionMap`.
        rotated: Whether queries are rotated. The bound then holds for all offsets: `|Omega_h^T R k| <= |Omega_h| |k|`.
        dropout: Probability p. A dropped weight stands for a value of 0, any other for `v / (1 - p)`.
        hidden: Columns hidden from every row, `[B, M]`: they count neither as values nor as rows.
        made: What queries are made of besides y, `[B, M, G d]`; None if nothing, or if rows belong to queries.
        starts: Where the document of each token begins, `[B, M]`, if a mask keeps documents apart; None if samples
            are documents.

    Returns:
        The bound.
    """
    stored = ROUNDINGS * torch.finfo(value.dtype).eps
    key, value, weight = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (key, value, weight))
    if not rows_are_keys:
        key = centred(key, hidden, starts)
    hidden, starts = (None if t is None else t[:, None] for t in (hidden, starts))  # [B, 1, M]
    pulled = _pulled(key, weight, rotated)  # [B, H, M]
    heads = pulled.shape[1]
    computed = ROUNDINGS * torch.finfo(value.dtype).eps
    # Without `made` nothing: torch.export cannot save a region without gradients that has no operations.
    given = 0.0 if made is None else _given_scores(key, made, scale, heads, hidden, starts)  # [B, H, 1 or M]
    rounding = stored**2 + computed + computed**2 * given
    radius, size = (for_heads(t, heads) for t in _ball(value, dropout, hidden, starts))
    by_head = pulled * (scale**2 * (radius + rounding * size))
    if not rows_are_keys:
        return Gain(_largest(by_head, hidden, starts).sum(1), None)
    rows = by_head.sum(1, keepdim=True)
    return Gain(_largest(rows, hidden, starts)[:, 0], rows[:, 0])


def centred(key: Tensor, hidden: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """Return keys less the mean of those that are not hidden, which changes no weight if rows belong to queries.

    Args:
        key: `[B, G, M, d]`.
        hidden: Columns hidden from every row, `[B, M]`.
        starts: As in `gain`.
    """
    return key - _mean(key, *(None if t is None else t[:, None] for t in (hidden, starts)))


def hidden_columns(padding: Tensor | None) -> Tensor | None:
    """Return the columns `[B, M]` that a padding mask hides from every row: where it is True, or `-inf`."""
    return padding if padding is None or padding.dtype == torch.bool else torch.isneginf(padding)


def predicted_steps(max_gain: float, reduction: float) -> int:
    """Return the steps after which plain iteration has made a distance smaller by a factor at least.

    Args:
        max_gain: The rate, in (0, 1).
        reduction: The factor, in (0, 1).
    """
    return math.ceil(math.log(reduction) / math.log(max_gain))


def _mean(t: Tensor, hidden: Tensor | None, starts: Tensor | None) -> Tensor:
    """The mean of the columns of `[B, G, M, d]` that are not hidden, `[B, G, 1, d]`; by document `[B, G, M, d]`."""
    if hidden is None and starts is None:
        return t.mean(-2, keepdim=True)
    seen = torch.ones_like(t[:, :1, :, :1]) if hidden is None else (~hidden[..., None]).to(t.dtype)
    total, count = (_sum(part, starts) for part in (t * seen, seen))
    mean: Tensor = total / count.clamp_min(1.0)
    return mean


def _sum(t: Tensor, starts: Tensor | None) -> Tensor:
    """The sum of the columns of `[B, G, M, d]`, `[B, G, 1, d]`; of those of each column's document, `[B, G, M, d]`."""
    if starts is None:
        return t.sum(-2, keepdim=True)
    place = starts[..., None].expand_as(t)
    return torch.zeros_like(t).scatter_add(-2, place, t).gather(-2, place)


@torch.no_grad()
def _given_scores(
    key: Tensor, made: Tensor, scale: float, heads: int, hidden: Tensor | None, starts: Tensor | None
) -> Tensor:
    """A bound of the squares of the scores at y = 0, `[B, H, 1 or M]`, without a gradient: it measures rounding."""
    made = split_heads(made.to(key.dtype), made.shape[-1] // key.shape[-1])
    sizes = (_largest(torch.linalg.vector_norm(t, dim=-1), hidden, starts) for t in (made, key))
    asked, given = (for_heads(size, heads) for size in sizes)
    largest = 1.0 / torch.finfo(key.dtype).eps  # beyond that nothing is left of the weights
    return (scale * given * asked).clamp_max(largest).square()


def _ball(value: Tensor, dropout: float, hidden: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """A ball around all that a weight can stand for: its squared radius, and a bound of squared values, `[B, G, 1]`."""
    mean = _mean(value, hidden, starts)
    radius, middle = _largest((value - mean).square().sum(-1), hidden, starts), mean.square().sum(-1)
    size = 2.0 * (radius + middle)
    if dropout:
        radius = torch.maximum(radius, middle) / (1.0 - dropout) ** 2
    return radius, size


def _largest(t: Tensor, hidden: Tensor | None, starts: Tensor | None) -> Tensor:
    """The largest of `[B, G, M]`, none negative, that is not hidden, `[B, G, 1]`; by document `[B, G, M]`."""
    t = t if hidden is None else t.masked_fill(hidden, 0.0)
    if starts is None:
        return t.amax(-1, keepdim=True)
    place = starts.expand_as(t)
    return torch.zeros_like(t).scatter_reduce(-1, place, t, "amax").gather(-1, place)


def _pulled(key: Tensor, weight: Tensor, rotated: bool) -> Tensor:
    """`|Omega_h^T k|^2`, or a bound of it for every rotation of k, `[B, H, M]`."""
    dim = key.shape[-1]
    by_head = weight.view(-1, dim, weight.shape[-1])
    gram = by_head @ by_head.mT  # [G, d, d], or [H, d, d]
    heads = max(len(gram), key.shape[1])
    gram = for_heads(gram[None], heads)[0]
    if rotated:
        bound: Tensor = for_heads(key.square().sum(-1), heads) * _largest_eigenvalue(gram)[:, None]
        return bound
    key = for_heads(key, heads)
    pulled: Tensor = ((key @ gram) * key).sum(-1).clamp_min(0.0)
    return pulled


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """A bound of the largest eigenvalue of positive matrices, `[H]`, from above: `|A^n|_F^(1 / n)`."""
    power, wide = 2**_SQUARINGS, gram.double()
    size = torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    found = torch.linalg.matrix_norm(torch.linalg.matrix_power(wide / size, power))
    bound: Tensor = size[:, 0, 0] * found.clamp_min(torch.finfo(torch.float64).tiny) ** (1.0 / power)
    return bound.to(gram.dtype)
