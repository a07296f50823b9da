"""`inspect`: find the implicit layers of a model, see what goes into them, and measure each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from implicit_attention.equation import Equation
from implicit_attention.equation.packing import PackedMap
from implicit_attention.equilibrium.reports import FailureReport
from implicit_attention.errors import Came, bad_type, bad_value, check_positive, missing_extra
from implicit_attention.inputs import InputOptions
from implicit_attention.inspection.checking import token_labels
from implicit_attention.inspection.evaluating import evaluating
from implicit_attention.inspection.measuring import measure
from implicit_attention.inspection.report import Report
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.seed import ImplicitQueryAttentionLinearV

_KINDS = (ImplicitQueryAttention, ImplicitQueryAttentionLinearV)


def inspect(
    layer_or_model: nn.Module,
    x_or_text: Tensor | str,
    *,
    tokenizer: Any = None,
    tokens: list[str] | None = None,
    layers: list[str] | None = None,
    iterations: int = 50,
    **inputs: Any,
) -> Report:
    """Measure every implicit layer on one sample: does it settle, how fast, how stably, and what it attends to.

    The model is run once in eval mode, without gradients, to see what goes into its layers. Each equation is then
    solved again: by the layer's own solver, by plain iteration with its history, and from two other starts.

    Args:
        layer_or_model: An `ImplicitQueryAttention`, the original `ImplicitQueryAttentionLinearV`, or a module that
            holds some, such as a model of `implicit_attention.hf`.
        x_or_text: What it is called with: one sample, `[1, N, D]` or `[N, D]` for a layer, token numbers `[1, N]` or
            `[N]` for a language model; or a text, for a model with a tokenizer.
        tokenizer: Makes tokens of a text, as those of transformers do. If None, that of the directory from which the
            model was loaded.
        tokens: Labels of the tokens; from the tokenizer, or numbers, if None.
        layers: Names of the layers to measure, as in `named_modules()`; all if None.
        iterations: Steps of plain iteration, at most.
        **inputs: What else the layer or model is called with.

    Returns:
        The report. `report.summary` says it in words; `report.to_html()` is a page for a browser.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no implicit layer, more than one sample, packed documents or a cache.

    Example:
        >>> import torch
        >>> from implicit_attention import ImplicitQueryAttention, inspect
        >>> report = inspect(ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(5, 8))
        >>> report.settles
        True
    """
    if not isinstance(layer_or_model, nn.Module):
        raise bad_type("layer_or_model", "a layer or a model", layer_or_model)
    check_positive("iterations", iterations, integer=True)
    given: Any = x_or_text
    if isinstance(given, str):
        tokenizer = _tokenizer(layer_or_model) if tokenizer is None else tokenizer
        given = torch.tensor([tokenizer(given)["input_ids"]], device=next(layer_or_model.parameters()).device)
    if not isinstance(given, Tensor):
        raise bad_type("x_or_text", "a tensor or a text", x_or_text)
    if not given.is_floating_point() and given.dim() == 1:
        given = given[None]
    with torch.inference_mode(False):  # the adjoint is measured too
        calls = _calls(layer_or_model, _ordinary(given), {n: _ordinary(v) for n, v in inputs.items()}, layers)
        found = tuple(measure(call.layer, call.name, _equation(call), iterations) for call in calls)
    count = len(found[0].gain)
    return Report(found, _labels(count, given, tokenizer, tokens))


def _ordinary(value: Any) -> Any:
    """A tensor that autograd may keep, if it was made in inference mode; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def implicit_layers(model: nn.Module) -> list[str]:
    """Return the paths of a model's implicit layers; "" for a layer itself.

    Args:
        model: The model.
    """
    return [name for name, module in model.named_modules() if isinstance(module, _KINDS)]


