"""Language models with implicit-query attention for Hugging Face transformers, known to its Auto classes."""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "implicit_attention.hf needs transformers, which is not installed: pip install 'implicit-attention[hf]'."
    ) from error

from transformers.models.auto import modeling_auto as _known

from implicit_attention.hf.configuration import ImplicitAttentionConfig
from implicit_attention.hf.conversion import ConversionError, convert
from implicit_attention.hf.heads import ImplicitAttentionForCausalLM, ImplicitAttentionForMaskedLM
from implicit_attention.hf.labels import (
    ImplicitAttentionForQuestionAnswering,
    ImplicitAttentionForSequenceClassification,
    ImplicitAttentionForTokenClassification,
)
from implicit_attention.hf.modeling import ImplicitAttentionModel, ImplicitAttentionPreTrainedModel
from implicit_attention.hf.outputs import SolverStats

transformers.AutoConfig.register(ImplicitAttentionConfig.model_type, ImplicitAttentionConfig, exist_ok=True)
for _auto, _names, _model in (
    (transformers.AutoModel, _known.MODEL_MAPPING_NAMES, ImplicitAttentionModel),
    (transformers.AutoModelForCausalLM, _known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ImplicitAttentionForCausalLM),
    (transformers.AutoModelForMaskedLM, _known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, ImplicitAttentionForMaskedLM),
    (transformers.AutoModelForSequenceClassification, _known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
     ImplicitAttentionForSequenceClassification),
    (transformers.AutoModelForTokenClassification, _known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
     ImplicitAttentionForTokenClassification),
    (transformers.AutoModelForQuestionAnswering, _known.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
     ImplicitAttentionForQuestionAnswering),
):  # fmt: skip
    _auto.register(ImplicitAttentionConfig, _model, exist_ok=True)
    # Trainer's label smoothing shifts labels for names in these lists alone; pipelines warn of all others.
    _names[ImplicitAttentionConfig.model_type] = _model.__name__

__all__ = [
    "ConversionError",
    "ImplicitAttentionConfig",
    "ImplicitAttentionForCausalLM",
    "ImplicitAttentionForMaskedLM",
    "ImplicitAttentionForQuestionAnswering",
    "ImplicitAttentionForSequenceClassification",
    "ImplicitAttentionForTokenClassification",
    "ImplicitAttentionModel",
    "ImplicitAttentionPreTrainedModel",
    "SolverStats",
    "convert",
]
