"""The layer: implicit-query attention solved to its equilibrium, with all its options."""

from dataclasses import replace
from typing import Any, Never, Unpack

import torch
from torch import Tensor, nn

from implicit_attention.attention.linear_map import ZeroLinear, check_weights_are_here, checked_against, expected
from implicit_attention.attention.positions import Positions, make_positions
from implicit_attention.cache import Cache, DecodeCache
from implicit_attention.equation import Equation, prepare
from implicit_attention.equilibrium.adjoints import Adjoint
from implicit_attention.equilibrium.reports import Reporting
from implicit_attention.equilibrium.solvers import Method, Solution
from implicit_attention.equilibrium.solvers.solution import writable
from implicit_attention.errors import Came, bad_type, bad_value
from implicit_attention.inputs import InputOptions, Inputs, check_cacheable, check_names, checked, dtype_of_values
from implicit_attention.recommended import Recommended
from implicit_attention.settings import CHANGEABLE, Configured, Settings, unknown_option
from implicit_attention.solving import make_adjoint, make_solver, solve_call

_OF_FORWARD = ("need_weights", "average_attn_weights", "need_solution", "gains")


class ImplicitQueryAttention(Recommended, Configured, Reporting):
    r"""Attention whose queries are made from its own output, solved to its equilibrium.

    `y = softmax(K (Omega_Q y)^T * scale) V` with `K = W_K x`, `V = Omega_V x`: row i belongs to key i, the
    softmax runs over the queries of all tokens j. The defaults are the seed's map; every option widens it.
    Gradients flow whenever autograd is on, in eval mode too.

    A solve applies `Omega_Q` in every iteration by its weight and bias. If you put an adapter, a hook, a norm or a
    module of your own in its place, the layer calls it once on the unit vectors to find them (`linear_map`).

    For a model, start from the recommended settings (`implicit_attention.recommended`): `for_causal_lm`,
    `for_encoder` or `for_cross_attention`. The seed's map itself has no mask and collapses to the mean of its values.

    The settings can be read as attributes (`layer.num_heads`). Those that shape no parameter can be changed:
    `is_causal`, `window`, `self_query`, `feedback_norm`, `dropout`, `max_gain`, `scale`. So can `adjoint` and `solver`;
    a solver that "auto" chose follows the settings.
    """

    solver: Method

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        window: int | None = None,
        self_query: str = "output",
        normalize_over: str = "queries",
        query_input: bool = False,
        query_output: bool = True,
        qk_norm: bool | str = False,
        positions: str | Positions | None = None,
        values: str = "linear",
        feedback_norm: bool = True,
        out_proj: bool = False,
        bias: bool | str = False,
        dropout: float = 0.0,
        max_gain: float | None = None,
        scale: float | None = None,
        solver: str | Method = "auto",
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        """Make the layer.

        Args:
            embed_dim: Size D of a token, a multiple of `num_heads` unless there is a `head_dim`.
            num_heads: H; heads see slices of keys, queries and values, and mix through `Omega_Q`.
            num_kv_heads: G, a divisor of `num_heads` (the default): heads of the columns, queries and values (with
                `normalize_over="keys"` keys and values), each shared by H / G heads of the rows. A cache holds G.
            head_dim: Size d of a head, D / H if None. Where it differs, equilibria have H d features instead of D.
            is_causal: Row i sees columns j <= i.
            window: Causal only: row i sees columns i - window < j <= i.
            self_query: Under a causal mask, what the query of column j = i is made from in row i: "output",
                the unknown y_i, or "input", the start v_i (then the equilibrium is unique, whatever the weights).
            normalize_over: "queries" (the seed), or "keys": rows are queries against keys of the input, the
                conventional orientation, where tokens decouple; cross-attention exists only there.
            query_input: Queries are `Omega_Q y + W_Q x`.
            query_output: Without, queries are `W_Q x` (needs `query_input` and `values="feedback"`): only values then
                read outputs.
            qk_norm: RMS norm of keys and queries over the head dimension, with one learned temperature per head of
                the keys; or "weights": with d learned weights, of all keys and of all queries, in their place.
            positions: None, "rope", "alibi", "relative" or a `Positions` object.
            values: "linear", `V = Omega_V x`; "identity", `V = x`; or "feedback": rows after j see the value
                `Omega_V x_j + Psi_V y_j`, row j its own `Omega_V x_j`. `Psi_V` is zero at the start. The layer then
                keeps state. Needs `is_causal` and `self_query="input"`.
            feedback_norm: `Psi_V` reads the output divided by its root mean square, which bounds all outputs. Without,
                they can grow along the sequence.
            out_proj: A linear map after the equilibrium.
            bias: Biases on all linear maps (with `query_input`, queries get theirs from `W_Q`), or "qkv": on all but
                `out_proj`.
            dropout: Probability of dropping an attention weight in training; one mask for a whole solve.
            max_gain: No causal mask: a bound c in (0, 1). Queries are `f Omega_Q y + W_Q x`, `f = min(1, c / L)` of
                each sample, such that the map contracts by c for any weights: one equilibrium, found in a known number
                of steps. `qk_norm` then norms keys and `W_Q x` (`attention/gain.py`).
            scale: Factor on the scores; `d ** -0.5` if None.
            solver: "auto", or a solver object. "auto" is `ForwardSubstitution()` for causal layers, `Contraction()`
                with `max_gain`, and `Anderson()` for all others and what is unrolled.
            adjoint: "implicit", "unrolled", "phantom", or `Implicit(...)`, `Unrolled(...)`, `Phantom(...)`.
            on_failure: When a solve misses its tolerance: "warn", at the 1st, 10th, 100th ... failure, with the layer's
                name and their number; "raise"; or "ignore". `last_solve` has the figures in any case.
            device: Device of the parameters.
            dtype: Their dtype.
            **unknown: Refused, with what it may have meant.

        Raises:
            TypeError: If an argument is of the wrong type, or has an unknown name.
            ValueError: If a value is unknown, out of range, or without effect next to the others.

        Reference:
            Iterated retrieval: Ramsauer et al., arXiv 2008.02217 (2020). Equilibria as layers: Bai, Kolter and Koltun,
            arXiv 1909.01377 (2019). Attention to own outputs: the Recurrent Transformer, arXiv 2604.21215.
        """
        super().__init__()
        if unknown:
            raise unknown_option(next(iter(unknown)))
        self.settings = Settings(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,  # type: ignore[arg-type]
            is_causal=is_causal, window=window, self_query=self_query, normalize_over=normalize_over,
            query_input=query_input, query_output=query_output, qk_norm=qk_norm, values=values,
            feedback_norm=feedback_norm, out_proj=out_proj, bias=bias, dropout=dropout, max_gain=max_gain,
            scale=scale,  # type: ignore[arg-type]
        )  # fmt: skip
        if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1)):
            raise bad_type("dtype", "a floating-point dtype of 16 bits or more, such as torch.float32", dtype)
        self.adjoint: Adjoint = adjoint  # type: ignore[assignment]  # what it names: see __setattr__
        self.solver = solver  # type: ignore[assignment]  # what it names: see __setattr__
        self._begin_reports(on_failure, f"{type(self).__name__}({embed_dim}, num_heads={num_heads})")
        self._make_modules(positions, {"device": device, "dtype": dtype})

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A name becomes what it names; a solver that "auto" chose follows the settings."""
        if name == "adjoint":
            value = make_adjoint(value)
        if name == "solver":
            self.__dict__["_chosen"] = isinstance(value, str)
            value = make_solver(value, self.settings, self.adjoint)
        if name == "positions":
            value = make_positions(value, self.settings.num_heads, self.settings.head_dim)
        super().__setattr__(name, value)
        if (name in CHANGEABLE or name == "adjoint") and self.__dict__.get("_chosen", False):
            super().__setattr__("solver", make_solver("auto", self.settings, self.adjoint))

    def _make_modules(self, positions: str | Positions | None, where: dict[str, Any]) -> None:
        settings = self.settings
        size, inner, bias = settings.embed_dim, settings.inner_dim, bool(settings.bias)

        def linear(name: str, inputs: int, bias: bool, kind: type[nn.Linear] = nn.Linear) -> nn.Linear | None:
            return kind(inputs, settings.widths[name], bias=bias, **where) if name in settings.widths else None

        def norm(name: str) -> nn.Parameter | None:
            return nn.Parameter(torch.ones(settings.norms[name], **where)) if name in settings.norms else None

        self.Omega_Q = linear("Omega_Q", inner, bias and not settings.query_input)
        self.W_K = nn.Linear(size, settings.widths["W_K"], bias=bias, **where)
        self.Omega_V = linear("Omega_V", size, bias)
        self.W_Q = linear("W_Q", size, bias)
        self.temperature = norm("temperature")
        self.key_norm, self.query_norm = norm("key_norm"), norm("query_norm")
        self.positions: Positions | None = positions  # type: ignore[assignment]  # what it names: see __setattr__
        if self.positions is not None:
            self.positions.to(**where)
        self.out_proj = nn.Linear(inner, size, bias=settings.bias is True, **where) if settings.out_proj else None
        self.Psi_V = linear("Psi_V", inner, bias, ZeroLinear)

    @property
    def triangular(self) -> bool:
        """Whether row i depends on rows j <= i, so that `ForwardSubstitution` can solve it."""
        return self.settings.triangular

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *more: Never,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: Cache | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        start: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        need_solution: bool = False,
        gains: bool = False,
        **unknown: Never,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor | None, Solution]:
        """Return the equilibrium, projected if the layer has an `out_proj`.

        Args:
            x: Input, `[B, N, D]` or `[N, D]`, of the parameters' dtype and device.
            context: Source of keys and values, `[B, M, D]` or `[M, D]`; x if None. Needs `normalize_over="keys"`.
            attn_mask: `[N, M]`, `[B * H, N, M]` or `[B, H, N, M]`: bool, **True = hidden**, or float, added to
                the scores (numbers of -1e6 or less hide, as -inf does). Rows are output tokens, columns the tokens
                they see (those in the cache first).
            key_padding_mask: `[B, M]` (or `[M]`): columns hidden from every row; bool or float alike. With a cache
                those of the new tokens, bool.
            cache: Causal only: the tokens before x, to which those of x are added, `layer.make_cache(...)`. If the call
                raises, it stays as it was.
            segments: Packed documents: `[B, N]` (or `[N]`), int32 or int64. Each run of one number is a document (two
                runs are two), which is an equilibrium of its own: its tokens see no others, its positions begin at 0.
                No work is done between documents, unless there is an `attn_mask`: it then hides other documents, too,
                and nothing is read on the host, as a compiled graph needs it. Not next to `context`, `cache`, `start`.
            cu_seqlens: The same for one sample, as the boundaries of its documents, `[docs + 1]` from 0 to N; not next
                to `attn_mask`.
            start: Where an iterative solver begins, `[B, N, H d]` or `[N, H d]`: `solve(...).value` of inputs like
                these saves steps. It gets no gradient.
            need_weights: Also return the attention matrix at the equilibrium (the only thing that makes one).
            average_attn_weights: Average it over the heads.
            need_solution: Also return what `solve` returns, for a model that logs it: hooks see this call as any other.
            gains: As in `solve`; needs `need_solution`.
            *more: Refused: all others go by name.
            **unknown: Refused, with what it may have meant.

        Returns:
            `[B, N, D]` or `[N, D]`, zeros (before `out_proj`) in rows that see nothing; with `need_weights` also
            `[B, N, M]`, or `[B, H, N, M]` if not averaged; with `need_solution` output, weights or None, and solution.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument has an unknown name.
            ValueError: If a shape, dtype or device does not fit, or an input or weight holds NaN or Inf.
            ConvergenceError: If the tolerance is missed and `on_failure` is "raise".
        """
        if more or unknown:
            check_names(unknown, _OF_FORWARD, len(more))
        if gains and not need_solution:
            raise bad_value("gains", "False without need_solution=True", gains, "Or call `solve`.")
        self._check_gains(gains)
        inputs = self._inputs(
            x, context, attn_mask=attn_mask, key_padding_mask=key_padding_mask, cache=cache, segments=segments,
            cu_seqlens=cu_seqlens, start=start,
        )  # fmt: skip
        solved = solve_call(self, self._report, inputs, may_decode=not (need_weights or gains), needs_output=True)
        out: Any = solved.output
        weights = solved.weights(average_attn_weights) if need_weights else None
        solution = solved.with_gains(self._report) if gains else solved.solution
        if cache is not None:
            solved.fill_cache(inputs)
        if not inputs.batched:
            out, weights, solution = out[0], None if weights is None else weights[0], solution.unbatched()
        if need_solution:
            return out, weights, solution
        return out if weights is None else (out, weights)

    def solve(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        history: bool = False,
        gains: bool = False,
        **inputs: Unpack[InputOptions],
    ) -> Solution:
        """Return the equilibrium before `out_proj`, with residual, steps and convergence.

        Args:
            x: As in `forward`.
            context: As in `forward`.
            history: Keep every iterate. Iterative solvers have them, Picard() and Anderson() among them; the causal
                default, `ForwardSubstitution`, has none.
            gains: Also return `Solution.gain`, how much each row feeds itself, at the cost of no attention pass. Only
                causal layers whose rows belong to keys have it.
            **inputs: Masks, cache, packed documents and start, as in `forward`.

        Returns:
            The solution: `value` `[B, N, D]`; `residual`, `steps` and `converged` per sample `[B]`, or per row `[B, N]`
            with a causal mask, `normalize_over="keys"` or packed documents; no batch for unbatched input.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`; or if the solver has no history or the layer no gains.
            ConvergenceError: As `forward`.
        """
        self._check_gains(gains)
        check_weights_are_here(self, self.W_K, "solve")
        given = self._inputs(x, context, **inputs)
        solved = solve_call(self, self._report, given, history=history, may_decode=not (history or gains))
        solution = solved.with_gains(self._report) if gains else solved.solution
        solution = replace(solution, value=writable(solution.value))
        solution = solution if given.batched else solution.unbatched()
        solved.fill_cache(given)
        return solution

    def equation(self, x: Tensor, context: Tensor | None = None, **inputs: Unpack[InputOptions]) -> Equation:
        """Return the equation that `solve` solves, for `fixed_point`, diagnostics or solvers of your own.

        Args:
            x: As in `forward`; an unbatched input becomes a batch of one.
            context: As in `forward`.
            **inputs: As in `solve`; the cache stays as it is.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`.
        """
        check_weights_are_here(self, self.W_K, "equation")
        return prepare(self, self._inputs(x, context, **inputs))

    def make_cache(self, batch_size: int, capacity: int) -> DecodeCache:
        """Return an empty cache for this layer.

        Args:
            batch_size: B.
            capacity: Tokens it can hold.

        Raises:
            ValueError: If the layer is not causal, or is on the meta device.
        """
        check_cacheable(self.settings)
        settings = self.settings
        device, dtype = expected(self, self.W_K)
        if device.type == "meta":
            raise bad_value("layer", "on a device that holds numbers", Came("one on the meta device"), "Move it "
                            "(layer.to_empty(device=...)), then load its weights.")  # fmt: skip
        return DecodeCache(batch_size, settings.num_kv_heads, settings.head_dim, capacity, device=device,
                           dtype=dtype_of_values(dtype, device))  # fmt: skip

    def _inputs(self, x: Tensor, context: Tensor | None, **options: Unpack[InputOptions]) -> Inputs:
        check_names(options)
        return checked(self.settings, checked_against(self.W_K), x, context, **options)

    def _check_gains(self, gains: bool) -> None:
        if gains and not self.triangular:
            raise bad_value("gains", 'False unless is_causal=True and normalize_over="queries"', gains,
                            "Use diagnostics.spectral_radius.")  # fmt: skip
