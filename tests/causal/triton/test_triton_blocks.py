"""The Triton diagonal blocks against the torch ones, which the oracle holds: outputs and all gradients.

Without a device they run in Triton's interpreter, which takes about a millisecond for what a device does in a few
instructions: sizes are the smallest that have every kind of edge.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from implicit_attention import DecodeCache, ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal import engines, self_test, triton
from implicit_attention.causal import forward_substitution as substitution
from implicit_attention.causal.backward_substitution import Equilibrium
from implicit_attention.causal.diagonal import BlockSolver
from implicit_attention.causal.diagonal_adjoint import NEAR_SINGULAR, BlockAdjointSolver
from implicit_attention.causal.forward_substitution import solved_with
from implicit_attention.causal.own_columns import own_jacobian
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton import tiles
from implicit_attention.causal.triton.engine import AdjointKernel, ForwardKernel
from implicit_attention.equilibrium.triton_available import launching_on

pytestmark = pytest.mark.usefixtures("brisk_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
OPTIONS = {
    "norm": {"qk_norm": True},
    "rope": {"positions": "rope", "qk_norm": True},
    "alibi": {"positions": "alibi"},
    "relative": {"positions": "relative"},
    "input": {"query_input": True, "bias": True},
    "self-input": {"self_query": "input", "qk_norm": True},
    "self-input-alibi": {"self_query": "input", "positions": "alibi"},
    "window": {"window": 5},
    "identity": {"values": "identity"},
    "groups": {"heads": 4, "num_kv_heads": 2},
}


def make(kernel, tol, dtype, *, embed=16, heads=2, hard=1.0, block=64, on_failure="warn", **options):
    torch.manual_seed(0)
    solver = ForwardSubstitution(rtol=tol, atol=tol, kernel=kernel, block=block)
    layer = ImplicitQueryAttention(embed, heads, is_causal=True, solver=solver, on_failure=on_failure, **options)
    with torch.no_grad():
        layer.Omega_Q.weight.mul_(hard)
    return layer.to(DEVICE, dtype)


def inputs(batch, n, embed=16, dtype=F64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, embed, generator=generator, dtype=F64).to(DEVICE, dtype)


def run(kernel, x, tol, **options):
    """Return the solution and the gradients of input and parameters for a fixed cotangent."""
    layer = make(kernel, tol, x.dtype, embed=x.shape[-1], **options)
    x = x.clone().requires_grad_()
    solution = layer.solve(x)
    weight = inputs(*solution.value.shape, dtype=x.dtype, seed=1)
    found = torch.autograd.grad(solution.value, [x, *layer.parameters()], weight, allow_unused=True)
    return solution, [g for g in found if g is not None]


def assert_same(x, tol, allowed, **options):
    ours, ours_grads = run("triton", x, tol, **options)
    other, other_grads = run("torch", x, tol * 1e-3, **options)
    assert bool(ours.converged.all())
    assert bool(other.converged.all())
    torch.testing.assert_close(ours.value, other.value, rtol=allowed, atol=allowed)
    for mine, theirs in zip(ours.memo, other.memo, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * allowed, atol=10 * allowed)
    scale = max(1.0, *(float(g.abs().max()) for g in other_grads))
    for mine, theirs in zip(ours_grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=10 * allowed * scale)


def refuse(*_):
    raise AssertionError("torch was asked")


@pytest.mark.parametrize("n", [1, 7, 16, 17, 33], ids=lambda n: f"N{n}")
def test_equals_torch_at_tile_edges(n, poisoned):
    assert_same(inputs(2 if n < 16 else 1, n), 1e-9, 1e-8)


def test_equals_torch_over_several_blocks(poisoned):
    """Blocks of 20 rows: the merge by log-sum-exp, and tiles that are not full within a block."""
    assert_same(inputs(1, 45), 1e-7, 1e-6, block=20)


@pytest.mark.parametrize(("embed", "heads"), [(16, 1), (8, 1), (64, 4), (24, 1), (32, 4)], ids=lambda v: str(v))
def test_equals_torch_for_any_head_dimension(embed, heads, poisoned):
    assert_same(inputs(1, 9, embed), 1e-8, 1e-7, heads=heads)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_torch_for_every_option(name, poisoned):
    assert_same(inputs(1, 18, 32), 1e-5, 2e-5, **{"heads": 2, **OPTIONS[name]})


def test_padding_hides_rows_from_themselves():
    x = inputs(2, 18)
    padding = torch.zeros(2, 18, dtype=torch.bool, device=DEVICE)
    padding[0, :3] = True
    padding[1, 12:] = True
    found = [make(k, 1e-9, x.dtype).solve(x, key_padding_mask=padding).value for k in ("triton", "torch")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def test_after_a_cache():
    """Rows whose columns before them are not of the block."""
    x, found = inputs(2, 30), []
    for kernel in ("triton", "torch"):
        layer, cache = make(kernel, 1e-9, x.dtype), DecodeCache(2, 2, 8, 30, dtype=F64, device=DEVICE)
        with torch.no_grad():
            layer(x[:, :13], cache=cache)
            found.append(layer(x[:, 13:], cache=cache))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("heads", [1, 2])
def test_hard_weights_are_solved(heads):
    x = inputs(1, 12)
    solution, grads = run("triton", x, 1e-7, heads=heads, hard=10.0)
    other, other_grads = run("torch", x, 1e-10, heads=heads, hard=10.0)
    assert bool(solution.converged.all())
    assert float((solution.residual - 1e-7 * (1.0 + solution.value.detach().abs().amax(-1))).max()) <= 1e-12
    torch.testing.assert_close(solution.value, other.value, rtol=1e-5, atol=1e-5)
    scale = max(float(g.abs().max()) for g in other_grads)
    for mine, theirs in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-4 * scale)


@pytest.mark.parametrize(("heads", "hard"), [(1, 15.0), (2, 20.0)], ids=["H1", "H2"])
def test_hard_weights_do_not_go_to_torch(heads, hard, monkeypatch):
    """Gains above 2: plain sweeps over the rows' own columns would not settle."""
    x = inputs(1, 12)
    monkeypatch.setattr(BlockSolver, "settle", refuse)
    with torch.no_grad():
        solution = make("triton", 1e-7, x.dtype, heads=heads, hard=hard).solve(x, gains=True)
    assert bool(solution.converged.all())
    assert float(solution.gain.max()) > 2.0


