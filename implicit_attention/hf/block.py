"""One block of the models: norm, attention, norm, gated MLP, with residual connections."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf.caching import LayerCache
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.offload import weights_on_device
from implicit_attention.hf.ordinary import OrdinaryAttention, attention_scale
from implicit_attention.hf.outputs import Stats, layer_stats
from implicit_attention.hf.settings import make_adjoint, make_positions, make_solver
from implicit_attention.hf.tokens import Tokens


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden_states: `[B, n, D]`.
        weights: Attention matrix `[B, H, n, P + n]`, if it was asked for.
        stats: Statistics of the solve, None in an ordinary block.
    """

    hidden_states: Tensor
    weights: Tensor | None
    stats: Stats | None


class GatedMLP(nn.Module):
    """`W_down (silu(W_gate x) * W_up x)`.

    Reference:
        Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202 (2020).
    """

    def __init__(self, size: int, width: int, activation: str = "silu", bias: bool = False) -> None:
        """Make the MLP.

        Args:
            size: Size D of a token.
            width: Size of the layer inside.
            activation: What stands in the place of silu, by transformers' name for it.
            bias: Whether the linear maps have biases.
        """
        super().__init__()
        self.gate = nn.Linear(size, width, bias=bias)
        self.up = nn.Linear(size, width, bias=bias)
        self.down = nn.Linear(width, size, bias=bias)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `[..., D]`."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class ImplicitAttentionBlock(GradientCheckpointingLayer):
    """A pre-norm block, implicit or ordinary; an ordinary one's MLP is wider if its attention has fewer weights."""

    def __init__(self, config: ImplicitAttentionConfig, layer_idx: int) -> None:
        """Make the block.

        Args:
            config: The model's configuration.
            layer_idx: Which entry of `config.block_types`, and of a cache, belongs to it.
        """
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.layer_idx = layer_idx
        self.attention_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.attention: ImplicitQueryAttention | OrdinaryAttention
        if config.block_types[layer_idx] == "implicit":
            self.attention = implicit_attention(config, layer_idx)
        else:
            self.attention = OrdinaryAttention(config, layer_idx)
            fewer = _count(implicit_attention(config, layer_idx, device="meta")) - _count(self.attention)
            width += round(fewer / (3 * size)) if config.equal_weights else 0
        self.mlp_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(size, width, config.hidden_act, config.mlp_bias)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        mask: Any = None,
        cache: Cache | None = None,
        *,
        output_attentions: bool = False,
        output_gains: bool = False,
    ) -> BlockOutput:
        """Return the block's output.

        Args:
            x: `[B, n, D]`.
            tokens: What the call says of its tokens.
            mask: What transformers makes of its masks, for an ordinary block.
            cache: The P tokens before.
            output_attentions: Also return the attention matrix.
            output_gains: Also measure gains.

        Returns:
            Output, weights and statistics.
        """
        layer, stats = self.attention, None
        normed = self.attention_norm(x)
        if isinstance(layer, OrdinaryAttention):
            y, weights = layer(normed, tokens, mask, cache, need_weights=output_attentions)
        else:
            y, weights, stats = self._solve(layer, normed, tokens, cache, output_attentions, output_gains)
        x = x + self._multiplied(y)
        return BlockOutput(x + self._multiplied(self.mlp(self.mlp_norm(x))), weights, stats)

    def _multiplied(self, y: Tensor) -> Tensor:
        return y if self.residual_multiplier == 1 else y * self.residual_multiplier

    def _solve(
        self, layer: ImplicitQueryAttention, x: Tensor, tokens: Tokens, cache: Cache | None, show: bool, gains: bool
    ) -> BlockOutput:
        """What an implicit layer adds. It is called, so that hooks and offloading act on it as on any module."""
        needed = cache is not None or tokens.positions is not None
        held = LayerCache(cache, self.layer_idx, tokens) if needed else None
        with weights_on_device(layer):
            y, weights, solution = layer(
                x, attn_mask=tokens.mask, key_padding_mask=tokens.hidden, cache=held, segments=tokens.segments,
                need_weights=show, average_attn_weights=False, need_solution=True, gains=gains,
            )  # fmt: skip
        weights = None if weights is None else tokens.weights_by_slot(weights)
        return BlockOutput(y, weights, layer_stats(solution))


def implicit_attention(
    config: ImplicitAttentionConfig, layer_idx: int = 0, device: torch.device | str | None = None
) -> ImplicitQueryAttention:
    """Return the implicit layer that a configuration describes.

    Args:
        config: The configuration.
        layer_idx: Which block it belongs to.
        device: Device of its parameters.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range, or without effect next to the others.
    """
    positions = make_positions(
        config.positions_of(layer_idx), config.num_attention_heads, config.head_dim, config.max_position_embeddings
    )
    return ImplicitQueryAttention(
        **config.layer_options() | {"scale": attention_scale(config, positions)},
        positions=positions,
        solver=make_solver(config.solver),
        adjoint=make_adjoint(config.adjoint),
        on_failure=config.on_failure,
        device=device,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
