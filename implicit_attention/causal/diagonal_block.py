"""A diagonal block of a causal map: its tensors, attention over its columns, and the equations of its rows."""

import torch
from torch import Tensor

from implicit_attention.causal.row_problem import RowProblem
from implicit_attention.causal.system import CausalSystem


class DiagonalBlock:
    """The keys, values and biases of a block, which do not change from sweep to sweep."""

    def __init__(self, system: CausalSystem, rows: slice) -> None:
        """Prepare the tensors of the block.

        Args:
            system: The map.
            rows: The rows of the block.
        """
        self.system, self.rows, self.n = system, rows, rows.stop - rows.start
        self.shape = (system.batch, system.heads, self.n)
        self.key = system.key[:, :, rows].to(system.wide).contiguous() * system.spec.scale
        value = system.value[:, :, rows].to(system.wide)
        # The heads of a group share queries and values: one product per group instead of one per head.
        self.folded_key = self.key.view(system.batch * system.groups, -1, system.dim)
        self.folded_value = value.reshape(system.batch * system.groups, self.n, system.dim)
        self.strict, self.own_bias = system.block_bias(rows)
        self.keep = system.keep(rows)
        self.own_value = system.per_head(value)
        if self.keep is not None:
            self.own_value = self.own_value * self.keep.diagonal(dim1=-2, dim2=-1)[..., None]
        self.given_own: Tensor | None = None
        if system.self_score is not None:
            self.given_own = self._biased(system.self_score[:, :, rows].to(system.wide))

    def _biased(self, own: Tensor) -> Tensor:
        return own if self.own_bias is None else own + self.own_bias

    def scores(self, query: Tensor) -> Tensor:
        """Scores of the block before biases, `[B, H, n, n]`, for queries `[B, n, G, d]`."""
        columns = query.permute(0, 2, 3, 1).reshape(len(self.folded_value), -1, self.n)
        return torch.bmm(self.folded_key, columns).view(*self.shape, self.n)


class BlockRows(DiagonalBlock):
    """A block whose rows are solved for, given attention over all columns before the block.

    A row's output is a mixture of its attention to all other columns and of its own value (`mixed`). The weight of the
    latter is its own weight.
    """

    def __init__(self, system: CausalSystem, rows: slice, before: Tensor, before_lse: Tensor) -> None:
        """Prepare the tensors of the block.

        Args:
            system: The map.
            rows: The rows of the block.
            before: Attention over the columns before the block, `[B, n, H, d]`.
            before_lse: Its log-sum-exp `[B, H, n]`.
        """
        super().__init__(system, rows)
        self.before, self.before_lse = before.transpose(1, 2).contiguous(), before_lse.contiguous()
        self.value = self.own_value.transpose(1, 2).contiguous()  # [B, n, H, d]

    def own_score(self, query: Tensor) -> Tensor:
        """Scores of the own column, `[B, H, n]`, for queries `[B, n, G, d]`."""
        return self._biased((self.key * self.system.per_head(query.transpose(1, 2))).sum(-1))

    def attend(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to all columns except a row's own.

        Args:
            query: Queries of the block, `[B, n, G, d]`.

        Returns:
            Attention `[B, n, H, d]`, its log-sum-exp and the score of the own column, both `[B, H, n]`.
        """
        own = self.given_own
        if self.n == 1:  # as in decoding: all other columns are before the block
            return self.before.transpose(1, 2), self.before_lse, self.own_score(query) if own is None else own
        scores = self.scores(query)
        if own is None:
            own = self._biased(scores.diagonal(dim1=-2, dim2=-1)).clone()
        scores += self.strict
        # A finite peak, so that rows without columns give exp(-inf) = 0, not NaN.
        peak = torch.maximum(scores.amax(-1), self.before_lse).clamp_min_(torch.finfo(scores.dtype).min)
        weights = scores.sub_(peak[..., None]).exp_()
        old = (self.before_lse - peak).exp_()
        total = weights.sum(-1).add_(old)
        if self.keep is not None:
            weights = weights * self.keep
        a = torch.bmm(weights.view(len(self.folded_key), -1, self.n), self.folded_value)
        a = a.view(*self.shape, -1).addcmul_(old[..., None], self.before)
        a /= total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]
        return a.transpose(1, 2).contiguous(), total.log_().add_(peak), own

    def own_weight(self, own: Tensor, lse: Tensor) -> Tensor:
        """The weight of the own column, `[B, H, n]`; 0 if the own column is hidden."""
        p = torch.sigmoid(own - lse)
        return p if self.own_bias is None else p.masked_fill_(torch.isneginf(own), 0.0)

    def start(self) -> Tensor | None:
        """Scores of the own column at the start y = v, `[B, H, n]`; None if they do not depend on outputs."""
        if self.given_own is not None or not self.system.reads_output:
            return None
        return self.own_score(self.system.phi(self.value, self.rows).query)

    def rounding(self, query: Tensor, size: Tensor) -> Tensor:
        """What rounding of scores may do to the outputs of rows, `[B, n]`, for queries `[B, n, G, d]`."""
        key, most = self.key.norm(dim=-1), self.system.per_head(query.norm(dim=-1).amax(1))
        score = (key * most[..., None]).amax(1)  # no score of the block is larger
        noise: Tensor = 4.0 * torch.finfo(score.dtype).eps * score * size
        return noise

    def row_problem(self, a: Tensor, lse: Tensor, samples: Tensor, positions: Tensor) -> tuple[RowProblem, Tensor]:
        """The row equations of some rows: scores of the query of `y = a + p (value - a)` with the row's key.

        Returns:
            The problems, and the rows' values `[R, H, d]`.
        """
        system = self.system
        keep = None
        if self.keep is not None:
            keep = self.keep.diagonal(dim1=-2, dim2=-1).transpose(1, 2)[samples, positions]
        key, value, constant = system.row(samples, self.rows.start + positions, keep)
        made = system.contributions(a[samples, positions])  # [R, G, H, d]
        base = made.sum(2) if constant is None else made.sum(2) + constant
        query = torch.cat([base[:, :, None], system.contributions(value) - made], 2)  # q(p) = query (1, p)
        score = (system.per_head(query) @ key[..., None])[..., 0]  # [R, H, 1 + H]
        own_bias = 0.0 if self.own_bias is None else self.own_bias.expand(self.shape)
        offset = (own_bias - lse).transpose(1, 2)[samples, positions]
        if self.own_bias is not None:
            offset = offset.masked_fill(offset.isnan(), -torch.inf)  # -inf + inf: the row sees no column at all
        gram = None
        if system.function.query_map.normalize:
            gram = query @ query.mT / system.dim
            gram[..., 0, 0] += system.function.query_map.eps
            gram = system.per_head(gram)
        return RowProblem(score[..., 0], score[..., 1:], offset, gram), value


def mixed(a: Tensor, value: Tensor, p: Tensor) -> Tensor:
    """`a + p (value - a)`, `[B, n, H, d]`, for weights `[B, H, n]`."""
    return torch.lerp(a, value, p.transpose(1, 2)[..., None])
