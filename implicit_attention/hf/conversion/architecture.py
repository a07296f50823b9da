"""What a trained model is made of, in the words of `ImplicitAttentionConfig`; what has no word there is refused."""

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from implicit_attention.hf.modeling import ImplicitAttentionModel
from implicit_attention.hf.rotary import ROPE_TYPES

OWN = "implicit_attention"  # its ordinary blocks
ARCHITECTURES = ("granite", OWN, "llama", "mistral", "qwen2", "qwen3", "smollm3")

# Names that both configurations share, with the same meaning.
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "problem_type", "id2label", "label2id",
)  # fmt: skip
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")  # of Granite
# Which models read a field of their configuration. The others may hold it too, and do not look at it.
_READS = {
    "attention_bias": ("granite", "llama", "qwen3", "smollm3"),
    "mlp_bias": ("granite", "llama", "smollm3"),
    "layer_types": ("qwen2", "qwen3", "smollm3"),  # each of its layers has a window or none; Mistral's all have it
}
# What the trained model does not have, of an implicit layer.
NEW = ("Omega_Q.weight", "Psi_V.weight", "Psi_V.bias")
_NORM_EPS = 1e-6  # of the norms of queries and keys: the layer has this one alone

# Modules of a block, ours by theirs. In an implicit block rows belong to keys, so queries and keys change places.
_BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "self_attn.o_proj": "attention.out_proj",
}
_IMPLICIT = {
    "self_attn.q_proj": "attention.W_K",
    "self_attn.k_proj": "attention.W_Q",
    "self_attn.v_proj": "attention.Omega_V",
    "self_attn.q_norm.weight": "attention.key_norm",
    "self_attn.k_norm.weight": "attention.query_norm",
}
_ORDINARY = {
    "self_attn.q_proj": "attention.W_Q",
    "self_attn.k_proj": "attention.W_K",
    "self_attn.v_proj": "attention.W_V",
    "self_attn.q_norm.weight": "attention.query_norm",
    "self_attn.k_norm.weight": "attention.key_norm",
}
_BECOMES = {"W_Q": "attention.W_K", "W_K": "attention.W_Q", "W_V": "attention.Omega_V",
            "query_norm": "attention.key_norm", "key_norm": "attention.query_norm"}  # fmt: skip
_OWN = re.compile(rf"^attention\.({'|'.join(_BECOMES)})\b")
_IN_BLOCK = re.compile(r"(.*\blayers\.)(\d+)\.(.+)")


class ConversionError(ValueError):
    """A model cannot be converted exactly."""


def chosen_layers(layers: str | int | slice | Iterable[int], count: int) -> list[int]:
    """Return which layers become implicit, in order.

    Args:
        layers: "all", "none", an index, indices, a slice, or such as "0,4,8-16": layers are counted from 0, and a range
            includes both its ends. Negative indices count from the last layer.
        count: How many there are.

    Raises:
        ConversionError: If there is no such layer.
    """
    if isinstance(layers, str) and layers in ("all", "none"):
        return list(range(count)) if layers == "all" else []
    if isinstance(layers, slice):
        return list(range(count))[layers]
    if isinstance(layers, str):
        wanted: list[Any] = list(_spelled(layers))
    else:
        wanted = list(layers) if isinstance(layers, Iterable) else [layers]
    found = set()
    for index in wanted:
        whole = hasattr(index, "__index__") and not isinstance(index, bool)  # NumPy's integers too
        if not whole or not -count <= operator.index(index) < count:
            there = f"layers 0 to {count - 1}" if count > 1 else "layer 0 alone"
            raise ConversionError(f"`layers`: the model has {there}, but {index!r} was asked for.")
        found.add(operator.index(index) % count)
    return sorted(found)


def _spelled(layers: str) -> list[int]:
    found: list[int] = []
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise ConversionError(f'`layers` must be "all", "none", or such as "0,4,8-16", but got {layers!r}.')
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found


_QUANTISED = "The weights are quantised, and a solve needs them as they are: convert the model that was quantised."


