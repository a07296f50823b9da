"""From a trained model to the same model with implicit blocks, checked on a few tokens."""

import copy
import logging
from collections.abc import Callable, Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from implicit_attention.errors import Came, bad_type
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.conversion.architecture import (
    NEW,
    OWN,
    ConversionError,
    check_new,
    check_source,
    check_weights,
    chosen_layers,
    described,
    renamed,
)
from implicit_attention.hf.conversion.loading import load_whole
from implicit_attention.hf.heads import ImplicitAttentionForCausalLM
from implicit_attention.hf.labels import ImplicitAttentionForSequenceClassification
from implicit_attention.hf.modeling import ImplicitAttentionModel, ImplicitAttentionPreTrainedModel
from implicit_attention.inspection.evaluating import evaluating

_LOG = logging.getLogger("implicit_attention")
_HEADS: dict[str, type[ImplicitAttentionPreTrainedModel]] = {
    "ForCausalLM": ImplicitAttentionForCausalLM,
    "ForSequenceClassification": ImplicitAttentionForSequenceClassification,
    "Model": ImplicitAttentionModel,
}
# Of the largest output. transformers' norms are float32 in any model; half precision rounds every sum in both models.
_TOLERANCE, _HALF_TOLERANCE = 1e-5, 5e-2
_TRIED = 32  # tokens on which outputs are compared
Layers = str | int | slice | Iterable[int]
Say = Callable[[str], None]


class Converted(NamedTuple):
    """A converted model and how near it is to the trained one.

    Attributes:
        model: The model, in eval mode.
        layers: Which of its blocks are implicit.
        difference: The largest difference between an output (a logit, where there are logits) of both models.
        largest: The largest output.
    """

    model: ImplicitAttentionPreTrainedModel
    layers: list[int]
    difference: float
    largest: float


def convert(model_or_dir: PreTrainedModel | str | PathLike[str], layers: Layers = "all", **options: Any) -> Any:
    """Return a trained model with implicit blocks: the same weights, and the same outputs until it is trained.

    `Omega_Q` is new, and zero: it has a gradient, and training it is what makes the blocks implicit.

    Args:
        model_or_dir: A model of transformers (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite), whose weights are
            copied; or a directory, or a file in GGUF format, with one.
        layers: Which blocks become implicit: "all", "none", an index, indices, a slice, or such as "0,4,8-16", from 0,
            both ends included. The others stay ordinary attention.
        **options: As in `converted`.

    Returns:
        `ImplicitAttentionForCausalLM`, `ImplicitAttentionForSequenceClassification` or `ImplicitAttentionModel`, in
        eval mode.

    Raises:
        ConversionError: If the model cannot be converted exactly, or the outputs differ.
    """
    return converted(model_or_dir, layers, **options).model


def converted(
    model_or_dir: PreTrainedModel | str | PathLike[str],
    layers: Layers = "all",
    *,
    self_query: str = "input",
    values: str = "linear",
    solver: str | dict[str, Any] = "auto",
    adjoint: str | dict[str, Any] = "implicit",
    on_failure: str = "warn",
    dtype: str | torch.dtype = "auto",
    tolerance: float | None = None,
    say: Say = _LOG.info,
) -> Converted:
    """Convert a trained model, and say how near the outputs are.

    Args:
        model_or_dir: As in `convert`.
        layers: As in `convert`.
        self_query: As in `ImplicitQueryAttention`.
        values: "linear", or "feedback": values read outputs too, by a `Psi_V` that is zero at first.
        solver: As in `ImplicitAttentionConfig`.
        adjoint: As there.
        on_failure: As there.
        dtype: Of a model in a directory, "auto" for the one that it was saved in.
        tolerance: How far outputs may differ, as a part of the largest; 1e-5, in half precision 0.05, if None.
        say: Is told each step, in a sentence.

    Returns:
        The model with the comparison.

    Raises:
        ConversionError: If the model cannot be converted exactly, or the outputs differ.
    """
    live = _checked(model_or_dir, dtype)
    config = model_or_dir.config if isinstance(model_or_dir, PreTrainedModel) else read_config(model_or_dir)
    target_config, wanted = target(
        config, layers, self_query=self_query, values=values, solver=solver, adjoint=adjoint, on_failure=on_failure
    )
    if isinstance(model_or_dir, PreTrainedModel):
        source = model_or_dir
    else:
        say(f"Reading {fspath(model_or_dir)}.")
        source = _read(model_or_dir, config, dtype)
    head = _head(type(source).__name__)
    check_weights(source)
    before = _outputs(source)
    say(f"Converting {len(wanted)} of {config.num_hidden_layers} layers.")
    model = _with_weights(head, target_config, source, wanted, copied=live)
    return _compared(model, wanted, before, tolerance, say)


def _checked(given: object, dtype: str | torch.dtype) -> bool:
    """Whether a model is given, and not where it is."""
    if isinstance(given, PreTrainedModel):
        if dtype != "auto":
            raise ConversionError('`dtype` is for models in directories: leave it "auto", and call model.to before.')
        return True
    if isinstance(given, str | PathLike):
        return False
    inner = getattr(given, "_orig_mod", None)
    remedy = ""
    if hasattr(given, "merge_and_unload"):
        remedy = "Convert what its merge_and_unload() gives."
    elif isinstance(inner, PreTrainedModel):
        remedy = "It is a compiled model: convert its _orig_mod."
    came = Came(f"a {type(given).__name__}")
    raise bad_type("model_or_dir", "a model of transformers, or the path of one", came, remedy)


