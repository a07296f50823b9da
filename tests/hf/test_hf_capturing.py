"""Hidden states and attentions that a call shows, by transformers' `capture_outputs` without its hooks."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from transformers.utils.output_capturing import install_all_output_capturing_hooks

from implicit_attention.hf import ImplicitAttentionForCausalLM, ImplicitAttentionModel
from tests.hf import tiny

MIXED = {"layer_types": ["attention", "implicit"]}
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def shown(model):
    out = model(tiny.tokens(), **EVERYTHING)
    return [*out.hidden_states, *out.attentions]


def same(found, expected):
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_another_class(model):
    """As FSDP does: the class is replaced after the model was made."""
    for module in (model, model.model):
        module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {})
    return model


@torch.no_grad()
@pytest.mark.parametrize("change", [pickled, copy.deepcopy, of_another_class], ids=lambda change: change.__name__)
def test_a_changed_model_shows_the_same(change):
    model = tiny.make(**MIXED)
    expected = shown(model)
    assert not any(module._forward_hooks for module in model.modules())
    same(shown(change(model)), expected)


def test_a_model_of_another_process_shows_its_states(tmp_path):
    torch.save(tiny.make(ImplicitAttentionModel, **MIXED), tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); "
        "print(len(model(torch.ones(1, 4).long(), output_hidden_states=True).hidden_states))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert out.stdout.split() == ["3"]


@torch.no_grad()
def test_a_replaced_block_shows_its_states():
    model, other = tiny.make(**MIXED), tiny.make(**MIXED)
    shown(model)
    other.model.layers[1].mlp.down.weight.mul_(2)
    model.model.layers[1] = other.model.layers[1]
    same(shown(model), shown(other))


@torch.no_grad()
@pytest.mark.parametrize("chosen", [True, [1], [0, -1]], ids=str)
def test_hooks_of_a_model_around_it_add_nothing(chosen):
    """A model of several hangs transformers' hooks on the blocks of those inside."""
    model = tiny.make(**MIXED)
    expected, options = shown(model), {"output_attentions": True, "output_hidden_states": chosen}
    install_all_output_capturing_hooks(model)
    out = model(tiny.tokens(), **options)
    kept = range(3) if chosen is True else [i % 3 for i in chosen]
    assert [state is not None for state in out.hidden_states] == [i in kept for i in range(3)]
    for i in kept:
        torch.testing.assert_close(out.hidden_states[i], expected[i])
    same([*expected[:3], *out.attentions], expected)


@torch.no_grad()
def test_flags_that_are_none_are_the_configurations():
    model = tiny.make(ImplicitAttentionForCausalLM, **MIXED)
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(tiny.tokens(), output_hidden_states=None, output_attentions=None)
    same([*out.hidden_states, *out.attentions], shown(model))
