"""What calls the Triton kernels for one decoded token per sample, and for the equations of single rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.causal.triton.call import TYPES, padded
from implicit_attention.causal.triton.kernels.token import prepare_ends, prepare_keys, settle_token


class Keys(NamedTuple):
    """Keys of the tokens.

    Attributes:
        key: As they enter scores, `[B, H, 1, d]`.
        scaled: Before their rotation, times the scale, `[B, H, d]`, float32 or wider.
    """

    key: Tensor
    scaled: Tensor


class Token(NamedTuple):
    """Solved tokens.

    Attributes:
        y: Outputs, `[B, 1, H d]`.
        column: Their queries, rotated, `[B, G, 1, d]`.
        judged: `[3, B]`: residuals, these over the outputs' sizes, and 1 where a token is within tolerance, else 0.
    """

    y: Tensor
    column: Tensor
    judged: Tensor


def keys(made: Tensor, temperature: Tensor | None, rotation: Tensor | None, scale: float, eps: float) -> Keys:
    """Norm, temper and rotate keys in one launch.

    Args:
        made: `[B, 1, H, d]`.
        temperature: `[H]` in their type, or None: no norm either.
        rotation: `[2, 1, d / 2]` or `[2, B, 1, 1, d / 2]`, or None.
        scale: Factor on the scores.
        eps: Of the norm.

    Returns:
        The keys.
    """
    batch, _, heads, dim = made.shape
    made = made.contiguous()
    key = torch.empty_like(made).view(batch, heads, 1, dim)
    scaled = made.new_empty(batch, heads, dim, dtype=torch.promote_types(made.dtype, torch.float32))
    turn, turn_b = _turn(rotation)
    prepare_keys[(heads, batch)](
        made, temperature, turn, key, scaled, turn_b, scale, eps, dim, padded(dim), heads, num_warps=1
    )
    return Keys(key, scaled)


def solve_token(
    key: Tensor, a: Tensor, lse: Tensor, value: Tensor, by_head: Tensor, fixed: Tensor | None,
    rotation: Tensor | None, eps: float | None, tolerance: tuple[float, float], dtype: torch.dtype,
    slot: tuple[Tensor, Tensor] | None,
) -> Token:  # fmt: skip
    """Solve the equation of one token per sample without a look at any number.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, float32 or wider.
        a: Attention over the columns before, `[B, H, d]`, in the type of the inputs.
        lse: Its log-sum-exp, `[B, H]`, in the type of `key`.
        value: The token's, `[B, G, d]`.
        by_head: Omega_Q by the head it reads, `[H, d, G d]`.
        fixed: What is added to what it makes, `[1 or B, G d]`, or None.
        rotation: As in `keys`.
        eps: Of the norm; None without one.
        tolerance: Relative and absolute.
        dtype: Of the outputs.
        slot: Where the tokens' queries and values belong, `[B, G, 1, d]`, of equal strides, filled; None: the queries
            get a tensor of their own.

    Returns:
        The tokens.
    """
    batch, heads, dim = key.shape
    groups, dp, hp = value.shape[1], padded(dim), padded(heads)
    a = a if a.stride(-1) == 1 else a.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    ends = by_head.new_empty(heads, 2 * batch, dim)
    prepare_ends[(heads, batch)](
        a, value, ends, *value.stride()[:2], *a.stride()[:2], batch, heads, groups, dim, dp, TYPES[key.dtype],
        num_warps=1,
    )  # fmt: skip
    made = torch.bmm(ends, by_head)
    y = a.new_empty(batch, 1, heads * dim, dtype=dtype)
    column, held = (value.new_empty(batch, groups, 1, dim), None) if slot is None else slot
    judged = key.new_empty(3, batch)
    turn, turn_b = _turn(rotation)
    settle_token[(batch,)](
        key, made, fixed, lse.contiguous(), a, value, turn, None, None, column, held, y, judged,
        key.new_empty(batch, groups, hp * hp + hp + 1), _step(fixed), *value.stride()[:2], *a.stride()[:2], turn_b,
        *column.stride()[:2], batch, *tolerance, 0.0 if eps is None else eps, eps is not None, heads, groups, dim, dp,
        hp, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Token(y, column, judged)


def solve_rows(
    key: Tensor, ends: Tensor, lse: Tensor, by_head: Tensor, fixed: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Solve the own equations of R rows in one launch.

    Args:
        key: Scaled, before its rotation, `[R, H, d]`, float32 or wider.
        ends: Attention over all other columns, and the value less that, one after the other, `[2 R, H, d]`.
        lse: The log-sum-exp of these columns, `[R, H]`, in the type of `key`.
        by_head: As in `solve_token`.
        fixed: `[R, G d]` or None.
        eps: As in `solve_token`.

    Returns:
        The weights on the own column `[R, H]`, and how far one more step would move them, inf in rows that are not
        solved.
    """
    rows, heads, dim = key.shape
    made = torch.bmm(ends.to(by_head.dtype).transpose(0, 1), by_head)
    groups, dp, hp = made.shape[-1] // dim, padded(dim), padded(heads)
    p, moved = key.new_empty(rows, heads), key.new_empty(rows, heads)
    settle_token[(rows,)](
        key.contiguous(), made, fixed, lse.contiguous(), None, None, None, p, moved, None, None, None, None,
        key.new_empty(rows, groups, hp * hp + hp + 1), _step(fixed), 0, 0, 0, 0, 0, 0, 0, rows, 0.0, 0.0,
        0.0 if eps is None else eps, eps is not None, heads, groups, dim, dp, hp, num_warps=4, num_stages=1,
    )  # fmt: skip
    return p, moved


def _step(fixed: Tensor | None) -> int:
    """The stride from sample to sample, 0 where all share one."""
    return 0 if fixed is None or len(fixed) == 1 else fixed.stride(0)


def _turn(rotation: Tensor | None) -> tuple[Tensor | None, int]:
    """Cosines and sines of each sample, `[1 or B, 2, d / 2]`, and the stride of samples, 0 where all share one."""
    if rotation is None:
        return None, 0
    turn = rotation.reshape(2, -1, rotation.shape[-1]).transpose(0, 1).contiguous()
    return turn, 0 if len(turn) == 1 else turn.stride(0)
