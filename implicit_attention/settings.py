"""The settings of a layer, checked once: what the layer, its equation and the models' configuration share."""

import warnings
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from implicit_attention.errors import Came, bad_type, bad_value, check_choice, check_positive, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `ImplicitQueryAttention` is made of, beside its modules, solver and gradient; its docstring explains each.

    Attributes:
        embed_dim: Size D of a token.
        num_heads: H.
        num_kv_heads: G, a divisor of H; None stands for H.
        head_dim: Size d of a head; None stands for D / H.
        is_causal: Row i sees columns j <= i.
        window: Row i sees columns i - window < j <= i; None for all.
        self_query: "output" or "input".
        normalize_over: "queries" or "keys".
        query_input: Whether queries are `Omega_Q y + W_Q x`.
        query_output: Whether queries read outputs; without, they are `W_Q x`.
        qk_norm: Whether keys and queries are RMS-normed; "weights": with weights in the place of temperatures.
        values: "linear", "identity" or "feedback".
        feedback_norm: Whether outputs that values read are RMS-normed first.
        out_proj: Whether a linear map follows the equilibrium.
        bias: Whether linear maps have biases; "qkv": all but `out_proj`.
        dropout: Probability of dropping an attention weight in training.
        max_gain: Bound of the map's contraction, in (0, 1); None for none.
        scale: Factor on the scores; None stands for `head_dim ** -0.5`.
    """

    embed_dim: int
    num_heads: int = 1
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in, as are head_dim and scale
    head_dim: int = None  # type: ignore[assignment]
    is_causal: bool = False
    window: int | None = None
    self_query: str = "output"
    normalize_over: str = "queries"
    query_input: bool = False
    query_output: bool = True
    qk_norm: bool | str = False
    values: str = "linear"
    feedback_norm: bool = True
    out_proj: bool = False
    bias: bool | str = False
    dropout: float = 0.0
    max_gain: float | None = None
    scale: float = None  # type: ignore[assignment]  # filled in

    def __post_init__(self) -> None:
        """Fill in what was left open, and refuse what does not fit.

        Raises:
            TypeError: If a setting is of the wrong type.
            ValueError: If a value is unknown, out of range, or without effect next to the others.
        """
        self._check_sizes()
        self._check_groups()
        self._check_choices()
        self._check_numbers()
        _ = self.widths, self.norms  # the first read takes a lock (Python 3.11), which has no place in a compiled graph

    @property
    def inner_dim(self) -> int:
        """Size H d of an equilibrium's row: D, unless `head_dim` says something else."""
        return self.num_heads * self.head_dim

    @cached_property
    def widths(self) -> dict[str, int]:
        """Outputs of the linear maps that make keys, queries and values, by name: of those that there are."""
        columns = self.num_kv_heads * self.head_dim
        queries, keys = (columns, self.inner_dim) if self.rows_are_keys else (self.inner_dim, columns)
        found = {"W_K": keys}
        found |= {"Omega_Q": queries} if self.query_output else {}
        found |= {"W_Q": queries} if self.query_input else {}
        found |= {"Omega_V": columns} if self.values != "identity" else {}
        return found | ({"Psi_V": columns} if self.feeds_back else {})

    @cached_property
    def norms(self) -> dict[str, int]:
        """Sizes of the parameters of the norms, by name: of those that there are."""
        if self.qk_norm == "weights":
            return {"key_norm": self.head_dim, "query_norm": self.head_dim}
        return {"temperature": self.widths["W_K"] // self.head_dim} if self.qk_norm else {}

    @property
    def rows_are_keys(self) -> bool:
        """Whether output rows belong to keys and the softmax runs over queries, as in the original."""
        return self.normalize_over == "queries"

    @property
    def triangular(self) -> bool:
        """Whether row i depends on rows j <= i alone, so that `ForwardSubstitution` can solve it."""
        return self.is_causal and self.rows_are_keys

    @property
    def feeds_back(self) -> bool:
        """Whether values read outputs."""
        return self.values == "feedback"

    @property
    def unique(self) -> bool:
        """Whether there is one equilibrium, whatever the weights."""
        return self.self_query == "input" or self.max_gain is not None

    def changed(self) -> dict[str, object]:
        """Return the settings that are not the default, by name, `embed_dim` aside."""
        default = Settings(embed_dim=self.inner_dim, num_heads=self.num_heads)
        names = [field.name for field in fields(self) if field.name not in ("embed_dim", "num_heads")]
        found = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(default, n)}
        return found if self.inner_dim == self.embed_dim else {"head_dim": self.head_dim, **found}

    def _fill(self, name: str, value: object) -> None:
        """Give a setting that was left open its value."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        check_positive("embed_dim", self.embed_dim, integer=True)
        check_positive("num_heads", self.num_heads, integer=True)
        given: int | None = self.head_dim
        if given is None and self.embed_dim % self.num_heads:
            raise bad_value("num_heads", f"a divisor of embed_dim={self.embed_dim}", self.num_heads,
                            "Or give `head_dim`.")  # fmt: skip
        self._fill("head_dim", self.embed_dim // self.num_heads)
        check_positive("head_dim", self.head_dim, integer=True)

    def _check_groups(self) -> None:
        self._fill("num_kv_heads", self.num_heads)
        check_positive("num_kv_heads", self.num_kv_heads, integer=True)
        if self.num_heads % self.num_kv_heads:
            raise bad_value("num_kv_heads", f"a divisor of num_heads={self.num_heads}", self.num_kv_heads)

    def _check_choices(self) -> None:
        check_choice("self_query", self.self_query, ("output", "input"))
        check_choice("normalize_over", self.normalize_over, ("queries", "keys"))
        check_choice("values", self.values, ("linear", "identity", "feedback"))
        for name in ("is_causal", "query_input", "query_output", "feedback_norm", "out_proj"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("qk_norm", self.qk_norm, (True, False, "weights"))
        check_choice("bias", self.bias, (True, False, "qkv"))
        if self.self_query == "input" and not self.triangular:
            raise bad_value(
                "self_query", '"output" unless is_causal=True and normalize_over="queries"', self.self_query,
                "Elsewhere no column j = i is set apart, and the option would have no effect.",
            )  # fmt: skip
        if self.values == "identity" and self.num_kv_heads != self.num_heads:
            raise bad_value("num_kv_heads", f'num_heads={self.num_heads} with values="identity"', self.num_kv_heads,
                            "The input itself has no fewer heads.")  # fmt: skip
        if self.values == "identity" and self.inner_dim != self.embed_dim:
            raise bad_value("head_dim", 'embed_dim / num_heads with values="identity"', self.head_dim)
        self._check_feedback()

    def _not_strict(self) -> str:
        """The settings that keep a row from depending on earlier rows alone, as arguments."""
        wanted = {"is_causal": True, "normalize_over": "queries", "self_query": "input"}
        return ", ".join(f"{n}={getattr(self, n)!r}" for n, value in wanted.items() if getattr(self, n) != value)

    def _check_feedback(self) -> None:
        if self.feeds_back and not (self.triangular and self.self_query == "input"):
            raise bad_value(
                "values",
                '"feedback" only with is_causal=True, normalize_over="queries" and self_query="input"',
                Came(f"it with {self._not_strict()}"),
                "There each row follows from the rows before it. Elsewhere values that read their own output, or a "
                "later one, may have no equilibrium, or many.",
            )  # fmt: skip
        if not self.feeds_back and not self.feedback_norm:
            raise bad_value("feedback_norm", 'True unless values="feedback"', self.feedback_norm,
                            "It would have no effect: no value reads an output.")  # fmt: skip
        if not self.query_output and not (self.feeds_back and self.query_input):
            raise bad_value(
                "query_output", 'True unless values="feedback" and query_input=True', self.query_output,
                "Queries would be made from nothing, or nothing would read an output: that is ordinary attention.",
            )  # fmt: skip

    def _check_numbers(self) -> None:
        if self.window is not None:
            check_positive("window", self.window, integer=True)
            if not self.is_causal:
                raise bad_value("window", "None unless is_causal=True", self.window)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)):
            raise bad_type("dropout", "a number in [0, 1)", self.dropout)
        if not 0 <= self.dropout < 1:
            raise bad_value("dropout", "a number in [0, 1)", self.dropout)
        self._check_gain()
        self._fill("scale", self.head_dim**-0.5)
        check_positive("scale", self.scale)

    @property
    def contracting(self) -> str:
        """What makes this layer's map a contraction without a causal mask, whose outputs are not all the mean."""
        return "max_gain=0.9" if self.query_input else "query_input=True and max_gain=0.9"

    def _check_gain(self) -> None:
        if self.max_gain is None:
            return
        if isinstance(self.max_gain, bool) or not isinstance(self.max_gain, (int, float)):
            raise bad_type("max_gain", "a number in (0, 1) or None", self.max_gain)
        if not 0 < self.max_gain < 1:
            raise bad_value("max_gain", "a number in (0, 1) or None", self.max_gain)
        if self.is_causal:
            raise bad_value(
                "max_gain", "None with is_causal=True", self.max_gain,
                "The bound is that of a whole sample, so tokens would see later ones. Causal layers do not need it: "
                "they are solved exactly, and self_query=\"input\" gives one equilibrium for any weights.",
            )  # fmt: skip
        if not (self.rows_are_keys or self.query_input):
            raise bad_value("max_gain", 'None with normalize_over="keys" and query_input=False', self.max_gain,
                            "All tokens pose the same equation there: use query_input=True.")  # fmt: skip


