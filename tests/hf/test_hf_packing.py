"""Packed documents: each is what it is alone, in values, losses and gradients."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from implicit_attention.hf import ImplicitAttentionModel
from tests.hf import tiny

TIGHT = {"solver": {"name": "forward_substitution", "rtol": 1e-13, "atol": 1e-13}}
KINDS = {
    "implicit": TIGHT,
    "ordinary": {"layer_types": ["attention"] * 2},
    "mixed": {"layer_types": ["attention", "implicit"], "num_kv_heads": 2, **TIGHT},
    "window": {"layer_types": ["attention", "implicit"], "window": 2, **TIGHT},
    "alibi": {"layer_types": ["attention", "implicit"], "positions": "alibi", **TIGHT},
}
EVERY_KIND = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
LENGTHS = (3, 5, 1, 4)


def documents():
    return [tiny.tokens(1, length, seed=length) for length in LENGTHS]


def collated(**options):
    return DataCollatorWithFlattening(**options)([{"input_ids": d[0].tolist()} for d in documents()])


@EVERY_KIND
@pytest.mark.parametrize("flash", [False, True], ids=["position_ids", "cu_seq_lens"])
def test_documents_of_the_collator_are_each_alone(options, flash):
    model = tiny.make(**options)
    batch = collated(return_flash_attn_kwargs=flash, return_seq_idx=flash)
    out = model(**batch)
    assert out.cache is None
    found = out.logits[0].split(LENGTHS)
    for logits, document in zip(found, documents(), strict=True):
        torch.testing.assert_close(logits, model(document).logits[0], rtol=0, atol=1e-9)
    out.loss.backward()
    gradient = model.model.layers[1].attention.W_K.weight.grad.clone()
    model.zero_grad()
    losses = [
        model(d, labels=d, num_items_in_batch=sum(LENGTHS) - len(LENGTHS)).loss for d in documents() if d.shape[1] > 1
    ]
    torch.testing.assert_close(sum(losses), out.loss, rtol=1e-5, atol=0)
    sum(losses).backward()
    torch.testing.assert_close(model.model.layers[1].attention.W_K.weight.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["implicit", "attention"])
@torch.no_grad()
def test_bidirectional_documents(kind):
    model = tiny.make(
        ImplicitAttentionModel, is_causal=False, initializer_range=0.1, layer_types=[kind] * 2,
        solver={"name": "anderson", "rtol": 1e-11, "atol": 1e-11},
    )  # fmt: skip
    batch = collated()
    found = model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state[0].split(LENGTHS)
    for states, document in zip(found, documents(), strict=True):
        torch.testing.assert_close(states, model(document).last_hidden_state[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [TIGHT, KINDS["mixed"]], ids=["implicit", "mixed"])
@torch.no_grad()
def test_documents_in_a_graph(options):
    """There a mask keeps them apart: their lengths are not known."""
    model, batch = tiny.make(use_cache=False, **options), collated()
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(**given).logits
    torch.testing.assert_close(found, model(**given).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["rope", "alibi", "relative", None])
@torch.no_grad()
def test_bidirectional_documents_in_a_graph(positions):
    solver = {"name": "contraction", "rtol": 1e-12}
    model = tiny.make(ImplicitAttentionModel, is_causal=False, positions=positions, solver=solver).eval()
    batch = collated()
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(**given).last_hidden_state
    torch.testing.assert_close(found, model(**given).last_hidden_state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["implicit", "attention"])
@torch.no_grad()
def test_runs_of_one_number_are_documents(kind):
    """In a graph, too."""
    model = tiny.make(use_cache=False, layer_types=[kind] * 2, **TIGHT).eval()
    ids, numbers = tiny.tokens(1, 9), torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]])
    wanted = torch.cat([model(part).logits for part in ids.split([2, 3, 4], 1)], 1)
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="eager")):
        torch.testing.assert_close(call(ids, seq_idx=numbers).logits, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("named", ["position_ids", "cu_seq_lens_q"])
@torch.no_grad()
def test_a_graph_says_what_does_not_fit(named):
    """In the words that a call without a graph has."""
    model, batch = tiny.make(use_cache=False), collated()
    wrong = {
        "position_ids": {"cu_seq_lens_q": torch.tensor([0, 3, 13])} | {"position_ids": batch["position_ids"]},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 12])},
    }[named]
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=f"`{named}` must"):
            call(batch["input_ids"], **wrong)


def test_what_packed_documents_exclude():
    model, batch = tiny.make(), collated()
    given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with pytest.raises(ValueError, match="`use_cache` must be False with packed documents"):
        model(**given, use_cache=True)
    bounds = torch.tensor([0, 3, 13], dtype=torch.int32)
    with pytest.raises(ValueError, match="`position_ids` must be consecutive within each document"):
        model(**given, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="`use_cache` must be False with packed documents"):
        model(batch["input_ids"], cu_seq_lens_q=bounds, cache=DynamicCache(config=model.config))


def bounds(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


BAD_VALUES = {
    "no-zero": ({"cu_seq_lens_q": bounds(4, 9)}, "`cu_seq_lens_q` must be rising from 0 to the number of tokens, 9"),
    "negative": ({"cu_seq_lens_q": bounds(-2, 4, 9)}, "`cu_seq_lens_q` must be rising from 0"),
    "falls": ({"cu_seq_lens_q": bounds(0, 9, 4, 9)}, "`cu_seq_lens_q` must be rising from 0"),
    "short": ({"cu_seq_lens_q": bounds(0, 4, 8)}, "`cu_seq_lens_q` must be rising from 0"),
    "keys": (
        {"cu_seq_lens_q": bounds(0, 4, 9), "cu_seq_lens_k": bounds(0, 3, 9)},
        "`cu_seq_lens_k` must be the same as cu_seq_lens_q",
    ),
    "numbers": (
        {"cu_seq_lens_q": bounds(0, 4, 9), "seq_idx": torch.tensor([[0] * 3 + [1] * 6])},
        "`seq_idx` must change where a document of `cu_seq_lens_q` begins",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("kind", ["implicit", "attention"])
@torch.no_grad()
def test_boundaries_that_cannot_be_are_refused(given, message, kind):
    """In a graph, too."""
    model = tiny.make(use_cache=False, layer_types=[kind] * 2, **TIGHT).eval()
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=message):
            call(tiny.tokens(1, 9), **given)


@pytest.mark.parametrize("named", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_documents_are_told_by_tensors_of_integers(named):
    model, ids = tiny.make(), tiny.tokens(1, 9)
    right = {"cu_seq_lens_q": bounds(0, 4, 9), "cu_seq_lens_k": bounds(0, 4, 9)}
    right["seq_idx"] = torch.tensor([[0] * 4 + [1] * 5])
    for wrong in (right[named].tolist(), right[named].double(), right[named] > 0):
        with pytest.raises(TypeError, match=f"`{named}` must be an int32 or int64 tensor"):
            model(ids, **right | {named: wrong})
    if named != "seq_idx":
        for wrong in (bounds(9), right[named][None], torch.tensor(9)):
            with pytest.raises(ValueError, match=rf"`{named}` must be of shape \[documents \+ 1\]"):
                model(ids, **right | {named: wrong})


@torch.no_grad()
def test_names_that_say_the_same_documents_are_taken():
    """Empty documents, too; in a graph, too."""
    model, ids = tiny.make(use_cache=False, **TIGHT).eval(), tiny.tokens(1, 9)
    given = {"cu_seq_lens_q": bounds(0, 4, 4, 9), "cu_seq_lens_k": bounds(0, 4, 4, 9)}
    given["seq_idx"] = torch.tensor([[7] * 4 + [3] * 5])
    wanted = torch.cat([model(part).logits for part in ids.split([4, 5], 1)], 1)
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(call(ids, **given).logits, wanted, rtol=0, atol=1e-9)
