"""What a call of a model says of its tokens: which are padding, which document each belongs to, where each stands."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from implicit_attention.errors import bad_type, bad_value, required
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.settings import ROTATING


class Tokens(NamedTuple):
    """The new tokens of a call and those in its cache. `C` counts the cache's columns.

    `C` is P, the number of cached tokens. In a graph that reads a static cache, P is a tensor and `C` is the size of
    the cache, so that no shape depends on P.

    Attributes:
        length: P.
        hidden: Which new tokens are padding, `[B, n]`; None if none is.
        held: Which columns of the cache no row sees, `[B, C]`; None if all are seen.
        order: Which slot of a static cache each column shows, `[C]`: the newest token stands last, as windows and
            biases on distance expect. None if columns are slots.
        mask: Of implicit blocks, `[B, H, n, C + n]` or `[n, n]`: bool (True = hidden) or float; None if there is none.
        segments: Which document each new token belongs to, `[B, n]`, int64; None if samples are documents.
        positions: Position of each new token, `[B, n]`; None if it is its place behind the cached ones.
        size: Slots of a static cache; None if there is none.
    """

    length: int | Tensor
    hidden: Tensor | None = None
    held: Tensor | None = None
    order: Tensor | None = None
    mask: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    size: int | None = None

    def weights_by_slot(self, weights: Tensor) -> Tensor:
        """Return attention weights with one column for each slot of a static cache, as transformers' models give them.

        Args:
            weights: `[B, H, n, C + n]`.

        Returns:
            `[B, H, n, size]`; `weights` as they are without a static cache.
        """
        if self.size is None:
            return weights
        if isinstance(self.length, int):
            return F.pad(weights, (0, self.size - weights.shape[-1]))
        new = weights.shape[-1] - self.size
        old, own = weights.split([self.size, new], -1)
        if self.order is not None:
            old = torch.zeros_like(old).index_copy(-1, self.order, old)
        whole: Tensor = old.index_copy(-1, self.length + torch.arange(new, device=weights.device), own)
        return whole


def cached_length(cache: Cache | None) -> int | Tensor:
    """Return how many tokens a cache holds: a number, or in a graph that reads a static cache a tensor.

    Args:
        cache: The cache.
    """
    length: int | Tensor = 0 if cache is None else cache.get_seq_length()
    if not isinstance(length, Tensor):
        return length
    return length.clone() if is_tracing(length) else int(length)  # the cache counts on in the same tensor


def describe(
    config: ImplicitAttentionConfig,
    x: Tensor,
    cache: Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tokens, Tensor]:
    """Return what implicit blocks need to know of a call's tokens, and the tokens for them.

    The tokens are x, and in a graph carry the checks of positions: what is not used is not checked there.

    Args:
        config: Of the model.
        x: New tokens, `[B, n, D]`.
        cache: Holds the P tokens before.
        attention_mask: `[B, P + n]`, 1 where a token is to be attended to, or `[B, 1 or H, n, P + n]`, bool (True = to
            be attended to) or float; P + n may be the size of a static cache.
        position_ids: `[B, n]`.
        segments: From `packing.documents`.

    Raises:
        TypeError: If a mask is of the wrong type.
        ValueError: If they do not fit, or positions cannot be honoured.
    """
    batch, new = x.shape[:2]
    length = cached_length(cache)
    size = cache.get_max_length() if cache is not None and cache.is_compileable else None
    _check_mask(attention_mask, batch, new, length, size)
    full = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
    seen = None if attention_mask is None or full is not None else attention_mask.to(x.device) != 0
    tokens = _in_slots(config, x, length, size, seen, full) if isinstance(length, Tensor) else None
    if tokens is None:
        assert isinstance(length, int)
        tokens = _in_columns(config, x, length, seen, full)
    tokens = tokens._replace(size=size)
    if segments is None:
        positions, x = _positions(config, x, tokens, seen, position_ids)
        return tokens._replace(positions=positions), x
    x = _inside(x, position_ids, segments)
    if is_tracing(x) and tokens.mask is None:  # with a mask of whatever kind the layer does not read lengths
        tokens = tokens._replace(mask=torch.zeros(new, new, dtype=torch.bool, device=x.device))
    return tokens._replace(segments=segments), x


def _check_mask(mask: object, batch: int, new: int, length: int | Tensor, size: int | None) -> None:
    """Refuse a mask that does not fit; where P is a tensor, only its batch can be known."""
    if mask is None:
        return
    total = new if isinstance(length, Tensor) else length + new
    if not isinstance(mask, Tensor):
        raise bad_type("attention_mask", f"a tensor [{batch}, {total}] of zeros and ones", mask)
    if isinstance(length, Tensor):
        fits = mask.dim() in (2, 4)
    else:
        columns = mask.shape[-1] == total or mask.shape[-1] == size
        fits = columns and (mask.dim() == 2 or (mask.dim() == 4 and mask.shape[2] == new))
    if not fits or mask.shape[0] not in ((batch,) if mask.dim() == 2 else (1, batch)):
        raise bad_value("attention_mask", f"of shape ({batch}, {total}): all tokens, those of the cache included",
                        mask, "1 says that a token is attended to, 0 that it is padding.")  # fmt: skip


def _in_columns(
    config: ImplicitAttentionConfig, x: Tensor, length: int, seen: Tensor | None, full: Tensor | None
) -> Tokens:
    """The tokens where P is a number."""
    total = length + x.shape[1]
    if full is not None:
        return Tokens(length, mask=_hiding(full[..., :total], x.shape[0], config.num_attention_heads, x.dtype))
    if seen is None:
        return Tokens(length)
    held, hidden = ~seen[:, :length], ~seen[:, length:total]
    if is_tracing(x):
        return Tokens(length, hidden, held if length else None)
    some = torch.stack([held.any(), hidden.any()]).tolist()  # one look at the device
    return Tokens(length, hidden if some[1] else None, held if some[0] else None)


def _in_slots(
    config: ImplicitAttentionConfig,
    x: Tensor,
    length: Tensor,
    size: int | None,
    seen: Tensor | None,
    full: Tensor | None,
) -> Tokens:
    """The tokens where P is a tensor: every slot of the cache is a column, and those that are empty are hidden."""
    assert size is not None
    length = length.to(x.device)
    slots = torch.arange(size, device=x.device)
    place = length + torch.arange(x.shape[1], device=x.device)
    empty, hidden, mask = (slots >= length)[None], None, None
    if seen is not None:
        seen = F.pad(seen, (0, size - seen.shape[1]), value=True) if seen.shape[1] < size else seen[:, :size]
        hidden, empty = ~seen.index_select(1, place), empty | ~seen
    order = None
    if config.window is not None or config.position_names & _BY_DISTANCE:
        order = (slots + length) % size
        empty = empty.index_select(1, order)
    if full is not None:
        hiding = _hiding(full, x.shape[0], config.num_attention_heads, x.dtype)
        old = hiding[..., :size] if order is None else hiding.index_select(-1, order)
        mask = torch.cat([old, hiding.index_select(-1, place)], -1)
    return Tokens(length, hidden, empty.expand(x.shape[0], -1), order, mask)


_BY_DISTANCE = frozenset({"alibi", "relative"})


def _hiding(mask: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
    """The layer's mask, True = hidden, of transformers' with four dimensions."""
    mask = mask.to(dtype) if mask.is_floating_point() else mask == 0
    return mask.expand(batch, heads, -1, -1)


def _inside(x: Tensor, position_ids: Tensor | None, segments: Tensor) -> Tensor:
    """The tokens, once their positions leap nowhere within a document: the layer counts them itself."""
    if position_ids is None:
        return x
    leaps = (position_ids.diff(dim=-1) != 1) & (segments.diff(dim=-1) == 0)
    return required(
        x,
        ~leaps.any(),
        "`position_ids` must be consecutive within each document, but got positions that leap. Leave them out, or "
        "number each document's tokens 0, 1, 2, ...",
    )


def _positions(
    config: ImplicitAttentionConfig, x: Tensor, tokens: Tokens, seen: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The positions that rotations have to follow, None if they are the tokens' places; and the tokens."""
    names = config.position_names
    if position_ids is None or (names == {None} and config.window is None):
        return None, x
    new = position_ids.shape[1]
    place = tokens.length + torch.arange(new, device=position_ids.device)
    if not is_tracing(position_ids) and bool((position_ids == place).all()):
        return None, x
    turns = bool(names & ROTATING) and not names & _BY_DISTANCE and config.is_causal
    if turns and config.window is None:
        return position_ids, x
    # Biases and windows count columns, as do layers without a causal mask: positions may move only as a whole, by the
    # padding before them.
    moved = place - position_ids
    counted = torch.ones_like(moved, dtype=torch.bool)
    padding = torch.zeros_like(moved)
    if seen is not None:
        index = place.clamp_max(seen.shape[1] - 1)
        counted, padding = seen.index_select(1, index), (~seen).cumsum(-1).index_select(1, index)
        # Padding in between would shorten distances.
        padding = torch.where((~seen).cumprod(-1).sum(-1, keepdim=True) == padding, padding, padding - new - 1)
    fits = (moved == 0) | (moved == padding) | ~counted
    x = required(
        x,
        fits.all(),
        "`position_ids` must be each token's place among those that are no padding: distances are counted in columns "
        f"with positions={config.positions!r}, window={config.window}, is_causal={config.is_causal}. Leave them out.",
    )
    return position_ids if turns else None, x
