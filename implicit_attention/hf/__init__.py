"""Language models with implicit-query attention for Hugging Face transformers, known to its Auto classes."""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "implicit_attention.hf needs transformers, which is not installed: pip install 'implicit-attention[hf]'."
    ) from error

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
for _auto, _model in (
    (transformers.AutoModel, ImplicitAttentionModel),
    (transformers.AutoModelForCausalLM, ImplicitAttentionForCausalLM),
    (transformers.AutoModelForMaskedLM, ImplicitAttentionForMaskedLM),
    (transformers.AutoModelForSequenceClassification, ImplicitAttentionForSequenceClassification),
    (transformers.AutoModelForTokenClassification, ImplicitAttentionForTokenClassification),
    (transformers.AutoModelForQuestionAnswering, ImplicitAttentionForQuestionAnswering),
):
    _auto.register(ImplicitAttentionConfig, _model, exist_ok=True)

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
