"""The models: embedding, blocks, a last norm, and the usual heads."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import ModelOutput

from implicit_attention import ALiBi, ImplicitQueryAttention, RelativeBias
from implicit_attention.errors import Came, bad_type, bad_value
from implicit_attention.hf.block import ImplicitAttentionBlock
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.ordinary import OrdinaryAttention
from implicit_attention.hf.outputs import (
    ImplicitCausalLMOutput,
    ImplicitClassifierOutput,
    ImplicitMaskedLMOutput,
    ImplicitModelOutput,
    stack_stats,
)

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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ImplicitQueryAttention, OrdinaryAttention)) and module.temperature is not None:
            init.ones_(module.temperature)
        elif isinstance(module, RelativeBias):
            init.zeros_(module.table)
        elif isinstance(module, ALiBi):
            init.copy_(module.slopes, ALiBi(len(module.slopes)).slopes)


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
        hidden = _hidden(attention_mask, x.shape[0], past + x.shape[1])
        show_weights = _or(output_attentions, self.config.output_attentions)
        states, weights, stats = [x], [], []
        for block in self.layers:
            x, block_weights, block_stats = block(x, hidden, cache=cache, output_attentions=show_weights)
            states.append(x)
            weights.append(block_weights)
            stats += [] if block_stats is None else [block_stats]
        states[-1] = x = self.norm(x)
        out = ImplicitModelOutput(
            last_hidden_state=x,
            cache=cache,
            hidden_states=tuple(states) if _or(output_hidden_states, self.config.output_hidden_states) else None,
            attentions=tuple(weights) if show_weights else None,
            solver_stats=stack_stats(stats),
        )
        return _returned(out, return_dict, self.config)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to be used, a new one if one is wanted and none is given."""
        if cache is not None and not self.config.is_causal:
            raise bad_value("cache", "None unless is_causal=True", Came(type(cache).__name__),
                            "Without a causal mask, old equilibria change with every new token.")  # fmt: skip
        decodes = self.config.is_causal and "implicit" not in self.config.layer_types
        wanted = _or(use_cache, self.config.use_cache and decodes and not self.training)
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None and wanted and not checkpointing:
            return DynamicCache(config=self.config)
        return cache


class ImplicitAttentionForCausalLM(ImplicitAttentionPreTrainedModel, GenerationMixin):
    """A language model: the next token from those before."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of, with `is_causal=True`.

        Raises:
            ValueError: If the configuration is not causal.
        """
        super().__init__(config)
        if not config.is_causal:
            raise bad_value("is_causal", "True for a causal language model", config.is_causal)
        self.model = ImplicitAttentionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ImplicitCausalLMOutput | Output:
        """Return logits, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            cache: As there.
            inputs_embeds: As there.
            labels: Tokens `[B, n]` to be predicted, each from those before it (they are shifted here); -100 counts
                for nothing.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            logits_to_keep: How many of the last tokens get logits, all if 0; or which.
            num_items_in_batch: What the summed loss is divided by, if not by the number of labels here.

        Returns:
            Output with `loss`, `logits` `[B, n, vocab_size]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.model(
            input_ids, attention_mask, cache, inputs_embeds, use_cache, output_attentions, output_hidden_states, True
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return _returned(
            ImplicitCausalLMOutput(
                loss=loss,
                logits=logits,
                cache=out.cache,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                solver_stats=out.solver_stats,
            ),
            return_dict,
            self.config,
        )


class ImplicitAttentionForMaskedLM(ImplicitAttentionPreTrainedModel):
    """A bidirectional model that fills in masked tokens."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of, with `is_causal=False`.

        Raises:
            ValueError: If the configuration is causal.
        """
        super().__init__(config)
        if config.is_causal:
            raise bad_value("is_causal", "False for a masked language model", config.is_causal,
                            "It fills in tokens from both sides.")  # fmt: skip
        self.model = ImplicitAttentionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ImplicitMaskedLMOutput | Output:
        """Return logits, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: `[B, n]`, the tokens that were masked, -100 elsewhere.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            num_items_in_batch: What the summed loss is divided by, if not by the number of labels here.

        Returns:
            Output with `loss`, `logits` `[B, n, vocab_size]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.model(
            input_ids, attention_mask, None, inputs_embeds, False, output_attentions, output_hidden_states, True
        )
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return _returned(
            ImplicitMaskedLMOutput(
                loss=loss,
                logits=logits,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                solver_stats=out.solver_stats,
            ),
            return_dict,
            self.config,
        )


class ImplicitAttentionForSequenceClassification(ImplicitAttentionPreTrainedModel):
    """One label, or one vector of scores, for a sequence.

    A causal model is read at its last token that is not padding, the only one that sees all others; a
    bidirectional one by the mean over its tokens.
    """

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of, with `num_labels`.
        """
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = ImplicitAttentionModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ImplicitClassifierOutput | Output:
        """Return scores, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there; if None, tokens equal to `pad_token_id` at the end of a row are padding.
            inputs_embeds: As there.
            labels: `[B]` int64, or as `config.problem_type` says.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            num_items_in_batch: What the summed loss is divided by, if not by the number of labels here.

        Returns:
            Output with `loss`, `logits` `[B, num_labels]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.model(
            input_ids, attention_mask, None, inputs_embeds, False, output_attentions, output_hidden_states, True
        )
        logits = self.score(self._pool(out.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return _returned(
            ImplicitClassifierOutput(
                loss=loss,
                logits=logits,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                solver_stats=out.solver_stats,
            ),
            return_dict,
            self.config,
        )

    def _pool(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[B, n, D] -> [B, D]`."""
        if attention_mask is None:
            return x[:, -1] if self.config.is_causal else x.mean(1)
        seen = attention_mask.to(x.device) != 0
        if not self.config.is_causal:
            return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
        last = (torch.arange(x.shape[1], device=x.device) * seen).argmax(-1)
        return x[torch.arange(len(x), device=x.device), last]


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


def _or(value: bool | None, default: bool | None) -> bool:
    return bool(default if value is None else value)


def _returned(out: M, return_dict: bool | None, config: ImplicitAttentionConfig) -> M | Output:
    return out if _or(return_dict, config.return_dict) else out.to_tuple()
