"""The configuration of the models: every option of the layer, as plain JSON values."""

import warnings
from dataclasses import fields
from typing import Any, ClassVar

from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import remap_legacy_layer_types

from implicit_attention import recommended
from implicit_attention.errors import Came, bad_type, bad_value, check_choice, check_positive, did_you_mean
from implicit_attention.hf.settings import make_adjoint, make_solver
from implicit_attention.settings import Settings

BLOCK_TYPES = ("implicit", "full_attention")

# What else may stand in a config.json: written by transformers itself, or by tools around it.
_ALSO = {"auto_map", "experts_implementation", "model_type", "num_labels", "output_attentions", "per_layer_config",
         "quantization_config", "tie_last_hidden_states", "torch_dtype", "transformers_weights",
         "attn_implementation", "name_or_path"}  # fmt: skip

# What other libraries call a size.
_ELSEWHERE = {
    "hidden_size": ("hidden", "d_model", "dim", "n_embd", "width"),
    "intermediate_size": ("d_ff", "ffn_dim", "n_inner"),
    "num_hidden_layers": ("layers", "num_layers", "n_layer", "n_layers", "depth"),
    "num_attention_heads": ("heads", "n_head", "n_heads", "nhead"),
    "max_position_embeddings": ("max_len", "max_length", "max_seq_len", "block_size", "n_ctx", "n_positions"),
}


