"""Layers with `max_gain` under torch.compile(fullgraph=True) and torch.export: same values, gradients and reports."""

import io

import pytest
import torch

from implicit_attention import Contraction, ConvergenceError, ImplicitQueryAttention

LAYERS = {
    "encoder": {"positions": "rope"},
    "groups-relative": {"num_kv_heads": 2, "positions": "relative", "bias": True},
    "keys": {"normalize_over": "keys", "num_kv_heads": 2},
    "steps": {"solver": Contraction(steps=12)},
    "no-query-input": {"query_input": False},
}


def make(**options):
    torch.manual_seed(0)
    layer = ImplicitQueryAttention(16, 4, **{"query_input": True, "max_gain": 0.9, "dtype": torch.float64} | options)
    return layer, torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_compiles_as_a_whole(options):
    layer, x = make(**options)
    layer._report.on_failure = "ignore"  # four steps do not reach the tolerance of float64
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden, found = torch.zeros(2, 9, dtype=torch.bool), []
    hidden[0, :3] = True
    inputs = {"key_padding_mask": hidden} if "solver" in options else {"attn_mask": torch.randn(9, 9).double()}
    for call in (layer, compiled):
        y = call(x, **inputs)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "max_gain": None}], ids=["encoder", "causal"])
def test_compiles_after_a_setting_changed(options):
    """What settings keep must be there before the graph: the lock of a first read cannot be in it."""
    layer, x = make(**options)
    layer.dropout = 0.1
    layer.eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_solution_comes_through():
    layer, x = make()
    found, expected = torch.compile(layer.solve, fullgraph=True, backend="aot_eager")(x), layer.solve(x)
    assert found.unique
    for name in ("steps", "converged"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.residual, expected.residual)


def test_compiles_with_dropout_and_other_lengths():
    layer, x = make(dropout=0.2)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), x.detach()
    for n in (9, 6):
        assert bool(torch.isfinite(compiled(x[:, :n])).all())
    layer.eval()
    for n in (9, 6):
        torch.testing.assert_close(compiled(x[:, :n]), layer(x[:, :n]), rtol=1e-11, atol=1e-11)


def test_export():
    layer, x = make()
    lengths = {"x": {1: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(layer.eval(), (x.detach(),), dynamic_shapes=lengths)
    for n in (9, 5):
        torch.testing.assert_close(program.module()(x[:, :n].detach()), layer(x[:, :n]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"normalize_over": "keys", "query_input": True}])
def test_export_with_any_batch(options):
    layer, x = make(**options)
    batch, n = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(layer.eval(), (x.detach(),), dynamic_shapes={"x": {0: batch, 1: n}})
    for shape in ((5, 9), (1, 4)):
        given = torch.randn(*shape, x.shape[-1], dtype=x.dtype)
        torch.testing.assert_close(program.module()(given), layer(given), rtol=1e-11, atol=1e-11)


SAVED = LAYERS | {
    "masked-cross": {"normalize_over": "keys"},
}


@pytest.mark.parametrize("name", SAVED)
def test_an_exported_layer_is_saved_and_loaded(name):
    layer, x = make(**SAVED[name])
    layer, x, named = layer.eval(), x.detach(), {}
    inputs = (x, torch.randn(2, 7, 16, dtype=x.dtype)) if name == "masked-cross" else (x,)
    if name == "masked-cross":
        named["key_padding_mask"] = torch.arange(7).expand(2, 7) > 4
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, inputs, named), file)
    file.seek(0)
    found = torch.export.load(file).module()(*inputs, **named)
    torch.testing.assert_close(found, layer(*inputs, **named), rtol=1e-11, atol=1e-11)


def test_nan_is_said_by_compiled_layers_too():
    layer, x = make()
    with pytest.raises(ValueError, match="look for them in the inputs"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.full_like(x, torch.nan))


def test_failures_are_said_by_compiled_layers_too():
    layer, x = make(solver=Contraction(steps=2), on_failure="raise")
    with pytest.raises(ConvergenceError, match="Raise steps"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_fit_what_the_compiler_was_told(dtype):
    layer, x = make(positions="relative")
    equation = layer.to(dtype).equation(x.to(dtype))
    function, args = equation.function, [a.detach() for a in equation.args]
    words = ",".join(function.names) + ";table"
    rtol = 1e-10 if dtype == torch.float64 else 3e-2
    numbers = [function.spec.scale, 0.0, 0.9, rtol, 0.0]
    operator = torch.ops.implicit_attention.contraction.default
    given = (args, dtype, layer._report.handle, words, numbers, [4, 1, 0])
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_what_runs_outside_of_graphs_is_refused_with_a_remedy():
    """Where the graph would have to be one: by torch with our words, and in an export by us."""
    layer, x = ImplicitQueryAttention(16, 2, query_input=True), torch.randn(2, 5, 16)
    said = r"reads residuals on the host.*max_gain=0.9"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"(?s){said}"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=said):
        torch.export.export(layer, (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))
