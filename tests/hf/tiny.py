"""Tiny models for the tests, large enough that every option matters."""

import torch

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM

VOCABULARY = 50


def config(**options):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,  # weights as a trained model has them: with 0.02 attention hardly matters
        "self_query": "output",  # the one that has rows to solve, and gains
        "on_failure": "raise",
    }
    return ImplicitAttentionConfig(**(sizes | options))


def make(cls=ImplicitAttentionForCausalLM, dtype=torch.float64, **options):
    """A model in eval mode whose every parameter is random, those that start at constants too."""
    torch.manual_seed(1)
    model = cls(config(**options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if "Psi_V" in name:
                parameter.normal_(std=0.2)
            if name.endswith("table"):
                parameter.normal_(std=0.5)
    return model


def tokens(batch=2, length=9, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
