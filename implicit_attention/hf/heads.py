"""The language models: the next token from those before, masked tokens from those around them."""

from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import TransformersKwargs

from implicit_attention.errors import bad_value
from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.modeling import Headed
from implicit_attention.hf.outputs import ImplicitCausalLMOutput, ImplicitMaskedLMOutput


class ImplicitAttentionForCausalLM(Headed, GenerationMixin):
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, cache: Cache | None = None, **others: Any
    ) -> Tensor | None:
        """Return the mask that `generate` hands to `forward` with a static cache, `[B, size of the cache]`.

        Its shape is the same at every step, so that a compiled step is compiled once.

        Args:
            attention_mask: 1 where a token is to be attended to, `[B, P + n]`.
            cache: The cache.
            **others: What other models make larger masks from.
        """
        if attention_mask is None or cache is None or attention_mask.dim() != 2:
            return attention_mask
        return F.pad(attention_mask, (0, cache.get_max_length() - attention_mask.shape[1]), value=1)

    def _prepare_position_ids_for_generation(self, *arguments: Any, **options: Any) -> Any:
        """Let `generate` make no `position_ids`: they would say again what the mask says."""
        # But dynamic rotary positions change with the largest position, in which padding must not count.
        if not self.config.has_dynamic_positions:
            return None
        return super()._prepare_position_ids_for_generation(*arguments, **options)

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """Refuse continuous batching: a paged cache holds parts of columns, and a row's equation needs all of them.

        Args:
            *arguments: As in transformers.
            **options: As there.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Models with implicit attention have no continuous batching: transformers' paged attention replaces the "
            "attention function, and implicit blocks have a solver in its place. Use model.generate on a padded batch."
        )

    continuous_batching_context_manager = init_continuous_batching
    generate_batch = init_continuous_batching

    def forward(  # type: ignore[misc] # as in `ImplicitAttentionModel`
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_gains: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImplicitCausalLMOutput:
        """Return logits, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            cache: As there.
            inputs_embeds: As there.
            labels: Tokens `[B, n]` to be predicted, each from those before it (they are shifted here); -100 counts
                for nothing.
            use_cache: As there.
            position_ids: As there.
            logits_to_keep: How many of the last tokens get logits, all if 0; or which.
            output_gains: As there.
            **kwargs: As there; `shift_labels` are labels that are shifted already, in the place of `labels`;
                `num_items_in_batch` is what the summed loss is divided by, if not by the number of labels here.

        Returns:
            Output with `loss`, `logits` `[B, n, vocab_size]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        # Not named above: Trainer takes every argument called label for one that its batches have to hold.
        shift_labels = kwargs.pop("shift_labels", None)
        out = self.read(
            input_ids, attention_mask, cache, inputs_embeds, use_cache=use_cache, output_gains=output_gains,
            position_ids=position_ids, **kwargs,
        )  # fmt: skip
        logits = scaled(self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep)), self.config)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                shift_labels=shift_labels,
            )
        return ImplicitCausalLMOutput(loss=loss, logits=logits, cache=out.cache, **out.shared())


class ImplicitAttentionForMaskedLM(Headed):
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(  # type: ignore[misc] # as in `ImplicitAttentionModel`
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImplicitMaskedLMOutput:
        """Return logits, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: `[B, n]`, the tokens that were masked, -100 elsewhere.
            position_ids: As there.
            **kwargs: As there; `num_items_in_batch` is what the summed loss is divided by, if not by the number of
                labels here.

        Returns:
            Output with `loss`, `logits` `[B, n, vocab_size]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.read(input_ids, attention_mask, None, inputs_embeds, position_ids=position_ids, **kwargs)
        logits, loss = scaled(self.lm_head(out.last_hidden_state), self.config), None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=count)
        return ImplicitMaskedLMOutput(loss=loss, logits=logits, **out.shared())


def scaled(logits: Tensor, config: ImplicitAttentionConfig) -> Tensor:
    """Return logits divided by the configuration's `logits_scaling`."""
    return logits if config.logits_scaling == 1 else logits / config.logits_scaling
