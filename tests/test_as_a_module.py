"""A layer where modules go: the meta device, copies and pickles, empty batches, compilation, nested inputs."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from implicit_attention import (
    ALiBi,
    Anderson,
    ImplicitQueryAttention,
    ImplicitQueryAttentionLinearV,
    Picard,
    fixed_point,
    inspect,
)
from implicit_attention.causal import self_test
from tests.bridge import make_layer

LAYERS = {
    "causal": {"is_causal": True},
    "everything": {"is_causal": True, "qk_norm": True, "query_input": True, "bias": True, "positions": "relative",
                   "out_proj": True},
    "bidirectional": {},
    "keys": {"normalize_over": "keys", "query_input": True},
    "input": {"is_causal": True, "self_query": "input"},
    "unrolled": {"is_causal": True, "adjoint": "unrolled"},
    "phantom": {"is_causal": True, "adjoint": "phantom"},
    "one-step": {"is_causal": True, "adjoint": "unrolled", "solver": Anderson(max_steps=1)},
    "dropout": {"is_causal": True, "dropout": 0.5},
    "identity": {"is_causal": True, "values": "identity"},
    "feedback": {"is_causal": True, "self_query": "input", "values": "feedback"},
}  # fmt: skip


def make(name, heads=2, **options):
    torch.manual_seed(0)
    return ImplicitQueryAttention(8, heads, **(LAYERS[name] | {"on_failure": "ignore"} | options))


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12])
def test_slopes_are_those_of_the_paper(heads):
    power = 2 ** (heads.bit_length() - 1)
    right = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    right += [2 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
    assert torch.equal(ALiBi(heads).slopes, torch.tensor(right))


@pytest.mark.parametrize("positions", ["alibi", "relative", "rope", None])
@pytest.mark.parametrize("assign", [False, True])
def test_from_the_meta_device(positions, assign):
    """Nothing that a layer needs is lost there: a buffer that no state dict holds would be."""
    right = make("causal", positions=positions, dtype=torch.float64)
    with torch.device("meta"):
        layer = make("causal", positions=positions, dtype=torch.float64)
    assert not list(layer.buffers())
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(right.state_dict(), assign=assign)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.equal(layer(x), right(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "given", [{}, {"segments": torch.arange(60).div(11, rounding_mode="floor").expand(2, -1)}, None]
)
def test_the_default_device_is_for_new_layers(name, given):
    """What a layer makes for itself is where the layer is: the kernels take addresses."""
    layer = make(name, dtype=torch.float64, **({} if name == "keys" else {"positions": "rope"}))

    def found():
        torch.manual_seed(3)
        x = torch.randn(2, 60, 8, dtype=torch.float64, device="cpu", requires_grad=True)
        if given is None:
            return list(layer(x, need_weights=True))
        y = layer(x, **given)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    right = found()
    with torch.device("meta"):
        tried = found()
    assert all(torch.equal(a, b) for a, b in zip(tried, right, strict=True))


def test_the_default_device_does_not_reach_checks():
    layer, x = make("causal"), torch.randn(5, 8)
    with torch.device("meta"):
        _, args, grad = self_test._problem(5, torch.device("cpu"))
        report = inspect(layer, x)
    assert {t.device.type for t in (*args, grad, report.layers[0].residual)} == {"cpu"}


def test_no_solve_on_the_meta_device():
    layer = make("causal").to("meta")
    with pytest.raises(ValueError, match="`x` must be on a device that holds numbers"):
        layer(torch.zeros(2, 3, 8, device="meta"))


def test_a_pickle_with_slopes_in_a_buffer_still_loads():
    old = ALiBi(4)
    vars(old)["_buffers"]["slopes"] = torch.zeros(4)
    del old.num_heads
    assert torch.equal(pickle.loads(pickle.dumps(old)).slopes, ALiBi(4).slopes)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_layers_of_their_own(name):
    layer = make(name).eval()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 5, 8)
    for other in (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert other.settings == layer.settings
        assert other.num_heads == 2
        assert other.on_failure == "ignore"
        assert torch.equal(other(x), layer(x))
        other.scale = 0.1  # a setting that can change
        assert (other.scale, layer.scale) == (0.1, 0.5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zeros(name, compiled):
    """So that all processes of a data-parallel run have the same gradients to exchange."""
    layer = make(name)
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.zeros(0, 5, 8, requires_grad=True)
    y = call(x)
    assert y.shape == (0, 5, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any()
    with torch.no_grad():
        assert call(x).shape == (0, 5, 8)


def test_an_empty_batch_of_fixed_point():
    a = torch.ones(3, requires_grad=True)
    fixed_point(lambda y, a: a * y, torch.zeros(0, 3), (a,)).value.sum().backward()
    assert not a.grad.any()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_can_be_changed_in_place(name, heads):
    layer, found = make(name, heads).eval(), []
    for change in (False, True):
        x = torch.linspace(-1, 1, 80).view(2, 5, 8).requires_grad_()
        for y in (layer(x), layer.solve(x).value):
            if change:
                y += x
                y *= 2
            else:
                y = 2 * (y + x)
            found.append(torch.autograd.grad(y.sin().sum(), x)[0])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler looks at `.grad` where a graph breaks
@pytest.mark.parametrize("name", ["causal", "bidirectional", "everything", "keys"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
def test_compiled_layers_refuse_what_is_not_finite(name, value, gradient):
    layer, x = make(name), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager")
    with torch.set_grad_enabled(gradient):
        call(x)
        x[1, 2, 3] = value
        for one in (layer, call):
            with pytest.raises(ValueError, match="NaN or Inf"):
                one(x)


def test_a_compiled_projection_that_overflows_is_refused():
    layer, x = make("everything"), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        layer.out_proj.weight.fill_(3e38)
        for one in (layer, call):
            with pytest.raises(ValueError, match="The output of `out_proj` overflows"):
                one(x)


def test_an_exported_layer_refuses_what_is_not_finite():
    layer, x = make("everything"), torch.randn(2, 5, 8)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    with pytest.raises(ValueError, match="NaN or Inf"):
        exported(torch.full_like(x, torch.nan))


def test_an_exported_layer_refuses_second_derivatives():
    layer, x = make("everything").double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(layer, (x.detach(),)).module()
    (first,) = torch.autograd.grad(exported(x).sin().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(layer(x).sin().sum(), x)
    torch.testing.assert_close(first.detach(), expected, rtol=1e-6, atol=1e-8)
    with pytest.raises(NotImplementedError, match=r"the operator of an exported layer, .* before torch\.export"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.filterwarnings("ignore::UserWarning")  # a prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    for layer in (make("causal"), ImplicitQueryAttentionLinearV(8)):
        with pytest.raises(TypeError, match=r"`x` must be a dense tensor .*x\.to_padded_tensor"):
            layer(x)
    with pytest.raises(TypeError, match="`x` must be a dense tensor"):
        make("causal")(torch.randn(2, 5, 8).to_sparse())


def test_weights_that_are_shared_or_tied():
    """Maps that are one module get the gradient of both."""
    layer = make_layer(8, 2, is_causal=True, qk_norm=True)
    layer.W_K = layer.Omega_Q
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.sin().sum(), layer.W_K.weight)
    step = torch.randn_like(grad)
    with torch.no_grad():
        values = []
        for h in (1e-6, -1e-6):
            layer.W_K.weight.add_(step, alpha=h)
            values.append(layer(x).sin().sum())
            layer.W_K.weight.add_(step, alpha=-h)
    torch.testing.assert_close((grad * step).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


CHECKPOINTED = {
    "no-mask": {"query_input": True},
    "keys": {"normalize_over": "keys", "is_causal": True, "query_input": True},
    "picard": {"is_causal": True, "solver": Picard()},
    "max_gain": {"query_input": True, "max_gain": 0.9},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("options", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing_solves_once_more(options, reentrant):
    """Whatever a backward pass asks of the graph: checkpointing must not be asked once for each of its products."""
    layer, solves = ImplicitQueryAttention(16, num_heads=2, out_proj=True, **options), []
    x = torch.randn(2, 9, 16, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    layer.register_forward_pre_hook(lambda *called: solves.append(called))
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert len(solves) == 2
    for found, one in zip([x.grad, *(p.grad for p in layer.parameters())], wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)
