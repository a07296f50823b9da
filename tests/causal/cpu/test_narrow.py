"""Inputs in half precision: the kernels work in float32, and everything is rounded once, at the end."""

import pytest
import torch

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True, "positions": "rope"}, {"self_query": "input", "bias": True}, {"num_kv_heads": 2, "window": 5}],
    ids=["rope", "input", "groups"],
)
def test_half_precision_is_the_float32_equilibrium_rounded_once(dtype, options):
    solver = ForwardSubstitution(kernel="cpp", rtol=1e-6, atol=1e-6)
    layer = ImplicitQueryAttention(32, 4, is_causal=True, solver=solver, dtype=dtype, on_failure="raise", **options)
    equation = layer.equation(torch.randn(2, 70, 32, dtype=dtype))
    args = [a.detach().requires_grad_(a.is_floating_point()) for a in equation.args]
    wide = [a.detach().float().requires_grad_() if a.is_floating_point() else a for a in args]
    grad = torch.randn(2, 70, 32).to(dtype)
    found = solver.equilibrium(equation.function, tuple(args), dtype)
    expected = solver.equilibrium(equation.function, tuple(wide), torch.float32)
    assert found.value.dtype == found.memo[0].dtype == dtype
    torch.testing.assert_close(found.value, expected.value.to(dtype), rtol=0, atol=0)
    needs = tuple(a.requires_grad for a in args)
    pulled = solver.adjoint(equation.function, tuple(args), found.value, found.memo, grad, needs)
    assert bool(pulled.converged.all())
    memo = tuple(t.float() for t in found.memo)
    right = solver.adjoint(equation.function, tuple(wide), found.value.float(), memo, grad.float(), needs)
    for one, other in zip(pulled.by_arg, right.by_arg, strict=True):
        if one is not None:
            assert one.dtype == dtype or one.dtype == torch.float32
            # The solutions differ by what the tolerance of the narrow dtype allows.
            scale = float(other.abs().max()) * torch.finfo(dtype).eps
            torch.testing.assert_close(one.float(), other, rtol=2 * torch.finfo(dtype).eps, atol=2 * scale)
