"""Sweeps over blocks of many rows in Triton, against the torch blocks: outputs, gradients, and who does what.

Without a device they run in Triton's interpreter, with the smallest blocks that have several tiles.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from implicit_attention.causal import forward_substitution as substitution
from implicit_attention.causal.diagonal import BlockSolver, Unsettled
from implicit_attention.causal.diagonal_adjoint import BlockAdjointSolver
from implicit_attention.causal.system import CausalSystem
from implicit_attention.causal.triton import launches, sweeps
from implicit_attention.causal.triton.engine import AdjointKernel, ForwardKernel
from implicit_attention.causal.triton.kernels import own_rows, sweep
from tests.causal.triton.test_triton_blocks import DEVICE, F64, OPTIONS, assert_same, inputs, make, refuse, run

pytestmark = [pytest.mark.usefixtures("brisk_interpreter", "narrow_blocks"), pytest.mark.kernels]
BLOCK = 8  # rows that are left to the other kernel
in_float64 = pytest.mark.skipif(DEVICE != "cpu", reason="a device sweeps no float64, which these tests want")


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Sweep over 32 rows, so that 45 are a whole block and a part of one."""
    monkeypatch.setattr(sweeps, "WIDEST", ((0, 32),))


@pytest.fixture
def swept_alone(monkeypatch):
    """Refuse whatever else could settle a block."""
    for kernel, name in ((BlockSolver, "settle"), (BlockAdjointSolver, "solve"), (ForwardKernel, "settle"),
                         (AdjointKernel, "solve")):  # fmt: skip
        monkeypatch.setattr(kernel, name, refuse)


@pytest.fixture
def swept(monkeypatch):
    """A record of the blocks: rows, direction and whether sweeps settled them."""
    record, settle, solve = [], sweeps.ForwardSweeps.settle, sweeps.AdjointSweeps.solve

    def forward(self, rows):
        record.append(("forward", rows.start, rows.stop, settle(self, rows)))
        return record[-1][-1]

    def backward(self, rows, *, exactly):
        record.append(("exactly" if exactly else "backward", rows.start, rows.stop, solve(self, rows, exactly=exactly)))
        return record[-1][-1]

    monkeypatch.setattr(sweeps.ForwardSweeps, "settle", forward)
    monkeypatch.setattr(sweeps.AdjointSweeps, "solve", backward)
    return record


@pytest.mark.parametrize("n", [9, 32, 45], ids=lambda n: f"N{n}")
def test_equals_torch(n, poisoned):
    assert_same(inputs(2, n, 32), 1e-8, 1e-7, block=BLOCK)


