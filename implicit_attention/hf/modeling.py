"""The model without a head: embedding, blocks and a last norm."""

from os import PathLike
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from implicit_attention import ImplicitQueryAttention, RelativeBias
from implicit_attention.errors import Came, bad_type, bad_value
from implicit_attention.hf.block import ImplicitAttentionBlock
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.ordinary import OrdinaryAttention
from implicit_attention.hf.outputs import (
    ImplicitModelOutput,
    stack_stats,
)
from implicit_attention.hf.transactions import transactional

M = TypeVar("M", bound=ModelOutput)
Output = tuple[object, ...]


class ImplicitAttentionPreTrainedModel(PreTrainedModel):
    """What all models share: how weights begin, and what transformers may do with them."""

    config_class = ImplicitAttentionConfig
    config: ImplicitAttentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImplicitAttentionBlock"]
    _supports_context_parallel = False
    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let every model with a forward of its own leave the cache of a call that raises as it was."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls):
            cls.forward = transactional(cls.forward)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Load a model as transformers does, but from safetensors alone: a pickle can run code.

        Args:
            pretrained_model_name_or_path: Folder, or name of a repository.
            *model_args: As in `PreTrainedModel.from_pretrained`.
            **kwargs: As there.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: If `use_safetensors=False`.
            OSError: If there is no such file.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise bad_value("use_safetensors", "True", False, "Pickled weights can run code: save them anew.")
        loaded: Self = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ImplicitQueryAttention, OrdinaryAttention)) and module.temperature is not None:
            init.ones_(module.temperature)
        elif isinstance(module, RelativeBias):
            init.zeros_(module.table)


class ImplicitAttentionModel(ImplicitAttentionPreTrainedModel):
    """Token embedding, blocks and a last norm, without a head."""

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of.
        """
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ImplicitAttentionBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gains: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImplicitModelOutput | Output:
        """Return the last hidden states.

        Args:
            input_ids: Tokens `[B, n]`, int64.
            attention_mask: `[B, P + n]`, 1 where a token is to be attended to, 0 where it is padding.
            cache: What is kept of the P tokens before.
            inputs_embeds: `[B, n, D]`, in the place of `input_ids`.
            use_cache: Whether to return a cache; the configuration's `use_cache` if None.
            output_attentions: Whether to return the attention matrices at the equilibria.
            output_hidden_states: Whether to return what every block is given.
            output_gains: Whether to measure `solver_stats.gain`; the configuration's `output_gains` if None.
            return_dict: Whether to return an output with names, or a tuple of what is not None.

        Returns:
            Output with `last_hidden_state` `[B, n, D]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise bad_value("input_ids", "given unless `inputs_embeds` is, and not both", input_ids)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(cache, use_cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        if isinstance(cache, StaticCache) and past + x.shape[1] > cache.get_max_length():
            raise bad_value("cache", f"of max_cache_len {past + x.shape[1]} or more",
                            Came(f"one of {cache.get_max_length()}"))  # fmt: skip
        hidden = _hidden(attention_mask, x.shape[0], past + x.shape[1])
        show_weights = either(output_attentions, self.config.output_attentions)
        states, weights, stats = [x], [], []
        gains = either(output_gains, self.config.output_gains)
        for block in self.layers:
            x, block_weights, block_stats = block(
                x, hidden, cache=cache, output_attentions=show_weights, output_gains=gains
            )
            states.append(x)
            weights.append(block_weights)
            stats += [] if block_stats is None else [block_stats]
        states[-1] = x = self.norm(x)
        out = ImplicitModelOutput(
            last_hidden_state=x,
            cache=cache,
            hidden_states=tuple(states) if either(output_hidden_states, self.config.output_hidden_states) else None,
            attentions=tuple(weights) if show_weights else None,
            solver_stats=stack_stats(stats),
        )
        return returned(out, return_dict, self.config)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to be used, a new one if one is wanted and none is given."""
        if cache is not None and not self.config.is_causal:
            raise bad_value("cache", "None unless is_causal=True", Came(type(cache).__name__),
                            "Without a causal mask, old equilibria change with every new token.")  # fmt: skip
        wanted = either(use_cache, self.config.use_cache and self.config.is_causal and not self.training)
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and checkpointing:
            raise bad_value("cache", "None with gradient checkpointing in training", Came(type(cache).__name__),
                            "The backward pass calls every block again, which would add its tokens twice: "
                            "model.gradient_checkpointing_disable(), or call without a cache.")  # fmt: skip
        if cache is None and wanted and not checkpointing:
            return DynamicCache(config=self.config)
        return cache


def _hidden(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The padding that an attention mask names, `[B, P + n]`, True = hidden; None if there is none."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise bad_type("attention_mask", f"a tensor [{batch}, {length}] of zeros and ones", attention_mask)
    if tuple(attention_mask.shape) != (batch, length):
        raise bad_value("attention_mask", f"of shape ({batch}, {length}): all tokens, those of the cache included",
                        attention_mask, "1 says that a token is attended to, 0 that it is padding.")  # fmt: skip
    hidden = attention_mask == 0
    return hidden if torch.compiler.is_compiling() or bool(hidden.any()) else None


def either(value: bool | None, default: bool | None) -> bool:
    """Return a flag of a call, or where it is None the configuration's."""
    return bool(default if value is None else value)


def returned(out: M, return_dict: bool | None, config: ImplicitAttentionConfig) -> M | Output:
    """Return an output as it is, or as the tuple of what in it is not None."""
    return out if either(return_dict, config.return_dict) else out.to_tuple()
