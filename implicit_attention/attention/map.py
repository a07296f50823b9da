r"""The map of implicit-query attention, `F(y) = softmax(K phi(y)^T / sqrt(d)) V`, as a pure function.

`phi` makes queries from the output, token by token: a linear map (`Omega_Q`, which mixes the heads), plus an input,
then RMS norm, then rotation. What does not depend on y is computed before.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention import AttentionSpec, attention
from implicit_attention.attention.chunked import weights, with_own_values
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.positions import rotate

NORM_EPS = 1e-6


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """`[B, N, D] -> [B, H, N, d]`."""
    return t.reshape(*t.shape[:-1], num_heads, t.shape[-1] // num_heads).transpose(-3, -2)


def merge_heads(t: Tensor) -> Tensor:
    """`[B, H, N, d] -> [B, N, D]`."""
    return t.transpose(-3, -2).flatten(-2)


def by_read_head(weight: Tensor, num_heads: int) -> Tensor:
    """Return a view of `Omega_Q` `[G d, D]`, split by the head of the output that it reads, `[H, d, G d]`."""
    return weight.view(len(weight), num_heads, -1).permute(1, 2, 0)


def rms_norm(t: Tensor) -> Tensor:
    """`t / sqrt(mean(t^2) + 1e-6)` over the last dimension, in float32 or wider."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=NORM_EPS).to(t.dtype)


