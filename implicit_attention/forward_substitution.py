"""Forward substitution: the exact equilibrium of a causal map, block by block, and its adjoint backwards.

Under a causal mask row i depends on rows j <= i alone. So attention between blocks is computed once, by the stock
kernel, and merged by log-sum-exp. Inside a block, sweeps solve every row's own equation exactly (`rows`) while the
rows above it settle: after t sweeps the first t rows are final, whatever the weights, and usually all are by then.
The adjoint is the same recursion backwards, with a linear equation of H unknowns per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention_map import AttentionMap, merge_heads, split_heads
from implicit_attention.errors import Came, bad_type, bad_value, check_positive
from implicit_attention.kernels.attention import attention, gradient_of_key
from implicit_attention.kernels.spec import AttentionSpec
from implicit_attention.positions import unrotate
from implicit_attention.rows import RowProblem, solve_rows
from implicit_attention.solvers import NewtonKrylov, Solver
from implicit_attention.solvers.base import DirectSolver

_CAREFUL = (0.1, 1e-4, 0.0)  # shares of the tolerance at which a block's sweeps stop; 0: never early, so exact


@dataclass(frozen=True, kw_only=True)
class ForwardSubstitution(DirectSolver):
    """The exact solver of causal maps: about one attention pass plus the diagonal blocks, for any weights.

    Attributes:
        block: Rows of a diagonal block.
        fallback: What solves the equations that have no causal structure to go by: adjoints that are
            differentiated again or taken under torch.func transforms.

    Reference:
        The recursion is that of blocked triangular solves; computing each off-diagonal block once is also how the
        Recurrent Transformer (arXiv 2604.21215) trains.
    """

    block: int = 64
    fallback: Solver = field(default_factory=NewtonKrylov)

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        check_positive("block", self.block, integer=True)
        if not isinstance(self.fallback, Solver):
            raise bad_type("fallback", "an iterative solver such as NewtonKrylov()", self.fallback)

    def equilibrium(
        self, function: Callable[..., Tensor], args: tuple[Tensor, ...], tolerance: float, attempt: int
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the equilibrium `[B, N, D]`, the sweeps that each row's block took `[B, N]`, and a memo.

        Args:
            function: A causal `AttentionMap` whose rows belong to keys.
            args: Its tensors.
            tolerance: Absolute tolerance on the rows.
            attempt: 0 at first; higher for blocks that take more sweeps.

        Returns:
            Equilibrium, sweeps, and what `adjoint` takes as its memo.

        Raises:
            ValueError: If the map is not causal.
        """
        state = _State(_causal(function), args)
        limit = tolerance * _CAREFUL[attempt]
        _forward(state, self.block, limit, 0, state.y.shape[-2])
        del state.out  # the adjoint does not need it
        return merge_heads(state.y), state.sweeps, state

    @property
    def attempts(self) -> int:
        """How many levels of care `equilibrium` knows."""
        return len(_CAREFUL)

    def adjoint(
        self, function: Callable[..., Tensor], args: tuple[Tensor, ...], y: Tensor, grad: Tensor, rtol: float, memo: Any
    ) -> Tensor:
        """Return the solution of `lam = grad + J^T lam` at the equilibrium `y`, `[B, N, D]`.

        Args:
            function: As in `equilibrium`.
            args: As in `equilibrium`.
            y: The equilibrium.
            grad: Cotangent.
            rtol: Relative tolerance.
            memo: What `equilibrium` left, or None.
        """
        state = memo if isinstance(memo, _State) else _State.at(_causal(function), args, y)
        state.lam = split_heads(grad.to(state.wide), state.heads).contiguous().clone()
        state.d_query = torch.zeros_like(state.lam)
        limit = rtol * _CAREFUL[0] * float(grad.abs().amax())
        _backward(state, self.block, limit, 0, y.shape[-2])
        return merge_heads(state.lam)


def _causal(function: Callable[..., Tensor]) -> AttentionMap:
    if not (isinstance(function, AttentionMap) and function.spec.is_causal and function.rows_are_keys):
        raise bad_value(
            "solver",
            'one that iterates on the whole map, unless is_causal=True and normalize_over="queries"',
            Came("ForwardSubstitution(...)"),
            'Rows depend on later rows here, or on none: use solver="auto" or Anderson().',
        )
    return function


