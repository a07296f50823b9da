"""The model without a head: embedding, blocks and a last norm."""

import warnings
from os import PathLike
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
)
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from implicit_attention import ImplicitQueryAttention, RelativeBias
from implicit_attention.attention.linear_map import ZeroLinear
from implicit_attention.errors import Came, bad_value
from implicit_attention.hf.agreement import check_read, check_saved, used_blocks
from implicit_attention.hf.block import ImplicitAttentionBlock
from implicit_attention.hf.calls import check_others, check_positions, take_cache
from implicit_attention.hf.capturing import Shown, captured, register
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.ordinary import OrdinaryAttention
from implicit_attention.hf.outputs import (
    ImplicitModelOutput,
    stack_stats,
)
from implicit_attention.hf.packing import documents
from implicit_attention.hf.tokens import cached_length, describe
from implicit_attention.hf.transactions import level, transactional


class ImplicitAttentionPreTrainedModel(PreTrainedModel):
    """What all models share: how weights begin, and what transformers may do with them."""

    config_class = ImplicitAttentionConfig
    config: ImplicitAttentionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImplicitAttentionBlock"]
    _supports_context_parallel = False
    _supports_sdpa = True  # ordinary blocks; implicit ones have kernels of their own
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache"]
    _can_record_outputs = {"hidden_states": ImplicitAttentionBlock, "attentions": ImplicitAttentionBlock}
    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let every forward take `return_dict`, and leave the cache of a call that raises as it was."""
        super().__init_subclass__(**kwargs)
        register(cls, cls._can_record_outputs)
        if "forward" in vars(cls):
            cls.forward = transactional(can_return_tuple(cls.forward))

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
        if kwargs.get("tp_plan") is not None or kwargs.get("tp_size") is not None:
            raise bad_value("tp_plan", "None", kwargs.get("tp_plan"),
                            "A row's equation couples all heads: use device_map, FSDP or data parallelism."
                            )  # fmt: skip
        loaded: Self = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does; warn of layers whose settings are not those of the configuration.

        Args:
            *args: As in `PreTrainedModel.save_pretrained`.
            **kwargs: As there.

        Returns:
            What it returns.
        """
        base: Any = self.base_model
        try:
            check_saved(self.config, used_blocks(self.config, base.layers))
        except ValueError as error:  # what was trained is saved in any case
            warnings.warn(f"the saved configuration is not that of this model: {error}", UserWarning, stacklevel=2)
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ImplicitQueryAttention, OrdinaryAttention)):
            for factors in (module.temperature, module.key_norm, module.query_norm):
                if factors is not None:
                    init.ones_(factors)
        if isinstance(module, ZeroLinear):  # drawn already, as a linear map
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)
        if isinstance(module, RelativeBias):
            init.zeros_(module.table)


