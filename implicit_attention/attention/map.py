r"""The map of implicit-query attention, `F(y) = softmax(K phi(y)^T / sqrt(d)) V`, as a pure function.

`phi` makes queries from the output, each token on its own: linear (`Omega_Q`, which mixes the heads), plus an
input, then RMS norm, then rotation. Everything that does not depend on y is prepared before.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention import AttentionSpec, attention
from implicit_attention.attention.chunked import weights
from implicit_attention.attention.positions import rotate

NORM_EPS = 1e-6


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """`[B, N, D] -> [B, H, N, d]`."""
    return t.reshape(*t.shape[:-1], num_heads, t.shape[-1] // num_heads).transpose(-3, -2)


def merge_heads(t: Tensor) -> Tensor:
    """`[B, H, N, d] -> [B, N, D]`."""
    return t.transpose(-3, -2).flatten(-2)


def by_read_head(weight: Tensor, num_heads: int) -> Tensor:
    """Return `Omega_Q` `[G d, D]` by the head of the output that it reads, `[H, d, G d]`, a view."""
    return weight.view(len(weight), num_heads, -1).permute(1, 2, 0)


def rms_norm(t: Tensor) -> Tensor:
    """`t / sqrt(mean(t^2) + 1e-6)` over the last dimension, in float32 or wider."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=NORM_EPS).to(t.dtype)


@dataclass(frozen=True)
class QueryMap:
    """`phi`, without its tensors: `[B, N, D] -> [B, H, N, d]`.

    Attributes:
        num_heads: Heads of the queries (G where rows belong to keys and heads share queries, else H).
        normalize: Whether queries are RMS-normed over the head dimension.
    """

    names: ClassVar[tuple[str, ...]] = ("weight", "bias", "added", "rotation")
    eps: ClassVar[float] = NORM_EPS

    num_heads: int
    normalize: bool = False

    def __call__(
        self,
        y: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Return the queries made from `y`.

        Args:
            y: Output, `[B, N, D]`.
            weight: `Omega_Q`, `[D, D]`; None where it has been absorbed into the keys.
            bias: Its bias, `[D]`.
            added: `W_Q x`, `[B, N, D]`.
            rotation: `[2, N, d / 2]`.
        """
        q = y if weight is None else F.linear(y, weight, bias)
        q = split_heads(q if added is None else q + added, self.num_heads)
        if self.normalize:
            q = rms_norm(q)
        return q if rotation is None else rotate(q, rotation)


@dataclass(frozen=True)
class AttentionMap:
    """F, without its tensors, which `__call__` takes in the order of `names`.

    Tensors by name: `key` `[B, H, M, d]`, `value` `[B, G, M, d]` (G heads of columns, each for H / G heads of rows;
    with `rows_are_keys` false the keys are columns, `[B, G, M, d]`); optional `weight`, `bias`, `added`,
    `rotation` of the query map; `past_column`, `past_value` `[B, G, P, d]`, columns before the first row;
    `self_score` `[B, H, N]`; `seeds` `[B]`; `term0`, `term1`, ... of the bias terms.

    Attributes:
        spec: Scale, causality, bias terms and dropout.
        query_map: phi.
        rows_are_keys: Whether output rows belong to keys and the softmax runs over queries (the seed), or the
            other way round.
        names: Names of the tensors.
    """

    spec: AttentionSpec
    query_map: QueryMap
    rows_are_keys: bool
    names: tuple[str, ...]

    @property
    def system_ndim(self) -> int:
        """Leading dimensions of y that are independent systems: samples, or tokens where rows decouple."""
        return 1 if self.rows_are_keys else 2

    @property
    def row_ndim(self) -> int:
        """Leading dimensions of y that are judged one by one: tokens unless all depend on all."""
        return 2 if self.spec.is_causal else self.system_ndim

    def __call__(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return F(y), `[B, N, D]`, for y `[B, N, D]`; computed in the dtype of the keys."""
        t = dict(zip(self.names, tensors, strict=True))
        row, column = self._sides(y, t)
        value = _joined(t.get("past_value"), t["value"])
        out, _ = attention(
            row,
            column,
            _for_heads(value, row.shape[1]),
            self._spec(t),
            self_score=t.get("self_score"),
            seeds=t.get("seeds"),
            terms=self._terms(t),
        )
        return merge_heads(out).to(y.dtype)

    def weights(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the attention matrix `[B, H, N, M]` at y, before dropout, all of it at once."""
        t = dict(zip(self.names, tensors, strict=True))
        row, column = self._sides(y, t)
        return weights(self._spec(t), (row, column, None, t.get("self_score"), *self._terms(t)))

    def columns(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return what a cache keeps of the tokens beside their values: their side of the scores, `[B, G, N, d]`."""
        t = dict(zip(self.names, tensors, strict=True))
        return self._queries(y, t) if self.rows_are_keys else t["key"]

    def _sides(self, y: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows and columns of the scores, `[B, H, N, d]` and `[B, H, P + M, d]`."""
        made = self._queries(y, t)
        row, column = (t["key"], made) if self.rows_are_keys else (made, t["key"])
        return row, _for_heads(_joined(t.get("past_column"), column), row.shape[1])

    def _queries(self, y: Tensor, t: dict[str, Tensor]) -> Tensor:
        return self.query_map(y.to(t["key"].dtype), *(t.get(n) for n in QueryMap.names))

    def _spec(self, t: dict[str, Tensor]) -> AttentionSpec:
        return self.spec.following(t["past_value"].shape[-2]) if "past_value" in t else self.spec

    def _terms(self, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(t[f"term{i}"] for i in range(len(self.spec.terms)))


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], -2)


def _for_heads(t: Tensor, heads: int) -> Tensor:
    """`[B, G, M, d] -> [B, H, M, d]`: what a group of heads shares, for each of them."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)
