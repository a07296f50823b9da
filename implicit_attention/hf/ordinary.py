"""The ordinary attention block's attention: what an implicit layer is to be compared with, option for option."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.attention.positions import Positions, rotate
from implicit_attention.equilibrium.solvers.solution import zero_of
from implicit_attention.errors import bad_value
from implicit_attention.hf.caching import held_dtype, kept
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.rotary import ScaledRotary
from implicit_attention.hf.settings import make_positions
from implicit_attention.hf.tokens import Tokens
from implicit_attention.inputs import refuse_recomputation


class OrdinaryAttention(nn.Module):
    """Softmax attention with the parameters, positions, norms and windows of the implicit layer next to it.

    `y = softmax(W_Q x (W_K x)^T * scale) W_V x`; `W_Q` takes the place of `Omega_Q`, `W_V` that of `Omega_V`. What
    computes it is transformers' choice, `attn_implementation`.
    """

    def __init__(self, config: ImplicitAttentionConfig, layer_idx: int) -> None:
        """Make the layer.

        Args:
            config: The model's configuration.
            layer_idx: Which entry of a cache belongs to it.
        """
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.config = config
        self.num_kv_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.head_dim, self.layer_idx = config.head_dim, layer_idx
        self.is_causal, self.window, self.dropout = config.is_causal, config.window, config.dropout
        shared, inner, bias = self.num_kv_heads * self.head_dim, self.num_heads * self.head_dim, bool(config.bias)
        self.W_Q = nn.Linear(size, inner, bias=bias)
        self.W_K = nn.Linear(size, shared, bias=bias)
        self.W_V = nn.Linear(size, shared, bias=bias) if config.values != "identity" else None
        weights, normed = config.qk_norm == "weights", bool(config.qk_norm)
        self.temperature = nn.Parameter(torch.ones(self.num_heads)) if normed and not weights else None
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if weights else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if weights else None
        self.positions = make_positions(
            config.positions_of(layer_idx), self.num_heads, self.head_dim, config.max_position_embeddings
        )
        self.scale = attention_scale(config, self.positions)
        self.out_proj = nn.Linear(inner, size, bias=config.bias is True) if config.out_proj else None

    def forward(
        self, x: Tensor, tokens: Tokens, mask: Any = None, cache: Cache | None = None, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the weights if they are asked for.

        Args:
            x: New tokens, `[B, n, D]`.
            tokens: What the call says of them.
            mask: What transformers makes of its masks for this kind of attention.
            cache: Holds keys and values of the P tokens before, and is given those of the new ones.
            need_weights: Also return the attention matrix.

        Returns:
            `[B, n, D]`, and `[B, H, n, P + n]` (of a static cache, all its slots) or None.

        Raises:
            ValueError: If `attn_implementation` cannot add the positions' bias, or cannot return weights.
        """
        query, key, value = self._project(x, tokens)
        if cache is not None:
            refuse_recomputation()
            dtype = held_dtype(cache, self.layer_idx) or key.dtype
            key, value = cache.update(key.to(dtype), value.to(dtype), self.layer_idx)
            held = cache.layers[self.layer_idx]
            key, value = kept(held, key).to(query.dtype), kept(held, value).to(query.dtype)
        bias = self._bias(x, key.shape[2], tokens.length)
        name = self.config._attn_implementation
        _check(name, bias is not None, need_weights)
        empty = not torch.compiler.is_compiling() and not x.numel()  # transformers' own functions cannot take it
        computed = _eager if need_weights or empty else ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager)
        others: dict[str, Any] = {} if bias is None else {"position_bias": bias.to(query.dtype)}
        others |= {} if self.window is None else {"sliding_window": self.window}
        dropout = self.dropout if self.training else 0.0
        y, weights = computed(self, query, key, value, mask, dropout=dropout, scaling=self.scale, **others)
        if bias is not None and x.shape[0] == 0:  # a kernel gives it no gradient, where other processes have one
            y = y + zero_of((bias,))
        out = merge_heads(y.transpose(1, 2))
        return out if self.out_proj is None else self.out_proj(out), weights if need_weights else None

    def _project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return query `[B, H, n, d]`, key and value `[B, G, n, d]`."""
        query, key = split_heads(self.W_Q(x), self.num_heads), split_heads(self.W_K(x), self.num_kv_heads)
        value = split_heads(x if self.W_V is None else self.W_V(x), self.num_kv_heads).to(key.dtype)
        if self.temperature is not None:
            query = rms_norm(query) * self.temperature[:, None, None].to(query.dtype)
            key = rms_norm(key)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = rms_norm(query) * self.query_norm, rms_norm(key) * self.key_norm
        first = tokens.length if tokens.positions is None else tokens.positions
        rotation = None if self.positions is None else self.positions.rotation(x.shape[1], x, first)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def _bias(self, x: Tensor, total: int, past: int | Tensor) -> Tensor | None:
        """What positions add to the scores, `[1, H, n, columns]`; None if nothing."""
        new, made = x.shape[1], None if self.positions is None else self.positions(x)
        if made is None:
            return None
        term, tensor = made
        if isinstance(past, int):
            block: Tensor = term.block(tensor, slice(past, past + new), slice(0, total))
            return block
        # P is a tensor: the bias of every distance, of which each pair takes its own.
        most, device = total + new, tensor.device
        by_distance = term.block(tensor, slice(most, most + 1), slice(0, 2 * most + 1))[..., 0, :]
        distance = past + torch.arange(new, device=device)[:, None] - torch.arange(total, device=device)
        found: Tensor = by_distance[..., most - distance]
        return found


def attention_scale(config: ImplicitAttentionConfig, positions: Positions | None) -> float:
    """Return the factor on the scores, that of the positions included.

    Args:
        config: The model's configuration.
        positions: Of the block.
    """
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    return scale * positions.attention_scaling**2 if isinstance(positions, ScaledRotary) else scale


def _check(name: str | None, has_bias: bool, need_weights: bool) -> None:
    """Refuse what an implementation cannot do."""
    if has_bias and name not in (None, "eager", "sdpa", "flex_attention"):
        raise bad_value("attn_implementation", '"eager", "sdpa" or "flex_attention" with a bias of positions', name,
                        'Use positions="rope", or one of these.')  # fmt: skip
    if need_weights and name not in (None, "eager", "sdpa"):
        raise bad_value("output_attentions", f"False with attn_implementation={name!r}", True,
                        'It makes no attention matrix: call model.set_attn_implementation("eager").')  # fmt: skip


def _eager(
    module: OrdinaryAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The readable way, which makes the attention matrix. It takes the masks of "eager" and of "sdpa"."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query @ key.mT * scaling).to(torch.promote_types(query.dtype, torch.float32))
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and module.is_causal and query.shape[2] > 1:
        # transformers leaves the mask out where rows begin at the first column: a static cache has more of them.
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(query.dtype)
    dropped = torch.nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2), weights