@pytest.mark.parametrize("name", ["alibi", "input", "self-input", "self-input-alibi", "window", "groups", "identity"])
def test_equals_torch_for_every_option(name, poisoned):
    options = {"heads": 2, **OPTIONS[name]}
    assert_same(inputs(1, 45, 32 * options["heads"] // 2), 1e-6, 1e-5, block=BLOCK, **options)


@pytest.mark.parametrize("name", ["norm", "rope", "relative"])
def test_equals_torch_where_sweeps_are_slow(name, poisoned):
    """Norms over 16 numbers make heavy rows: halved blocks, the other kernel, own columns solved for."""
    assert_same(inputs(1, 38, 32), 1e-5, 1e-4, block=BLOCK, **OPTIONS[name])


@pytest.mark.parametrize(("embed", "heads"), [(16, 1), (64, 4), (64, 2)], ids=str)
def test_equals_torch_for_any_head_dimension(embed, heads, poisoned):
    assert_same(inputs(1, 33, embed), 1e-7, 1e-6, heads=heads, block=BLOCK)


def test_dimensions_that_are_no_powers_of_two_are_left_to_the_other_kernel(swept):
    assert_same(inputs(1, 17, 48), 1e-6, 1e-5, block=BLOCK)
    assert not swept


def test_blocks_are_swept_and_nothing_else(swept_alone, swept):
    run("triton", inputs(2, 45, 32, dtype=torch.float32), 1e-4, block=BLOCK)
    assert swept == [
        ("forward", 0, 32, True), ("forward", 32, 45, True), ("backward", 32, 45, True), ("backward", 0, 32, True),
    ]  # fmt: skip


@in_float64
def test_after_a_cache(swept):
    """Rows that see columns before the first."""
    x, found = inputs(2, 45, 32), []
    for kernel, tol in (("triton", 1e-9), ("torch", 1e-11)):
        layer = make(kernel, tol, x.dtype, embed=32, block=BLOCK)
        cache = layer.make_cache(2, 45)
        with torch.no_grad():
            layer(x[:, :13], cache=cache)
            found.append(layer(x[:, 13:], cache=cache))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)
    assert swept[-1] == ("forward", 0, 32, True)


def with_two_roots(row, batch=1, n=45, heads=1, **options):
    """A map whose row, in the first sample, has two stable roots, and its last head's weight is tiny at the start.

    With all other columns' output a, `p = sigmoid(w . a - l + w . (v - a) p)`; v is chosen so that the slope is 12.
    """
    layer = make("torch", 1e-12, F64, embed=16 * heads if heads > 1 else 32, heads=heads, **options)
    with torch.no_grad():
        equation = layer.equation(inputs(batch, n, layer.embed_dim))
    args = [a.detach().clone() for a in equation.args]
    value = args[equation.function.names.index("value")]
    y = layer.solver.equilibrium(equation.function, tuple(args), F64).value
    system = CausalSystem(equation.function, tuple(args))
    p = equation.function.weights(y, *args)[0, -1, row, row]
    at = system.row(torch.tensor([0]), torch.tensor([row]), None)
    weight = torch.eye(system.dim, dtype=F64, device=y.device) if system.weight is None else system.weight
    group = weight.view(system.groups, system.dim, heads, system.dim)[-1, :, -1]
    way = group.mT @ at.key[0, -1]
    a = (y[0, row].view(heads, -1)[-1] - p * at.value[0, -1]) / (1.0 - p)
    value[0, -1, row] = a + 12.0 * way / (way @ way)
    return equation.function, tuple(args)


TWO_ROOTS = {
    "first-block": (5, 1, {}),
    "later-block": (40, 1, {}),
    "batch": (40, 3, {}),
    "heads": (40, 2, {"heads": 2}),
    "groups": (40, 2, {"heads": 4, "num_kv_heads": 2}),
    "alibi": (40, 1, {"heads": 2, "positions": "alibi"}),
    "input": (40, 2, {"heads": 2, "query_input": True, "bias": True}),
}


@in_float64
@pytest.mark.parametrize("case", TWO_ROOTS)
def test_rows_are_taken_to_the_roots_that_are_wanted(case, monkeypatch, swept):
    row, batch, options = TWO_ROOTS[case]
    checked, check = [], sweeps.ForwardSweeps._check_roots

    def checking(self, *args):
        checked.append(check(self, *args))
        return checked[-1]

    monkeypatch.setattr(sweeps.ForwardSweeps, "_check_roots", checking)
    function, args = with_two_roots(row, batch, **options)
    solver = substitution.ForwardSubstitution(rtol=1e-7, atol=1e-7, kernel="triton", block=BLOCK)
    with torch.no_grad():
        found = solver.equilibrium(function, args, F64)
        wanted = make("torch", 1e-11, F64).solver.equilibrium(function, args, F64).value
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-5)
    assert float(function.weights(wanted, *args)[0, -1, row, row]) > 0.9
    again = (function(found.value, *args) - found.value).abs().amax(-1)
    torch.testing.assert_close(found.residual, again, rtol=1e-6, atol=1e-13)
    if row == 40:
        assert False in checked, "the row was taken to its root, which is not far from where y = v is"
    if row == 40 and not options:  # with more heads sweeps may not settle around it, and the other kernel takes over
        assert swept == [("forward", 0, 32, True), ("forward", 32, 45, True)]