def test_residual_is_that_of_the_value_returned():
    x = inputs(2, 20)
    layer = make("triton", 1e-4, x.dtype, heads=2)
    with torch.no_grad():
        solution = layer.solve(x)
        equation = layer.equation(x)
        again = (equation.function(solution.value, *equation.args) - solution.value).abs().amax(-1)
    torch.testing.assert_close(solution.residual, again, rtol=1e-6, atol=1e-13)


def test_rows_are_settled_here_and_not_in_torch(monkeypatch):
    monkeypatch.setattr(BlockSolver, "settle", refuse)
    monkeypatch.setattr(BlockAdjointSolver, "solve", refuse)
    run("triton", inputs(1, 18), 1e-5)


def test_rows_that_are_given_up_go_to_torch(monkeypatch):
    """As many as are handed over together, and the kernel goes on after them; of other samples nothing is lost."""
    rows, settle, launch = [], BlockSolver.settle, ForwardKernel.settle

    def give_up(self, block):
        done = launch(self, block)
        if block.start == 0:
            self.into["y"][:] = torch.where(torch.arange(20, device=DEVICE)[:, None, None] < 16, self.into["y"], 0.0)
            self.into["lse"][:, :, 16:] = -torch.inf
            return 16
        return done

    monkeypatch.setattr(BlockSolver, "settle", lambda self, *a: rows.append(self.n) or settle(self, *a))
    monkeypatch.setattr(ForwardKernel, "settle", give_up)
    x = inputs(2, 20)
    found = make("triton", 1e-9, x.dtype).solve(x)
    assert rows == [4]
    wanted = make("torch", 1e-12, x.dtype).solve(x)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, in the interpreter