class _State:
    """A causal map with its tensors at hand, and per row what the recursion knows so far.

    Layout `[B, H, N, d]`, in float32 or wider. `out`, `lse`: attention over the columns before a row's block while
    the recursion goes forward; the final output and log-sum-exp afterwards.
    """

    def __init__(self, function: AttentionMap, args: tuple[Tensor, ...]) -> None:
        self.function = function
        self.tensors = dict(zip(function.names, args, strict=True))
        self.key, self.value = self.tensors["key"], self.tensors["value"]
        self.wide = torch.promote_types(self.key.dtype, torch.float32)
        self.heads, self.dim = self.key.shape[1], self.key.shape[3]
        self.terms = tuple(self.tensors[f"term{i}"] for i in range(len(function.spec.terms)))
        self.seeds = self.tensors.get("seeds")
        batch, _, n, _ = self.key.shape
        self.sweeps = torch.zeros(batch, n, dtype=torch.long, device=self.key.device)
        self.out = torch.zeros_like(self.value, dtype=self.wide)
        self.lse = self.out.new_full(self.out.shape[:-1], -torch.inf)
        self.y, self.query = torch.zeros_like(self.out), torch.zeros_like(self.key)
        self.lam, self.d_query = self.y, self.y  # the adjoint's
        weight = self.tensors.get("weight")
        shape = (self.heads, self.dim, self.heads, self.dim)
        self.weight = None if weight is None else weight.to(self.wide).reshape(shape)  # Omega_Q by head pairs

    @classmethod
    def at(cls, function: AttentionMap, args: tuple[Tensor, ...], y: Tensor) -> "_State":
        """The state at a known equilibrium."""
        state = cls(function, args)
        state.y = split_heads(y.to(state.wide), state.heads).contiguous()
        state.query = state.phi(state.y, slice(0, y.shape[-2])).contiguous()
        _, state.lse = attention(
            state.key,
            state.query,
            state.value,
            function.spec,
            self_score=state.tensors.get("self_score"),
            seeds=state.seeds,
            terms=state.terms,
        )
        return state

    def phi(self, y: Tensor, rows: slice) -> Tensor:
        """The queries made from outputs `[B, H, r, d]` of some rows."""
        t = self.tensors
        added, rotation = t.get("added"), t.get("rotation")
        return self.function.query_map(
            merge_heads(y.to(self.key.dtype)),
            t.get("weight"),
            t.get("bias"),
            None if added is None else added[:, rows],
            None if rotation is None else rotation[:, rows],
        )

    def unrotated(self, t: Tensor, rows: slice) -> Tensor:
        """Turn `[B, H, r, d]` back by the positions of the rows: `k . R q = (R^T k) . q`."""
        rotation = self.tensors.get("rotation")
        return t if rotation is None else unrotate(t, rotation[:, rows].to(self.wide))

    def constant(self, rows: slice) -> Tensor | None:
        """The part of the queries that does not depend on y, `W_Q x + b`, `[B, r, H, d]`."""
        added, bias = self.tensors.get("added"), self.tensors.get("bias")
        total = None if bias is None else bias.to(self.wide).reshape(self.heads, self.dim)
        if added is not None:
            part = split_heads(added[:, rows], self.heads).transpose(1, 2).to(self.wide)
            total = part if total is None else total + part
        return total

    def contributions(self, u: Tensor) -> Tensor:
        """What head g's `u` adds to head h's query: `[B, H, r, d] -> [B, r, H (h), H (g), d]`."""
        if self.weight is None:  # one head, absorbed
            return u.transpose(1, 2)[:, :, :, None]
        return torch.einsum("hegf,bgnf->bnhge", self.weight, u)

    def pulled_apart(self, t: Tensor) -> Tensor:
        """`Omega_Q^T` on each head's `t` alone: `[B, H, r, d] -> [B, r, H (h), H (g), d]`."""
        if self.weight is None:
            return t.transpose(1, 2)[:, :, :, None]
        return torch.einsum("hegf,bhne->bnhgf", self.weight, t)

    def shifted(self, rows: slice, cols: slice) -> AttentionSpec:
        """The attention call of a block below the diagonal."""
        return self.function.spec.shifted(rows.start, cols.start)

    def block_bias(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The bias strictly below the diagonal of a block `[b, h, r, r]`, `-inf` elsewhere, and the diagonal's."""
        n = rows.stop - rows.start
        bias = replace(self.function.spec, is_causal=False).bias(self.terms, rows, rows, self.y)
        hidden = torch.full((n, n), -torch.inf, dtype=self.wide, device=self.key.device).triu()
        if bias is None:
            return hidden, hidden.new_zeros(1, 1, n)
        own = bias.expand(*bias.shape[:2], n, n).diagonal(dim1=-2, dim2=-1)
        return bias + hidden, own

    def keep(self, rows: slice) -> Tensor | None:
        """The dropout factors of a diagonal block, `[B, H, r, r]`."""
        return self.function.spec.keep(self.seeds, self.heads, rows, rows, self.y)


def _halves(low: int, high: int, block: int) -> int:
    """Where a range is cut: after half of its blocks."""
    blocks = -(-(high - low) // block)
    return low + block * ((blocks + 1) // 2)


def _forward(state: _State, block: int, limit: float, low: int, high: int) -> None:
    if high - low <= block:
        _solve_block(state, slice(low, high), limit)
        return
    middle = _halves(low, high, block)
    _forward(state, block, limit, low, middle)
    rows, cols = slice(middle, high), slice(low, middle)
    out, lse = attention(
        state.key[:, :, rows],
        state.query[:, :, cols],
        state.value[:, :, cols],
        state.shifted(rows, cols),
        seeds=state.seeds,
        terms=state.terms,
    )
    before = state.lse[:, :, rows]
    total = torch.logaddexp(before, lse)
    share = torch.exp(lse - total.masked_fill(torch.isneginf(total), 0.0))[..., None]
    state.out[:, :, rows] = torch.lerp(state.out[:, :, rows], out.to(state.wide), share)
    state.lse[:, :, rows] = total
    _forward(state, block, limit, middle, high)


def _solve_block(state: _State, rows: slice, limit: float) -> None:
    """Sweep over a diagonal block until its rows move by no more than `limit`."""
    key, value = state.key[:, :, rows].to(state.wide), state.value[:, :, rows].to(state.wide)
    before, before_lse = state.out[:, :, rows], state.lse[:, :, rows]
    strict, own = state.block_bias(rows)
    keep = state.keep(rows)
    equation = _OwnColumn(state, rows, own, keep, limit)
    y = torch.where(torch.isneginf(before_lse)[..., None], value, before)
    n = rows.stop - rows.start
    thorough = limit == 0  # rows that Newton's method does not solve are cheap to leave until the others settle
    for sweep in range(1, 2 * n + 1):
        query = state.phi(y, rows).to(state.wide)
        scores = (key @ query.mT) * state.function.spec.scale + strict
        peak = torch.maximum(scores.amax(-1), before_lse)
        peak = peak.masked_fill(torch.isneginf(peak), 0.0)
        weights, old = torch.exp(scores - peak[..., None]), torch.exp(before_lse - peak)
        total = weights.sum(-1) + old
        kept = weights if keep is None else weights * keep
        summed = kept @ value + old[..., None] * before
        a = summed / total.masked_fill(total == 0, 1.0)[..., None]
        fresh, lse = equation.solve(a, total.log() + peak, thorough)
        moved = (fresh - y).abs().amax() if sweep > 1 else y.new_tensor(torch.inf)
        y = fresh
        if bool(moved <= limit) or (limit == 0 and sweep == n):
            if thorough or not equation.unsolved:
                break
            thorough = True
    state.y[:, :, rows], state.lse[:, :, rows] = y, lse
    state.query[:, :, rows] = state.phi(y, rows)
    state.sweeps[:, rows] = sweep


class _OwnColumn:
    """The equations of a block's rows for the weight of their own column."""

    def __init__(self, state: _State, rows: slice, own: Tensor, keep: Tensor | None, limit: float) -> None:
        self.state, self.own = state, own
        self.tolerance = max(0.1 * limit, 32 * torch.finfo(state.wide).eps)
        self.near: Tensor | None = None  # the rows' last roots
        self.unsolved = False
        value = state.value[:, :, rows].to(state.wide)
        self.value = value if keep is None else value * keep.diagonal(dim1=-2, dim2=-1)[..., None]
        self.normed = state.function.query_map.normalize
        self.constant = state.constant(rows)
        self.self_score = state.tensors.get("self_score")
        if self.self_score is not None:
            self.self_score = self.self_score[:, :, rows].to(state.wide)
            return
        key = state.unrotated(state.key[:, :, rows].to(state.wide), rows)
        self.key = key.transpose(1, 2)  # [B, r, H, d]
        self.fixed = state.contributions(self.value) if self.normed else state.pulled_apart(key)

    def solve(self, a: Tensor, lse: Tensor, thorough: bool) -> tuple[Tensor, Tensor]:
        """Return the rows' outputs `[B, H, r, d]` and log-sum-exps, given attention over all other columns."""
        offset = self.own - lse
        unseen = torch.isneginf(self.own) & torch.isneginf(lse)
        offset = offset.masked_fill(unseen, -torch.inf).expand_as(lse)
        if self.self_score is not None:
            p, score = torch.sigmoid(self.self_score + offset), self.self_score
        else:
            p, score = self._solve_rows(a, offset, thorough)
        return a + p[..., None] * (self.value - a), torch.logaddexp(lse, score + self.own)

    def _solve_rows(self, a: Tensor, offset: Tensor, thorough: bool) -> tuple[Tensor, Tensor]:
        batch, heads, n = offset.shape
        problem = self._problem(a, offset.transpose(1, 2).flatten(0, 1))
        found = solve_rows(problem, self.tolerance, self.near, thorough=thorough)
        p, self.unsolved = found.p, not bool(found.solved.all())
        self.near = p.masked_fill(~found.solved[:, None], torch.nan)
        score = problem.score(p)
        return tuple(t.view(batch, n, heads).transpose(1, 2) for t in (p, score))  # type: ignore[return-value]

    def _problem(self, a: Tensor, offset: Tensor) -> RowProblem:
        """`y = a + p (value - a)`, put through the query map and onto the row's key."""
        scale = self.state.function.spec.scale
        if not self.normed:  # self.fixed: Omega_Q^T k, by head pairs
            at = a.transpose(1, 2)[:, :, None]
            alpha = (self.fixed * at).sum((-1, -2))
            if self.constant is not None:
                alpha = alpha + (self.key * self.constant).sum(-1)
            beta = (self.fixed * (self.value.transpose(1, 2)[:, :, None] - at)).sum(-1)
            return RowProblem((scale * alpha).flatten(0, 1), (scale * beta).flatten(0, 1), offset)
        made = self.state.contributions(a)  # self.fixed: the value's contributions
        base = made.sum(3) if self.constant is None else made.sum(3) + self.constant
        query = torch.cat([base[:, :, :, None], self.fixed - made], 3)  # [B, r, H, 1 + H, d]: q(p) = query (1, p)
        score = scale * (self.key[:, :, :, None] * query).sum(-1).flatten(0, 1)
        gram = (query @ query.mT).flatten(0, 1) / query.shape[-1]
        gram[..., 0, 0] += self.state.function.query_map.eps
        return RowProblem(score[..., 0], score[..., 1:], offset, gram)


def _backward(state: _State, block: int, limit: float, low: int, high: int) -> None:
    """`lam = g + J^T lam` from the last block to the first; `state.lam` starts as g."""
    if high - low <= block:
        _solve_block_adjoint(state, slice(low, high), limit)
        return
    middle = _halves(low, high, block)
    _backward(state, block, limit, middle, high)
    rows, cols = slice(middle, high), slice(low, middle)
    state.d_query[:, :, cols] += gradient_of_key(
        state.lam[:, :, rows],
        state.key[:, :, rows],
        state.query[:, :, cols],
        state.value[:, :, cols],
        state.y[:, :, rows],
        state.lse[:, :, rows],
        state.shifted(rows, cols),
        seeds=state.seeds,
        terms=state.terms,
    )
    _backward(state, block, limit, low, middle)


def _solve_block_adjoint(state: _State, rows: slice, limit: float) -> None:
    """The rows of a block from the last to the first, by sweeps: each with its own column solved exactly."""
    scale = state.function.spec.scale
    y, lse = state.y[:, :, rows], state.lse[:, :, rows]
    key, value = state.key[:, :, rows].to(state.wide), state.value[:, :, rows].to(state.wide)
    query = state.query[:, :, rows].to(state.wide)
    strict, own = state.block_bias(rows)
    keep = state.keep(rows)
    seen = lse.masked_fill(torch.isneginf(lse), 0.0)
    weights = torch.exp((key @ query.mT) * scale + strict - seen[..., None])
    pull = _QueryPullback(state, rows)
    solve_own = None
    if "self_score" not in state.tensors:
        p = torch.exp((key * query).sum(-1) * scale + own - seen)
        kept = value if keep is None else value * keep.diagonal(dim1=-2, dim2=-1)[..., None]
        solve_own = _OwnColumnAdjoint((scale * p)[..., None] * (kept - y), pull.by_head(key))
    given, later = state.lam[:, :, rows].clone(), state.d_query[:, :, rows]
    lam = given
    n = rows.stop - rows.start
    for sweep in range(1, n + 1):
        slope = lam @ value.mT
        slope = weights * ((slope if keep is None else slope * keep) - (lam * y).sum(-1, keepdim=True))
        fresh = given + pull(later + scale * (slope.mT @ key))
        fresh = fresh if solve_own is None else solve_own(fresh)
        moved = (fresh - lam).abs().amax() if sweep > 1 else y.new_tensor(torch.inf)
        lam = fresh
        if bool(moved <= limit):
            break
    state.lam[:, :, rows] = lam


class _QueryPullback:
    """Products with the transpose of phi's Jacobian at the equilibrium, on a block of rows."""

    def __init__(self, state: _State, rows: slice) -> None:
        self.state, self.rows = state, rows
        self.query: Tensor | None = None
        if state.function.query_map.normalize:
            made = state.contributions(state.y[:, :, rows]).sum(3)
            constant = state.constant(rows)
            self.query = (made if constant is None else made + constant).transpose(1, 2)  # before the norm
            mean = self.query.square().mean(-1, keepdim=True)
            self.inverse = torch.rsqrt(mean + state.function.query_map.eps)

    def _through_norm(self, t: Tensor) -> Tensor:
        t = self.state.unrotated(t, self.rows)
        if self.query is None:
            return t
        unit = self.query * self.inverse
        return (t - unit * (unit * t).mean(-1, keepdim=True)) * self.inverse

    def __call__(self, t: Tensor) -> Tensor:
        """`[B, H, r, d] -> [B, H, r, d]`, cotangents of queries to cotangents of outputs."""
        return self.by_head(t).sum(2).transpose(1, 2)

    def by_head(self, t: Tensor) -> Tensor:
        """The same for each head's cotangent alone, `[B, r, H (h), H (g), d]`."""
        return self.state.pulled_apart(self._through_norm(t))


class _OwnColumnAdjoint:
    """`lam = c + sum_h w_h (u_h . lam_h)`: what a row's own column adds is of rank one per head.

    So lam follows from H numbers per row, `(I - M) z = (u_h . c_h)` with `M_hg = u_h . w_g,h` (Woodbury); the
    eigenvalues of M are those of the row's Jacobian.
    """

    def __init__(self, u: Tensor, w: Tensor) -> None:
        self.u, self.w = u.transpose(1, 2), w  # [B, r, H, d], [B, r, H (g), H (h), d]
        gains = torch.einsum("bnhd,bnghd->bnhg", self.u, w)
        eye = torch.eye(gains.shape[-1], dtype=u.dtype, device=u.device)
        self.matrix = eye - gains

    def __call__(self, c: Tensor) -> Tensor:
        """Solve for lam, `[B, H, r, d]`."""
        c = c.transpose(1, 2)
        right = (self.u * c).sum(-1, keepdim=True)
        z: Tensor = torch.linalg.solve_ex(self.matrix, right)[0]
        lam: Tensor = c + (z[..., None] * self.w).sum(2)
        return lam.transpose(1, 2)