@in_float64
@pytest.mark.parametrize("name", ["norm", "rope", "relative", "input", "window", "groups", "identity"])
def test_own_equations_are_those_of_the_map(name, poisoned):
    """Where a block has settled, each row's weight on itself solves the row's own equation."""
    options = {"heads": 2, **OPTIONS[name]}
    layer = make("triton", 1e-4, F64, embed=16 * options["heads"], block=BLOCK, **options)
    with torch.no_grad():
        for parameter in (p for p_name, p in layer.named_parameters() if "weight" not in p_name):
            parameter.add_(inputs(1, 1, parameter.numel(), seed=5).view_as(parameter), alpha=0.3)
        if layer.temperature is not None:
            layer.temperature.fill_(0.3)
        equation = layer.equation(inputs(2, 45, layer.embed_dim))
    function, args = equation.function, tuple(a.detach().clone() for a in equation.args)
    forward, rows = substitution._Forward(CausalSystem(function, args), layer.solver, "triton", F64), slice(0, 32)
    swept = forward.sweeper
    assert swept.settle(rows)
    marked = (torch.arange(32) % torch.tensor([[3], [5]]) == 1).to(DEVICE)
    for b, state in enumerate(swept.judged[0].tolist()):
        at = -2 - state if state < -1 else state
        swept.judged[0, b] = -2 - at
        swept.far[: sweeps.MOST_SWEEPS * 64].view(-1, 2, 32)[at, b] = marked[b].int()
    swept.judged[1] = marked.sum(1)
    found = swept.own_rows.solve(swept._settled(rows, swept.begin(rows)), int(marked.sum()))
    assert torch.equal(torch.stack([found.samples, found.positions]), marked.nonzero().T.int())
    assert not found.outcome.any()
    y = forward.y.flatten(-2)
    samples, positions = found.samples.long(), found.positions.long()
    p = function.weights(y, *args).diagonal(dim1=-2, dim2=-1)[samples, :, positions]
    new = function(y, *args).view(forward.y.shape)[samples, positions]
    assert float(p.max()) > 0.05
    torch.testing.assert_close(found.root, p, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(found.a + p[..., None] * found.way, new, rtol=1e-9, atol=1e-9)


def test_rows_are_listed_sample_by_sample():
    """Of samples whose rows may be at other roots alone, at the sweep at which they settled; more than fit once."""
    batch, n = 3, 1100
    far = (torch.rand(4, batch, n, generator=torch.Generator().manual_seed(0)) < 0.1).int().to(DEVICE)
    states, at = [-2 - 3, 1, -2], [3, None, 0]
    wanted = [(b, i) for b, t in enumerate(at) if t is not None for i in far[t, b].nonzero()[:, 0].tolist()]
    counts = [sum(1 for b, _ in wanted if b == of) for of in range(batch)]
    status, counted = torch.tensor([states, counts], dtype=torch.int32, device=DEVICE).unbind()
    listed = status.new_full((2, len(wanted)), -1)
    own_rows.list_rows[(batch,)](far, status, counted, listed, batch, n, len(wanted), 4)
    assert listed.T.tolist() == [list(pair) for pair in wanted]


@in_float64
def test_own_columns_are_solved_for_where_sweeps_are_slow(swept):
    x = inputs(1, 45, 32)
    solution, grads = run("triton", x, 1e-6, qk_norm=True, block=BLOCK)
    other, other_grads = run("torch", x, 1e-10, qk_norm=True, block=BLOCK)
    assert bool(solution.converged.all())
    assert any(kind == "exactly" and done for kind, *_, done in swept)
    torch.testing.assert_close(solution.value, other.value, rtol=1e-5, atol=1e-5)
    scale = max(float(g.abs().max()) for g in other_grads)
    for mine, theirs in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-4 * scale)


@in_float64
def test_residual_is_that_of_the_value_returned(swept_alone):
    x = inputs(2, 45, 32)
    layer = make("triton", 1e-3, x.dtype, embed=32, block=BLOCK)
    with torch.no_grad():
        solution = layer.solve(x)
        equation = layer.equation(x)
        again = (equation.function(solution.value, *equation.args) - solution.value).abs().amax(-1)
    torch.testing.assert_close(solution.residual, again, rtol=1e-6, atol=1e-13)
    assert float(again.max()) > 1e-5, "samples stop when they are within tolerance"