class ImplicitAttentionModel(ImplicitAttentionPreTrainedModel):
    """Token embedding, blocks and a last norm, without a head."""

    _output_capturing_hooks_installed = True  # none are needed: see `Shown`

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of.
        """
        super().__init__(config)
        config.validate()  # it may have been changed since it was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ImplicitAttentionBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @captured
    def forward(  # type: ignore[misc] # keywords of transformers that have a place of their own here
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        output_gains: bool | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImplicitModelOutput:
        """Return the last hidden states.

        Args:
            input_ids: Tokens `[B, n]`, int64.
            attention_mask: `[B, P + n]`, 1 where a token is to be attended to, 0 where it is padding; or a mask of your
                own, `[B, 1 or H, n, P + n]`, bool (True = attended to) or added to the scores.
            cache: What is kept of the P tokens before; `past_key_values` is the same.
            inputs_embeds: `[B, n, D]`, in the place of `input_ids`.
            use_cache: Whether to return a cache; the configuration's `use_cache` if None.
            output_gains: Whether to measure `solver_stats.gain`; the configuration's `output_gains` if None.
            position_ids: Where each token stands, `[B, n]`, int64. Without a mask and a cache, positions that restart
                are packed documents: each is an equilibrium of its own.
            cache_position: Slots of the new tokens, P to P + n - 1. It is checked alone.
            **kwargs: What transformers' models know: `output_attentions` for the attention matrices at the equilibria,
                `output_hidden_states` for what every block is given, or for those that it names by their numbers;
                `cu_seq_lens_q`, `seq_idx` for packed documents; others must be what they are without them. With
                `return_dict=False` the output is a tuple of what is not None.

        Returns:
            Output with `last_hidden_state` `[B, n, D]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        cache = take_cache(cache, kwargs)
        level(cache, self.config.num_hidden_layers)
        check_others(kwargs, self.config.is_causal)
        if (input_ids is None) == (inputs_embeds is None):
            raise bad_value("input_ids", "given unless `inputs_embeds` is, and not both", input_ids)
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        position_ids = check_positions(position_ids, cache_position, cached_length(cache), x)
        restarts = position_ids if attention_mask is None and cache is None else None
        segments = documents(x, restarts, kwargs)
        cache = self._cache(cache, use_cache, segments if not is_tracing(x) else None)
        self._check_room(cache, x.shape[1])
        blocks = self._blocks(cache)
        check_read(self.config, blocks, x)
        tokens, x = describe(self.config, x, cache, attention_mask, position_ids, segments)
        mask = self._ordinary_mask(x, cache, attention_mask, segments)
        gains, shown, stats = either(output_gains, self.config.output_gains), Shown(), []
        if gains and not (self.config.is_causal and self.config.normalize_over == "queries"):
            raise bad_value("output_gains", 'False unless is_causal=True and normalize_over="queries"', True,
                            "A token is no system of its own: use diagnostics.spectral_radius.")  # fmt: skip
        shown.add(x)
        for i, block in enumerate(blocks, 1):
            x, weights, block_stats = block(
                x, tokens, mask, cache=cache, output_attentions=shown.attentions_wanted, output_gains=gains
            )
            x = self.norm(x) if i == len(blocks) else x
            shown.add(x, weights)
            stats += [] if block_stats is None else [block_stats]
        return ImplicitModelOutput(
            last_hidden_state=x,
            cache=cache,
            hidden_states=shown.hidden_states,  # type: ignore[arg-type] # None in the place of those not asked for
            attentions=shown.attentions,  # type: ignore[arg-type]
            solver_stats=stack_stats(stats),
        )

    def _blocks(self, cache: Cache | None) -> nn.ModuleList:
        """The blocks that are used; refused where the cache would take them for others."""
        blocks = used_blocks(self.config, self.layers)
        places = [block.layer_idx for block in blocks]
        if cache is not None and places != list(range(len(blocks))):
            raise bad_value("layer_idx", "the place of each block, where a cache is used", Came(str(places)),
                            "After taking blocks out, set `block.layer_idx`, and `block.attention.layer_idx` of "
                            "ordinary blocks, to 0, 1, 2, ...; or pass use_cache=False.")  # fmt: skip
        return blocks

    def _cache(self, cache: Cache | None, use_cache: bool | None, segments: Tensor | None) -> Cache | None:
        """The cache to be used, a new one if one is wanted and none is given."""
        if cache is not None and not self.config.is_causal:
            raise bad_value("cache", "None unless is_causal=True", Came(type(cache).__name__),
                            "Without a causal mask, old equilibria change with every new token.")  # fmt: skip
        if segments is not None and (cache is not None or use_cache):
            raise bad_value("use_cache", "False with packed documents", True,
                            "A cache holds one document per sample: give each a call, or a row, of its own."
                            )  # fmt: skip
        wanted = self.config.use_cache and self.config.is_causal and not self.training and segments is None
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing and cache is not None:
            raise bad_value("cache", "None with gradient checkpointing in training", Came(type(cache).__name__),
                            "The backward pass calls every block again, which would add its tokens twice: "
                            "model.gradient_checkpointing_disable(), or call without a cache.")  # fmt: skip
        if checkpointing:
            return None
        new = cache is None and self.config.is_causal and either(use_cache, wanted)
        return DynamicCache(config=self.config) if new else cache

    def _check_room(self, cache: Cache | None, new: int) -> None:
        """Refuse a static cache that is too small; in a graph its own writing does."""
        length = cached_length(cache)
        if cache is None or not cache.is_compileable or isinstance(length, Tensor):
            return
        if length + new > cache.get_max_length():
            raise bad_value("cache", f"of max_cache_len {length + new} or more",
                            Came(f"one of {cache.get_max_length()}"))  # fmt: skip

    def _ordinary_mask(
        self, x: Tensor, cache: Cache | None, attention_mask: Tensor | None, segments: Tensor | None
    ) -> Any:
        """What transformers makes of the masks for ordinary blocks; None where there is none."""
        name = self.config._attn_implementation
        if all(kind == "implicit" for kind in self.config.block_types[: self.config.num_hidden_layers]):
            if name not in (None, "eager", "sdpa"):
                raise bad_value("attn_implementation", "left out for a model of implicit blocks", name,
                                "They have kernels of their own: see `solver`. Ordinary blocks use it.")  # fmt: skip
            return None
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.is_floating_point():
                return attention_mask
            seen = attention_mask != 0
            nothing = torch.zeros((), dtype=x.dtype, device=x.device)
            return seen if name == "sdpa" else nothing.masked_fill(~seen, torch.finfo(x.dtype).min)
        make = create_causal_mask if self.config.window is None else create_sliding_window_causal_mask
        config: Any = _MaskSettings(name, self.config.is_causal, self.config.window)
        if segments is None:
            return make(config, x, attention_mask, cache)
        if attention_mask is None and self.config.is_causal:
            leaping = torch.arange(x.shape[1], device=x.device) + 2 * segments  # between documents alone
            return make(config, x, None, None, position_ids=leaping)
        return make(config, x, attention_mask, None, and_mask_function=packed_sequence_mask_function(segments))


class Headed(ImplicitAttentionPreTrainedModel):
    """What models with a head share: the model beneath it, and how it is called."""

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model beneath.

        Args:
            config: What it is made of.
        """
        super().__init__(config)
        self.model = ImplicitAttentionModel(config)

    def read(self, *inputs: Any, use_cache: bool | None = False, **kwargs: Any) -> ImplicitModelOutput:
        """Return what the model beneath makes of a call, with names whatever `config.return_dict` says.

        Args:
            *inputs: The first arguments of `ImplicitAttentionModel.forward`.
            use_cache: As there.
            **kwargs: As there.
        """
        out: ImplicitModelOutput = self.model(*inputs, use_cache=use_cache, return_dict=True, **kwargs)
        return out


class _MaskSettings:
    """What transformers' masks ask of a configuration, under the names they know. Dynamo traces no SimpleNamespace."""

    def __init__(self, implementation: str | None, is_causal: bool, window: int | None) -> None:
        self._attn_implementation = implementation
        self.is_causal = is_causal
        self.sliding_window = window


def either(value: bool | None, default: bool | None) -> bool:
    """Return a flag of a call, or where it is None the configuration's."""
    return bool(default if value is None else value)
