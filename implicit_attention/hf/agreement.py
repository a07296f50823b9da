"""Whether blocks are what the configuration says: a model reads it in their place, and it alone is saved."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention import ImplicitQueryAttention
from implicit_attention.attention.positions import Positions
from implicit_attention.errors import Came, bad_value
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.ordinary import OrdinaryAttention, attention_scale
from implicit_attention.hf.settings import (
    make_positions,
    positions_kind,
    positions_setting,
    setting_kind,
)
from implicit_attention.settings import NAMES, Settings

_NOT_SAVED = frozenset({"dropout"})  # it changes no output of a loaded model, which is in eval mode
_ORDINARY = ("is_causal", "window", "num_heads", "num_kv_heads", "head_dim", "scale")


def used_blocks(config: ImplicitAttentionConfig, layers: nn.ModuleList) -> nn.ModuleList:
    """Return the blocks that are used; refused where masks or saved files would take them for others.

    Args:
        config: Of the model.
        layers: All its blocks.

    Raises:
        ValueError: If a block is of another kind than the configuration says.
    """
    blocks = layers[: config.num_hidden_layers]
    kinds = ["attention" if isinstance(block.attention, OrdinaryAttention) else "implicit" for block in blocks]
    said = config.block_types[: len(blocks)]
    if any((kind == "implicit") != (other == "implicit") for kind, other in zip(kinds, said, strict=True)):
        raise bad_value("config.block_types", f"{kinds}, as the blocks are", config.block_types,
                        "Set it, and `config.num_hidden_layers`, when you exchange blocks.")  # fmt: skip
    return blocks


def check_read(config: ImplicitAttentionConfig, blocks: Iterable[Any], x: Tensor) -> None:
    """Refuse settings of layers that a call reads from the configuration, where both disagree.

    Args:
        config: Of the model.
        blocks: Those that are used.
        x: New tokens.

    Raises:
        ValueError: If they disagree.
    """
    causal, window, positions = config.is_causal, config.window, config.positions  # a configuration is slow to read
    for i, block in enumerate(blocks):
        layer = block.attention
        if not isinstance(layer, (ImplicitQueryAttention, OrdinaryAttention)):
            continue
        held = layer if isinstance(layer, OrdinaryAttention) else layer.settings
        if held.is_causal != causal:
            raise _disagree(i, "is_causal", held.is_causal, causal, _FOLLOW)
        if held.window != window:
            raise _disagree(i, "window", held.window, window, _FOLLOW)
        said, encoding = positions[i] if isinstance(positions, list) else positions, layer.positions
        if positions_kind(encoding, x) != setting_kind(said):
            raise _disagree(i, "positions", _shown(encoding), said, _FOLLOW)


def check_saved(config: ImplicitAttentionConfig, blocks: Iterable[Any]) -> None:
    """Raise an error for a setting of a layer that a loaded model would not have.

    Args:
        config: Of the model.
        blocks: Those that are used.

    Raises:
        ValueError: If they are not those of the configuration.
    """
    for i, block in enumerate(blocks):
        layer = block.attention
        if not isinstance(layer, (ImplicitQueryAttention, OrdinaryAttention)):
            continue
        with torch.device("meta"):
            positions = make_positions(
                config.positions_of(i), config.num_attention_heads, config.head_dim, config.max_position_embeddings
            )
        options = config.layer_options() | {"scale": attention_scale(config, positions)}
        if isinstance(layer, OrdinaryAttention):
            pairs = [(name, getattr(layer, name), options[name]) for name in _ORDINARY]
        else:
            wanted, names = Settings(**options), sorted(NAMES - _NOT_SAVED)
            pairs = [(name, getattr(layer.settings, name), getattr(wanted, name)) for name in names]
        for name, held, said in pairs:
            if held != said:
                raise _disagree(i, name, held, said, _LOST)
        held = positions_setting(layer.positions)
        if layer.positions is not None and held is None:
            raise _disagree(i, "positions", _shown(layer.positions), config.positions_of(i),
                            "No configuration names this encoding: keep `model.state_dict()` instead.")  # fmt: skip
        if held != positions_setting(positions):
            raise _disagree(i, "positions", held, config.positions_of(i), _LOST)


_REMEDY = (
    "Set `config.{0}` and the layers of all blocks to the same value. Or make the model anew from the configuration: "
    "`new = type(model)(config)` and `new.load_state_dict(model.state_dict())`."
)
_FOLLOW = f"Masks, positions and caches of the model follow the configuration. {_REMEDY}"
_LOST = f"A loaded model has what the configuration says. {_REMEDY}"


def _shown(positions: Positions | None) -> object:
    """An encoding as a setting, or as it prints itself."""
    found = positions_setting(positions)
    return positions if found is None else found


def _disagree(place: int, name: str, held: object, said: object, remedy: str) -> ValueError:
    expected = f"{said!r}, as `config.{name}` says"
    return bad_value(f"layers[{place}].attention.{name}", expected, Came(repr(held)), remedy.format(name))
