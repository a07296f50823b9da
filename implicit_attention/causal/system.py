"""A causal map and its tensors, in the layout and precision of forward substitution."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention.map import AttentionMap, by_read_head
from implicit_attention.attention.masks import NotOwn
from implicit_attention.attention.operation import attention, partial_backward
from implicit_attention.attention.positions import rotate, unrotate
from implicit_attention.errors import FITTING, Came, bad_value


class Queries(NamedTuple):
    """The queries of some outputs.

    Attributes:
        query: `[B, n, G, d]`, normed and rotated.
        inverse: `[B, n, G, 1]`, the inverse of the root mean square before the norm; None without a norm.
        normed: `[B, n, G, d]`, queries as the norm leaves them, before its weights and the rotation; None without
            weights. The rotation mixes features of different weights, so they cannot be told from `query`.
    """

    query: Tensor
    inverse: Tensor | None
    normed: Tensor | None = None


class Row(NamedTuple):
    """The tensors of R single rows, each at its own sample and position.

    Attributes:
        key: `[R, H, d]`, scaled, with the row's rotation undone and with the weights of the queries' norm, so that
            `score = key . query as the norm leaves it`.
        value: `[R, H, d]`.
        constant: `[R, G, d]`, the part of the query that does not depend on y; None without one.
    """

    key: Tensor
    value: Tensor
    constant: Tensor | None


@dataclass
class CausalSystem:
    """The tensors of a causal map whose rows belong to keys.

    Rows are counted from 0. Columns are counted from 0 too; the `past` first columns come from a cache. Outputs are
    `[B, n, H, d]`, queries `[B, n, G, d]` (G groups of heads share queries and values), and attention works on
    `[B, H, n, d]`. All sums are in `wide`, float32 or wider; `narrow` is the dtype of the inputs.
    """

    function: AttentionMap
    args: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        """Unpack the tensors."""
        self.spec, self.value_map = self.function.spec, self.function.value_map
        self.reads_output = self.function.query_map.reads_output
        self.tensors = dict(zip(self.function.names, self.args, strict=True))
        self.key, self.value = self.tensors["key"], self.tensors["value"]
        self.batch, self.heads, self.length, self.dim = self.key.shape
        self.groups = self.value.shape[1]
        self.narrow, self.wide = self.key.dtype, torch.promote_types(self.key.dtype, torch.float32)
        self.terms = tuple(self.tensors[f"term{i}"] for i in range(len(self.spec.terms)))
        self.seeds = self.tensors.get("seeds")
        self.self_score = self.tensors.get("self_score")
        self.weight, self.bias = self.tensors.get("weight"), self.tensors.get("bias")
        self.added = self.tensors.get("added")
        norm_weight = self.tensors.get("norm_weight")  # [d]
        self.norm_weight = None if norm_weight is None else norm_weight.to(self.wide)
        rotation = self.tensors.get("rotation")  # [2, N, d / 2] or [2, B, 1, N, d / 2]
        if rotation is not None:
            rotation = rotation[:, None] if rotation.dim() == 3 else rotation[:, :, 0]
        self.rotation = None if rotation is None else rotation[:, :, :, None]  # [2, 1 or B, N, 1, d / 2]
        self.past_column, self.past_value = self.tensors.get("past_column"), self.tensors.get("past_value")
        self.past = 0 if self.past_value is None else self.past_value.shape[-2]

    def widened(self) -> "CausalSystem":
        """The same map with all its tensors in the wide dtype."""
        if self.narrow == self.wide:
            return self
        args = tuple(t.to(self.wide) if t.is_floating_point() else t for t in self.args)
        return CausalSystem(self.function, args)

    # Queries from outputs.

    def phi(self, y: Tensor, rows: slice) -> Queries:
        """Return the queries of some rows' outputs `[B, n, H, d]`, in the wide dtype."""
        if self.reads_output:
            q = y.flatten(-2).to(self.narrow)
            if self.weight is not None:
                q = F.linear(q, self.weight, self.bias)
            if self.added is not None:
                q = q + self.added[:, rows]
        else:
            assert self.added is not None
            q = self.added[:, rows]
        q = q.view(*q.shape[:2], self.groups, self.dim).to(self.wide)
        inverse = None
        if self.function.query_map.normalize:
            inverse = (q * q).mean(-1, keepdim=True).add_(self.function.query_map.eps).rsqrt_()
            q = q * inverse
        normed = None if self.norm_weight is None else q
        if self.norm_weight is not None:
            q = q * self.norm_weight
        if self.rotation is not None:
            q = rotate(q, self.rotation[:, :, rows])
        # Rounded to the narrow dtype, as the attention kernels read queries: all parts see the same numbers.
        return Queries(q.to(self.narrow).to(self.wide), inverse, normed)

    def before_map(self, d_query: Tensor, queries: Queries, rows: slice) -> Tensor:
        """Return the cotangent of the linear map's output `[B, n, G d]` from that of the queries `[B, n, G, d]`."""
        if queries.inverse is None:
            return self.before_turn(d_query, rows).flatten(-2)
        along = (d_query * queries.query).mean(-1, keepdim=True)  # a rotation does not change it
        if queries.normed is None or self.norm_weight is None:
            d_query = torch.addcmul(d_query, queries.query, along, value=-1.0).mul_(queries.inverse)
            return self.before_turn(d_query, rows).flatten(-2)
        d_query = self.before_turn(d_query, rows) * self.norm_weight
        return torch.addcmul(d_query, queries.normed, along, value=-1.0).mul_(queries.inverse).flatten(-2)

    def before_turn(self, t: Tensor, rows: slice) -> Tensor:
        """Undo the rotation of some rows' keys, queries or cotangents, `[B, n, G or H, d]`."""
        return t if self.rotation is None else unrotate(t, self.rotation[:, :, rows])

    def through_map(self, d_made: Tensor) -> Tensor:
        """Return the cotangent of the outputs `[B, n, H, d]` from that of the linear map's output `[B, n, G d]`."""
        d_y = d_made if self.weight is None else (d_made.to(self.narrow) @ self.weight).to(self.wide)
        return d_y.view(*d_y.shape[:2], self.heads, self.dim)

    # Single rows, for row equations.

    def row(self, samples: Tensor, positions: Tensor, keep: Tensor | None) -> Row:
        """Return the tensors of rows `(samples[r], positions[r])`; `keep` `[R, H]` scales the own value."""
        key = self.key.transpose(1, 2)[samples, positions].to(self.wide) * self.spec.scale
        if self.rotation is not None:
            turn = self.rotation.expand(-1, self.batch, -1, -1, -1)[:, samples, positions]
            key = unrotate(key, turn)
        if self.norm_weight is not None:
            key = key * self.norm_weight
        value = self.per_head(self.value.transpose(1, 2)[samples, positions].to(self.wide))
        constant = None if self.bias is None else self.bias.to(self.wide).view(1, self.groups, self.dim)
        if self.added is not None:
            own = self.added[samples, positions].to(self.wide).view(-1, self.groups, self.dim)
            constant = own if constant is None else constant + own
        return Row(key, value if keep is None else value * keep[..., None], constant)

    def contributions(self, u: Tensor) -> Tensor:
        """Return what each head's `u` `[R, H, d]` adds to each group's query before the norm, `[R, G, H, d]`."""
        if self.weight is None:  # one head, whose key has absorbed Omega_Q
            return u[:, None]
        made = torch.bmm(u.transpose(0, 1), self._by_head)  # [H, R, G d]
        return made.view(self.heads, -1, self.groups, self.dim).permute(1, 2, 0, 3)

    @cached_property
    def _by_head(self) -> Tensor:
        """Omega_Q, split by the head that it reads, `[H, d, G d]`."""
        assert self.weight is not None
        return by_read_head(self.weight.to(self.wide), self.heads).contiguous()

    def per_head(self, t: Tensor) -> Tensor:
        """`[R, G, ...] -> [R, H, ...]`: repeat each group's part for its heads."""
        return t if self.heads == self.groups else t.repeat_interleave(self.heads // self.groups, 1)

    # Attention.

    def seen(self, low: int, middle: int, high: int) -> tuple[slice, slice]:
        """Return the rows from `middle` on and the columns before it between which the window lets attention pass."""
        if self.spec.window is not None:
            high, low = min(high, middle + self.spec.window - 1), max(low, middle - self.spec.window + 1)
        return slice(middle, high), slice(low, middle)

    def block_bias(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The bias strictly below a block's diagonal, `-inf` elsewhere; and the bias on the diagonal, None for 0."""
        n = rows.stop - rows.start
        # The own column is solved apart, so it is hidden with the later ones.
        hidden = torch.full((n, n), -torch.inf, dtype=self.wide, device=self.key.device).triu_()
        at = slice(self.past + rows.start, self.past + rows.stop)
        bias = replace(self.spec, is_causal=False).bias(self.terms, at, at, hidden)
        if bias is None:
            return hidden, None
        if bias.shape[-3] not in (1, self.heads):
            raise bad_value("positions", f"made for {self.heads} heads", Came(f"biases of {bias.shape[-3]}"), FITTING)
        bias = bias.expand(*bias.shape[:2], n, n)
        return bias + hidden, bias.diagonal(dim1=-2, dim2=-1)

    def compiled_bias(self, rows: slice) -> tuple[Tensor, int, int] | None:
        """The biases of a block, diagonal included, for compiled kernels; None without biases.

        Args:
            rows: The block.

        Returns:
            The biases `[1 or B, 1 or H, n, n]`, and their strides of samples and of heads, 0 for a shared dimension.
        """
        if self.spec.plain:
            return None
        strict, own = self.block_bias(rows)
        strict = strict.detach().expand(*(1,) * (4 - strict.dim()), *strict.shape).clone()
        diagonal = strict.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.zeros_like(diagonal) if own is None else own)
        by_sample, by_head = (0 if strict.shape[dim] == 1 else strict.stride(dim) for dim in (0, 1))
        return strict, by_sample, by_head

    def keep(self, rows: slice) -> Tensor | None:
        """The dropout factors of a diagonal block, `[B, H, n, n]`, None without dropout."""
        at = slice(self.past + rows.start, self.past + rows.stop)
        like = self.key.new_empty(0, dtype=self.wide)
        return self.spec.keep(self.seeds, self.heads, at, at, like)

    def below(self, rows: slice, query: Tensor, value: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Attend rows to columns that are all before them: `[B, H, r, d]` and `[B, H, r]`.

        Args:
            rows: The rows.
            query: Queries of the columns, `[B, G, c, d]`.
            value: Their values, `[B, G, c, d]`.
            first: The first column, counted with past columns.

        Returns:
            Output and log-sum-exp.
        """
        spec, key = self.spec.shifted(self.past + rows.start, first), self.key[:, :, rows]
        if self.groups == self.heads:
            return attention(key, query, value, spec, seeds=self.seeds, terms=self.terms)
        if spec.plain and not spec.dropout:  # fold the heads of a group into rows: no copies of queries and values
            out, lse = attention(self._folded(key), query, value, spec)
            return out.reshape(key.shape), lse.reshape(key.shape[:-1])
        return attention(key, self._expanded(query), self._expanded(value), spec, seeds=self.seeds, terms=self.terms)

    def below_backward(
        self, grad: Tensor, rows: slice, query: Tensor, value: Tensor, first: int, whole: tuple[Tensor, Tensor],
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
        """Return the gradients of `below` for key, query, value and terms, as a part of the whole softmax.

        Args:
            grad: Cotangent of the whole output, `[B, H, r, d]`.
            rows: As in `below`.
            query: As in `below`.
            value: As in `below`.
            first: As in `below`.
            whole: Output `[B, H, r, d]` and log-sum-exp `[B, H, r]` of the rows over all columns.
            bias_grad: Whether the terms' gradients are needed.

        Returns:
            Gradients of key `[B, H, r, d]`, query and value `[B, G, c, d]`, and one (or None) per term.
        """
        spec, key = self.spec.shifted(self.past + rows.start, first), self.key[:, :, rows]
        out, lse = whole[0], whole[1].contiguous()
        folds = self.groups != self.heads and spec.plain and not spec.dropout
        if folds:
            grad, key, out = self._folded(grad), self._folded(key), self._folded(out)
            lse = lse.reshape(self.batch, self.groups, -1)
        elif self.groups != self.heads:
            query, value = self._expanded(query), self._expanded(value)
        d_key, d_query, d_value, *d_terms = partial_backward(
            grad, key, query, value, out, lse, spec, seeds=self.seeds, terms=self.terms, bias_grad=bias_grad
        )
        assert d_key is not None and d_query is not None and d_value is not None
        if folds:
            d_key = d_key.reshape(self.batch, self.heads, -1, self.dim)
        elif self.groups != self.heads:
            d_query, d_value = self._summed(d_query), self._summed(d_value)
        return d_key, d_query, d_value, tuple(d_terms)

    def query_cotangent(self, lam: Tensor, y: Tensor, lse: Tensor, query: Tensor) -> Tensor:
        """Return the cotangent of all queries, `[B, N, G, d]`.

        Args:
            lam: Cotangent of the outputs, `[B, N, H, d]`.
            y: The equilibrium, `[B, N, H, d]`.
            lse: Its log-sum-exp, `[B, H, N]`.
            query: Its queries, `[B, N, G, d]`.
        """
        spec, terms = self.spec, self.terms
        if self.self_score is not None:  # scores of own columns are made from no query of `query`
            spec, terms = replace(spec, terms=(*spec.terms, NotOwn())), (*terms, lse.new_zeros(1))
        query, value = (self.per_head(t) for t in (query.transpose(1, 2), self.value))
        _, d_query, *_ = partial_backward(
            lam.transpose(1, 2), self.key, query, value, y.transpose(1, 2), lse.contiguous(),
            replace(spec.shifted(self.past, self.past), is_causal=True), seeds=self.seeds, terms=terms,
        )  # fmt: skip
        assert d_query is not None
        return self._summed(d_query).transpose(1, 2).to(self.wide)

    def whole_lse(self, query: Tensor) -> Tensor:
        """The log-sum-exp of every row, `[B, H, N]`, from the queries `[B, G, N, d]` of an equilibrium."""
        value = self._expanded(self.value) if self.groups != self.heads else self.value
        query = self._expanded(query) if self.groups != self.heads else query
        diagonal = replace(self.spec.shifted(self.past, self.past), is_causal=True)
        _, lse = attention(
            self.key, query, value, diagonal, self_score=self.self_score, seeds=self.seeds, terms=self.terms
        )
        if self.past:
            assert self.past_column is not None and self.past_value is not None
            _, past = self.below(slice(0, self.length), self.past_column, self.past_value, 0)
            lse = torch.logaddexp(lse, past)
        return lse

    def _folded(self, t: Tensor) -> Tensor:
        """`[B, H, r, d] -> [B, G, (H / G) r, d]`."""
        return t.reshape(self.batch, self.groups, -1, self.dim)

    def _expanded(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(self.heads // self.groups, 1)

    def _summed(self, t: Tensor) -> Tensor:
        return t.reshape(self.batch, self.groups, -1, *t.shape[2:]).sum(2)


def halves(low: int, high: int, block: int) -> int:
    """Return where to cut a range of rows: after half of its blocks, rounded up."""
    blocks = -(-(high - low) // block)
    return low + block * ((blocks + 1) // 2)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge attention over more columns into `out` and `lse`, in place.

    Args:
        out: Attention of some rows, `[..., d]`.
        lse: Its log-sum-exp, `[...]`.
        more: Attention of the same rows over other columns, `[..., d]`.
        more_lse: Its log-sum-exp, `[...]`.
    """
    total = torch.logaddexp(lse, more_lse)
    out.lerp_(more, torch.exp(more_lse - finite(total))[..., None])
    lse.copy_(total)


def finite(lse: Tensor) -> Tensor:
    """Return a log-sum-exp made finite: rows that have seen no column get weights exp(-inf) = 0, not NaN."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)
