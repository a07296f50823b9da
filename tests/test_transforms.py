"""The layer under `torch.func`: grad, jacrev, vmap, and gradients per sample."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vjp, vmap

from implicit_attention import Anderson, ImplicitQueryAttention, NewtonKrylov, Unrolled, fixed_point
from tests.bridge import array, close, make_layer

TOL = 1e-10  # both sides are solved to 1e-13
LAYERS = {
    "query_input": {"query_input": True},
    "causal-qk_norm": {"is_causal": True, "num_heads": 2, "qk_norm": True},
    "causal-input": {"is_causal": True, "num_heads": 2, "self_query": "input"},
    "keys-rope": {"normalize_over": "keys", "num_heads": 2, "query_input": True, "positions": "rope"},
    "relative": {"num_heads": 2, "positions": "relative"},
    "feedback": {"is_causal": True, "num_heads": 2, "self_query": "input", "values": "feedback", "positions": "rope"},
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def make(options, B=3, N=4):
    layer = make_layer(4, **{"gain": 0.5} | options)
    return layer, torch.randn(B, N, 4, dtype=torch.float64), dict(layer.named_parameters())


def backward(layer, x):
    """Gradients of a scalar in x and in all parameters, by plain autograd."""
    x = x.detach().requires_grad_()
    found = torch.autograd.grad(layer(x).sin().sum(), [x, *layer.parameters()])
    return found[0], dict(zip(dict(layer.named_parameters()), found[1:], strict=True))


@each_layer
def test_grad(options):
    layer, x, parameters = make(options)
    found = grad(lambda p, x: functional_call(layer, p, (x,)).sin().sum(), argnums=(0, 1))(parameters, x)
    by_x, by_name = backward(layer, x)
    close(found[1], array(by_x), TOL)
    for name, expected in by_name.items():
        close(found[0][name], array(expected), TOL)


@each_layer
def test_jacrev(options):
    layer, x, _ = make(options, B=1, N=3)
    found = jacrev(layer)(x)
    close(found, array(torch.autograd.functional.jacobian(layer, x)), TOL)


@each_layer
def test_vmap(options):
    layer, x, _ = make(options)
    close(vmap(layer)(x), array(layer(x)), TOL)
    stacked = torch.stack([x, 0.5 * x], 1)  # mapped in the middle
    found = vmap(layer, in_dims=1, out_dims=1)(stacked)
    close(found, array(torch.stack([layer(x), layer(0.5 * x)], 1)), TOL)


@each_layer
def test_gradients_per_sample(options):
    layer, x, parameters = make(options)

    def loss(p, x):
        return functional_call(layer, p, (x,)).sin().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        _, expected = backward(layer, x[i])
        for name, g in expected.items():
            close(found[name][i], array(g), TOL)


def test_ensembles_map_over_parameters():
    layers = [make_layer(4, 2, gain=0.5, seed=i, positions="relative") for i in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    found = vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
    close(found, array(torch.stack([layer(x) for layer in layers])), TOL)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"max_gain": 0.5}], ids=["causal", "gain"])
def test_vmap_over_nothing_is_refused(options):
    layer = ImplicitQueryAttention(8, 2, query_input=True, **options)
    with pytest.raises(ValueError, match="at least one"):
        vmap(layer)(torch.randn(0, 3, 8))


def test_vmap_names_the_input_that_is_not_finite():
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(3, 2, 4, 8)
    x[1, 0, 2, 5] = float("nan")
    with pytest.raises(ValueError, match="`x` holds 1 NaN or Inf of 192 entries"):
        vmap(layer)(x)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"query_input": True, "max_gain": 0.9}, {"query_input": True}], ids=str
)
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_gradients_by_sample_with_masks_of_their_own(options, name):
    layer, x = ImplicitQueryAttention(8, 2, dtype=torch.float64, **options), torch.randn(3, 4, 8, dtype=torch.float64)
    masks = (
        torch.zeros(3, 4, dtype=torch.bool) if name == "key_padding_mask" else torch.zeros(3, 4, 4, dtype=torch.bool)
    )
    masks[1, ..., 3] = masks[2, ..., 1] = True

    def loss(x, mask):
        return layer(x, **{name: mask}).square().sum()

    found = vmap(grad(loss))(x, masks)
    close(found, array(torch.stack([grad(loss)(*given) for given in zip(x, masks, strict=True)])), TOL)


def test_masks_under_vmap():
    layer, x, _ = make({"num_heads": 2})
    padding = torch.rand(3, 4) < 0.4
    found = vmap(lambda x, m: layer(x, key_padding_mask=m))(x, padding)
    close(found, array(layer(x, key_padding_mask=padding)), TOL)


def test_nested_maps():
    layer, x, _ = make({})
    doubled = torch.stack([x, 2 * x])
    close(vmap(vmap(layer))(doubled), array(torch.stack([layer(x), layer(2 * x)])), TOL)


def test_vjp():
    layer, x, _ = make({}, B=1, N=2)
    out, pull = vjp(layer, x)
    close(pull(torch.ones_like(out))[0], array(torch.autograd.functional.vjp(layer, x, torch.ones_like(out))[1]), TOL)


@pytest.mark.parametrize(
    "options", [{"query_input": True}, {"is_causal": True, "num_heads": 2}], ids=["seed", "causal"]
)
def test_reverse_over_reverse(options):
    layer, x, _ = make(options, B=1, N=2)

    def loss(x):
        return layer(x).sin().sum()

    close(jacrev(jacrev(loss))(x), array(torch.autograd.functional.hessian(loss, x)), TOL)
    close(jacrev(grad(loss))(x), array(torch.autograd.functional.hessian(loss, x)), TOL)


@pytest.mark.parametrize("solver", [Anderson(rtol=1e-13), NewtonKrylov(rtol=1e-13)], ids=["anderson", "newton"])
def test_fixed_point_under_transforms(solver):
    """`y = a y + 1`: y = 1 / (1 - a), and its derivatives."""

    def solve(a):
        y0 = torch.zeros(1, 1, dtype=torch.float64)
        return fixed_point(lambda y, a: a * y + 1, y0, (a,), solver=solver).value[0, 0]

    a = torch.tensor([0.5, -3.0, 2.0], dtype=torch.float64)
    close(vmap(solve)(a), array(1 / (1 - a)), TOL)
    close(vmap(grad(solve))(a), array((1 - a) ** -2), TOL)
    close(vmap(grad(grad(solve)))(a), array(2 * (1 - a) ** -3), TOL)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"query_input": True}], ids=["direct", "iterative"])
def test_derivatives_that_a_solve_cannot_give_are_refused_by_name(options):
    layer, x = ImplicitQueryAttention(8, 2, **options, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* Use reverse mode"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"vectorize=True.* Use torch.func.jacrev"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), expected)


def test_an_unrolled_solve_has_forward_mode_derivatives():
    layer = ImplicitQueryAttention(8, 2, query_input=True, adjoint=Unrolled(), dtype=torch.float64)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), torch.func.jacrev(layer)(x))


def test_forward_mode_of_an_unrolled_layer_with_norms():
    """What the refusal of forward mode recommends has to work, with everything that the layer norms."""
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(
        8, 2, is_causal=True, self_query="input", qk_norm=True, adjoint=Unrolled(), dtype=torch.float64
    )
    x, direction = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    step = 1e-6 * direction
    expected = (layer(x + step) - layer(x - step)) / 2e-6
    torch.testing.assert_close(tangent, expected.detach(), atol=1e-6, rtol=1e-6)


MIXED = {
    "vmap": lambda layer, x: vmap(layer)(x[:, None]).sin().sum(),
    "vmap over weights": lambda layer, x: vmap(
        lambda p, x: functional_call(layer, p, (x,)), in_dims=(0, None)
    )({name: p[None] for name, p in layer.named_parameters()}, x).sin().sum(),
    "grad": lambda layer, x: grad(lambda t: layer(t).sin().sum())(x).square().sum(),
    "jacrev": lambda layer, x: jacrev(layer)(x[:1]).square().sum(),
    "vjp": lambda layer, x: vjp(layer, x)[0].sin().sum(),
}  # fmt: skip


def gradient(layer, x):
    """`grad` by autograd alone."""
    return torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]


PLAIN = {
    "vmap": lambda layer, x: layer(x).sin().sum(),
    "vmap over weights": lambda layer, x: layer(x).sin().sum(),
    "grad": lambda layer, x: gradient(layer, x).square().sum(),
    "jacrev": lambda layer, x: torch.autograd.functional.jacobian(layer, x[:1], create_graph=True).square().sum(),
    "vjp": lambda layer, x: layer(x).sin().sum(),
}


@each_layer
@pytest.mark.parametrize("kind", MIXED)
def test_autograd_through_a_transform_finds_every_gradient(options, kind):
    """A level of torch.func hides from the layer what autograd outside of it needs."""
    layer, x, _ = make(options, B=2, N=3)
    x.requires_grad_()
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(PLAIN[kind](layer, x), wanted, allow_unused=True)
    found = torch.autograd.grad(MIXED[kind](layer, x), wanted, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, array(other), 1e-8)  # second derivatives are sums of products of two solves


def test_a_phantom_gradient_stays_one_below_a_transform():
    """`func.grad` of a recorded step is differentiated by autograd; the solve before it is not."""
    layer = make_layer(4, is_causal=True, num_heads=2, adjoint="phantom")
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(MIXED["grad"](layer, x), [*layer.parameters()])
    expected = torch.autograd.grad(PLAIN["grad"](layer, x), [*layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        close(one, array(other), TOL)


@pytest.mark.parametrize(
    "transform", [grad, jacrev, lambda f: lambda a: vmap(f)(a[None]).sum()], ids=["grad", "jacrev", "vmap"]
)
def test_a_closure_under_a_transform_is_refused(transform):
    """Its gradient would be zero."""
    closed = transform(lambda a: fixed_point(lambda y: torch.cos(a * y), torch.zeros(1, 1)).value.sum())
    with pytest.raises(ValueError, match=r"closes over a tensor of a torch.func transform"):
        closed(torch.tensor(0.5))
    right = transform(lambda a: fixed_point(lambda y, a: torch.cos(a * y), torch.zeros(1, 1), (a,)).value.sum())
    right(torch.tensor(0.5))