def test_what_a_sample_lost_is_restored():
    """A sample whose scores are NaN stops at its first tile; the other, which went on, is taken back to it."""
    x = inputs(2, 20)
    layer = make("triton", 1e-9, x.dtype)
    equation = layer.equation(x)
    args = [a.detach().clone() for a in equation.args]
    args[equation.function.names.index("key")][1, :, 17] = torch.nan
    system = CausalSystem(equation.function, tuple(args))
    forward = substitution._Forward(system, layer.solver, "triton", x.dtype)
    before = forward.y.clone(), forward.lse.clone()
    assert forward.kernel.settle(slice(0, 20)) == 16
    assert forward.kernel.status.tolist() == [20, 16]
    torch.testing.assert_close(forward.y[:, 16:], before[0][:, 16:], rtol=0.0, atol=0.0)
    torch.testing.assert_close(forward.lse[:, :, 16:], before[1][:, :, 16:], rtol=0.0, atol=0.0)
    assert bool((forward.y[:, :16] != before[0][:, :16]).any())


def test_same_bits_alone_and_in_a_batch():
    x, block = inputs(2, 17, dtype=torch.float32), Block(17, batch=2, hard=10.0, dtype=torch.float32, tol=1e-5)
    with torch.no_grad():
        whole, alone = (make("triton", 1e-4, x.dtype, positions="rope").solve(of) for of in (x, x[1:2]))
    assert torch.equal(alone.value, whole.value[1:2])
    assert torch.equal(alone.residual, whole.residual[1:2])
    found, only = block.compiled(), block.only(1).compiled()
    for name in ("lam", "d_made", "d_key", "d_value", "slope", "residual"):
        assert torch.equal(getattr(only, name), getattr(found, name)[1:2]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_lower_precision_is_as_exact_as_torch(dtype):
    """Off float64 by no more than a few times what torch is in the same dtype, or what rounding its inputs costs."""
    tol, x = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], inputs(1, 18, 32).to(dtype)
    eps = torch.finfo(dtype).eps

    def wide(kernel, of):
        layer = make(kernel, tol if of is dtype else 1e-11, dtype, embed=32)
        leaf = x.to(of).requires_grad_()
        value = layer.to(of).solve(leaf).value
        weight = inputs(*value.shape, seed=1).to(of)
        grads = torch.autograd.grad(value, [leaf, *layer.parameters()], weight)
        return value.detach().double(), [g.double() for g in grads]

    exact, exact_grads = wide("torch", F64)
    rough, rough_grads = wide("torch", dtype)
    found, found_grads = wide("triton", dtype)
    assert float((found - exact).abs().max()) <= 2 * float((rough - exact).abs().max()) + tol + eps
    for mine, other, theirs in zip(found_grads, rough_grads, exact_grads, strict=True):
        floor = 4 * (tol + eps) * float(theirs.abs().max())
        assert float((mine - theirs).abs().max()) <= 2 * float((other - theirs).abs().max()) + floor


