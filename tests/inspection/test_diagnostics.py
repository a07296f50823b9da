"""The two stability figures against brute force: the whole Jacobian, and every pair of values."""

import pytest
import torch

from implicit_attention import Anderson, ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.inspection import diagnostics
from tests.bridge import make_layer

D, H = 8, 2


def make(seed=0, gain=1.0, **options):
    torch.manual_seed(seed)
    layer = ImplicitQueryAttention(D, H, solver=Anderson(max_steps=1000), dtype=torch.float64, **options)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(gain)
    return layer, torch.randn(3, 6, D, dtype=torch.float64)


def radii_by_brute_force(layer, x, **inputs):
    """The eigenvalues of the full Jacobian of each sample `[B]`, or of each token `[B, N]`."""
    y = layer.solve(x, **inputs).value.detach()
    function, args, _ = layer.equation(x, **inputs)
    jacobian = torch.autograd.functional.jacobian(lambda t: function(t, *args), y)  # [B, N, D, B, N, D]
    B, N, _ = y.shape
    if layer.normalize_over == "keys":
        blocks = [jacobian[b, n, :, b, n] for b in range(B) for n in range(N)]
        return torch.stack([torch.linalg.eigvals(j).abs().max() for j in blocks]).reshape(B, N)
    blocks = [jacobian[b, :, :, b].reshape(N * D, N * D) for b in range(B)]
    return torch.stack([torch.linalg.eigvals(j).abs().max() for j in blocks])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "positions": "rope"},
        {"is_causal": True},
        {"normalize_over": "keys"},
    ],
    ids=["seed", "qk_norm-rope", "causal", "keys"],
)
def test_spectral_radius_is_that_of_the_whole_jacobian(options):
    layer, x = make(gain=3.0, **options)
    expected = radii_by_brute_force(layer, x)
    found = diagnostics.spectral_radius(layer, x, **({} if layer.triangular else {"iterations": 4000}))
    assert found.shape == expected.shape
    # The geometric mean over the last half of the iterations leaves O(1 / iterations) of the start.
    torch.testing.assert_close(found, expected, rtol=1e-8 if layer.triangular else 5e-3, atol=1e-6)


CAUSAL = {
    "one-head": {"num_heads": 1},
    "qk_norm-rope": {"num_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True},
    "relative-bias": {"num_heads": 2, "positions": "relative", "bias": True},
    "groups-window": {"num_heads": 4, "num_kv_heads": 2, "window": 3},
    "input": {"num_heads": 2, "self_query": "input"},
}


@pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)
def test_gains_of_rows_are_exact_and_differentiable(options):
    layer = make_layer(D, is_causal=True, gain=3.0, solver=ForwardSubstitution(rtol=1e-14, atol=1e-13), **options)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, :2] = True
    solution = layer.solve(x, key_padding_mask=hidden, gains=True)
    function, args, _ = layer.equation(x, key_padding_mask=hidden)
    y = solution.value.detach()
    jacobian = torch.autograd.functional.jacobian(lambda t: function(t, *args), y)
    for b in range(2):
        for i in range(5):
            expected = torch.linalg.eigvals(jacobian[b, i, :, b, i]).abs().max()
            torch.testing.assert_close(solution.gain[b, i], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(diagnostics.row_gains(layer, x, key_padding_mask=hidden), solution.gain)
    torch.testing.assert_close(solution.stats["sradius"], solution.gain)
    module = _Gains(layer)
    parameters = dict(module.named_parameters())

    def gains(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x, hidden))

    if layer.self_query == "output":
        leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters.values())]
        assert torch.autograd.gradcheck(gains, leaves, fast_mode=True, atol=1e-6)


