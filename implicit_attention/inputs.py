"""What may enter a layer: every check of its input tensors, made once, before anything is computed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from implicit_attention.cache import Cache, DecodeCache, Past
from implicit_attention.documents import check_documents, document_starts, kept_apart
from implicit_attention.errors import Came, NonFiniteError, bad_type, bad_value, did_you_mean, first_non_finite
from implicit_attention.settings import Settings

# From here on a float mask hides, as -inf does: beside such numbers a log-sum-exp in float32 has no digits left.
HIDDEN = -1e6


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call, checked and with a batch dimension.

    Attributes:
        x: `[B, N, D]`.
        context: Where keys and values come from, `[B, M, D]`; None if x.
        attn_mask: `[1 or B, 1 or H, N, P + M]`, bool (True = hidden) or float (added to the scores).
        key_padding_mask: Of the new columns, `[B, M]`, bool or float.
        cache: Takes the new tokens.
        past: The P columns it holds; None if there are none.
        position: Of the first new token, or of all, as in `Past`.
        batched: Whether x came with a batch dimension.
        segments: Which document each token belongs to, `[B, N]`, int; None if samples are documents.
        cu_seqlens: The same for a batch of one, as the boundaries of documents, `[docs + 1]`.
        start: Where iteration begins, `[B, N, H d]`, without a graph; None for the values.
        document_starts: Where the document of each token begins, `[B, N]`, if `attn_mask` keeps documents apart.
    """

    x: Tensor
    context: Tensor | None = None
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    cache: Cache | None = None
    past: Past | None = None
    position: int | Tensor = 0
    batched: bool = True
    segments: Tensor | None = None
    cu_seqlens: Tensor | None = None
    start: Tensor | None = None
    document_starts: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether samples hold several documents that are solved apart: without an `attn_mask`."""
        named = self.segments is not None or self.cu_seqlens is not None
        return named and self.attn_mask is None and self.x.numel() > 0

    @property
    def source(self) -> Tensor:
        """What keys and values are made from."""
        return self.x if self.context is None else self.context

    @property
    def past_length(self) -> int:
        """P."""
        return 0 if self.past is None else self.past.value.shape[-2]

    @property
    def padding(self) -> Tensor | None:
        """Which columns are hidden from every row, those of the cache first, `[B, P + M]`; None if none are."""
        new = self.key_padding_mask
        if self.past is None or (self.past.hidden is None and new is None):
            return new
        batch, length = self.x.shape[0], self.past_length
        held = self.past.hidden
        held = self.x.new_zeros(batch, length, dtype=torch.bool) if held is None else held
        return torch.cat([held, held.new_zeros(batch, self.x.shape[1]) if new is None else new], 1)

    def named(self) -> dict[str, Tensor | None]:
        """The tensors by the names of the arguments."""
        names = ("x", "context", "attn_mask", "key_padding_mask", "start")
        return {name: getattr(self, name) for name in names}


class InputOptions(TypedDict, total=False):
    """What a call can be given beside `x` and `context`; `ImplicitQueryAttention.forward` explains each."""

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    cache: Cache | None
    segments: Tensor | None
    cu_seqlens: Tensor | None
    start: Tensor | None


_NAMES = tuple(InputOptions.__annotations__)
_ONE_X = (
    "x is query, key and value alike: layer(x). Keys and values can come from a second tensor, layer(x, context), in a "
    'layer with normalize_over="keys". For modules that call nn.MultiheadAttention, see docs/using.md.'
)
_ELSEWHERE = {  # what calls of other libraries name, and what stands in its place here
    **dict.fromkeys(("query", "key", "value"), _ONE_X),
    "is_causal": "It is an option of the layer: ImplicitQueryAttention(..., is_causal=True).",
    "attention_mask": "There 1 means keep, and here True means hidden: key_padding_mask=attention_mask == 0.",
    "past_key_values": "Give cache=layer.make_cache(...).",
    "position_ids": "Positions count tokens, those of a cache first; segments begin anew with each document.",
}


def check_names(given: Iterable[str], others: tuple[str, ...] = (), by_place: int = 0) -> None:
    """Refuse inputs of other names, and inputs that need one.

    Args:
        given: The names that a call was given beside `x` and `context`.
        others: Names that the call takes beside those of `InputOptions`.
        by_place: How many came without a name after `x` and `context`.

    Raises:
        TypeError: If one has an unknown name or none.
    """
    if by_place:
        raise TypeError(f"The layer takes x and context by place, and all others by name. {_ONE_X}")
    names = (*_NAMES, *others)
    for name in given:
        if name not in names:
            remedy = _ELSEWHERE.get(name) or did_you_mean(name, names)
            takes = f"It takes x, context, {', '.join(names)}."
            raise TypeError(f"`{name}` is no input of the layer. {takes} {remedy}".rstrip())


def checked(
    settings: Settings,
    weight: Tensor | None,
    x: Tensor,
    context: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cache: Cache | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    start: Tensor | None = None,
) -> Inputs:
    """Return the inputs of a call if they fit.

    Args:
        settings: Of the layer.
        weight: A parameter of the layer, for its dtype and device; None if only its modules know what they take.
        x: As in `ImplicitQueryAttention.forward`, as are all that follow.
        context: Likewise.
        attn_mask: Likewise.
        key_padding_mask: Likewise.
        cache: Likewise.
        segments: Likewise.
        cu_seqlens: Likewise.
        start: Likewise.

    Raises:
        TypeError: If a tensor is of the wrong type.
        ValueError: If one does not fit.
    """
    check_input("x", x, weight, settings.embed_dim)
    if segments is not None or cu_seqlens is not None:
        others: dict[str, object] = {"context": context, "cache": cache, "start": start}
        others |= {"attn_mask": attn_mask} if segments is None else {}
        check_documents(x, segments, cu_seqlens, others)
    if context is not None:
        _check_context(settings, weight, x, context)
    if start is not None:
        start = _checked_start(settings, x, start)
    inputs = Inputs(
        x, context, attn_mask, key_padding_mask, cache, batched=x.dim() == 3, segments=segments, cu_seqlens=cu_seqlens,
        start=start,
    )  # fmt: skip
    if not inputs.batched:
        padding = key_padding_mask
        if isinstance(padding, Tensor) and padding.dim() == 1:
            padding = padding[None]
        context = None if context is None else context[None]
        segments, start = (None if t is None else t[None] for t in (segments, start))
        inputs = replace(inputs, x=x[None], context=context, key_padding_mask=padding, segments=segments, start=start)
    past = None if cache is None else _past(settings, inputs, cache)
    if past is not None:
        inputs = replace(inputs, past=past if past.column.shape[-2] else None, position=past.position)
    return _with_masks(settings, inputs)


_OF_DIMENSIONS = {
    True: "Dimensions before the tokens are samples: flatten them into one, x.flatten(0, -3).",
    False: "A sequence of one token is x[None].",
}


def check_input(name: str, x: object, weight: Tensor | None, embed_dim: int, *, any_lead: bool = False) -> None:
    """Refuse what cannot be an input `[B, N, D]` or `[N, D]` (any leading dimensions with `any_lead`)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        remedy = f"Convert it: torch.as_tensor({name}) with a float dtype." if hasattr(x, "__array__") else ""
        raise bad_type(name, f"a float tensor [B, N, {embed_dim}]", x, "" if isinstance(x, Tensor) else remedy)
    if x.is_nested or x.layout != torch.strided:
        raise bad_type(name, f"a dense tensor [B, N, {embed_dim}]", Came("a nested or sparse one"),
                       f"Pad it ({name}.to_padded_tensor(0.0), or {name}.to_dense()) and name the padding in "
                       "key_padding_mask.")  # fmt: skip
    shape_fits = x.dim() >= 2 if any_lead else x.dim() in (2, 3)
    if not shape_fits or x.shape[-1] != embed_dim:
        lead = "..." if any_lead else "B"
        last = not x.dim() or x.shape[-1] != embed_dim
        remedy = f"The last dimension must be embed_dim={embed_dim}." if last else _OF_DIMENSIONS[x.dim() > 1]
        raise bad_value(name, f"of shape [{lead}, N, {embed_dim}] or [N, {embed_dim}]", x, remedy)
    if x.shape[-2] == 0:
        raise bad_value(name, "of at least one token (N >= 1)", x, "An empty sequence has no equilibrium.")
    if weight is None:  # only the module knows what it takes
        return
    if x.device != weight.device:
        raise bad_value(name, f"on the parameters' device, {weight.device}", x,
                        f'Make it there, or move it: {name}.to("{weight.device}").')  # fmt: skip
    if x.is_meta:
        raise bad_value(name, "on a device that holds numbers", x, "A solve reads residuals to stop: move the "
                        "layer (layer.to_empty(device=...), then load its weights). Make the input anew.")  # fmt: skip
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        layer = f" or the layer (layer.to({x.dtype}))" if x.dtype.itemsize > 1 else ""  # nothing computes in fewer bits
        raise bad_type(name, f"of the parameters' dtype, {weight.dtype}", x,
                       f"Convert it ({name}.to({weight.dtype})){layer}.")  # fmt: skip


