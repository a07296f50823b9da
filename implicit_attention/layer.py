"""The layer: implicit-query attention solved to its equilibrium, with all its options."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention import maps, operator
from implicit_attention.adjoints import Adjoint, Implicit, Phantom, Problem, Unrolled
from implicit_attention.cache import Cache, DecodeCache
from implicit_attention.decoding import decode
from implicit_attention.errors import (
    Came,
    NonFiniteError,
    bad_type,
    bad_value,
    check_choice,
    check_positive,
)
from implicit_attention.fixed_point import FailureReport
from implicit_attention.forward_substitution import ForwardSubstitution
from implicit_attention.inputs import non_finite
from implicit_attention.positions import Positions, make_positions
from implicit_attention.preparation import Equation, prepare
from implicit_attention.solvers import Anderson, DirectSolver, Method, Solution

_NO_CACHE = "Without a causal mask later tokens change the equilibria of earlier ones."
_ADJOINTS = {"implicit": Implicit, "unrolled": Unrolled, "phantom": Phantom}


class ImplicitQueryAttention(nn.Module):
    r"""Attention whose queries are made from its own output, solved to its equilibrium.

    `y = softmax(K (Omega_Q y)^T * scale) V` with `K = W_K x`, `V = Omega_V x`: row i belongs to key i, the
    softmax runs over the queries of all tokens j. The defaults are the seed's map; every option widens it.
    Gradients flow whenever autograd is on, in eval mode too.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        window: int | None = None,
        self_query: str = "output",
        normalize_over: str = "queries",
        query_input: bool = False,
        qk_norm: bool = False,
        positions: str | Positions | None = None,
        values: str = "linear",
        out_proj: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        solver: str | Method = "auto",
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            embed_dim: Size D of a token, a multiple of `num_heads`.
            num_heads: H; heads see slices of keys, queries and values, and mix through `Omega_Q`.
            num_kv_heads: G, a divisor of `num_heads` (the default): heads of the columns, queries and values (with
                `normalize_over="keys"` keys and values), each shared by H / G heads of the rows. A cache holds G.
            is_causal: Row i sees columns j <= i.
            window: Causal only: row i sees columns i - window < j <= i.
            self_query: Under a causal mask, what the query of column j = i is made from in row i: "output",
                the unknown y_i, or "input", the start v_i (then the equilibrium is unique, whatever the weights).
            normalize_over: "queries" (the seed), or "keys": rows are queries against keys of the input, the
                conventional orientation, where tokens decouple; cross-attention exists only there.
            query_input: Queries are `Omega_Q y + W_Q x`.
            qk_norm: RMS norm of keys and queries over the head dimension, with one learned temperature per head of
                the keys.
            positions: None, "rope", "alibi", "relative" or a `Positions` object.
            values: "linear", `V = Omega_V x`, or "identity", `V = x`.
            out_proj: A linear map after the equilibrium.
            bias: Biases on all linear maps (with `query_input`, queries get theirs from `W_Q`).
            dropout: Probability of dropping an attention weight in training; one mask for a whole solve.
            scale: Factor on the scores; `(D / H) ** -0.5` if None.
            solver: "auto", or a solver object. "auto" is `ForwardSubstitution()` for causal layers (unless they are
                unrolled) and `Anderson()` for all others.
            adjoint: "implicit", "unrolled", "phantom", or `Implicit(...)`, `Unrolled(...)`, `Phantom(...)`.
            on_failure: "warn" (once), "raise" or "ignore" when a solve misses its tolerance.
            device: Device of the parameters.
            dtype: Their dtype.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is unknown, out of range, or without effect next to the others.

        Reference:
            Iterated retrieval with queries as state: Ramsauer et al., "Hopfield Networks is All You Need",
            arXiv 2008.02217. Equilibria as layers: Bai, Kolter and Koltun, arXiv 1909.01377. Attention to a
            layer's own outputs: the Recurrent Transformer, arXiv 2604.21215.
        """
        super().__init__()
        check_positive("embed_dim", embed_dim, integer=True)
        check_positive("num_heads", num_heads, integer=True)
        if embed_dim % num_heads:
            raise bad_value("num_heads", f"a divisor of embed_dim={embed_dim}", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive("num_kv_heads", num_kv_heads, integer=True)
        if num_heads % num_kv_heads:
            raise bad_value("num_kv_heads", f"a divisor of num_heads={num_heads}", num_kv_heads)
        check_choice("self_query", self_query, ("output", "input"))
        check_choice("normalize_over", normalize_over, ("queries", "keys"))
        check_choice("values", values, ("linear", "identity"))
        flags = {"is_causal": is_causal, "query_input": query_input, "qk_norm": qk_norm, "out_proj": out_proj}
        for name, flag in (flags | {"bias": bias}).items():
            check_choice(name, flag, (True, False))
        if self_query == "input" and not (is_causal and normalize_over == "queries"):
            raise bad_value(
                "self_query", '"output" unless is_causal=True and normalize_over="queries"', self_query,
                "Elsewhere no column j = i is set apart, and the option would have no effect.",
            )  # fmt: skip
        if values == "identity" and num_kv_heads != num_heads:
            raise bad_value("num_kv_heads", f'num_heads={num_heads} with values="identity"', num_kv_heads,
                            "The input itself has no fewer heads.")  # fmt: skip
        if window is not None:
            check_positive("window", window, integer=True)
            if not is_causal:
                raise bad_value("window", "None unless is_causal=True", window)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise bad_type("dropout", "a number in [0, 1)", dropout)
        if not 0 <= dropout < 1:
            raise bad_value("dropout", "a number in [0, 1)", dropout)
        if dtype is not None and not dtype.is_floating_point:
            raise bad_type("dtype", "a floating-point dtype", dtype)
        if scale is not None:
            check_positive("scale", scale)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.num_kv_heads, self.window = num_kv_heads, window
        self.is_causal, self.self_query, self.normalize_over = is_causal, self_query, normalize_over
        self.query_input, self.qk_norm, self.values = query_input, qk_norm, values
        self.dropout, self.scale = float(dropout), self.head_dim**-0.5 if scale is None else float(scale)
        self.adjoint = _make_adjoint(adjoint)
        self.solver = self._make_solver(solver)
        self._report = FailureReport(on_failure)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        columns, by_keys = num_kv_heads * self.head_dim, normalize_over == "queries"  # rows belong to keys
        queries, keys = (columns, embed_dim) if by_keys else (embed_dim, columns)
        self.Omega_Q = nn.Linear(embed_dim, queries, bias=bias and not query_input, **where)
        self.W_K = nn.Linear(embed_dim, keys, bias=bias, **where)
        self.Omega_V = nn.Linear(embed_dim, columns, bias=bias, **where) if values == "linear" else None
        self.W_Q = nn.Linear(embed_dim, queries, bias=bias, **where) if query_input else None
        self.temperature = nn.Parameter(torch.ones(keys // self.head_dim, **where)) if qk_norm else None
        self.positions = make_positions(positions, num_heads, self.head_dim)
        if self.positions is not None:
            self.positions.to(**where)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **where) if out_proj else None

    @property
    def on_failure(self) -> str:
        """What happens when a solve misses its tolerance: "warn", "raise" or "ignore"."""
        return self._report.on_failure

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the equilibrium, projected if the layer has an `out_proj`.

        Args:
            x: Input, `[B, N, D]` or `[N, D]`, of the parameters' dtype and device.
            context: Where keys and values come from, `[B, M, D]` or `[M, D]`; x if None. Needs
                `normalize_over="keys"`.
            attn_mask: `[N, M]`, `[B * H, N, M]` or `[B, H, N, M]`: bool, **True = hidden**, or float, added to
                the scores. Rows are output tokens, columns the tokens they see (those in the cache first).
            key_padding_mask: `[B, M]` (or `[M]`): columns hidden from every row; bool or float alike. With a cache
                those of the new tokens, bool.
            cache: Causal only: the tokens before x, to which those of x are added, `layer.make_cache(...)`.
            need_weights: Also return the attention matrix at the equilibrium (the only thing that makes one).
            average_attn_weights: Average it over the heads.

        Returns:
            `[B, N, D]` or `[N, D]`, zeros (before `out_proj`) in rows that see nothing; with `need_weights` also
            `[B, N, M]`, or `[B, H, N, M]` if not averaged (before dropout).

        Raises:
            TypeError: If a tensor is of the wrong type.
            ValueError: If a shape, dtype or device does not fit, or an input or weight holds NaN or Inf.
            ConvergenceError: If the tolerance is missed and `on_failure` is "raise".
        """
        if not need_weights:
            solution = self.solve(x, context, attn_mask=attn_mask, key_padding_mask=key_padding_mask, cache=cache)
            return self._project(solution.value)
        equation, batched = prepare(self, x, context, attn_mask, key_padding_mask, cache)
        named = {"x": x, "context": context, "attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        solution = self._solve(equation, named)
        if cache is not None:
            self._append(cache, equation, solution, key_padding_mask)
        out = self._project(solution.value)
        weights = equation.function.weights(solution.value, *equation.args)
        weights = weights.mean(1) if average_attn_weights else weights
        return (out, weights) if batched else (out[0], weights[0])

    def _project(self, y: Tensor) -> Tensor:
        if self.out_proj is None:
            return y
        out: Tensor = self.out_proj(y)
        looks = not maps.transforms_active() and not torch.compiler.is_compiling()
        if looks and not bool(torch.isfinite(out).all()):
            raise non_finite(dict(self.named_parameters()))
        return out

    def solve(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        history: bool = False,
        gains: bool = False,
    ) -> Solution:
        """Return the equilibrium before `out_proj`, with residual, steps and convergence.

        Args:
            x: As in `forward`.
            context: As in `forward`.
            attn_mask: As in `forward`.
            key_padding_mask: As in `forward`.
            cache: As in `forward`.
            history: Keep every iterate.
            gains: Also return `Solution.gain`, how much each row feeds itself, at the cost of no attention pass. Only
                causal layers whose rows belong to keys have it.

        Returns:
            The solution: `value` `[B, N, D]`; `residual`, `steps` and `converged` one per sample `[B]`, or per
            row `[B, N]` with a causal mask and with `normalize_over="keys"`; no batch for unbatched input.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`.
            ConvergenceError: As `forward`.
        """
        if gains and not self.triangular:
            raise bad_value("gains", 'False unless is_causal=True and normalize_over="queries"', gains,
                            "Use diagnostics.spectral_radius.")  # fmt: skip
        special = context is not None or attn_mask is not None or key_padding_mask is not None or history or gains
        if cache is not None and not special:
            decoded = decode(self, x, cache)
            if decoded is not None:
                return decoded
        equation, batched = prepare(self, x, context, attn_mask, key_padding_mask, cache)
        named = {"x": x, "context": context, "attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        solution = self._solve(equation, named, history=history)
        if cache is not None:
            self._append(cache, equation, solution, key_padding_mask)
        if gains:
            solution = replace(solution, gain=row_gains(equation, solution))
        return solution if batched else solution.unbatched()

    def equation(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Equation:
        """Return the equation that `solve` solves, for `fixed_point`, diagnostics or solvers of your own.

        Args:
            x: As in `forward`; an unbatched input becomes a batch of one.
            context: As in `forward`.
            attn_mask: As in `forward`.
            key_padding_mask: As in `forward`.
            cache: The tokens before x, which stay as they are.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`.
        """
        return prepare(self, x, context, attn_mask, key_padding_mask, cache)[0]

    def make_cache(self, batch_size: int, capacity: int) -> DecodeCache:
        """Return an empty cache for this layer.

        Args:
            batch_size: B.
            capacity: Tokens it can hold.

        Raises:
            ValueError: If the layer is not causal.
        """
        if not self.is_causal:
            raise bad_value(
                "cache", "None unless is_causal=True", Came("a cache"), "Later tokens would change earlier ones."
            )
        like = self.W_K.weight
        return DecodeCache(batch_size, self.num_kv_heads, self.head_dim, capacity, device=like.device, dtype=like.dtype)

    @property
    def triangular(self) -> bool:
        """Whether row i depends on rows j <= i, so that `ForwardSubstitution` can solve it."""
        return self.is_causal and self.normalize_over == "queries"

    def _append(self, cache: Cache, equation: Equation, solution: Solution, key_padding_mask: Tensor | None) -> None:
        """Add the tokens of a solved equation to the cache they followed."""
        hidden = key_padding_mask
        if hidden is not None and hidden.dim() == 1:
            hidden = hidden[None]
        with torch.no_grad():
            if solution.memo:
                column = solution.memo[0].transpose(1, 2)
            else:
                column = equation.function.columns(solution.value, *equation.args)
            value = equation.args[equation.function.names.index("value")]
            cache.append(column, value, hidden)

    def _solve(self, equation: Equation, named: dict[str, Tensor | None], *, history: bool = False) -> Solution:
        function = equation.function
        if torch.compiler.is_compiling() and not history and operator.serves(self.solver, self.adjoint, function):
            assert isinstance(self.solver, ForwardSubstitution)
            return operator.solve(self.solver, function, equation.args, equation.start.dtype, self._report.handle)
        problem = Problem(function, self.solver, function.system_ndim, function.row_ndim, self._report)
        try:
            return self.adjoint(problem, equation.start, equation.args, history=history)
        except NonFiniteError as error:
            raise non_finite({**named, **dict(self.named_parameters())}) from error

    def _make_solver(self, solver: str | Method) -> Method:
        if isinstance(solver, DirectSolver) and not self.triangular:
            raise bad_value(
                "solver", 'an iterative one unless is_causal=True and normalize_over="queries"', solver,
                'Rows depend on later rows here, or on no other: use "auto" or Anderson().',
            )  # fmt: skip
        if isinstance(solver, Method):
            return solver
        if not isinstance(solver, str):
            raise bad_type("solver", '"auto" or a solver object such as Picard()', solver)
        if solver != "auto":
            raise bad_value("solver", '"auto" or a solver object such as Picard()', solver)
        return ForwardSubstitution() if self.triangular and not isinstance(self.adjoint, Unrolled) else Anderson()

    def extra_repr(self) -> str:
        """Return the settings that are not the default, for `print`."""
        shown = {
            "num_kv_heads": (self.num_kv_heads, self.num_heads),
            "is_causal": (self.is_causal, False),
            "window": (self.window, None),
            "self_query": (self.self_query, "output"),
            "normalize_over": (self.normalize_over, "queries"),
            "qk_norm": (self.qk_norm, False),
            "values": (self.values, "linear"),
            "dropout": (self.dropout, 0.0),
            "scale": (self.scale, self.head_dim**-0.5),
            "on_failure": (self.on_failure, "warn"),
        }
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}"]
        parts += [f"{name}={value!r}" for name, (value, default) in shown.items() if value != default]
        return ", ".join([*parts, f"solver={self.solver}", f"adjoint={self.adjoint}"])


def row_gains(equation: Equation, solution: Solution) -> Tensor:
    """Return the spectral radius of each row's own Jacobian at the equilibrium of a causal equation, `[B, N]`.

    Args:
        equation: The equation.
        solution: Its solution, by any solver.
    """
    with torch.no_grad():
        return ForwardSubstitution().gains(equation.function, equation.args, solution.value, solution.memo)


def _make_adjoint(adjoint: str | Adjoint) -> Adjoint:
    if isinstance(adjoint, Adjoint):
        return adjoint
    if isinstance(adjoint, str) and adjoint in _ADJOINTS:
        made: Adjoint = _ADJOINTS[adjoint]()
        return made
    if not isinstance(adjoint, str):
        raise bad_type("adjoint", '"implicit", "unrolled", "phantom" or an object such as Implicit()', adjoint)
    raise bad_value("adjoint", '"implicit", "unrolled", "phantom" or an object such as Implicit()', adjoint)
