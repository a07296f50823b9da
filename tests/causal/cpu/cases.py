"""Layers that are solved by the C++ kernels and by torch, and how alike the two have to be."""

import torch

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal.diagonal import BlockSolver
from implicit_attention.causal.diagonal_adjoint import BlockAdjointSolver

OPTIONS = {
    "plain": {},
    "norm": {"qk_norm": True},
    "rope": {"positions": "rope", "qk_norm": True},
    "alibi": {"positions": "alibi"},
    "relative": {"positions": "relative"},
    "input": {"query_input": True, "bias": True},
    "self-input": {"self_query": "input", "qk_norm": True},
    "self-input-alibi": {"self_query": "input", "positions": "alibi"},
    "window": {"window": 9},
    "identity": {"values": "identity"},
    "groups": {"heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "one-group": {"heads": 4, "num_kv_heads": 1, "positions": "rope"},
    "one-head": {"heads": 1},
    "dropout": {"dropout": 0.3, "qk_norm": True},
    "dropout-self-input": {"dropout": 0.3, "self_query": "input"},
}
SIZES = (1, 7, 63, 64, 65, 130)


def make(kernel, tol, dtype, *, embed=24, heads=2, seed=0, hard=1.0, **options):
    torch.manual_seed(seed)
    solver = ForwardSubstitution(rtol=tol, atol=tol, kernel=kernel)
    layer = ImplicitQueryAttention(embed, heads, is_causal=True, solver=solver, **options).to(dtype)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(hard)
    return layer


def inputs(batch, n, embed=24, dtype=torch.float64, seed=2):
    return torch.randn(batch, n, embed, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(kernel, x, tol, *, call=None, between=lambda: None, **options):
    """Return the solution and the gradients of input and parameters for a fixed cotangent."""
    layer = make(kernel, tol, x.dtype, **options)
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # of dropout
    solution = layer.solve(x, **(call or {}))
    between()
    weight = torch.randn(solution.value.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = torch.autograd.grad(solution.value, [x, *layer.parameters()], weight, allow_unused=True)
    return solution, [g for g in found if g is not None]


def assert_same(x, tol, allowed, **options):
    ours, ours_grads = run("cpp", x, tol, **options)
    other, other_grads = run("torch", x, tol, **options)
    assert bool(ours.converged.all())
    assert bool(other.converged.all())
    torch.testing.assert_close(ours.value, other.value, rtol=allowed, atol=allowed)
    for mine, theirs in zip(ours.memo, other.memo, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * allowed, atol=10 * allowed)
    scale = max(float(g.abs().max()) for g in other_grads)
    assert len(ours_grads) == len(other_grads)
    for mine, theirs in zip(ours_grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=allowed * max(scale, 1.0))


def refuse_torch(monkeypatch):
    """Make it an error if rows are handed to torch."""

    def refuse(*_):
        raise AssertionError("torch was asked")

    monkeypatch.setattr(BlockSolver, "settle", refuse)
    monkeypatch.setattr(BlockAdjointSolver, "solve", refuse)