def check_source(source: PreTrainedConfig) -> None:
    """Refuse a model of another architecture, or with quantised weights.

    Args:
        source: Its configuration.

    Raises:
        ConversionError: If it is one.
    """
    if source.model_type not in ARCHITECTURES:
        raise ConversionError(f"Models of type {source.model_type!r} cannot be converted. These can: "
                              f"{', '.join(ARCHITECTURES)}.")  # fmt: skip
    quantised = getattr(source, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and method != "gguf":  # transformers dequantises files in GGUF format as it reads them
        raise ConversionError(_QUANTISED)


def check_weights(source: nn.Module) -> None:
    """Refuse a model whose weights are no numbers that can be copied.

    Args:
        source: The model.

    Raises:
        ConversionError: If it was quantised after it was loaded, or has no weights yet.
    """
    for held in source.state_dict().values():
        if not isinstance(held, Tensor) or held.is_quantized:  # quantize_dynamic keeps packed weights and dtypes
            raise ConversionError(_QUANTISED)
        if held.is_meta:
            raise ConversionError('The model has no weights yet, it is on the device "meta": load them first.')


def check_new(values: str, self_query: str) -> None:
    """Refuse values that cannot begin as those of the trained model.

    Args:
        values: As in `ImplicitQueryAttention`.
        self_query: As there.

    Raises:
        ConversionError: If they cannot.
    """
    if values not in ("linear", "feedback"):
        raise ConversionError(f'`values` must be "linear" or "feedback", but got {values!r}.')
    if values == "feedback" and self_query != "input":
        raise ConversionError('`values="feedback"` needs `self_query="input"`: else an equation may have no solution.')


def described(source: PreTrainedConfig, layers: list[int]) -> dict[str, Any]:
    """Return the options of an `ImplicitAttentionConfig` for the same model.

    Args:
        source: The configuration of a trained model, checked.
        layers: Which blocks are implicit.

    Raises:
        ConversionError: If the model has something that they cannot say.
    """
    if source.model_type == OWN:
        return _own(source, layers)
    found = {name: getattr(source, name) for name in _SAME}
    if source.model_type == "granite":
        found |= {name: getattr(source, name) for name in _MULTIPLIERS}
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    kinds = ["implicit" if i in layers else "full_attention" for i in range(source.num_hidden_layers)]
    return found | {
        "head_dim": head_dim,
        "block_types": kinds,
        "equal_weights": False,
        "is_causal": True,
        "query_input": True,
        "qk_norm": _norms(source),
        "bias": "qkv" if source.model_type == "qwen2" else bool(_read(source, "attention_bias")),
        "mlp_bias": bool(_read(source, "mlp_bias")),
        "out_proj": True,
        "dropout": float(source.attention_dropout),
        "scale": source.attention_multiplier if source.model_type == "granite" else None,
        "window": _window(source),
        "positions": _positions(source),
    }


def _own(source: PreTrainedConfig, layers: list[int]) -> dict[str, Any]:
    """The options of a model of ordinary blocks, where some become implicit."""
    count = source.num_hidden_layers
    if any(kind == "implicit" for kind in source.block_types[:count]):
        raise ConversionError(f"{source.name_or_path or 'The model'} has implicit layers already: train it as it is.")
    if not (source.is_causal and source.values == "linear" and source.out_proj):
        raise ConversionError('Its ordinary blocks must have is_causal=True, values="linear" and out_proj=True.')
    kept = ("self_query", "values", "solver", "adjoint", "on_failure", "equal_weights", "block_types", "dtype",
            "transformers_version", "model_type", "architectures", "layer_types", "_name_or_path")  # fmt: skip
    found = {name: value for name, value in source.to_dict().items() if name not in kept}
    with torch.device("meta"):
        blocks: Any = ImplicitAttentionModel(source).layers  # type: ignore[arg-type]  # its type was looked at
        widths = {block.mlp.up.out_features for block in blocks}
    if len(widths) > 1:
        raise ConversionError(f"Its MLPs must be equally wide, but have widths {sorted(widths)}.")
    (width,) = widths
    kinds = ["implicit" if i in layers else "full_attention" for i in range(count)]
    return found | {
        "intermediate_size": width, "equal_weights": False, "block_types": kinds, "query_input": True,
        "query_output": True,
    }  # fmt: skip


def _norms(source: PreTrainedConfig) -> bool | str:
    if source.model_type != "qwen3":
        return False
    if source.rms_norm_eps != _NORM_EPS:
        raise ConversionError(f"Its norms of queries and keys have eps={source.rms_norm_eps}, but those of the layer "
                              f"have {_NORM_EPS}.")  # fmt: skip
    return "weights"


def _read(source: PreTrainedConfig, field: str) -> Any:
    """A field of a configuration, None where its model does not read it."""
    return getattr(source, field, None) if source.model_type in _READS[field] else None


def _window(source: PreTrainedConfig) -> int | None:
    window = getattr(source, "sliding_window", None)
    if source.model_type == "mistral":
        return None if window is None else int(window)
    if source.model_type == "smollm3" and not source.use_sliding_window:
        return None
    kinds = set(_read(source, "layer_types") or ["full_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise ConversionError(f"Its layers have attention of several kinds ({', '.join(sorted(kinds))}), but all "
                              "blocks of ImplicitAttentionConfig share one window.")  # fmt: skip
    return None if window is None else int(window)


def _positions(source: PreTrainedConfig) -> Any:
    parameters = dict(getattr(source, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConversionError(f"Its rotary positions are of type {kind!r}, but the layer has {', '.join(ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            "Its rotary positions turn only a part of each head, but those of the layer turn all of it."
        )
    made = {
        "name": "scaled_rope",
        "max_position_embeddings": source.max_position_embeddings,
        "parameters": parameters,
    }
    turning = getattr(source, "no_rope_layers", None)
    if turning is None or all(turning):
        return made
    return [made if turns else None for turns in turning]


def renamed(name: str, layers: list[int], *, own: bool = False) -> str:
    """Return our name of a weight.

    Args:
        name: Its name in the trained model.
        layers: Which blocks are implicit.
        own: Whether the trained model has the ordinary blocks of this library.

    Raises:
        ConversionError: If it has no place here.
    """
    in_block = _IN_BLOCK.fullmatch(name)
    if in_block is None:
        return name
    prefix, index, rest = in_block.groups()
    if own:
        return f"{prefix}{index}.{_OWN.sub(lambda found: _BECOMES[found[1]], rest)}" if int(index) in layers else name
    table = _BLOCK | (_IMPLICIT if int(index) in layers else _ORDINARY)
    module, _, last = rest.rpartition(".")
    if rest in table:
        return f"{prefix}{index}.{table[rest]}"
    if ".base_layer." in name or ".lora_" in name:
        raise ConversionError(f"It has adapters ({name}): convert what model.merge_and_unload() gives.")
    if module not in table:
        raise ConversionError(f"The weight {name} has no place in an implicit model.")
    return f"{prefix}{index}.{table[module]}.{last}"