def test_same_bits_alone_and_in_a_batch(swept_alone):
    x = inputs(3, 45, 32, dtype=torch.float32)
    found = []
    for of in (x, x[1:2]):
        leaf = of.clone().requires_grad_()
        solution = make("triton", 1e-4, x.dtype, embed=32, block=BLOCK).solve(leaf)
        (grad,) = torch.autograd.grad(solution.value.square().sum(), leaf)
        found.append((solution.value.detach(), solution.residual.detach(), grad))
    for whole, alone in zip(*found, strict=True):
        assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_lower_precision_is_as_exact_as_torch(dtype, swept_alone):
    tol, x = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], inputs(1, 45, 32).to(dtype)
    eps = torch.finfo(dtype).eps

    def found(kernel, of):
        layer = make(kernel, tol if of is dtype else 1e-11, dtype, embed=32, block=BLOCK)
        leaf = x.to(of).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if kernel == "torch":
                patch.setattr(BlockSolver, "settle", SETTLE)
                patch.setattr(BlockAdjointSolver, "solve", SOLVE)
            value = layer.to(of).solve(leaf).value
            weight = inputs(*value.shape, seed=1).to(of)
            grads = torch.autograd.grad(value, [leaf, *layer.parameters()], weight)
        return value.detach().double(), [g.double() for g in grads]

    exact, exact_grads = found("torch", F64)
    rough, rough_grads = found("torch", dtype)
    ours, our_grads = found("triton", dtype)
    assert float((ours - exact).abs().max()) <= 2 * float((rough - exact).abs().max()) + tol + eps
    for mine, other, theirs in zip(our_grads, rough_grads, exact_grads, strict=True):
        floor = 4 * (tol + eps) * float(theirs.abs().max())
        assert float((mine - theirs).abs().max()) <= 2 * float((other - theirs).abs().max()) + floor


SETTLE, SOLVE = BlockSolver.settle, BlockAdjointSolver.solve


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_nan_is_an_error():
    x = inputs(1, 33, 32)
    x[0, 20, 3] = torch.nan
    with pytest.raises(ValueError, match="`x` holds 1 NaN or Inf"), torch.no_grad():
        make("triton", 1e-3, x.dtype, embed=32, block=BLOCK).solve(x)


def test_what_has_overflowed_has_not_settled():
    """An infinite residual is within no tolerance of an infinite size."""
    bits = torch.tensor([1e-3, torch.inf, torch.nan, 1.0], device=DEVICE).view(torch.int32)
    for residual, size, wanted in ((0, 3, 0), (1, 1, -1), (1, 3, -1), (2, 3, -1), (3, 3, -1)):
        found = torch.stack([bits[residual], bits[size]]).view(1, 2, 1, 1).contiguous()
        far, (status, counts) = torch.zeros_like(found[0, 0]), torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
        sweep.judge_rows[(1,)](found, far, status, counts, 1, 1, 1, 1e-2, 1e-2, tl.float32)
        assert status.item() == wanted, (residual, size)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@in_float64
def test_a_block_that_does_not_settle_is_as_it_was():
    x = inputs(2, 32, 32)
    layer = make("triton", 1e-9, x.dtype, embed=32, block=BLOCK)
    equation = layer.equation(x)
    args = [a.detach().clone() for a in equation.args]
    args[equation.function.names.index("key")][1, :, 17] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "MOST_SWEEPS", 4)
        forward = substitution._Forward(CausalSystem(equation.function, tuple(args)), layer.solver, "triton", x.dtype)
        before = forward.y.clone(), forward.lse.clone(), forward.residual.clone()
        assert not forward.sweeper.settle(slice(0, 32))
    for now, then in zip((forward.y, forward.lse, forward.residual), before, strict=True):
        assert torch.equal(now, then)