NAMES = frozenset(field.name for field in fields(Settings))
# What a made layer can still change: the others decide the shapes of its parameters.
CHANGEABLE = frozenset({"is_causal", "window", "self_query", "feedback_norm", "dropout", "max_gain", "scale"})
_WORDS = sorted(NAMES | {"solver", "adjoint", "on_failure"})  # what a misspelt attribute may have meant
_ELSEWHERE = {  # what other libraries call an option
    **dict.fromkeys(("d_model", "dim", "hidden_size", "width", "n_embd"), "embed_dim"),
    **dict.fromkeys(("heads", "n_heads", "nhead", "n_head", "num_attention_heads"), "num_heads"),
    **dict.fromkeys(("kv_heads", "num_key_value_heads"), "num_kv_heads"),
    "dim_head": "head_dim", "causal": "is_causal", "sliding_window": "window", "attn_dropout": "dropout",
    "dropout_p": "dropout", "pos": "positions", "rope": "positions",
}  # fmt: skip
_OF_SOLVERS = ("rtol", "atol", "tol", "max_steps", "max_iter", "kernel")


def unknown_option(name: str) -> TypeError:
    """Return the error for an option that a layer does not have, with what it may have meant."""
    if name == "batch_first":
        remedy = "Inputs are [batch, tokens, width] always: leave it out."
    elif name in _OF_SOLVERS:
        remedy = "It is one of solvers, as in solver=ForwardSubstitution(rtol=1e-5)."
    else:
        remedy = did_you_mean(_ELSEWHERE.get(name, name), _WORDS) + "help(ImplicitQueryAttention) lists all options."
    return TypeError(f"a layer has no option `{name}`. {remedy}")


