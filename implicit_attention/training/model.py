"""The model that a run trains."""

from transformers import set_seed

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.training.settings import Settings
from implicit_attention.training.tokenizer import END, PAD, VOCABULARY


def build(settings: Settings) -> ImplicitAttentionForCausalLM:
    """Return a new model, with weights drawn from the seed.

    Args:
        settings: The settings of a run. Implicit and ordinary attention give models with as many weights.

    Returns:
        The model, on the CPU.
    """
    assert isinstance(settings.layers, int)  # the settings have looked
    kind = {"implicit": "implicit", "ordinary": "attention"}[settings.attention]
    config = ImplicitAttentionConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.embed_dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        block_types=[kind] * settings.layers,
        max_position_embeddings=settings.length,
        self_query=settings.self_query,
        values=settings.values,
        solver={"name": "forward_substitution", "kernel": settings.kernel},
        pad_token_id=PAD,
        eos_token_id=END,
    )
    set_seed(settings.seed)
    return ImplicitAttentionForCausalLM(config)