class Block:
    """A block of a layer with scaled weights, and what the adjoint equation needs there; y need not be F(y)."""

    def __init__(self, n, *, batch=1, hard=1.0, heads=2, embed=16, dtype=F64, tol=1e-9, seed=0, **options):
        torch.manual_seed(seed)
        layer = ImplicitQueryAttention(embed, heads, is_causal=True, **options).to(DEVICE, dtype)
        with torch.no_grad():
            layer.Omega_Q.weight.mul_(hard)
            equation = layer.equation(inputs(batch, n, embed, dtype))
            self.y = equation.function(equation.start, *equation.args)
        self.n, self.function, self.args = n, equation.function, tuple(a.detach() for a in equation.args)
        self.grad = inputs(batch, n, embed, dtype, 3).view(batch, n, heads, -1)
        later = inputs(batch, n, layer.Omega_Q.weight.shape[0], dtype, 4)
        self.later = later.view(batch, n, -1, embed // heads)
        self.allowed = tol * self.grad.abs().amax((1, 2, 3))

    def only(self, b):
        """The block of one sample."""
        one, batch = Block.__new__(Block), len(self.y)
        one.n, one.function = self.n, self.function
        one.args = tuple(a[b : b + 1] if a.dim() > 2 and len(a) == batch else a for a in self.args)
        for name in ("y", "grad", "later", "allowed"):
            setattr(one, name, getattr(self, name)[b : b + 1])
        return one

    def at(self):
        return Equilibrium(CausalSystem(self.function, self.args), self.y, ())

    def compiled(self):
        at = self.at()
        named = {"y": at.y, "query": at.query, "inverse": at.inverse, "lse": at.lse}
        return AdjointKernel(at.system, named, self.grad, self.later, self.allowed, self.n).solve(slice(0, self.n))

    def eager(self):
        return self.at().block(slice(0, self.n)).solve(self.grad, self.later, self.allowed)

    def gains(self):
        at, rows = self.at(), slice(0, self.n)
        return torch.linalg.eigvals(own_jacobian(at.system, rows, at.y, at.queries(rows), at.block(rows).p))


def assert_same_adjoint(found, wanted, allowed):
    scale = max(1.0, float(wanted.lam.abs().max()))
    for name in ("lam", "d_made", "d_key", "d_value"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        size = max(scale, float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=allowed * size, msg=lambda m, n=name: f"{n}: {m}")
    own = wanted.slope.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.slope[..., 0], own, rtol=0.0, atol=allowed * max(scale, float(own.abs().max())))


@pytest.mark.parametrize(("heads", "n", "hard"), [(1, 17, 10.0), (2, 7, 1.0), (2, 33, 1.0), (4, 18, 10.0)], ids=str)
def test_adjoint_equals_torch(heads, n, hard, poisoned):
    block = Block(n, heads=heads, hard=hard)
    assert_same_adjoint(block.compiled(), block.eager(), 1e-7)


@pytest.mark.parametrize("name", ["rope", "alibi", "self-input-alibi", "window"])
def test_adjoint_equals_torch_with_hard_weights_and_options(name, poisoned):
    block = Block(18, hard=10.0, **OPTIONS[name])
    assert_same_adjoint(block.compiled(), block.eager(), 1e-7)


def test_own_columns_are_solved_for_where_sweeps_would_diverge():
    block = Block(18, hard=30.0, heads=2)
    assert float(block.gains().abs().max()) > 1.5
    found = block.compiled()
    assert found.sweeps <= 24
    assert_same_adjoint(found, block.eager(), 1e-6)


def test_rows_near_a_fold_are_counted():
    """Scale the weights until one gain is that near 1."""

    def nearest(hard):
        return float((Block(8, hard=hard, seed=1).gains() - 1.0).real.max())

    low, high = 1.0, 1.0
    while nearest(high) < 0.0:
        high *= 1.1
        assert high < 100.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if nearest(middle) < -0.5 * NEAR_SINGULAR else (low, middle)
    assert Block(8, hard=low, seed=1).compiled().near_singular == 1
    assert Block(8, hard=0.9 * low, seed=1).compiled().near_singular == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_lost_adjoint_is_left_to_torch():
    block = Block(9)
    block.later[0, 4, 0, 0] = torch.nan
    assert block.compiled() is None


def kernel_for(layer, x):
    equation = layer.equation(x)
    return layer.solver.kernel_for(equation.function, equation.args)


def test_choice_is_visible():
    x = inputs(1, 20)
    assert kernel_for(make("triton", 1e-8, x.dtype), x) == "triton"
    assert (kernel_for(make("auto", 1e-8, x.dtype), x) == "triton") == (DEVICE == "cuda"), "not the interpreter"


def test_maps_on_a_cuda_device(monkeypatch):
    class OnDevice:
        """A map whose tensors say that they are on a CUDA device."""

        def __init__(self, system):
            self.spec, self.length, self.heads, self.dim = system.spec, system.length, system.heads, system.dim
            self.key = self.value = self.weight = self
            self.value_map = self.norm_weight = None
            self.args = ()

        dtype, device = torch.bfloat16, torch.device("cuda:1")

    room = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    equation = make("auto", 1e-8, F64).equation(inputs(1, 20))
    system, wrong = OnDevice(CausalSystem(equation.function, equation.args)), None
    monkeypatch.setattr(self_test, "verdict", lambda name, device, solve: wrong)
    assert engines.chosen("triton", system, solved_with) == "triton"
    wrong = None
    assert engines.chosen("auto", system, solved_with) == "triton"
    wrong = "off"
    with pytest.warns(RuntimeWarning, match=r"fail their self-test on cuda:1 \(off\)"):
        assert engines.chosen("auto", system, solved_with) == "torch"
    with pytest.raises(ValueError, match=r"`kernel` must be .* where the tensors are on cuda"):
        engines.chosen("cpp", system, solved_with)
    system.dim = 256
    assert engines.chosen("auto", system, solved_with) == "torch"
    with pytest.raises(ValueError, match=r"2 heads of 256 in torch\.bfloat16 need 147456 bytes of shared memory"):
        engines.chosen("triton", system, solved_with)


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "maps", "needed"),
    [
        (4, 256, torch.float32, True, 294912),
        (4, 256, torch.bfloat16, True, 147456),
        (4, 128, torch.float32, True, 81920),
        (4, 160, torch.float64, True, 589824),
        (64, 128, torch.bfloat16, False, 65536),
        (128, 100, torch.bfloat16, False, 131072),
    ],
)
def test_tiles_that_do_not_fit_the_device_are_left_to_torch(monkeypatch, heads, dim, dtype, maps, needed):
    """Bytes of the tiles, as Triton's compiler counts them for the largest kernel of each kind."""
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    key = SimpleNamespace(dtype=dtype, device=torch.device("cuda"), shape=(1, 1, heads * dim))
    for room, fits in ((needed + 1024, True), (needed + 1023, False)):
        device = SimpleNamespace(shared_memory_per_block_optin=room)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        assert (tiles.too_large(key, heads, dim, maps=maps) is None) == fits
        if not maps:
            assert (triton.decode_hindrance(key, heads) is None) == fits