def _check_context(settings: Settings, weight: Tensor | None, x: Tensor, context: Tensor) -> None:
    check_input("context", context, weight, settings.embed_dim)
    if settings.rows_are_keys:
        raise bad_value("context", 'None unless normalize_over="keys"', context,
                        "Rows that belong to keys have no query side of their own to attend from.")  # fmt: skip
    if context.dim() != x.dim() or context.shape[:-2] != x.shape[:-2]:
        raise bad_value("context", f"batched like x, {tuple(x.shape)}", context)
    if settings.is_causal and context.shape[-2] != x.shape[-2]:
        raise bad_value("context", f"as long as x ({x.shape[-2]}) in a causal layer", context,
                        "Rows and columns are aligned at the first token.")  # fmt: skip


def _checked_start(settings: Settings, x: Tensor, start: object) -> Tensor:
    """A start without its graph, if it fits."""
    shape = (*x.shape[:-1], settings.inner_dim)
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise bad_type("start", f"a float tensor of shape {shape}", start)
    if start.shape != shape:
        raise bad_value("start", f"of shape {shape}", start, "It is an equilibrium before out_proj: solve(...).value.")
    if start.device != x.device:
        raise bad_value("start", f"on the device of x, {x.device}", start, "Move it: start.to(x.device).")
    return start.detach()


