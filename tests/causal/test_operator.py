"""The layer under torch.compile(fullgraph=True): same values, same gradients, same reports as without."""

import copy
import warnings

import pytest
import torch

from implicit_attention import (
    ConvergenceError,
    ConvergenceWarning,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    Picard,
    diagonal,
    operator,
)
from implicit_attention.causal import cpu
from implicit_attention.equilibrium.reports import FailureReport
from tests.bridge import make_layer

LAYERS = {
    "one-head": {},
    "qk_norm-rope": {"num_heads": 4, "qk_norm": True, "positions": "rope", "out_proj": True},
    "input-relative": {"num_heads": 4, "self_query": "input", "positions": "relative"},
    "groups-window-alibi": {"num_heads": 4, "num_kv_heads": 2, "window": 5, "positions": "alibi", "query_input": True},
    "bias": {"num_heads": 2, "bias": True},
    "feedback": {"num_heads": 4, "num_kv_heads": 2, "self_query": "input", "values": "feedback", "bias": True},
    "feedback-only-values": {
        "num_heads": 2, "self_query": "input", "values": "feedback", "feedback_norm": False, "query_input": True,
        "query_output": False, "qk_norm": True, "positions": "rope",
    },
}  # fmt: skip


def make(options, **more):
    layer = make_layer(8, is_causal=True, **{"solver": ForwardSubstitution(block=4)} | options | more)
    return layer, torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)


def gradients(layer, x, y):
    return torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_compiles_as_a_whole(options):
    layer, x = make(options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden = torch.zeros(2, 13, dtype=torch.bool)
    hidden[0, :3] = True
    for inputs in ({}, {"key_padding_mask": hidden}, {"attn_mask": torch.randn(13, 13, dtype=torch.float64)}):
        y, z = layer(x, **inputs), compiled(x, **inputs)
        if cpu.problem() is None:
            assert torch.equal(y, z)
        else:  # torch's products round by the layout of their inputs
            torch.testing.assert_close(y, z, rtol=1e-14, atol=1e-14)
        for a, b in zip(gradients(layer, x, y), gradients(layer, x, z), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiles_with_dropout_and_other_lengths():
    layer, x = make({"num_heads": 2}, dropout=0.2)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), x.detach()
    for n in (13, 9, 6):
        assert bool(torch.isfinite(compiled(x[:, :n])).all())
    layer.eval()
    for n in (13, 9, 6):
        assert torch.equal(compiled(x[:, :n]), layer(x[:, :n]))


def test_a_solution_comes_through():
    layer, x = make({"num_heads": 2})
    found = torch.compile(layer.solve, fullgraph=True, backend="aot_eager")(x)
    expected = layer.solve(x)
    assert torch.equal(found.steps, expected.steps)
    assert torch.equal(found.converged, expected.converged)
    torch.testing.assert_close(found.residual, expected.residual)
    torch.testing.assert_close(found.rel_trace, expected.rel_trace)


def test_inductor_takes_it():
    layer, x = make({"num_heads": 2, "qk_norm": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        y = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-9, atol=1e-9)


def test_failures_are_reported_from_compiled_code(monkeypatch):
    monkeypatch.setattr(diagonal, "MOST_SWEEPS", 1)
    solver = ForwardSubstitution(rtol=1e-30, atol=1e-30, kernel="torch")
    options = {"num_heads": 2, "on_failure": "warn", "solver": solver}
    layer, x = make(options, gain=20.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.warns(ConvergenceWarning, match="equilibrium was not solved"):
        compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x)  # the second of ten
    strict, x = make(options | {"on_failure": "raise"}, gain=20.0)
    with pytest.raises(ConvergenceError):
        torch.compile(strict, fullgraph=True, backend="aot_eager")(x)


def test_copies_report_for_themselves():
    layer, _ = make({"num_heads": 2})
    other = copy.deepcopy(layer)
    assert other._report.handle != layer._report.handle
    assert FailureReport.of(other._report.handle) is other._report
    handle = other._report.handle
    del other
    assert FailureReport.of(handle).on_failure == "raise", "as it was made, in another process too"


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"query_input": True, "max_gain": 0.9}], ids=["causal", "gain"]
)
def test_layers_of_one_kind_share_a_graph(options):
    """What tells them apart, such as the report that names them, is an input of the graph: there may be any number."""
    many = range(torch._dynamo.config.recompile_limit + 2)
    layers = [ImplicitQueryAttention(8, num_heads=2, out_proj=True, **options) for _ in many]
    x = torch.randn(2, 5, 8)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
        layer(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert all(layer.last_solve is not None for layer in layers)


def test_other_solvers_and_adjoints_go_their_own_way():
    layer, x = make({"num_heads": 2})
    function = layer.equation(x).function
    assert operator.serves(layer.solver, layer.adjoint, function)
    assert not operator.serves(Picard(), layer.adjoint, function)
    assert not operator.serves(layer.solver, Implicit(Picard()), function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_operator_keeps_its_promises(options, dtype):
    """Schema, shapes and dtypes of the fake, autograd registration, and tracing, by torch's own checks."""
    layer, x = make(options, on_failure="ignore")
    function, args, _ = layer.to(dtype).equation(x.to(dtype))
    rtol = 1e-10 if dtype == torch.float64 else 1e-2
    described = operator._Description.of_map(ForwardSubstitution(block=4), function, rtol, rtol)
    leaves = [a.detach().requires_grad_() for a in args]
    torch.library.opcheck(operator._forward, (leaves, dtype, layer._report.handle, *described.arguments()))