def test_a_solve_is_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert isinstance(launching_on(torch.device("cpu")), nullcontext)
    with pytest.raises(RuntimeError, match=r"cannot wait for that. Use torch\.compile"):
        launching_on(torch.device("cuda"))


def test_triton_where_it_cannot_serve_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="dropout is on"):
        make("triton", 1e-8, F64, dropout=0.1).train().solve(inputs(1, 20))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = make("triton", 1e-8, F64).cpu()
    with pytest.raises(ValueError, match=r"CUDA device.*TRITON_INTERPRET=1.*\"triton\" where the tensors are on cpu"):
        layer.solve(inputs(1, 20).cpu())


def test_missing_triton(monkeypatch):
    monkeypatch.setattr("implicit_attention.causal.engines.find_spec", lambda name: None)
    x = inputs(1, 20)
    assert kernel_for(make("auto", 1e-8, x.dtype), x) != "triton"
    with pytest.raises(ImportError, match=r"kernel='triton' needs triton: .*implicit-attention\[gpu\]"):
        make("triton", 1e-8, x.dtype).solve(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_cuda_graphs_of_compiled_layers():
    """Solves look at numbers, which a graph cannot: the compiler cuts them out of its graphs."""
    layer = make("auto", 1e-5, torch.float32, embed=128, qk_norm=True, out_proj=True)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # warm up, capture, replay
        x = inputs(2, 96, 128, torch.float32, seed).requires_grad_()
        wanted = layer(x)
        found = compiled(x)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        pairs = [torch.autograd.grad(y.sin().sum(), [x, layer.W_K.weight])[0].clone() for y in (wanted, found)]
        torch.testing.assert_close(*pairs, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_tokens_decoded_on_a_device(dtype):
    """A prompt by blocks, then token by token, by the kernels that "auto" takes there."""
    options = {"embed": 128, "heads": 4, "num_kv_heads": 2, "qk_norm": True, "positions": "rope", "query_input": True}
    layer, x = make("auto", None, dtype, **options), inputs(2, 90, 128, dtype)
    assert engines.token_kernels("auto", x, 4, solved_with) is not None
    cache = layer.make_cache(2, 90)
    parts = [layer(x[:, :80], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in range(80, 90))]
    wanted = layer(x).float()
    off = (torch.cat(parts, 1).float() - wanted).abs().max() / wanted.abs().max()
    assert float(off) <= (1e-3 if dtype == torch.float32 else 5e-2)
