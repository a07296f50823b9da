"""The recommended settings, said once: what everything above the layer starts from.

`ImplicitQueryAttention` itself has the original map's settings as its defaults: no mask, one head, nothing added.
Without a mask that map collapses to the mean and does not train. So models take the settings here: `for_causal_lm`,
`for_encoder` and `for_cross_attention` of the layer, `ImplicitAttentionConfig`, the commands `train` and `demo`, and
the examples.

Decoders: `self_query="input"`. Every weight matrix then has exactly one equilibrium, no row has an equation to be
solved, and all gains are 0, so nothing can fail to converge in a long run.
`self_query="output"` is the original equation. It was ahead in 0 of 8 comparisons of `docs/results.md` and behind in
none: try it where a run is watched. `qk_norm=True` keeps scores bounded while weights grow. `positions="rope"` has no
weights and no largest distance, and is what trained models have. Relative biases were ahead of it in 2 of 2 comparisons
and behind in none: they learn recall in fewer steps, and bytes better.

Encoders: `query_input=True`. Queries that see the input differ from the start. `max_gain=0.9` keeps the map contracting
while weights grow: one equilibrium for any weights, found in a few steps in training too.

Cross-attention: the conventional orientation, the only one that it exists in. No positions: tokens and context have no
common order.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

CAUSAL_LM: Mapping[str, Any] = MappingProxyType(
    {"is_causal": True, "self_query": "input", "qk_norm": True, "positions": "rope", "out_proj": True}
)
MAX_GAIN = 0.9
ENCODER: Mapping[str, Any] = MappingProxyType(
    {"query_input": True, "max_gain": MAX_GAIN, "positions": "rope", "out_proj": True}
)  # fmt: skip
CROSS_ATTENTION: Mapping[str, Any] = MappingProxyType(
    {"normalize_over": "keys", "query_input": True, "max_gain": MAX_GAIN, "out_proj": True}
)  # fmt: skip


def default_max_gain(*, is_causal: bool, normalize_over: str, query_input: bool) -> float | None:
    """Return the default of a model's `max_gain`: None where the layer refuses a number.

    Args:
        is_causal: Whether the model has a causal mask.
        normalize_over: As in the layer.
        query_input: As in the layer.
    """
    return None if is_causal or not (query_input or normalize_over == "queries") else MAX_GAIN


def default_settings(*, is_causal: bool, normalize_over: str) -> dict[str, Any]:
    """Return the defaults of a model's settings that depend on its mask and on what the softmax runs over.

    Args:
        is_causal: Whether the model has a causal mask.
        normalize_over: As in the layer.

    Returns:
        `self_query`, `query_input` and `qk_norm`.
    """
    family = CAUSAL_LM if is_causal else ENCODER
    triangular = is_causal and normalize_over == "queries"
    return {
        "self_query": family.get("self_query", "output") if triangular else "output",
        "query_input": family.get("query_input", False),
        "qk_norm": family.get("qk_norm", False),
    }


class Recommended:
    """A layer that can be made with the settings that are recommended for a purpose."""

    @classmethod
    def for_causal_lm(cls, embed_dim: int, num_heads: int, **overrides: Any) -> Self:
        """Make the layer that is recommended for language models: causal, with one equilibrium whatever the weights.

        Args:
            embed_dim: Size D of a token.
            num_heads: H.
            **overrides: Other arguments of the constructor, and those that are to differ from `CAUSAL_LM`.

        Returns:
            The layer.
        """
        return cls(embed_dim, num_heads, **{**CAUSAL_LM, **overrides})  # type: ignore[call-arg]

    @classmethod
    def for_encoder(cls, embed_dim: int, num_heads: int, **overrides: Any) -> Self:
        """Make the layer that is recommended where every token sees every other.

        Args:
            embed_dim: Size D of a token.
            num_heads: H.
            **overrides: Other arguments of the constructor, and those that are to differ from `ENCODER`;
                `positions=None` where the input has positions of its own.

        Returns:
            The layer.
        """
        return cls(embed_dim, num_heads, **{**ENCODER, **overrides})  # type: ignore[call-arg]

    @classmethod
    def for_cross_attention(cls, embed_dim: int, num_heads: int, **overrides: Any) -> Self:
        """Make the layer that is recommended for attention to another sequence, `layer(x, context)`.

        Args:
            embed_dim: Size D of a token.
            num_heads: H.
            **overrides: Other arguments of the constructor, and those that are to differ from
                `CROSS_ATTENTION`.

        Returns:
            The layer.
        """
        return cls(embed_dim, num_heads, **{**CROSS_ATTENTION, **overrides})  # type: ignore[call-arg]
