"""A model that is trained already, as the start of a run: read, converted, and told which of its weights learn."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from implicit_attention.hf import ConversionError, ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.hf.conversion import converted
from implicit_attention.hf.conversion.architecture import NEW, OWN
from implicit_attention.hf.conversion.convert import read_config, target
from implicit_attention.hf.conversion.loading import load_whole
from implicit_attention.training import lora
from implicit_attention.training.checkpoint import newest_model
from implicit_attention.training.faults import RunError, SettingError, reason
from implicit_attention.training.settings import Settings


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        model: The model. Weights that learn have `requires_grad`.
        tokenizer: Its tokenizer.
    """

    model: ImplicitAttentionForCausalLM
    tokenizer: PreTrainedTokenizerBase


def fitted(settings: Settings, said: Mapping[str, Any]) -> Settings:
    """Return settings that fit the model, before any of its weights are read.

    Args:
        settings: Settings with a `source`.
        said: Those that the user gave.

    Returns:
        The settings. A `length` that the user did not give is no larger than the model's.

    Raises:
        SettingError: If the model cannot be trained as the settings say.
        RunError: If `length` is named and larger than the model's.
    """
    assert settings.source is not None
    if settings.train == "lora":
        try:
            import peft  # noqa: F401
        except ModuleNotFoundError:
            raise SettingError("train", "lora needs the package peft: pip install 'implicit-attention[lora]'") from None
    source = _newest(settings.source)
    config = _config(settings, source, said)
    if settings.train == "query-map" and not _implicit(config):
        raise SettingError(
            "train",
            "no layer is implicit, so there is no query map to learn: name --layers, or use --train lora or all",
        )
    longest = int(config.max_position_embeddings)
    if settings.length > longest and said.get("length") is not None:
        raise RunError(f"--length {settings.length} is more than the model's {longest}: use --length {longest}")
    _tokenizer(Path(source))
    return replace(settings, length=min(settings.length, longest))


def start(settings: Settings, checkpoint: Path | None) -> Start:
    """Return the model and its tokenizer.

    Args:
        settings: Settings with a `source`.
        checkpoint: The checkpoint that a run goes on from, whose weights are loaded later; None for a new run.

    Raises:
        RunError: If it cannot be read or converted.
    """
    assert settings.source is not None
    set_seed(settings.seed)
    solver = {"name": "forward_substitution", "kernel": settings.kernel}
    model = _from_source(settings, solver) if checkpoint is None else _from_checkpoint(checkpoint, solver)
    _choose(model, settings)
    return Start(model, _tokenizer(checkpoint or Path(_newest(settings.source))))


def query_map(name: str) -> bool:
    """Return whether a weight is one of those that read outputs.

    Args:
        name: Its name.
    """
    return name.rpartition(".attention.")[2] in NEW


def _newest(source: str) -> str:
    """Where the newest model of a run is, if that is what `source` names."""
    directory = Path(source)
    return str((directory.is_dir() and newest_model(directory)) or source)


def _config(settings: Settings, source: str, said: Mapping[str, Any] | None = None) -> ImplicitAttentionConfig:
    """The configuration of the model that is to be trained."""
    try:
        found = read_config(source)
        kinds = found.architectures or []
        if kinds and not any(kind.endswith("ForCausalLM") for kind in kinds):
            raise SettingError("from", f"{source} is no causal language model, but {', '.join(kinds)}.")
        if found.model_type == OWN and _implicit(found):
            _check_converted(settings, found, said or {})
            assert isinstance(found, ImplicitAttentionConfig)
            return found
        layers = "all" if settings.layers == "auto" else settings.layers
        return target(found, layers, self_query=settings.self_query, values=settings.values)[0]
    except ConversionError as error:
        raise SettingError("from", f"{error}") from None


def _check_converted(settings: Settings, config: PreTrainedConfig, said: Mapping[str, Any]) -> None:
    if settings.layers != "auto":
        raise SettingError("layers", "the model of --from has implicit layers already: leave it out.")
    for name in ("self_query", "values"):
        wanted, has = said.get(name), getattr(config, name)
        if wanted not in (has, None):
            raise SettingError(
                name,
                f"the model of --from has {has}, which training cannot change: leave it out, or convert the "
                f"original with {wanted}.",
            )


def _implicit(config: PreTrainedConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.block_types[i] == "implicit"]


def _from_source(settings: Settings, solver: dict[str, str]) -> ImplicitAttentionForCausalLM:
    assert settings.source is not None
    source = _newest(settings.source)
    config = _config(settings, source)
    try:
        found = read_config(source)
        if found.model_type == OWN and _implicit(found):
            return load_whole(
                ImplicitAttentionForCausalLM, source, name=source, solver=solver, dtype=torch.float32,
                local_files_only=True,
            )  # fmt: skip
        model = converted(
            source, _implicit(config), self_query=settings.self_query, values=settings.values, solver=solver,
            dtype=torch.float32,
        ).model  # fmt: skip
    except ConversionError as error:
        raise SettingError("from", f"{error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError("from", f"{source} cannot be read: {reason(error)}") from None
    if not isinstance(model, ImplicitAttentionForCausalLM):
        raise SettingError("from", f"{source} is no causal language model.")
    return model


def _from_checkpoint(path: Path, solver: dict[str, str]) -> ImplicitAttentionForCausalLM:
    """A model of the same structure, without its weights."""
    config = ImplicitAttentionConfig.from_pretrained(path, local_files_only=True, solver=solver)
    model = ImplicitAttentionForCausalLM(config)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    place, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, local_files_only=True, **options)
    except Exception as error:  # of many kinds: transformers guesses at the files
        raise SettingError("from", f"{path} has no tokenizer that transformers can read: {reason(error)}") from None
    return found


def _choose(model: ImplicitAttentionForCausalLM, settings: Settings) -> None:
    """Let the weights learn that `settings.train` names."""
    if settings.train == "lora":
        lora.add(model, settings.lora_weights or _maps(model.config))
    for name, parameter in model.named_parameters():
        chosen = settings.train == "all" or query_map(name) or ".lora_" in name
        parameter.requires_grad_(chosen)


def _maps(config: ImplicitAttentionConfig) -> int:
    """How many weights read outputs; where none do, how many would in all layers."""
    each = query_map_weights(config) * (1 + (config.values == "feedback"))
    return each * (len(_implicit(config)) or config.num_hidden_layers)


def query_map_weights(config: PreTrainedConfig) -> int:
    """Return how many weights `Omega_Q` has in one layer of a model, converted or not.

    Args:
        config: Its configuration.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * config.num_key_value_heads * head_dim**2)


def learning(model: nn.Module) -> int:
    """Return how many weights learn.

    Args:
        model: A model.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
