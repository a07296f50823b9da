r"""The map of implicit-query attention, `F(y) = softmax(K phi(y)^T / sqrt(d)) V`, as a pure function.

`phi` makes queries from the output, each token on its own: linear (`Omega_Q`, which mixes the heads), plus an
input, then RMS norm, then rotation. Everything that does not depend on y is prepared before.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.kernels import AttentionSpec, attention
from implicit_attention.kernels.chunked import weights
from implicit_attention.positions import rotate

NORM_EPS = 1e-6


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """`[B, N, D] -> [B, H, N, d]`."""
    return t.reshape(*t.shape[:-1], num_heads, t.shape[-1] // num_heads).transpose(-3, -2)


def merge_heads(t: Tensor) -> Tensor:
    """`[B, H, N, d] -> [B, N, D]`."""
    return t.transpose(-3, -2).flatten(-2)


def rms_norm(t: Tensor) -> Tensor:
    """`t / sqrt(mean(t^2) + 1e-6)` over the last dimension, in float32 or wider."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=NORM_EPS).to(t.dtype)


@dataclass(frozen=True)
class QueryMap:
    """`phi`, without its tensors: `[B, N, D] -> [B, H, N, d]`.

    Attributes:
        num_heads: H.
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

    Tensors by name: `key`, `value` `[B, H, M, d]`; optional `weight`, `bias`, `added`, `rotation` of the query
    map; `self_score` `[B, H, N]`; `seeds` `[B]`; `term0`, `term1`, ... of the bias terms.

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
        query, key = self._sides(y, t)
        out, _ = attention(
            query,
            key,
            t["value"],
            self.spec,
            self_score=t.get("self_score"),
            seeds=t.get("seeds"),
            terms=self._terms(t),
        )
        return merge_heads(out).to(y.dtype)

    def weights(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the attention matrix `[B, H, N, M]` at y, before dropout, all of it at once."""
        t = dict(zip(self.names, tensors, strict=True))
        query, key = self._sides(y, t)
        return weights(self.spec, (query, key, None, t.get("self_score"), *self._terms(t)))

    def _sides(self, y: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        key = t["key"]
        made = self.query_map(y.to(key.dtype), *(t.get(n) for n in QueryMap.names))
        return (key, made) if self.rows_are_keys else (made, key)

    def _terms(self, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(t[f"term{i}"] for i in range(len(self.spec.terms)))
