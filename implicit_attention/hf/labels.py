"""The models that label: a sequence, every token, or where an answer begins and ends."""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.modeling import Headed
from implicit_attention.hf.outputs import ImplicitClassifierOutput, ImplicitSpanOutput, ImplicitTokenClassifierOutput
from implicit_attention.hf.tokens import cached_length


class ImplicitAttentionForSequenceClassification(Headed):
    """One label, or one vector of scores, for a sequence.

    A causal model is read at its last token that is not `pad_token_id`, as transformers' own models, nor hidden by
    `attention_mask`; of these it is the only one that sees all others. A bidirectional one is read by the mean over its
    tokens. Its padding is what `attention_mask` says; without it, the runs of `pad_token_id` at both ends.
    """

    accepts_loss_kwargs = False  # the loss is a mean over this call: Trainer divides by the number of calls

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of, with `num_labels`.
        """
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(  # type: ignore[misc] # as in `ImplicitAttentionModel`
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImplicitClassifierOutput:
        """Return scores, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: `[B]` int64, or as `config.problem_type` says.
            cache: As there.
            use_cache: As there, but False if None.
            position_ids: As there.
            **kwargs: As there; `num_items_in_batch` is not used: the loss is the mean over the batch, as of
                transformers' own models.

        Returns:
            Output with `loss`, `logits` `[B, num_labels]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        padding = self.config.pad_token_id
        real = None if input_ids is None or padding is None else input_ids != padding
        if attention_mask is None and real is not None and not self.config.is_causal:
            attention_mask = _inner(real)
        before = cached_length(cache)
        out = self.read(
            input_ids, attention_mask, cache, inputs_embeds, use_cache=bool(use_cache), position_ids=position_ids,
            **kwargs,
        )  # fmt: skip
        x = out.last_hidden_state
        logits = self.score(self._pool(x, _of_new_tokens(attention_mask, before, x), real))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImplicitClassifierOutput(loss=loss, logits=logits, cache=out.cache, **out.shared())

    def _pool(self, x: Tensor, seen: Tensor | None, real: Tensor | None) -> Tensor:
        """`[B, n, D] -> [B, D]`; where tokens are no padding by the mask and by their number, `[B, n]` both."""
        if not self.config.is_causal:
            if seen is None and real is not None:
                seen = _inner(real).bool()
            return x.mean(1) if seen is None else (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
        if real is not None:
            seen = real if seen is None else seen & real
        if seen is None:
            return x[:, -1]
        last = (torch.arange(x.shape[1], device=x.device) * seen).argmax(-1)
        return x[torch.arange(x.shape[0], device=x.device), last]


def _of_new_tokens(attention_mask: Tensor | None, before: int | Tensor, x: Tensor) -> Tensor | None:
    """Which new tokens x `[B, n, D]` are no padding, `[B, n]`, of a mask that may be as long as a static cache."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    place = before + torch.arange(x.shape[1], device=attention_mask.device)
    return attention_mask.index_select(1, place).to(x.device) != 0


class ImplicitAttentionForTokenClassification(Headed):
    """One label for every token."""

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of, with `num_labels`.
        """
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
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
    ) -> ImplicitTokenClassifierOutput:
        """Return scores, and the loss if labels are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: `[B, n]` int64; -100 counts for nothing.
            position_ids: As there.
            **kwargs: As there; `num_items_in_batch` is what the summed loss is divided by, if not by the number of
                labels here.

        Returns:
            Output with `loss`, `logits` `[B, n, num_labels]` and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.read(input_ids, attention_mask, None, inputs_embeds, position_ids=position_ids, **kwargs)
        logits, loss = self.score(out.last_hidden_state), None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=count)
        return ImplicitTokenClassifierOutput(loss=loss, logits=logits, **out.shared())


class ImplicitAttentionForQuestionAnswering(Headed):
    """Where in a text the answer to a question begins and ends."""

    accepts_loss_kwargs = False  # the loss is a mean over this call: Trainer divides by the number of calls

    def __init__(self, config: ImplicitAttentionConfig) -> None:
        """Make the model with new weights.

        Args:
            config: What it is made of.
        """
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(  # type: ignore[misc] # as in `ImplicitAttentionModel`
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImplicitSpanOutput:
        """Return scores, and the loss if both positions are given.

        Args:
            input_ids: As in `ImplicitAttentionModel.forward`, like all that is not named below.
            attention_mask: As there.
            inputs_embeds: As there.
            start_positions: `[B]` int64, the answer's first token; outside the text it counts for nothing.
            end_positions: `[B]` int64, its last token.
            position_ids: As there.
            **kwargs: As there; `num_items_in_batch` is not used: the loss is the mean over the batch, as of
                transformers' own models.

        Returns:
            Output with `loss`, `start_logits` and `end_logits` `[B, n]`, and `solver_stats`.

        Raises:
            TypeError: If a tensor is of the wrong type, or an argument is not known.
            ValueError: If inputs are missing, doubled, or do not fit.
        """
        out = self.read(input_ids, attention_mask, None, inputs_embeds, position_ids=position_ids, **kwargs)
        start, end = (t.contiguous() for t in self.qa_outputs(out.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return ImplicitSpanOutput(loss=loss, start_logits=start, end_logits=end, **out.shared())


def _inner(real: Tensor) -> Tensor:
    """A mask of all but the padding at both ends, `[B, n]`, from which tokens are no pad tokens."""
    inner = (real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)
    inner = inner | ~real.any(-1, keepdim=True)  # a sample of pad tokens alone is read as it is
    return inner.long()