def target(
    source: PreTrainedConfig, layers: Layers, *, self_query: str, values: str, **options: Any
) -> tuple[ImplicitAttentionConfig, list[int]]:
    """Return the configuration that a model gets, and which of its layers become implicit. No weight is read.

    Args:
        source: Its own configuration.
        layers: As in `convert`.
        self_query: As in `converted`.
        values: As there.
        **options: The others of `converted` that a configuration has.

    Raises:
        ConversionError: If the model cannot be converted exactly.
    """
    check_source(source)
    check_new(values, self_query)
    wanted = chosen_layers(layers, source.num_hidden_layers)
    found = described(source, wanted)
    try:
        config = ImplicitAttentionConfig(**found, self_query=self_query, values=values, **options)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    return config, wanted


def _place(path: str | PathLike[str]) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` finds a model, with the name of its file where that is in GGUF format."""
    found = Path(fspath(path))
    if found.suffix != ".gguf":
        return str(found), {}
    try:
        import gguf  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ModuleNotFoundError:
        raise ConversionError(
            "A model in GGUF format needs the package gguf: pip install 'implicit-attention[gguf]'."
        ) from None
    return str(found.parent), {"gguf_file": found.name}


def read_config(path: str | PathLike[str]) -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        path: Its directory, or its file in GGUF format.

    Raises:
        ConversionError: If there is none, or it cannot be read.
    """
    folder, options = _place(path)
    if not Path(path).exists():
        raise ConversionError(
            f"{fspath(path)} does not exist, and models of the hub are not downloaded: run "
            "hf download NAME --local-dir DIR, and name DIR."
        )
    if not Path(folder).is_dir() or not (Path(folder) / options.get("gguf_file", "config.json")).exists():
        raise ConversionError(f"{fspath(path)} is no directory of a model: it has no config.json.")
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds
        raise ConversionError(f"{fspath(path)} cannot be read: {_first_line(error)}") from None
    return found


def _read(path: str | PathLike[str], config: PreTrainedConfig, dtype: str | torch.dtype) -> PreTrainedModel:
    folder, options = _place(path)
    names = config.architectures or []
    own = {cls.__name__: cls for cls in _HEADS.values()}
    cls: Any = AutoModelForCausalLM if options else None
    if cls is None and names:
        cls = own.get(names[0], getattr(transformers, names[0], None))
    if cls is None:
        raise ConversionError(f"{fspath(path)} is of no class of transformers (`architectures` is {names!r}).")
    if not options:  # a file in GGUF format names no class, and has a language model
        _head(cls.__name__)
    try:
        found: PreTrainedModel = load_whole(
            cls, folder, name=fspath(path), dtype=dtype, use_safetensors=None if options else True, **options
        )
    except ConversionError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        raise ConversionError(f"{fspath(path)} cannot be read: {_first_line(error)}") from None
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _head(name: str) -> type[ImplicitAttentionPreTrainedModel]:
    for ending, cls in _HEADS.items():
        if name.endswith(ending):
            return cls
    raise ConversionError(f"A {name} cannot be converted, but models can whose class ends in {', '.join(_HEADS)}.")


def _with_weights(
    cls: type[ImplicitAttentionPreTrainedModel], config: ImplicitAttentionConfig, source: PreTrainedModel,
    layers: list[int], *, copied: bool,
) -> ImplicitAttentionPreTrainedModel:  # fmt: skip
    """The model with the weights of the source: its own tensors, or copies. What is new is zero."""
    with torch.inference_mode(False):  # made in that mode, they could not be trained
        return _filled(cls, config, source, layers, copied=copied)


def _filled(
    cls: type[ImplicitAttentionPreTrainedModel], config: ImplicitAttentionConfig, source: PreTrainedModel,
    layers: list[int], *, copied: bool,
) -> ImplicitAttentionPreTrainedModel:  # fmt: skip
    with torch.device("meta"):
        model = cls(config)
    given: dict[str, Tensor] = {}
    own = source.config.model_type == OWN
    for name, tensor in source.state_dict().items():
        given[renamed(name, layers, own=own)] = tensor.clone() if copied else tensor
    like: Tensor = source.get_input_embeddings().weight  # type: ignore[assignment]
    for name, tensor in model.state_dict().items():
        if name.rpartition(".attention.")[2] in NEW:
            given[name] = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device)
    try:
        model.load_state_dict(given, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"The weights do not fit: {' '.join(str(error).split())}") from None
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    config.dtype = like.dtype
    if model.can_generate() and source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    model.eval()
    return model


def _tokens(config: PreTrainedConfig) -> Tensor:
    """The same few tokens for both models, `[1, n]`, none of them padding: classifiers take no batch without it."""
    generator, padding = torch.Generator().manual_seed(0), config.pad_token_id
    found = torch.randint(config.vocab_size, (1, _TRIED), generator=generator, device="cpu")
    return found if padding is None else torch.where(found == padding, (found + 1) % config.vocab_size, found)


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Tensor:
    """Logits, scores or last hidden states of a model for a few tokens, without a cache, in float64."""
    like: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    tokens = _tokens(model.config).to(like.device)
    with evaluating(model):
        out = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    found: Tensor = out.last_hidden_state if "last_hidden_state" in out else out.logits
    return found.double().cpu()


def _compared(
    model: ImplicitAttentionPreTrainedModel, layers: list[int], before: Tensor, tolerance: float | None, say: Say
) -> Converted:
    after = _outputs(model)
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    half = torch.finfo(model.dtype).bits < 32
    allowed = (_HALF_TOLERANCE if half else _TOLERANCE) if tolerance is None else tolerance
    sentence = f"The largest difference of an output is {difference:.2g}, and the largest output is {largest:.3g}"
    if not difference <= allowed * largest:
        raise ConversionError(f"{sentence}: more than a part of {allowed:g} (`tolerance`). The model is not converted.")
    say(f"{sentence}.")
    return Converted(model, layers, difference, largest)