def _past(settings: Settings, inputs: Inputs, cache: Cache) -> Past | None:
    """What a cache holds, if it can take the new tokens."""
    check_cacheable(settings)
    if inputs.context is not None:
        raise bad_value("cache", "None next to a context", Came("a cache"), "The context stands in its place.")
    if not callable(getattr(cache, "past", None)):
        raise bad_type("cache", "one that layer.make_cache(batch_size, capacity) makes", cache)
    refuse_recomputation()
    padding = inputs.key_padding_mask
    if isinstance(padding, Tensor) and padding.dtype != torch.bool:
        raise bad_type("key_padding_mask", "bool with a cache", padding)
    if isinstance(cache, DecodeCache):
        cache.check(_like_values(settings, inputs.x))
    return cache.past()


def check_cacheable(settings: Settings) -> None:
    """Refuse a cache for a layer that is not causal."""
    if not settings.is_causal:
        raise bad_value(
            "cache", "None unless is_causal=True", Came("a cache"), "Later tokens would change earlier ones."
        )


def refuse_recomputation() -> None:
    """Refuse a cache in a call that is made again, for the backward pass of the first: it has the tokens already.

    Raises:
        ValueError: If a backward pass is under way.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise bad_value("cache", "None in a call that the backward pass makes again (torch.utils.checkpoint)",
                        Came("a cache"), "Call without checkpointing, or without a cache.")  # fmt: skip


def _like_values(settings: Settings, x: Tensor) -> Tensor:
    """A tensor without memory, of the shape, dtype and device that the values of x are going to have."""
    dtype = dtype_of_values(x.dtype, x.device)
    return x.new_empty((), dtype=dtype).expand(x.shape[0], settings.num_kv_heads, x.shape[1], settings.head_dim)


def dtype_of_values(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the values of an input of this dtype are computed in: autocast leaves float64 as it is."""
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _with_masks(settings: Settings, inputs: Inputs) -> Inputs:
    """The same, its attention mask with four dimensions, if the masks fit."""
    batch, rows, heads = inputs.x.shape[0], inputs.x.shape[1], settings.num_heads
    new = inputs.source.shape[1]
    cols = inputs.past_length + new
    mask, padding = inputs.attn_mask, inputs.key_padding_mask
    if padding is not None:
        _check_mask("key_padding_mask", padding, inputs.x)
        if tuple(padding.shape) != (batch, new):
            remedy = "It covers the new tokens; the cache keeps what it hid before." if inputs.cache is not None else ""
            raise bad_value("key_padding_mask", f"of shape ({batch}, {new})", padding, remedy)
        inputs = replace(inputs, key_padding_mask=_hiding(padding))
    if mask is None:
        return inputs
    _check_mask("attn_mask", mask, inputs.x)
    shapes = {(rows, cols): (1, 1), (batch * heads, rows, cols): (batch, heads)}
    shapes[batch, heads, rows, cols] = (batch, heads)
    lead = shapes.get(tuple(mask.shape))
    if lead is None:
        raise bad_value(
            "attn_mask",
            f"of shape ({rows}, {cols}), ({batch * heads}, {rows}, {cols}) or ({batch}, {heads}, {rows}, {cols})",
            mask,
            "Its rows are output tokens, its columns the tokens they may see."
            + (
                f" One for all heads: mask.expand(-1, {heads}, -1, -1)."
                if mask.dim() == 4 and mask.shape[1] == 1
                else ""
            ),
        )
    mask = _hiding(mask).reshape(*lead, rows, cols)
    if inputs.segments is None:
        return replace(inputs, attn_mask=mask)
    starts = document_starts(inputs.segments)
    return replace(inputs, attn_mask=kept_apart(mask, starts), document_starts=starts)


