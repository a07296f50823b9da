"""Models whose blocks or settings were changed after they were made: right, or refused with a remedy."""

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2, "initializer_range": 0.2}


def make(**settings):
    torch.manual_seed(0)
    return ImplicitAttentionForCausalLM(ImplicitAttentionConfig(**SIZES | settings)).eval()


def without_first(model):
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers -= 1
    return model


def test_blocks_that_were_moved_are_refused_where_a_cache_is_used():
    model, ids = without_first(make()), torch.arange(1, 10)[None]
    with pytest.raises(ValueError, match=r"layer_idx.*\[1, 2\].*set `block.layer_idx`"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    for place, block in enumerate(model.model.layers):
        block.layer_idx = place
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("kept", [[0, 2], [0, 1]])
def test_blocks_of_another_kind_than_the_configuration_says_are_refused(kept):
    """Padding would be attended to, and a saved model would come back as another one."""
    model = make(
        block_types=["implicit", "implicit", "attention"] if kept == [0, 2] else ["attention"] + ["implicit"] * 2
    )
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept[::-1]])
    model.config.num_hidden_layers = 2
    ids, mask = torch.randint(1, 31, (1, 9)), torch.tensor([[0] * 3 + [1] * 6])
    with pytest.raises(ValueError, match=r"config.block_types.*as the blocks are"):
        model(ids, mask, use_cache=False)
    model.config.block_types = [
        "implicit" if hasattr(block.attention, "Omega_V") else "attention" for block in model.model.layers
    ]
    padded = model(ids, mask, use_cache=False).logits[0, 3:]
    assert torch.allclose(padded, model(ids[:, 3:], use_cache=False).logits[0], atol=1e-4)


def test_a_configuration_that_was_changed_is_checked_again():
    config = ImplicitAttentionConfig(**SIZES | {"num_hidden_layers": 2})
    config.block_types = ["attention", "implicit"]
    assert ImplicitAttentionForCausalLM(config)(torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 31)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"block_types.*of length num_hidden_layers=4"):
        ImplicitAttentionForCausalLM(config)


def test_heads_that_do_not_make_up_a_token_need_a_projection():
    with pytest.raises(ValueError, match=r"out_proj.*8 numbers and not hidden_size=16"):
        ImplicitAttentionConfig(**SIZES, head_dim=4, out_proj=False)


@pytest.mark.parametrize("kinds", [["implicit"] * 2, ["attention", "implicit"]], ids=" ".join)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_cache_goes_on_where_autocast_begins_or_ends(kinds, static, first):
    model, ids = make(num_hidden_layers=2, block_types=kinds), torch.randint(1, 31, (1, 8))
    expected = model(ids, use_cache=False).logits[:, 6:]
    cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        for piece, narrow in ((ids[:, :6], first), (ids[:, 6:], not first)):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                found = model(piece, cache=cache, use_cache=True).logits
    assert cache.get_seq_length() == 8
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16 has three digits
