"""What is kept and what is made: memory of `Implicit` against iterations, and never an N x N tensor."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_attention import (
    Anderson,
    Broyden,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
)
from implicit_attention.attention import spec as spec_module


class Kept:
    """A tensor that autograd keeps for the backward pass; it lives as long as the graph wants it."""

    def __init__(self, tensor):
        self.tensor = tensor


def bytes_kept(function):
    """Bytes that the graph of `function()` holds, each storage counted once."""
    alive = weakref.WeakSet()

    def pack(tensor):
        kept = Kept(tensor.detach())  # an output itself would keep its own graph alive
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        out = function()
    gc.collect()
    sizes = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in alive}
    assert out.requires_grad
    return sum(sizes.values())


def kept_by(adjoint, steps, solver=Picard, **options):
    """Bytes kept after a given number of steps: no tolerance is met before."""
    torch.manual_seed(0)
    endless = solver(rtol=1e-300, atol=1e-300, max_steps=steps)
    layer = ImplicitQueryAttention(16, 2, solver=endless, adjoint=adjoint, on_failure="ignore", **options)
    x = torch.randn(1, 64, 16, requires_grad=True)
    return bytes_kept(lambda: layer(x))


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    "options", [{"query_input": True}, {"is_causal": True, "qk_norm": True}], ids=["seed", "causal"]
)
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(3)], ids=["implicit", "phantom"])
def test_memory_does_not_depend_on_iterations(adjoint, options, solver):
    few, many = (kept_by(adjoint, steps, solver, **options) for steps in (1, 8))
    assert few == many > 0


def test_unrolled_keeps_every_step_and_checkpoints_keep_less():
    few, many = (kept_by(Unrolled(), steps) for steps in (1, 8))
    checkpointed = kept_by(Unrolled(checkpoint=True), 8)
    assert many > 3 * few
    assert kept_by(Implicit(), 8) < 2 * few  # about one application, as a single unrolled step keeps
    assert checkpointed < many / 2


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


N = 256
SOLVERS = [Picard(max_steps=10), Anderson(), Broyden(memory=10), NewtonKrylov(restart=8, max_steps=3)]
LAYERS = {
    "seed": {"query_input": True},
    "causal": {"is_causal": True, "qk_norm": True},
    "causal-input": {"is_causal": True, "self_query": "input"},
    "relative": {"positions": "relative"},
    "alibi": {"positions": "alibi"},
    "keys": {"normalize_over": "keys"},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_no_matrix_of_tokens_by_tokens(options, solver, monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 2 * 32 * N)
    layer = ImplicitQueryAttention(8, 2, solver=solver, on_failure="ignore", **options)
    x = torch.randn(1, N, 8, requires_grad=True)
    padding = torch.zeros(1, N, dtype=torch.bool)
    padding[0, -5:] = True
    with Largest() as largest:
        layer(x, key_padding_mask=padding).square().sum().backward()
    assert N < largest.numel <= N * N // 2
    with Largest() as largest:
        layer(x, need_weights=True)
    assert largest.numel >= N * N  # asked for, and so the recorder does see it


def test_no_matrix_in_second_derivatives(monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 2 * 32 * N)
    layer = ImplicitQueryAttention(8, 2, query_input=True)
    x = torch.randn(1, N, 8, requires_grad=True)
    with Largest() as largest:
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert largest.numel <= N * N // 2