def _check_mask(name: str, mask: object, like: Tensor) -> None:
    expected = "a dense tensor: bool (True = hidden), or float of 16 bits or more (added to the scores)"
    if not isinstance(mask, Tensor):
        raise bad_type(name, expected, mask)
    if mask.is_nested or mask.layout != torch.strided:
        raise bad_type(name, expected, Came("a nested or sparse one"))
    if mask.dtype != torch.bool and not (mask.is_floating_point() and mask.dtype.itemsize > 1):
        raise bad_type(name, expected, mask)
    if mask.device != like.device:
        raise bad_value(name, f"on the input's device, {like.device}", mask, f"Move it: {name}.to(x.device).")


def _hiding(mask: Tensor) -> Tensor:
    """A float mask with -inf where it hides; a bool mask as it is."""
    return mask if mask.dtype == torch.bool else mask.masked_fill(mask <= HIDDEN, -torch.inf)


OVERFLOW = (
    "Attention scores or values overflow though the inputs and weights are finite: scale them down, use qk_norm=True, "
    "or a wider dtype. Where values read outputs, these may have grown: use feedback_norm=True, or a smaller Psi_V."
)


def non_finite(named: dict[str, Tensor | None], otherwise: str = OVERFLOW) -> NonFiniteError:
    """Return the error for an output that is not finite, naming the input or parameter to blame.

    Args:
        named: Inputs and parameters.
        otherwise: What is said if all of them are finite.
    """
    found = first_non_finite(named)
    if found is None:
        return NonFiniteError(otherwise)
    padded = found.startswith("`x`") and named.get("key_padding_mask") is not None
    remedy = " Hidden tokens count, too: x.masked_fill(key_padding_mask[..., None], 0.0)." if padded else ""
    return NonFiniteError(f"{found}: an equilibrium cannot be solved from it. Check what made it.{remedy}")
