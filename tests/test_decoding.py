"""The short way of a decode step against the solver: same root, same cache, and away where it does not serve.

With `gains=True` a layer takes the long way.
"""

import pytest
import torch

from implicit_attention import Anderson, ForwardSubstitution, ImplicitQueryAttention
from tests.bridge import decoded, make_layer

EXACT = ForwardSubstitution(rtol=1e-13, atol=1e-13)
LAYERS = {
    "heads": {"num_heads": 4},
    "qk_norm-rope": {"num_heads": 4, "qk_norm": True, "positions": "rope"},
    "one-head-qk_norm": {"num_heads": 1, "qk_norm": True},
    "query_input": {"num_heads": 2, "query_input": True, "bias": True},
    "bias": {"num_heads": 2, "bias": True, "qk_norm": True},
    "groups": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "positions": "rope"},
    "groups-of-four": {"num_heads": 4, "num_kv_heads": 1},
    "window": {"num_heads": 2, "window": 3, "positions": "rope"},
    "narrow-window": {"num_heads": 2, "window": 2},
    "identity": {"num_heads": 2, "values": "identity", "scale": 0.2},
}
FEEDBACK = {"self_query": "input", "values": "feedback", "query_input": True}
LAYERS |= {
    "feedback": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "positions": "rope"} | FEEDBACK,
    "feedback-one-head": {"num_heads": 1} | FEEDBACK,
    "feedback-only-values": {"num_heads": 2, "query_output": False, "window": 3, "bias": True} | FEEDBACK,
}
LAYERS |= {
    f"input-{name}": options | {"self_query": "input"}
    for name, options in LAYERS.items()
    if "self_query" not in options
}


def cached(layer, x, padding=None):
    cache = layer.make_cache(len(x), x.shape[1] + 1)
    layer.solve(x, cache=cache, key_padding_mask=padding)
    return cache


def case(name, batch=3, n=9, seed=0, **more):
    layer = make_layer(16, is_causal=True, seed=seed, **({"solver": EXACT} | LAYERS[name] | more))
    generator = torch.Generator().manual_seed(seed)
    return layer, torch.randn(batch, n + 1, 16, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_decoded_is_what_the_solver_finds(name, padded):
    layer, x = case(name)
    padding = None
    if padded:  # on the left, as generation does it
        padding = torch.zeros(3, 9, dtype=torch.bool)
        padding[1, :4], padding[2] = True, True
    short, long = cached(layer, x[:, :-1], padding), cached(layer, x[:, :-1], padding)
    found, expected = decoded(layer, x[:, -1:], short), layer.solve(x[:, -1:], cache=long, gains=True)
    assert found is not None
    assert float(found.residual.max()) <= 1e-12
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-11)
    for held, wanted in zip(short.past(), long.past(), strict=True):
        torch.testing.assert_close(held, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gain", [10.0, 30.0, 100.0])
@torch.no_grad()
def test_of_several_roots_the_same_one_and_hard_tokens_are_left_to_the_solver(gain):
    """Strong weights: equations with several roots, of which Picard's steps from y = v may not halve."""
    taken = 0
    for seed in range(60):
        layer, x = case("heads", batch=1, n=3, seed=seed, gain=gain, solver=ForwardSubstitution())
        short, long = cached(layer, x[:, :-1]), cached(layer, x[:, :-1])
        found = decoded(layer, x[:, -1:], short)
        if found is None:
            assert short.used == 3
            continue
        taken += 1
        expected = layer.solve(x[:, -1:], cache=long, gains=True).value
        torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-7)
    assert 0 < taken < 60


@torch.no_grad()
def test_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        layer, x = case("qk_norm-rope", solver=ForwardSubstitution())
        layer, x = layer.to(dtype), x.to(dtype)
        short, long = cached(layer, x[:, :-1]), cached(layer, x[:, :-1])
        found, expected = decoded(layer, x[:, -1:], short), layer.solve(x[:, -1:], cache=long, gains=True)
        assert found.value.dtype == dtype
        torch.testing.assert_close(found.value, expected.value, rtol=0, atol=tolerance)
        torch.testing.assert_close(short.past().column, long.past().column, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_heads": 1}, "one head: keys hold Omega_Q"),
        ({"num_heads": 2, "positions": "alibi"}, "a bias"),
        ({"num_heads": 2, "window": 1}, "no column before"),
        ({"num_heads": 2, "normalize_over": "keys", "solver": Anderson(), "query_input": True}, "rows are queries"),
        ({"num_heads": 2, "solver": Anderson()}, "another solver was asked for"),
    ],
)
@torch.no_grad()
def test_layers_it_does_not_serve(options, reason):
    layer = ImplicitQueryAttention(8, is_causal=True, on_failure="ignore", **options)
    x = torch.randn(1, 4, 8)
    assert decoded(layer, x[:, -1:], cached(layer, x[:, :-1])) is None, reason


def test_calls_it_does_not_serve():
    layer, x = case("heads")
    cache = cached(layer, x[:, :-1])
    assert decoded(layer, x[:, -1:], cache) is None, "gradients are wanted"
    with torch.no_grad():
        roomy = layer.make_cache(3, 20)
        layer(x[:, :-2], cache=roomy)
        assert decoded(layer, x[:, -2:], roomy) is None, "two tokens"
        assert decoded(layer, x[:, -1:], layer.make_cache(3, 5)) is None, "nothing is cached"
        layer.dropout = 0.1
        assert decoded(layer.train(), x[:, -1:], cache) is None, "dropout"


@torch.no_grad()
def test_what_is_not_finite_is_left_to_the_solver_which_says_so():
    for name in ("heads", "input-heads"):
        layer, x = case(name)
        cache = cached(layer, x[:, :-1])
        x[1, -1, 0] = torch.nan
        assert decoded(layer, x[:, -1:], cache) is None
        with pytest.raises(ValueError, match="`x` holds"):
            layer.solve(x[:, -1:], cache=cache)