_OF_MULTIHEAD = ("batch_first", "in_proj_weight", "in_proj_bias", "_qkv_same_embed_dim")
_SEEN = {"query_input", "query_output", "out_proj", "bias"}  # the printed modules show them
_MODULES = frozenset({"out_proj"})  # settings whose names belong to the modules that they make


class Configured(nn.Module):
    """A module whose settings can be read, and where they shape no parameter changed, as its attributes."""

    settings: Settings

    def __getattr__(self, name: str) -> Any:
        """Return a setting by its name; modules and parameters as every module does."""
        settings = self.__dict__.get("settings")
        if settings is not None and name in NAMES - _MODULES:
            return getattr(settings, name)
        if name in _OF_MULTIHEAD:
            raise AttributeError(
                f"a layer has no `{name}`: it is called with one x, unlike nn.MultiheadAttention. For what calls "
                'that one, see "In place of nn.MultiheadAttention" in docs/using.md.'
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting, which is checked as in the constructor."""
        if name in CHANGEABLE:
            self.settings = replace(self.settings, **{name: value})
        elif name in NAMES - _MODULES:
            raise AttributeError(f"`{name}` decides the shapes of parameters: make a new layer to change it")
        else:
            if not isinstance(value, (Tensor, nn.Module)) and (meant := self._meant(name)) is not None:
                text = f"a layer has no setting `{name}`: this changes nothing. Did you mean `{meant}`?"
                warnings.warn(text, UserWarning, stacklevel=3)
            super().__setattr__(name, value)

    def _meant(self, name: str) -> str | None:
        """The setting that a new attribute is a misspelling of; None if it has a name of its own."""
        if name in _WORDS or name.startswith("_") or hasattr(self, name):
            return None
        return next(iter(get_close_matches(name, _WORDS, 1, 0.85)), None)

    def extra_repr(self) -> str:
        """Return the settings that are not the default, for `print`."""
        settings = self.settings
        shown = [f"{name}={value!r}" for name, value in settings.changed().items() if name not in _SEEN]
        shown += [] if self.on_failure == "warn" else [f"on_failure={self.on_failure!r}"]
        parts = [f"{settings.embed_dim}, num_heads={settings.num_heads}", *shown]
        return ", ".join([*parts, f"solver={_brief(self.solver)}", f"adjoint={_brief(self.adjoint)}"])


def _brief(value: Any) -> str:
    """A value as it would be written down: solvers and gradients without the fields that are the default."""
    if not is_dataclass(value):
        return repr(value)
    shown = []
    for field in fields(value):
        given = getattr(value, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.repr and given != default:
            shown.append(f"{field.name}={_brief(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"