@dataclass(frozen=True)
class QueryMap:
    """The map `phi`, without its tensors: `[B, N, D] -> [B, H, N, d]`.

    Attributes:
        num_heads: Heads of the queries: G if rows belong to keys and heads share queries, else H.
        normalize: Whether queries get an RMS norm over the head dimension.
        reads_output: Whether there is a linear map of y; else queries are `added` alone.
    """

    names: ClassVar[tuple[str, ...]] = ("weight", "bias", "added", "rotation", "norm_weight", "gate")
    eps: ClassVar[float] = NORM_EPS

    num_heads: int
    normalize: bool = False
    reads_output: bool = True

    def __call__(
        self,
        y: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        added: Tensor | None = None,
        rotation: Tensor | None = None,
        norm_weight: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return the queries made from `y`.

        Args:
            y: Output, `[B, N, D]`.
            weight: `Omega_Q`, `[D, D]`; None if the keys have absorbed it.
            bias: Bias of `Omega_Q`, `[D]`.
            added: `W_Q x`, `[B, N, D]`.
            rotation: `[2, N, d / 2]`.
            norm_weight: What multiplies normed queries, `[d]`.
            gate: Factor on y, `[B, 1 or N, 1]`, float32 or wider: its gradient may exceed what half precision holds.
        """
        q = split_heads(self.linear(y if gate is None else gate.to(y.dtype) * y, weight, bias, added), self.num_heads)
        if self.normalize:
            q = rms_norm(q) if norm_weight is None else rms_norm(q) * norm_weight
        return q if rotation is None else rotate(q, rotation)

    def linear(self, y: Tensor, weight: Tensor | None, bias: Tensor | None, added: Tensor | None) -> Tensor:
        """Return queries before their norm and rotation, `[B, N, G d]`; arguments as of a call."""
        if not self.reads_output:
            assert added is not None
            return added
        q = y if weight is None else F.linear(y, weight, bias)
        return q if added is None else q + added


@dataclass(frozen=True)
class ValueMap:
    """What values read from the outputs of their tokens, `Psi_V y`, without its tensors: `[B, N, D] -> [B, G, N, d]`.

    Attributes:
        num_heads: G.
        normalize: Whether y gets an RMS norm over all its D numbers first. What is read is then bounded.
    """

    names: ClassVar[tuple[str, ...]] = ("feedback", "feedback_bias")

    num_heads: int
    normalize: bool = True

    def __call__(self, y: Tensor, feedback: Tensor, feedback_bias: Tensor | None = None) -> Tensor:
        """Return what is added to the values.

        Args:
            y: Output, `[B, N, D]`.
            feedback: `Psi_V`, `[G d, D]`.
            feedback_bias: Its bias, `[G d]`.
        """
        return split_heads(F.linear(rms_norm(y) if self.normalize else y, feedback, feedback_bias), self.num_heads)


@dataclass(frozen=True)
class AttentionMap:
    """The map F, without its tensors. `__call__` takes the tensors in the order of `names`.

    Tensors by name:

    - `key` `[B, H, M, d]` (`[B, G, M, d]` if `rows_are_keys` is false: then keys are columns).
    - `value` `[B, G, M, d]`. Each of the G column heads serves H / G row heads.
    - Optional, of the query map: `weight`, `bias`, `added`, `rotation`, `norm_weight`, `gate`.
    - Optional, of the value map: `feedback`, `feedback_bias`.
    - Optional, columns before the first row: `past_column` and `past_value` `[B, G, P, d]`.
    - Optional: `self_score` `[B, H, N]`, `seeds` `[B]`, and `term0`, `term1`, ... of the bias terms.
    - Optional: `start` `[B, N, D]`, where a solver of contractions begins; F does not depend on it.

    Attributes:
        spec: Scale, causality, bias terms and dropout.
        query_map: The map phi.
        rows_are_keys: True if output rows belong to keys and the softmax runs over queries, as in the seed. False if
            output rows belong to queries.
        names: Names of the tensors.
        value_map: What values read from outputs; None if they read none.
        max_gain: The rate at which F contracts, if it is made to.
    """

    _OF_SAMPLES: ClassVar[frozenset[str]] = frozenset(
        {"key", "value", "added", "gate", "past_column", "past_value", "self_score", "seeds", "start"}
    )

    spec: AttentionSpec
    query_map: QueryMap
    rows_are_keys: bool
    names: tuple[str, ...]
    value_map: ValueMap | None = None
    max_gain: float | None = None

    @property
    def system_ndim(self) -> int:
        """Leading dimensions of y that count independent systems: samples, or tokens if rows are independent."""
        return 1 if self.rows_are_keys else 2

    @property
    def row_ndim(self) -> int:
        """Leading dimensions of y whose residuals are judged one by one."""
        return 2 if self.spec.is_causal else self.system_ndim

    def __call__(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return F(y), `[B, N, D]`, for y `[B, N, D]`, computed in the dtype of the keys."""
        t = dict(zip(self.names, tensors, strict=True))
        row, column = self._sides(y, t)
        value = for_heads(_joined(t.get("past_value"), self._values(y, t)), row.shape[1])
        spec, score, seeds, terms = self._spec(t), t.get("self_score"), t.get("seeds"), self._terms(t)
        if self.value_map is None:
            out, _ = attention(row, column, value, spec, self_score=score, seeds=seeds, terms=terms)
        else:  # a row's own column does not read its output
            own = for_heads(t["value"], row.shape[1])
            out = with_own_values(spec, seeds, (row, column, value, score, *terms), own)
        return merge_heads(out).to(y.dtype)

    def per_sample(self, tensors: tuple[Tensor, ...]) -> tuple[bool, ...]:
        """Return, for each of the tensors, whether its first dimension counts samples."""
        batch = len(tensors[self.names.index("value")])
        masks = {f"term{i}" for i, term in enumerate(self.spec.terms) if isinstance(term, AdditiveMask)}
        own = self._OF_SAMPLES | masks
        return tuple(name in own and len(t) == batch for name, t in zip(self.names, tensors, strict=True))

    def weights(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the whole attention matrix `[B, H, N, M]` at y, before dropout."""
        t = dict(zip(self.names, tensors, strict=True))
        row, column = self._sides(y, t)
        return weights(self._spec(t), (row, column, None, t.get("self_score"), *self._terms(t)))

    def values(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return the values of the tokens, `[B, M, G d]`."""
        return merge_heads(tensors[self.names.index("value")])

    def columns(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the column side of the scores, `[B, G, N, d]`: what a cache keeps beside the values."""
        t = dict(zip(self.names, tensors, strict=True))
        return self._queries(y, t) if self.rows_are_keys else t["key"]

    def column_values(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """Return the values that later rows see, `[B, G, N, d]`."""
        return self._values(y, dict(zip(self.names, tensors, strict=True)))

    def _sides(self, y: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows and columns of the scores, `[B, H, N, d]` and `[B, H, P + M, d]`."""
        made = self._queries(y, t)
        row, column = (t["key"], made) if self.rows_are_keys else (made, t["key"])
        return row, for_heads(_joined(t.get("past_column"), column), row.shape[1])

    def _queries(self, y: Tensor, t: dict[str, Tensor]) -> Tensor:
        return self.query_map(y.to(t["key"].dtype), *(t.get(n) for n in QueryMap.names))

    def _values(self, y: Tensor, t: dict[str, Tensor]) -> Tensor:
        value = t["value"]
        if self.value_map is None:
            return value
        return value + self.value_map(y.to(value.dtype), t["feedback"], t.get("feedback_bias"))

    def _spec(self, t: dict[str, Tensor]) -> AttentionSpec:
        return self.spec.following(t["past_value"].shape[-2]) if "past_value" in t else self.spec

    def _terms(self, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(t[f"term{i}"] for i in range(len(self.spec.terms)))


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], -2)


def for_heads(t: Tensor, heads: int) -> Tensor:
    """`[B, G, M, d] -> [B, H, M, d]`: repeat each group's part for its heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)
