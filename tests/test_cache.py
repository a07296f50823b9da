"""Decoding in chunks gives what one pass gives: values, lengths, padding, windows, every orientation."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from implicit_attention import Anderson, ConvergenceError, DecodeCache, ForwardSubstitution, ImplicitQueryAttention
from tests.bridge import make_layer

F64 = torch.float64
EXACT = ForwardSubstitution(block=4, rtol=1e-14, atol=1e-13)
LAYERS = {
    "heads": {"num_heads": 2},
    "one-head": {"num_heads": 1},
    "qk_norm-rope": {"num_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True},
    "groups-rope": {"num_heads": 4, "num_kv_heads": 2, "positions": "rope"},
    "alibi": {"num_heads": 2, "positions": "alibi", "out_proj": True},
    "relative-window": {"num_heads": 2, "positions": "relative", "window": 4},
    "input": {"num_heads": 2, "self_query": "input", "positions": "rope"},
    "identity": {"num_heads": 2, "values": "identity"},
    "feedback": {"num_heads": 4, "num_kv_heads": 2, "self_query": "input", "values": "feedback", "positions": "rope"},
    "feedback-window": {"num_heads": 1, "self_query": "input", "values": "feedback", "window": 4, "bias": True},
    "keys": {"num_heads": 2, "normalize_over": "keys", "query_input": True, "positions": "rope", "solver": "iterate"},
    "keys-groups": {"num_heads": 4, "num_kv_heads": 1, "normalize_over": "keys", "solver": "iterate"},
    "anderson": {"num_heads": 2, "solver": "iterate"},
}
ITERATE = Anderson(rtol=1e-13, atol=1e-13, max_steps=300)


def make(name, n, batch=2, seed=0):
    options = {"solver": EXACT} | LAYERS[name]
    if options["solver"] == "iterate":
        options["solver"] = ITERATE
    layer = make_layer(8, is_causal=True, seed=seed, **options)
    x = torch.randn(batch, n, 8, dtype=F64, generator=torch.Generator().manual_seed(seed + 1))
    return layer, x


def close(a, b, tolerance=1e-10):  # both sides are solved to 1e-13, and gains here stay below 0.9
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@given(name=st.sampled_from(list(LAYERS)), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_chunks_equal_the_whole(name, chunks):
    layer, x = make(name, sum(chunks))
    cache = layer.make_cache(2, sum(chunks))
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split(chunks, 1)]
        close(torch.cat(parts, 1), layer(x))
    assert cache.lengths.tolist() == [sum(chunks)] * 2


@pytest.mark.parametrize("name", LAYERS)
def test_token_by_token(name):
    layer, x = make(name, 9)
    cache = layer.make_cache(2, 12)
    with torch.no_grad():
        parts = [layer(x[:, :4], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in range(4, 9))]
        close(torch.cat(parts, 1), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_samples_of_different_lengths(name):
    """Padding at the end of a chunk is forgotten: each sample goes on as if it were alone."""
    layer, x = make(name, 12, batch=3)
    counts = torch.tensor([[4, 2, 1], [3, 3, 3], [1, 2, 0], [2, 1, 3]])  # real tokens of each chunk, by sample
    cache, seen = layer.make_cache(3, 40), [[], [], []]
    with torch.no_grad():
        for chunk in counts:
            width = max(1, int(chunk.max()))
            new, hidden = torch.randn(3, width, 8, dtype=F64), torch.ones(3, width, dtype=torch.bool)
            for b, count in enumerate(chunk.tolist()):
                done = sum(len(part) for part in seen[b])
                new[b, :count], hidden[b, :count] = x[b, done : done + count], False
            y = layer(new, cache=cache, key_padding_mask=hidden)
            for b, count in enumerate(chunk.tolist()):
                seen[b].append(y[b, :count])
        assert cache.lengths.tolist() == counts.sum(0).tolist()
        for b in range(3):
            found = torch.cat(seen[b])
            close(found, layer(x[b : b + 1, : len(found)])[0])


@pytest.mark.parametrize("name", ["heads", "qk_norm-rope", "alibi", "keys"])
def test_padding_at_the_start(name):
    layer, x = make(name, 9)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[0, :3] = True
    cache = layer.make_cache(2, 9)
    with torch.no_grad():
        y = torch.cat(
            [layer(x[:, s], cache=cache, key_padding_mask=hidden[:, s]) for s in (slice(0, 5), slice(5, 9))], 1
        )
        close(y[1], layer(x[1:])[0])
        close(y[0, 3:], layer(x[:1, 3:])[0])


def test_masks_and_weights_see_past_columns_first():
    layer, x = make("heads", 9)
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(3)) < 0.4
    cache = layer.make_cache(2, 9)
    with torch.no_grad():
        whole, weights = layer(x, attn_mask=mask, need_weights=True)
        layer(x[:, :6], attn_mask=mask[:6, :6], cache=cache)
        y, last = layer(x[:, 6:], attn_mask=mask[6:], cache=cache, need_weights=True)
    close(y, whole[:, 6:])
    close(last, weights[:, 6:])


@given(
    name=st.sampled_from(list(LAYERS)),
    chunks=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    padded=st.booleans(),
    solver=st.sampled_from([EXACT, ITERATE]),
)
def test_gradients_flow_through_the_cache(name, chunks, padded, solver):
    """What the tokens before give the loss of later ones: as in one pass."""
    n = sum(chunks)
    layer, x = make(name, n)
    layer.solver = ITERATE if layer.normalize_over == "keys" else solver
    hidden = torch.zeros(2, n, dtype=torch.bool)
    hidden[0, : chunks[0] // 2] = padded
    found = []
    for split in (chunks, [n]):
        leaf, cache = x.clone().requires_grad_(), layer.make_cache(2, n)
        parts = zip(leaf.split(split, 1), hidden.split(split, 1), strict=True)
        y = torch.cat([layer(part, cache=cache, key_padding_mask=h) for part, h in parts], 1)
        y = y[:, -chunks[-1] :]
        found.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, *layer.parameters()], allow_unused=True)))
    for a, b in zip(*found, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, 1e-9)


def test_gradients_flow_through_moved_and_reordered_samples():
    layer, x = make("qk_norm-rope", 7)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[1, 3:] = True  # a sample's last slot is forgotten
    leaf, cache = x.clone().requires_grad_(), layer.make_cache(2, 9)
    layer(leaf[:, :4], cache=cache, key_padding_mask=hidden)
    cache.reorder(torch.tensor([1, 1]))
    y = layer(leaf[:, 4:], cache=cache)
    (found,) = torch.autograd.grad(y.sin().sum(), leaf)
    leaf = x.clone().requires_grad_()
    right = layer(torch.cat([leaf[1:, :3].expand(2, -1, -1), leaf[:, 4:]], 1))[:, 3:]
    close(y, right)
    close(found, torch.autograd.grad(right.sin().sum(), leaf)[0], 1e-9)


def test_a_copied_cache_goes_on_by_itself_and_shares_the_graph():
    layer, x = make("qk_norm-rope", 7)
    leaf, cache = x.clone().requires_grad_(), layer.make_cache(2, 7)
    layer(leaf[:, :4], cache=cache)
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        layer(leaf[:, :3], cache=cache)  # another continuation
    y = layer(leaf[:, 4:], cache=copied)
    right = layer(leaf)[:, 4:]
    close(y, right)
    close(*(torch.autograd.grad(out.sin().sum(), leaf)[0] for out in (y, right)), 1e-9)


def test_a_detached_cache_is_a_constant():
    layer, x = make("qk_norm-rope", 7)
    leaf, cache = x.clone().requires_grad_(), layer.make_cache(2, 7)
    layer(leaf[:, :4], cache=cache).sin().sum().backward()
    cache.detach()
    leaf.grad = None
    layer(leaf[:, 4:], cache=cache).sin().sum().backward()  # the graph of the first is gone
    assert not leaf.grad[:, :4].any()
    assert leaf.grad[:, 4:].any()


@pytest.mark.parametrize("name", ["heads", "one-head", "groups-rope", "keys"])
@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode_and_ordinary_mode_share_a_cache(name, made_inside):
    layer, x = make(name, 8)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.inference_mode(made_inside), torch.no_grad():
        cache = layer.make_cache(2, 9)
    with torch.inference_mode():
        layer(x[:, :4], cache=cache, key_padding_mask=hidden)
        cache.reorder(torch.tensor([1, 1]))
    leaf = x[:, 4:].clone().requires_grad_()
    y = layer(leaf, cache=cache)
    y.sum().backward()
    with torch.inference_mode():
        right = layer(torch.cat([x[1:, :3].expand(2, -1, -1), x[:, 4:]], 1))[:, 3:]
        close(y.detach(), right)


@pytest.mark.parametrize("name", ["heads", "one-head", "qk_norm-rope", "groups-rope", "alibi"])
@pytest.mark.parametrize("made_inside", [True, False])
def test_autocast(name, made_inside):
    """A cache made under autocast holds what is computed there; one made outside keeps its dtype."""
    options = LAYERS[name] | {"solver": ForwardSubstitution()}
    layer, x = ImplicitQueryAttention(8, is_causal=True, **options), torch.randn(2, 6, 8)
    with torch.no_grad():
        cache = layer.make_cache(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            cache = layer.make_cache(2, 6) if made_inside else cache
            whole = layer(x)
            parts = [layer(x[:, :4], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in (4, 5))]
            close(torch.cat(parts, 1), whole, 0.1)  # bfloat16
    assert cache.column.dtype == (torch.bfloat16 if made_inside else torch.float32)
    assert cache.used == 6
    if made_inside:
        with pytest.raises(ValueError, match="float32"):
            layer(x[:, :1], cache=cache)


def test_autocast_leaves_a_cache_in_float64():
    """Autocast casts no float64, so a cache in less would lose digits."""
    layer, x = make("qk_norm-rope", 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = layer.make_cache(2, 8)
        parts = [layer(x[:, i : i + 1], cache=cache) for i in range(x.shape[1])]
        assert cache.column.dtype == torch.float64
        close(torch.cat(parts, 1), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_that_is_made_again_is_refused(reentrant):
    layer, x = make("heads", 8)
    leaf, cache = x.clone().requires_grad_(), layer.make_cache(2, 64)
    y = checkpoint(lambda t: layer(t, cache=cache), leaf, use_reentrant=reentrant)
    with pytest.raises(ValueError, match="`cache` must be None in a call that the backward pass makes again"):
        y.square().sum().backward()
    assert cache.used == 8


class Interrupt(ForwardSubstitution):
    def tolerances(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("short", [True, False], ids=["one-token", "three-tokens"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda layer: layer.out_proj.weight.data.fill_(torch.inf), ValueError),
        (lambda layer: layer.out_proj.register_forward_hook(interrupt), KeyboardInterrupt),
        (lambda layer: setattr(layer, "solver", Interrupt()), KeyboardInterrupt),
        (lambda layer: layer.W_K.weight.data.fill_(torch.nan), ValueError),
    ],
    ids=["overflow", "interrupted-after", "interrupted-within", "nan"],
)
def test_a_call_that_raises_leaves_the_cache_as_it_was(change, error, short):
    layer, x = make("alibi", 9)
    if short:
        layer, x = make("heads", 9)
        layer.out_proj = torch.nn.Linear(8, 8, bias=False, dtype=F64)
    right, cache, count = layer(x), layer.make_cache(2, 9), 1 if short else 3
    with torch.no_grad():
        layer(x[:, :6], cache=cache)
        broken = copy.deepcopy(layer)
        change(broken)
        for kind in ({}, {"need_weights": True}):
            with pytest.raises(error):
                broken(x[:, 6 : 6 + count], cache=cache, **kind)
        assert cache.used == 6
        close(torch.cat([layer(x[:, i : i + count], cache=cache) for i in range(6, 9, count)], 1), right[:, 6:])


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_missed_tolerance_that_raises_leaves_the_cache_as_it_was():
    layer = make_layer(8, 2, is_causal=True, solver=Anderson(max_steps=1), on_failure="raise")
    cache = layer.make_cache(1, 4)
    with pytest.raises(ConvergenceError):
        layer(torch.randn(1, 4, 8, dtype=F64), cache=cache)
    assert cache.used == 0


def test_an_append_that_is_interrupted_leaves_the_cache_as_it_was(monkeypatch):
    layer, x = make("heads", 6)
    cache = layer.make_cache(2, 9)
    hidden = torch.zeros(2, 3, dtype=torch.bool)
    hidden[0, 2] = True
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
        monkeypatch.setattr(DecodeCache, "_forget_trailing", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer(x[:, 3:], cache=cache, key_padding_mask=hidden)
        monkeypatch.undo()
        assert cache.used == 3
        close(layer(x[:, 3:], cache=cache), layer(x)[:, 3:])


def test_an_interrupted_append_leaves_no_padding_behind(monkeypatch):
    """The cache knows padding from before; what the interrupted call said of new tokens must not stay."""
    layer, x = make("heads", 6)
    hidden = torch.tensor([[True, False, False], [False, False, False]])
    caches = [layer.make_cache(2, 9) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            layer(x[:, :3], cache=cache, key_padding_mask=hidden)
        monkeypatch.setattr(DecodeCache, "_forget_trailing", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer(x[:, 3:], cache=caches[0], key_padding_mask=~hidden)
        monkeypatch.undo()
        found = [[layer(x[:, i : i + 1], cache=cache) for i in range(3, 6)] for cache in caches]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_reorder_and_reset():
    layer, x = make("qk_norm-rope", 7)
    cache = layer.make_cache(2, 7)
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        cache.reorder(torch.tensor([1, 1]))
        y = layer(x[1:, 4:].expand(2, -1, -1), cache=cache)
        close(y, layer(x[1:])[:, 4:].expand(2, -1, -1))
        cache.reset()
        close(layer(x, cache=cache), layer(x))


def test_reset_leaves_the_gradients_of_what_was_solved():
    """Its graph keeps the columns of the tokens before it."""
    layer, x = make("qk_norm-rope", 7)
    found = []
    for resets in (False, True):
        cache, leaf = layer.make_cache(2, 7), x[:, 4:].clone().requires_grad_()
        with torch.no_grad():
            layer(x[:, :4], cache=cache)
        y = layer(leaf, cache=cache)
        if resets:
            cache.reset()
            with torch.no_grad():
                layer(x.flip(1), cache=cache)
        found.append(torch.autograd.grad(y.sin().sum(), leaf)[0])
    assert torch.equal(*found)


def test_unbatched():
    layer, x = make("heads", 6, batch=1)
    cache = layer.make_cache(1, 6)
    with torch.no_grad():
        y = torch.cat([layer(x[0, :2], cache=cache), layer(x[0, 2:], cache=cache)])
        close(y, layer(x[0]))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    layer, x = make("heads", 4)
    cache = layer.make_cache(2, 5)
    layer(x, cache=cache)
    before = cache.column.clone()
    for bad, match in (
        (x, "capacity 8 or more"),
        (x[:1, :1], "batch size 1"),
        (x[:, :1].expand(2, 1, 8)[[0, 1, 0]], "batch size 3"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(bad, cache=cache)
    with pytest.raises(TypeError, match="`key_padding_mask` must be bool"):
        layer(x[:, :1], cache=cache, key_padding_mask=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 1\), .* It covers the new tokens"):
        layer(x[:, :1], cache=cache, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full_like(x[:, :1], torch.nan), cache=cache)
    assert cache.used == 4
    assert torch.equal(cache.column, before)
    bidirectional = ImplicitQueryAttention(8)
    with pytest.raises(ValueError, match="is_causal=True"):
        bidirectional.make_cache(1, 4)
    with pytest.raises(ValueError, match="is_causal=True"):
        bidirectional(torch.randn(1, 2, 8), cache=DecodeCache(1, 1, 8, 4))
    with pytest.raises(ValueError, match="number of value heads 2"):
        layer(x[:, :1], cache=DecodeCache(2, 1, 4, 9, dtype=F64))
    with pytest.raises(ValueError, match="float64"):
        layer(x[:, :1], cache=DecodeCache(2, 2, 4, 9))
    with pytest.raises(ValueError, match="`capacity`"):
        DecodeCache(1, 1, 1, 0)


def test_a_layer_without_numbers_makes_no_cache():
    layer = ImplicitQueryAttention(8, is_causal=True, device="meta")
    with pytest.raises(ValueError, match=r"holds numbers, but got one on the meta device. .*to_empty"):
        layer.make_cache(1, 4)