class _Gains(torch.nn.Module):
    """The layer's gains, as a function of its parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, hidden):
        return diagnostics.row_gains(self.layer, x, key_padding_mask=hidden)


def test_the_penalty_keeps_gains_below_its_limit():
    layer = make_layer(D, 2, is_causal=True, gain=8.0, solver="auto", on_failure="warn")
    x = torch.randn(4, 8, D, dtype=torch.float64)
    before = layer.solve(x, gains=True).gain.max().item()
    assert before > 0.5
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        penalty = diagnostics.gain_penalty(layer, x, limit=0.3)
        penalty.backward()
        optimizer.step()
    assert layer.solve(x, gains=True).gain.max().item() < 0.6 * before
    assert diagnostics.gain_penalty(layer, x, limit=1e6).item() == 0.0


def test_spectral_radius_takes_masks_and_leaves_the_random_state_alone():
    layer, x = make(gain=3.0)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[:, 4:] = True
    state = torch.get_rng_state()
    found = diagnostics.spectral_radius(layer, x, iterations=2000, key_padding_mask=hidden)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, radii_by_brute_force(layer, x, key_padding_mask=hidden), rtol=5e-3, atol=1e-6)


def test_a_map_with_explicit_diagonal_has_radius_zero():
    layer, x = make(is_causal=True, self_query="input", gain=5.0)
    assert torch.equal(diagnostics.spectral_radius(layer, x), torch.zeros(3, dtype=torch.float64))


def bound_by_brute_force(layer, x):
    by_keys = layer.normalize_over == "keys"
    bounds = []
    for tokens in x:
        key, value = tokens @ layer.W_K.weight.T, tokens @ layer.Omega_V.weight.T
        squares = torch.zeros(H, len(tokens), dtype=x.dtype)
        for h in range(H):
            part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            radius = max((v - value[:, part].mean(0)).norm() for v in value[:, part])
            own = key[:, part] - key[:, part].mean(0) if by_keys else key[:, part]
            squares[h] = (layer.scale * (own @ layer.Omega_Q.weight[part]).norm(dim=-1) * radius) ** 2
        bounds.append(squares.amax(-1).sum().sqrt() if by_keys else squares.sum(0).max().sqrt())
    return torch.stack(bounds)


@pytest.mark.parametrize("normalize_over", ["queries", "keys"])
def test_contraction_bound(normalize_over):
    layer, x = make(normalize_over=normalize_over)
    torch.testing.assert_close(diagnostics.contraction_bound(layer, x), bound_by_brute_force(layer, x))


def test_values_that_read_outputs():
    """Gains are 0 and the radius too; a bound that holds for all outputs would say nothing."""
    layer = make_layer(D, 2, is_causal=True, self_query="input", values="feedback", solver=ForwardSubstitution())
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.nn.init.normal_(layer.Psi_V.weight)
    assert not diagnostics.row_gains(layer, x).any()
    assert not diagnostics.spectral_radius(layer, x).any()
    with pytest.raises(ValueError, match="values read no outputs"):
        diagnostics.contraction_bound(layer, x)


def test_an_empty_batch_has_no_figures():
    layer = ImplicitQueryAttention.for_encoder(16, 4)
    for found in (
        *diagnostics.contraction(layer, torch.randn(0, 5, 16)),
        diagnostics.spectral_radius(layer, torch.randn(0, 5, 16)),
    ):
        assert found.shape == (0,)


def test_contraction_bound_with_one_head_where_the_weight_is_absorbed():
    torch.manual_seed(1)
    layer, x = ImplicitQueryAttention(D), torch.randn(2, 5, D)
    key, value = layer.W_K(x), layer.Omega_V(x)
    size = (key @ layer.Omega_Q.weight).norm(dim=-1).amax(-1)
    expected = layer.scale * size * (value - value.mean(1, keepdim=True)).norm(dim=-1).amax(-1)
    torch.testing.assert_close(diagnostics.contraction_bound(layer, x), expected)


@pytest.mark.parametrize("normalize_over", ["queries", "keys"])
def test_contraction_says_what_max_gain_does_and_what_is_measured(normalize_over):
    layer, x = make(gain=20.0, normalize_over=normalize_over, query_input=True, max_gain=0.5)
    found = diagnostics.contraction(layer, x)
    torch.testing.assert_close(found.bound, bound_by_brute_force(layer, x))
    torch.testing.assert_close(found.factor, 0.5 / found.bound)
    torch.testing.assert_close(diagnostics.contraction_bound(layer, x), torch.full_like(found.bound, 0.5))
    assert (found.radius < 0.5).all()
    assert (diagnostics.spectral_radius(layer, x).reshape(3, -1).amax(1) == found.radius).all()
    layer.max_gain = None
    layer.Omega_Q.weight.data.mul_(0.02)
    assert (diagnostics.contraction(layer, x).factor == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"query_input": True, "positions": "alibi"},
        {"positions": "rope"},
        {"normalize_over": "keys"},
        {"normalize_over": "keys", "positions": "rope"},
    ],
    ids=["seed", "causal", "query_input-alibi", "rope", "keys", "keys-rope"],
)
def test_the_bound_bounds_the_map_between_any_two_points(options):
    layer, x = make(gain=4.0, **options)
    function, args, start = layer.equation(x)
    bound = diagnostics.contraction_bound(layer, x)
    for size in (1e-3, 1.0):
        a = torch.randn_like(start)
        b = a + size * torch.randn_like(start)
        change = (function(a, *args) - function(b, *args)).norm(dim=-1).amax(-1)
        assert (change <= bound * (a - b).norm(dim=-1).amax(-1)).all()
    radius = diagnostics.spectral_radius(layer, x, **({} if layer.triangular else {"iterations": 500}))
    assert (radius.reshape(3, -1).amax(-1) <= bound * 1.01).all()


def test_unbatched_input_is_a_batch_of_one():
    layer, x = make()
    assert diagnostics.spectral_radius(layer, x[0]).shape == (1,)
    assert diagnostics.contraction_bound(layer, x[0]).shape == (1,)


def test_refusals():
    layer, x = make(qk_norm=True)
    with pytest.raises(ValueError, match=r"`layer` must be one whose queries are affine in y.*spectral_radius"):
        diagnostics.contraction_bound(layer, x)
    layer, x = make(dropout=0.1)
    with pytest.raises(ValueError, match=r"eval mode"):
        diagnostics.spectral_radius(layer, x)
    assert torch.isfinite(diagnostics.spectral_radius(layer.eval(), x)).all()
    with pytest.raises(ValueError, match="`iterations`"):
        diagnostics.spectral_radius(layer, x, iterations=0)
    causal, _ = make(is_causal=True)
    with pytest.raises(ValueError, match=r"`iterations` must be None for a causal layer"):
        diagnostics.spectral_radius(causal, x, iterations=5)
    with pytest.raises(ValueError, match=r"`layer`.*is_causal"):
        diagnostics.row_gains(layer, x)
    with pytest.raises(ValueError, match=r"`gains`"):
        layer.solve(x, gains=True)


@pytest.mark.parametrize("figure", [diagnostics.row_gains, diagnostics.gain_penalty, diagnostics.spectral_radius])
def test_figures_refuse_a_cache_and_leave_it_as_it_was(figure):
    layer = make_layer(8, is_causal=True, num_heads=2)
    x, cache = torch.randn(1, 6, 8, dtype=torch.float64), layer.make_cache(1, 12)
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"`cache` must be None for this figure.*Pass all tokens"):
        figure(layer, x[:, 3:], cache=cache)
    assert cache.used == 3


def test_a_sample_alone_takes_masks_without_a_batch():
    layer = make_layer(8, is_causal=True, num_heads=2)
    x, hidden = torch.randn(6, 8, dtype=torch.float64), torch.tensor([False] * 5 + [True])
    batched = {"key_padding_mask": hidden[None]}
    for figure in (diagnostics.row_gains, diagnostics.spectral_radius):
        assert torch.equal(figure(layer, x, key_padding_mask=hidden), figure(layer, x[None], **batched))


def test_an_empty_batch_has_gains_too():
    layer = make_layer(8, is_causal=True, num_heads=2)
    x = torch.zeros(0, 4, 8, dtype=torch.float64)
    assert layer.solve(x, gains=True).gain.shape == (0, 4)
    assert layer(x, need_solution=True, gains=True)[2].gain.shape == (0, 4)
    assert diagnostics.spectral_radius(layer, x).shape == (0,)
