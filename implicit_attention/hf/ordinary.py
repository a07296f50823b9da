"""The ordinary attention block's attention: what an implicit layer is to be compared with, option for option."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.attention.positions import rotate
from implicit_attention.equilibrium.solvers.base import zero_of
from implicit_attention.hf.caching import kept
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.settings import make_positions
from implicit_attention.inputs import refuse_recomputation


class OrdinaryAttention(nn.Module):
    """Softmax attention with the parameters, positions, norms and windows of the implicit layer next to it.

    `y = softmax(W_Q x (W_K x)^T * scale) W_V x`; `W_Q` takes the place of `Omega_Q`, `W_V` that of `Omega_V`.
    """

    def __init__(self, config: ImplicitAttentionConfig, layer_idx: int) -> None:
        """Make the layer.

        Args:
            config: The model's configuration.
            layer_idx: Which entry of a cache belongs to it.
        """
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or self.num_heads
        self.head_dim, self.layer_idx = size // self.num_heads, layer_idx
        self.is_causal, self.window, self.dropout = config.is_causal, config.window, config.dropout
        self.scale = self.head_dim**-0.5 if config.scale is None else config.scale
        shared = self.num_kv_heads * self.head_dim
        self.W_Q = nn.Linear(size, size, bias=config.bias)
        self.W_K = nn.Linear(size, shared, bias=config.bias)
        self.W_V = nn.Linear(size, shared, bias=config.bias) if config.values == "linear" else None
        self.temperature = nn.Parameter(torch.ones(self.num_heads)) if config.qk_norm else None
        self.positions = make_positions(config.positions, self.num_heads, self.head_dim)
        self.out_proj = nn.Linear(size, size, bias=config.bias) if config.out_proj else None

    def forward(
        self, x: Tensor, hidden: Tensor | None = None, cache: Cache | None = None, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the weights if they are asked for.

        Args:
            x: New tokens, `[B, n, D]`.
            hidden: `[B, P + n]`, True where a token is padding; None if none is.
            cache: Holds keys and values of the P tokens before, and is given those of the new ones.
            need_weights: Also return the attention matrix.

        Returns:
            `[B, n, D]`, and `[B, H, n, P + n]` or None.
        """
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        total = past + x.shape[1]
        query, key, value = self._project(x, past)
        if cache is not None:
            refuse_recomputation()
            key, value = cache.update(key, value, self.layer_idx)
            held = cache.layers[self.layer_idx]  # a static one is longer than what it holds
            key, value = kept(held, key[..., :total, :]), kept(held, value[..., :total, :])
        bias = self._bias(x, hidden, past)
        dropout = self.dropout if self.training else 0.0
        shared = self.num_kv_heads != self.num_heads
        causal = bias is None and self.is_causal and x.shape[1] > 1
        y = F.scaled_dot_product_attention(
            query, key, value, bias, dropout, is_causal=causal, scale=self.scale, enable_gqa=shared
        )
        if bias is not None and not len(x):  # the kernel gives it no gradient, where other processes have one
            y = y + zero_of((bias,))
        out = merge_heads(y)
        weights = self._weights(query, key, bias, causal) if need_weights else None
        return out if self.out_proj is None else self.out_proj(out), weights

    def _project(self, x: Tensor, past: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return query `[B, H, n, d]`, key and value `[B, G, n, d]`."""
        query, key = split_heads(self.W_Q(x), self.num_heads), split_heads(self.W_K(x), self.num_kv_heads)
        value = split_heads(x if self.W_V is None else self.W_V(x), self.num_kv_heads).to(key.dtype)
        if self.temperature is not None:
            query = rms_norm(query) * self.temperature[:, None, None].to(query.dtype)
            key = rms_norm(key)
        rotation = None if self.positions is None else self.positions.rotation(x.shape[1], x, past)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def _bias(self, x: Tensor, hidden: Tensor | None, past: int) -> Tensor | None:
        """What is added to the scores, `[B or 1, H or 1, n, P + n]`; None where the kernel's own mask is enough."""
        new, total = x.shape[1], past + x.shape[1]
        term = None if self.positions is None else self.positions(x)
        windowed = self.window is not None and total > self.window
        if hidden is None and term is None and not windowed and not (self.is_causal and past and new > 1):
            return None
        offset = torch.arange(past, total, device=x.device)[:, None] - torch.arange(total, device=x.device)
        seen = offset >= 0 if self.is_causal else torch.ones_like(offset, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (offset < self.window)
        seen = seen[None, None]
        if hidden is not None:
            # A padding token sees itself: nobody reads what it makes of that, and a softmax over nothing is NaN.
            seen = (seen & ~hidden[:, None, None, :]) | (offset == 0)
        bias = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, -torch.inf)
        if term is None:
            return bias
        block: Tensor = term[0].block(term[1], slice(past, total), slice(0, total))
        return bias + block.to(x.dtype)

    def _weights(self, query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        key = key.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scores = (query @ key.mT * self.scale).to(torch.promote_types(query.dtype, torch.float32))
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = scores.masked_fill(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1).to(query.dtype)