@dataclass(frozen=True)
class _Call:
    """What went into a layer.

    Attributes:
        name: Path of the layer in the model; its class if it is the model.
        layer: The layer. An original layer is replaced by one with its map.
        arguments: Those by position.
        options: Those by name.
    """

    name: str
    layer: ImplicitQueryAttention
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def _calls(model: nn.Module, given: Tensor, inputs: dict[str, Any], wanted: list[str] | None) -> list[_Call]:
    """Run the model, and return the last call of each of its implicit layers, in their order."""
    named = {name: model.get_submodule(name) if name else model for name in implicit_layers(model)}
    if not named:
        raise bad_value("layer_or_model", "a module that holds an ImplicitQueryAttention", Came(type(model).__name__))
    for name in wanted or ():
        if name not in named:
            raise bad_value("layers", f"names among {', '.join(named)}", name)
    chosen = {name: layer for name, layer in named.items() if wanted is None or name in wanted}
    if isinstance(model, _KINDS):
        return [_Call(type(model).__name__, _solved_form(model), (given,), inputs)]
    calls: dict[str, _Call] = {}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs = {"use_cache": False, **inputs}
    with _listening(chosen, calls), evaluating(model), torch.no_grad():
        model(given, **inputs)
    silent = [name for name in chosen if name not in calls]
    if silent:
        raise bad_value("layer_or_model", f"one whose call uses its layer {silent[0]}", Came("one that does not"))
    return list(calls.values())


@contextmanager
def _listening(layers: dict[str, nn.Module], calls: dict[str, _Call]) -> Iterator[None]:
    """Keep what layers are called with, by `layer(...)` or `layer.solve(...)`. What does not settle is not reported."""
    handles, solving, reports = [], [], []
    for name, layer in layers.items():

        def keep(module: Any, arguments: tuple[Any, ...], options: dict[str, Any], name: str = name) -> None:
            calls[name] = _Call(name, _solved_form(module), arguments, options)

        handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        if isinstance(layer, ImplicitQueryAttention):

            def solve(*arguments: Any, layer: Any = layer, keep: Any = keep, **options: Any) -> Any:
                keep(layer, arguments, options)
                return type(layer).solve(layer, *arguments, **options)

            layer.solve = solve  # type: ignore[method-assign] # a model may call it instead of the layer
            solving.append(layer)
            reports.append((layer, layer._report))
            layer._report = FailureReport("ignore")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for changed in solving:
            del changed.solve
        for layer, report in reports:
            layer._report = report


def _solved_form(layer: nn.Module) -> ImplicitQueryAttention:
    """A layer whose equation can be solved: itself, or of the original layer one with the same map."""
    if isinstance(layer, ImplicitQueryAttention):
        return layer
    assert isinstance(layer, ImplicitQueryAttentionLinearV)
    weight = layer.W_K.weight
    solved = ImplicitQueryAttention(layer.embed_dim, on_failure="ignore", device=weight.device, dtype=weight.dtype)
    solved.load_state_dict(layer.state_dict())
    return solved


def _equation(call: _Call) -> Equation:
    """The equation of a call, checked to be one sample."""
    options = {n: v for n, v in call.options.items() if n in ("context", *InputOptions.__annotations__)}
    if options.pop("cache", None) is not None:
        raise bad_value("cache", "None for an inspection", Came("a cache"), "Give the whole text at once.")
    with evaluating(call.layer), torch.no_grad():
        equation = call.layer.equation(*call.arguments, **options)
    if isinstance(equation.function, PackedMap):
        raise bad_value("segments", "None for an inspection", Came("packed documents"), "Give one document at a time.")
    if equation.start.shape[0] != 1 or not equation.start.numel():
        raise bad_value("x_or_text", "one sample of one token or more", equation.start, "Inspect x[:1].")
    return equation


def _tokenizer(model: nn.Module) -> Any:
    """The tokenizer of the directory that a model was loaded from."""
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    if not path or not Path(path).is_dir():
        raise bad_value("tokenizer", "given with a text, for a model that was not loaded from a directory", None,
                        "Pass tokenizer=..., or a tensor in the place of the text.")  # fmt: skip
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise missing_extra("a text", "transformers", "hf") from error
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _labels(count: int, given: Tensor, tokenizer: Any, tokens: list[str] | None) -> tuple[str, ...]:
    if tokens is not None:
        return token_labels(tokens, count)
    if tokenizer is not None and not given.is_floating_point() and given.shape[-1] == count:
        return tuple(tokenizer.decode([number]) for number in given.flatten().tolist())
    return tuple(map(str, range(count)))