class ImplicitAttentionConfig(PreTrainedConfig):
    """What an implicit-attention model is made of; every value is plain JSON.

    Other names are understood too: `embed_dim` is `hidden_size`, `num_heads` is `num_attention_heads`, `num_kv_heads`
    is `num_key_value_heads`, `layer_types` is `block_types`. A name that is not known is
    an error, and so is a value that does not fit or would have no effect. In a saved configuration, an unknown name is
    kept with a warning: tools and later releases add fields of their own.

    Attributes:
        vocab_size: Number of different tokens.
        hidden_size: Size D of a token inside the model, a multiple of `num_attention_heads` unless there is a
            `head_dim`.
        intermediate_size: Width of the gated MLP; about 8 D / 3, a multiple of 32, if None.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads H of each attention layer.
        num_key_value_heads: Heads of queries-from-outputs and values (ordinary blocks: of keys and values), shared
            by groups of the others; None is replaced by H.
        head_dim: Size d of a head; D / H if None.
        hidden_act: Activation of the gated MLP, by transformers' name for it.
        mlp_bias: Whether its linear maps have biases.
        equal_weights: Whether an ordinary block's MLP is wider, to have as many weights as an implicit block.
        block_types: For each block "implicit", or "attention" for an ordinary one of the same size
            (transformers' own name for it, "full_attention", is what is kept); all implicit if None.
        max_position_embeddings: Longest sequence the model is meant for; nothing is allocated for it.
        is_causal: Token i sees tokens j <= i. `ImplicitAttentionForMaskedLM` needs False, generation True.
        window: Token i sees the last `window` tokens alone, itself included; all if None.
        self_query: As in `ImplicitQueryAttention`; if None, what is recommended (`implicit_attention.recommended`):
            "input" with a causal mask.
        normalize_over: As in `ImplicitQueryAttention`.
        query_input: As in `ImplicitQueryAttention`; if None, what is recommended: only without a causal mask.
        query_output: As in `ImplicitQueryAttention`.
        qk_norm: As in `ImplicitQueryAttention`; if None, what is recommended: only with a causal mask.
        max_gain: As in `ImplicitQueryAttention`. If it is "auto", what is recommended: 0.9 without a causal mask, else
            None; None too in models that were saved before there was one.
        positions: None, "rope", "alibi", "relative", or such as `{"name": "rope", "base": 500000.0}`. "scaled_rope" has
            transformers' `rope_parameters` (`hf.rotary.ScaledRotary`). Or a list with one of these for each block.
        values: As in `ImplicitQueryAttention`: "linear", "identity" or "feedback".
        feedback_norm: As in `ImplicitQueryAttention`.
        out_proj: As in `ImplicitQueryAttention`.
        bias: As in `ImplicitQueryAttention`; for the MLP there is `mlp_bias`.
        dropout: Probability of dropping an attention weight in training.
        scale: As in `ImplicitQueryAttention`.
        solver: "auto", "anderson", "broyden", "contraction", "forward_substitution", "newton_krylov", "picard", or such
            as `{"name": "anderson", "max_steps": 30}`.
        adjoint: "implicit", "phantom", "unrolled", or such as `{"name": "phantom", "steps": 3}`.
        on_failure: As in `ImplicitQueryAttention`.
        rms_norm_eps: Added to the mean square in the norms between layers.
        embedding_multiplier: Factor on the embedding.
        residual_multiplier: Factor on what attention and MLP add to a token.
        logits_scaling: What a language model's logits are divided by.
        initializer_range: Standard deviation of new weights.
        use_cache: Whether causal models return their cache unless they are told otherwise.
        output_gains: Whether calls measure `solver_stats.gain` unless they are told otherwise; it costs a tenth to
            a fifth of a forward pass.
        tie_word_embeddings: Whether the language-model head is the embedding itself.
        pad_token_id: Token that fills up a batch.
        bos_token_id: Token that begins a text.
        eos_token_id: Token, or tokens, that end it.
    """

    model_type = "implicit_attention"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "solver_stats"]
    attribute_map: ClassVar[dict[str, str]] = {
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "layer_types": "block_types",  # what transformers' caches look for, and 0.1.0 saved
    }

    # None where no None is allowed: `__post_init__` fills these in.
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = None  # type: ignore[assignment]
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    mlp_bias: bool = False
    equal_weights: bool = True
    block_types: list[str] = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    is_causal: bool = True
    window: int | None = None
    self_query: str = None  # type: ignore[assignment]
    normalize_over: str = "queries"
    query_input: bool = None  # type: ignore[assignment]
    query_output: bool = True
    qk_norm: bool | str = None  # type: ignore[assignment]
    max_gain: float | str | None = "auto"
    positions: str | dict[str, Any] | list[str | dict[str, Any] | None] | None = "rope"
    values: str = "linear"
    feedback_norm: bool = True
    out_proj: bool = True
    bias: bool | str = False
    dropout: float = 0.0
    scale: float | None = None
    solver: str | dict[str, Any] = "auto"
    adjoint: str | dict[str, Any] = "implicit"
    on_failure: str = "warn"
    rms_norm_eps: float = 1e-6
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    initializer_range: float = 0.02
    use_cache: bool = True
    output_gains: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what was left open, and refuse what does not fit.

        Args:
            **kwargs: What is no field: transformers' own settings. Anything else is an error, unless it was saved.

        Raises:
            TypeError: If a value is of the wrong type.
            ValueError: If a name is unknown, or a value does not fit.
        """
        saved = "model_type" in kwargs or self.transformers_version is not None
        self._check_unknown(kwargs, saved=saved)
        kinds = kwargs.pop("layer_types", None)
        if kinds is not None and self.block_types is not None and kinds != self.block_types:
            raise bad_value("layer_types", "None next to block_types", Came(repr(kinds)), "Both name the same setting.")
        self.block_types = kinds if self.block_types is None else self.block_types
        if self.block_types is not None:
            _check_names("block_types", self.block_types)  # before transformers puts its own names in their place
        super().__post_init__(**kwargs)
        check_positive("num_hidden_layers", self.num_hidden_layers, integer=True)
        for name in ("hidden_size", "num_attention_heads"):
            check_positive(name, getattr(self, name), integer=True)
        given: int | None = self.head_dim
        if given is None and self.hidden_size % self.num_attention_heads:
            raise bad_value("num_attention_heads", f"a divisor of hidden_size={self.hidden_size}",
                            self.num_attention_heads, "Or give `head_dim`.")  # fmt: skip
        defaults = {
            "block_types": ["implicit"] * self.num_hidden_layers,
            "intermediate_size": max(1, round(8 * self.hidden_size / 3 / 32)) * 32,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            **recommended.default_settings(is_causal=self.is_causal, normalize_over=self.normalize_over),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.max_gain == "auto":  # it is saved as a number or None
            self.max_gain = None if saved else recommended.default_max_gain(
                is_causal=self.is_causal, normalize_over=self.normalize_over, query_input=self.query_input
            )  # fmt: skip
        if len(self.block_types) > self.num_hidden_layers:
            raise _wrong_length(self.block_types, self.num_hidden_layers)
        self.validate()

    def _check_unknown(self, given: dict[str, Any], saved: bool) -> None:
        """Refuse unknown names that a user typed; warn of those that came from a file."""
        unknown = [n for n in given if n not in _ALSO and n not in self.attribute_map and not n.startswith("_")]
        if saved:
            generation = GenerationConfig._get_default_generation_params()  # transformers drops these itself
            unknown = [name for name in unknown if name not in generation]
        if not unknown:
            return
        if not saved:
            names = [*self.attribute_map, *(field.name for field in fields(self))]
            meant = next((ours for ours, theirs in _ELSEWHERE.items() if unknown[0] in theirs), unknown[0])
            raise bad_value(
                "config", "made of names that ImplicitAttentionConfig knows", Came(f"`{unknown[0]}`"),
                f"{did_you_mean(meant, names)}The options are {', '.join(names)}.",
            )  # fmt: skip
        warnings.warn(
            f"The saved configuration has fields that this release of implicit-attention does not know: "
            f"{', '.join(f'`{name}`' for name in unknown)}. They are kept and have no effect. If a newer release saved "
            "the model, update implicit-attention.",
            stacklevel=5,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the configuration from what was saved; unknown names are kept with a warning.

        Args:
            config_dict: What `to_dict` gave.
            **kwargs: As in `PreTrainedConfig.from_dict`.

        Returns:
            The configuration, with `return_unused_kwargs=True` also the other `kwargs`.
        """
        return super().from_dict({**config_dict, "model_type": cls.model_type}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved. A model that was cut short (`num_hidden_layers`) has as many `block_types`."""
        saved: dict[str, Any] = super().to_dict()
        saved["block_types"] = saved["block_types"][: self.num_hidden_layers]
        return saved

    def positions_of(self, layer_idx: int) -> str | dict[str, Any] | None:
        """Return the setting of one block's positions.

        Args:
            layer_idx: The block.
        """
        return self.positions[layer_idx] if isinstance(self.positions, list) else self.positions

    @property
    def position_names(self) -> frozenset[str | None]:
        """The names of the position encodings of all blocks, None for blocks without one."""
        settings = [self.positions_of(i) for i in range(self.num_hidden_layers)]
        return frozenset(setting["name"] if isinstance(setting, dict) else setting for setting in settings)

    @property
    def has_dynamic_positions(self) -> bool:
        """Whether some block's rotary positions change with the length of the text."""
        settings = [self.positions_of(i) for i in range(self.num_hidden_layers)]
        return any(s["parameters"].get("rope_type") == "dynamic" for s in settings
                   if isinstance(s, dict) and isinstance(s.get("parameters"), dict))  # fmt: skip

    @property
    def output_attentions(self) -> bool | None:
        """Whether calls return attention matrices unless they are told otherwise, with any `attn_implementation`."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        self._output_attentions = value

    def validate(self) -> None:
        """Refuse values that do not fit; called for a new config and before one is saved.

        Raises:
            TypeError: If a value is of the wrong type.
            ValueError: If it does not fit.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):  # fmt: skip
            check_positive(name, getattr(self, name), integer=True)
        check_positive("num_key_value_heads", self.num_key_value_heads, integer=True)
        if self.window is not None:
            check_positive("window", self.window, integer=True)
        check_positive("head_dim", self.head_dim, integer=True)
        for name in ("rms_norm_eps", "initializer_range", "embedding_multiplier", "residual_multiplier",
                     "logits_scaling"):  # fmt: skip
            check_positive(name, getattr(self, name))
        for name in ("is_causal", "query_input", "query_output", "feedback_norm", "out_proj", "use_cache",
                     "output_gains", "tie_word_embeddings", "mlp_bias", "equal_weights"):  # fmt: skip
            check_choice(name, getattr(self, name), (True, False))
        check_choice("qk_norm", self.qk_norm, (True, False, "weights"))
        check_choice("bias", self.bias, (True, False, "qkv"))
        if self.hidden_act not in ACT2FN:
            raise bad_value("hidden_act", "an activation that transformers knows", self.hidden_act)
        self._validate_layers()
        inner = self.num_attention_heads * self.head_dim
        if not self.out_proj and inner != self.hidden_size:
            raise bad_value("out_proj", f"True where all heads together have {inner} numbers and not "
                            f"hidden_size={self.hidden_size}", False,
                            "Something has to bring them to that size. Or leave `head_dim` out.")  # fmt: skip
        if "implicit" in self.block_types:
            Settings(**self.layer_options())  # which checks them
        make_solver(self.solver)
        make_adjoint(self.adjoint)
        self.validate_token_ids()

    def layer_options(self) -> dict[str, Any]:
        """Return the settings of the implicit layers, as arguments of `ImplicitQueryAttention`."""
        names = ("head_dim", "is_causal", "window", "self_query", "normalize_over", "query_input", "query_output",
                 "qk_norm", "values", "feedback_norm", "out_proj", "bias", "dropout", "max_gain", "scale")  # fmt: skip
        sizes = {"embed_dim": self.hidden_size, "num_heads": self.num_attention_heads}
        return sizes | {"num_kv_heads": self.num_key_value_heads} | {name: getattr(self, name) for name in names}

    def _validate_layers(self) -> None:
        types = self.block_types
        _check_names("block_types", types)
        if len(types) < self.num_hidden_layers:  # more of them: num_hidden_layers was lowered to leave early
            raise _wrong_length(types, self.num_hidden_layers)
        self.block_types = remap_legacy_layer_types(types) or types
        if isinstance(self.positions, list) and len(self.positions) < self.num_hidden_layers:
            raise bad_value("positions", f"of length num_hidden_layers={self.num_hidden_layers}",
                            Came(f"{len(self.positions)} entries"))  # fmt: skip
        if self.window is not None and not self.is_causal:
            raise bad_value("window", "None unless is_causal=True", self.window,
                            "A window reaches back from a token; without a causal mask there is no back.")  # fmt: skip


def _wrong_length(types: list[str], layers: int) -> ValueError:
    return bad_value("block_types", f"of length num_hidden_layers={layers}", Came(f"{len(types)} entries"))


def _check_names(argument: str, names: object) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad_type(argument, 'a list of "implicit" and "attention", one for each block', names)
    for name in names:
        check_choice(argument, name, (*BLOCK_TYPES, "attention"))
