"""One decoded token per sample, and row equations of single rows, by Triton kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicit_attention.attention.map import NORM_EPS, by_read_head
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton.call import TYPES
from implicit_attention.causal.triton.kernels.token import prepare_ends, prepare_keys, settle_token
from implicit_attention.causal.triton.tiles import padded


class Keys(NamedTuple):
    """Keys of the tokens.

    Attributes:
        key: Keys of the scores, rotated, `[B, H, 1, d]`.
        scaled: Keys before their rotation, times the scale, `[B, H, d]`, float32 or wider.
    """

    key: Tensor
    scaled: Tensor


class Token(NamedTuple):
    """Solved tokens.

    Attributes:
        y: Outputs, `[B, 1, H d]`.
        column: Queries of the outputs, rotated, `[B, G, 1, d]`.
        judged: `[3, B]`: residuals, relative residuals, and 1 for a token within tolerance, else 0.
    """

    y: Tensor
    column: Tensor
    judged: Tensor


def keys(made: Tensor, temperature: Tensor | None, rotation: Tensor | None, scale: float, eps: float) -> Keys:
    """Apply norm, temperature and rotation to keys, in one launch.

    Args:
        made: `[B, 1, H, d]`.
        temperature: `[H]` in the dtype of `made`; None for neither norm nor temperature.
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
    prepare_keys[(batch, heads)](
        made, temperature, turn, key, scaled, turn_b, scale, eps, dim, padded(dim), heads, num_warps=1
    )
    return Keys(key, scaled)


def solve_token(
    key: Tensor, a: Tensor, lse: Tensor, value: Tensor, by_head: Tensor, fixed: Tensor | None,
    rotation: Tensor | None, eps: float | None, tolerance: tuple[float, float], dtype: torch.dtype,
    slot: tuple[Tensor, Tensor] | None,
) -> Token:  # fmt: skip
    """Solve the row equation of one token per sample. The host reads no number.

    Args:
        key: Scaled, before its rotation, `[B, H, d]`, float32 or wider.
        a: Attention over the columns before, `[B, H, d]`, in the dtype of the inputs.
        lse: Its log-sum-exp, `[B, H]`, in the dtype of `key`.
        value: Value of the token, `[B, G, d]`.
        by_head: Omega_Q, split by the head that it reads, `[H, d, G d]`.
        fixed: Part of the query that does not depend on y, `[1 or B, G d]`, or None.
        rotation: As in `keys`.
        eps: Epsilon of the norm; None without a norm.
        tolerance: Relative and absolute tolerance.
        dtype: Dtype of the outputs.
        slot: The cache's places for the tokens' queries and values, `[B, G, 1, d]` with equal strides, filled. None
            allocates a tensor for the queries.

    Returns:
        The tokens.
    """
    batch, heads, dim = key.shape
    groups, dp, hp = value.shape[1], padded(dim), padded(heads)
    a = a if a.stride(-1) == 1 else a.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    ends = by_head.new_empty(heads, 2 * batch, dim)
    prepare_ends[(batch, heads)](
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
    """Solve the row equations of R rows in one launch.

    Args:
        key: Scaled, before its rotation, `[R, H, d]`, float32 or wider.
        ends: Attention a over all other columns for all rows, then value - a, `[2 R, H, d]`.
        lse: The log-sum-exp of the other columns, `[R, H]`, in the dtype of `key`.
        by_head: As in `solve_token`.
        fixed: `[R, G d]` or None.
        eps: As in `solve_token`.

    Returns:
        The weights on the own column `[R, H]` and their residuals, inf in rows that are not solved.
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


def last_row(system: CausalSystem, query: Tensor, tolerance: tuple[float, float]) -> Tensor:
    """Decode the last row of a map whose queries are normed and not rotated (for `self_test`).

    Args:
        system: The map.
        query: The queries of its equilibrium, `[B, N, G, d]`.
        tolerance: Relative and absolute.

    Returns:
        Its output, `[B, 1, H d]`.
    """
    last, before = slice(system.length - 1, system.length), slice(0, system.length - 1)
    a, lse = system.below(last, query[:, before].transpose(1, 2), system.value[:, :, before], 0)
    made = keys(system.key[:, :, last].transpose(1, 2), None, None, system.spec.scale, NORM_EPS)
    by_head = by_read_head(system.tensors["weight"], system.heads)
    value, dtype = system.value[:, :, -1], system.value.dtype
    found = solve_token(
        made.scaled, a[:, :, 0], lse[..., 0].to(made.scaled.dtype), value, by_head, None, None, NORM_EPS, tolerance,
        dtype, None,
    )  # fmt: skip
    return found.y


def _step(fixed: Tensor | None) -> int:
    """The stride of samples, 0 if they share the tensor."""
    return 0 if fixed is None or len(fixed) == 1 else fixed.stride(0)


def _turn(rotation: Tensor | None) -> tuple[Tensor | None, int]:
    """Cosines and sines of each sample, `[1 or B, 2, d / 2]`, and the stride of samples, 0 if they share them."""
    if rotation is None:
        return None, 0
    turn = rotation.reshape(2, -1, rotation.shape[-1]).transpose(0, 1).contiguous()
    return turn, 0 if len(turn) == 1 else turn.stride(0)