@in_float64
def test_what_followed_on_a_block_that_had_not_settled_is_done_again(monkeypatch):
    """Blocks are gone on from before they are known to have settled; on a device alone, so here it is pretended."""
    cautious, check = [], sweeps.ForwardSweeps.check

    def late(self):
        cautious.append(not self.hopeful)
        if len(cautious) == 2:
            raise Unsettled
        check(self)

    x = inputs(2, 45, 32)
    wanted = run("triton", x, 1e-8, block=BLOCK)[0].value
    monkeypatch.setattr(launches.Sweeps, "check", late)
    begun = []
    init = launches.Sweeps.__init__
    monkeypatch.setattr(
        launches.Sweeps, "__init__", lambda self, s, r, cautious: begun.append(cautious) or init(self, s, r, cautious)
    )
    with torch.no_grad():
        found = make("triton", 1e-8, x.dtype, embed=32, block=BLOCK).solve(x).value
    assert begun == [False, True]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture
def hopeful(monkeypatch):
    """Go on from calm blocks as on a device, on which nothing has to be waited for here; record where that is done."""

    class Done:
        def record(self):
            pass

        def synchronize(self):
            pass

    record, init, goes_on = [], launches.Sweeps.__init__, launches.Sweeps.goes_on

    def begin(self, system, rows, cautious):
        init(self, system, rows, cautious)
        self.hopeful = self.repeats = not cautious
        record.append("cautious" if cautious else "hopeful")

    def went_on(self, n):
        record.append(goes_on(self, n))
        return record[-1]

    def captured(work):
        return SimpleNamespace(replay=lambda: record.append("replay") or work())

    monkeypatch.setattr(launches, "_captured", captured)
    monkeypatch.setattr(torch.cuda, "Event", Done)
    monkeypatch.setattr(launches.Sweeps, "__init__", begin)
    monkeypatch.setattr(launches.Sweeps, "goes_on", went_on)
    monkeypatch.setattr(launches.Wary, "solves", 0)
    return record


@in_float64
def test_blocks_are_gone_on_from_before_they_are_known_to_have_settled(hopeful):
    x = inputs(2, 160, 32)
    ours, grads = run("triton", x, 1e-4, block=BLOCK)
    wanted, wanted_grads = run("torch", x, 1e-9, block=BLOCK)
    assert hopeful.count(True) >= 4, "forward and backward"
    assert hopeful.count("replay") >= 4, "graphs of the first block serve the others"
    assert "cautious" not in hopeful
    torch.testing.assert_close(ours.value, wanted.value, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-3 * float(theirs.abs().max()))


@in_float64
def test_a_block_that_was_wrongly_gone_on_from_is_solved_again(hopeful):
    """Its row is at another root than is wanted, which is seen when the next block has begun."""
    function, args = with_two_roots(100, n=160)
    solver = substitution.ForwardSubstitution(rtol=1e-4, atol=1e-4, kernel="triton", block=BLOCK)
    with torch.no_grad():
        found = solver.equilibrium(function, args, F64)
        wanted = make("torch", 1e-9, F64).solver.equilibrium(function, args, F64).value
    assert True in hopeful
    assert [entry for entry in hopeful if entry in ("hopeful", "cautious")] == ["hopeful", "cautious"]
    assert launches.Wary.solves > 0, "the next solves look at each block"
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are of devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_graphs_give_the_bits_of_single_launches(dtype, monkeypatch):
    x, found = inputs(2, 480, 128, dtype=dtype), []
    for graphs in (True, False):
        if not graphs:
            monkeypatch.setattr(launches.Sweeps, "launch", lambda self, n, done, most, sweep: sweep(done, most))
            monkeypatch.setattr(launches.Sweeps, "goes_on", lambda self, n: False)
        leaf = x.clone().requires_grad_()
        value = make("triton", 1e-2, dtype, embed=128, block=16).solve(leaf).value
        found.append((value.detach(), *torch.autograd.grad(value.float().square().sum(), leaf)))
    assert torch.equal(found[0][0], found[1][0])
