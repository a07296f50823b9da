"""The Triton kernels that no causal map is needed for: roots of rows, the merge by log-sum-exp, residuals."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch.func import jacfwd, jacrev, vmap

from implicit_attention import Anderson, Implicit, ImplicitQueryAttention, NewtonKrylov, Picard, Unrolled, fixed_point
from implicit_attention.causal.rows import RowProblem, solve_rows
from implicit_attention.causal.triton import sweeps, tiles
from implicit_attention.causal.triton.call import padded
from implicit_attention.causal.triton.kernels import merge
from implicit_attention.causal.triton.kernels.row_equation import solve_row
from implicit_attention.equilibrium import residual
from implicit_attention.equilibrium import triton_available as kernels

pytestmark = pytest.mark.usefixtures("brisk_interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
ROOT = Path(__file__).parents[3]


@triton.jit
def solve_all(alpha, beta, offset, gram, p, solved, count, heads: tl.constexpr, groups: tl.constexpr, hp: tl.constexpr):
    """Solve row problems whose tensors are padded to `hp` heads, one program each."""
    row = tl.program_id(0)
    h = tl.arange(0, hp)
    a = tl.load(alpha + row * hp + h)
    b = tl.load(beta + row * hp * hp + h[:, None] * hp + h[None, :])
    of = gram
    if gram is not None:
        of = gram + row * groups * (hp * hp + hp + 1)
    root, done = solve_row(a, b, tl.load(offset + row * hp + h), of, heads, groups, hp)
    tl.store(p + row * hp + h, root)
    tl.store(solved + row, tl.where(done, 1, 0))


def solve(problem, gram):
    """Solve a RowProblem whose heads have a group each; `gram` is `[R, H, 1 + H, 1 + H]` or None."""
    count, heads = problem.alpha.shape
    hp = padded(heads)

    def wide(t, value=0.0):
        out = t.new_full((count, *(hp for _ in t.shape[1:])), value)
        out[(slice(None), *(slice(0, heads) for _ in t.shape[1:]))] = t
        return out.to(DEVICE)

    forms = None
    if gram is not None:
        parts = [wide(gram[:, g, 1:, 1:]).flatten(1) for g in range(heads)]
        lines = [wide(gram[:, g, 0, 1:]) for g in range(heads)]
        ones = [gram[:, g, :1, 0].to(DEVICE) for g in range(heads)]
        forms = torch.cat([t for three in zip(parts, lines, ones, strict=True) for t in three], 1).contiguous()
    p, solved = torch.zeros(count, hp, dtype=F64, device=DEVICE), torch.zeros(count, dtype=torch.int32, device=DEVICE)
    args = wide(problem.alpha), wide(problem.beta), wide(problem.offset, -torch.inf), forms, p, solved
    solve_all[(count,)](*args, count, heads, heads, hp)
    return p[:, :heads].cpu(), solved.cpu() > 0


@pytest.mark.parametrize("normed", [False, True], ids=["linear", "normed"])
@pytest.mark.parametrize("heads", [1, 2, 4], ids=lambda h: f"H{h}")
def test_roots_are_those_of_the_row_solver(heads, normed):
    """Offsets and slopes of standard deviation 3 to 30; rows that need the curve are left alone, and say so."""
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    count = 18
    size = torch.tensor([3.0, 10.0, 30.0], dtype=F64).repeat_interleave(count // 3)[:, None, None]
    query, key = draw(count, 1 + heads, 16), draw(count, heads, 16) * size / 4.0
    score = key @ query.mT
    gram = (query @ query.mT / 16.0)[:, None].expand(-1, heads, -1, -1) if normed else None
    problem = RowProblem(score[..., 0], score[..., 1:], draw(count, heads) * size[..., 0] - 2.0, gram)
    wanted = solve_rows(problem, 1e-12)
    p, solved = solve(problem, gram)
    assert bool(wanted.solved.all())
    assert int(solved.sum()) >= 0.7 * count
    if heads == 1 and not normed:
        assert bool(solved.all())
    torch.testing.assert_close(p[solved], wanted.p[solved], rtol=0.0, atol=1e-9)


def test_one_linear_head_gives_the_largest_root():
    """Of up to three: `p = sigmoid(-3 + 6 p)` has roots near 0.071, 0.5 and 0.929; others are close to a fold."""
    steep = torch.tensor([6.0, 6.0, 6.0, 12.0, 12.0, 40.0, 40.0, 5.0, 3.0], dtype=F64)
    alpha = torch.tensor([-3.0, -3.3, -2.7, -6.0, -9.0, -20.0, -35.0, -2.5, -1.5], dtype=F64)
    problem = RowProblem(alpha[:, None], steep[:, None, None], torch.zeros(9, 1, dtype=F64))
    p, solved = solve(problem, None)
    assert bool(solved.all())
    torch.testing.assert_close(p, solve_rows(problem, 1e-12).p, rtol=0.0, atol=1e-9)
    grid = torch.linspace(0.0, 1.0, 20001, dtype=F64)
    above = torch.sigmoid(alpha[:, None] + steep[:, None] * grid) > grid
    last = (above.to(torch.long) * torch.arange(20001)).amax(-1)  # the sign changes behind it for the last time
    torch.testing.assert_close(p[:, 0], grid[last], rtol=0.0, atol=1e-4)


def test_infinite_offsets_give_weights_of_zero_and_one():
    offset = torch.tensor([[-torch.inf], [torch.inf]], dtype=F64)
    for heads in (1, 2):
        problem = RowProblem(
            torch.ones(2, heads, dtype=F64), torch.ones(2, heads, heads, dtype=F64), offset.expand(2, heads)
        )
        p, solved = solve(problem, None)
        assert bool(solved.all())
        assert p.tolist() == [[0.0] * heads, [1.0] * heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=lambda d: str(d)[6:])
def test_merge_equals_torch(dtype, poisoned):
    """Rows in the middle, strided parts, rows that see nothing in one part, in the other, in both."""
    batch, heads, length, dim, first, count = 2, 3, 50, 12, 7, 33
    wide = torch.promote_types(dtype, torch.float32)
    y, lse = torch.randn(batch, length, heads, dim, dtype=wide), torch.randn(batch, heads, length, dtype=wide)
    out = torch.randn(batch, count, heads, dim + 3).to(dtype).transpose(1, 2)[..., :dim]
    out_lse = torch.randn(batch, heads, count, dtype=wide)
    lse[0, :, first], out_lse[:, 0, 4], lse[1, 0, first + 4] = -torch.inf, -torch.inf, -torch.inf
    y, lse, out, out_lse = (t.to(DEVICE) for t in (y, lse, out, out_lse))
    rows = slice(first, first + count)
    total = torch.logaddexp(lse[:, :, rows], out_lse)
    share = torch.exp(out_lse - total.clamp_min(torch.finfo(wide).min))[..., None]
    wanted, wanted_lse = y.clone(), lse.clone()
    wanted[:, rows] = torch.lerp(y[:, rows].transpose(1, 2), out.to(wide), share).transpose(1, 2)
    wanted_lse[:, :, rows] = total
    grid = batch * heads, triton.cdiv(count, merge.MERGED)
    merge.merge_rows[grid](
        y, lse, out, out_lse, *out.stride()[:3], *out_lse.stride()[:2], length, first, count, heads, dim, 16,
        merge.MERGED,
    )  # fmt: skip
    allowed = 8 * torch.finfo(wide).eps
    torch.testing.assert_close(y, wanted, rtol=allowed, atol=allowed)
    torch.testing.assert_close(lse, wanted_lse, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 5)], ids=str)
def test_residuals_are_those_of_torch_bit_by_bit(rows, dtype, monkeypatch):
    """Rows that fill no program, and more than one; zeros, subnormal numbers, NaN and Inf among them."""
    monkeypatch.setattr("implicit_attention.equilibrium.residual_kernel.SPAN", 32)
    for length in (1, 31, 33, 70):
        y, f = torch.randn(2, rows[0], rows[1] * length, dtype=dtype, device=DEVICE).unbind()
        y[:, 0], f[:, 0] = f[:, 0].clone(), 1e-41
        for place, value in ((0, 0.0), (-1, torch.inf), (-1, -torch.inf), (0, torch.nan), (-1, torch.nan)):
            f.view(-1)[place] = value
            for mine, theirs in zip(residual.fused(y, f, rows), residual.measured(y, f, rows), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)
    strided = torch.randn(8, 6, dtype=dtype, device=DEVICE)[::2, ::3]
    for mine, theirs in zip(residual.fused(strided, y[:1, :1].expand_as(strided), (4, 2)),
                            residual.measured(strided, y[:1, :1].expand_as(strided), (4, 2)), strict=True):  # fmt: skip
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("solver", [Picard, Anderson, NewtonKrylov], ids=lambda s: s.__name__)
@pytest.mark.parametrize("options", [{}, {"normalize_over": "keys"}], ids=["queries", "keys"])
def test_iterations_measured_by_the_kernel_are_the_same(solver, options):
    """Samples that freeze at different steps, and gradients, whose equation is iterated on as well."""
    outcomes = []
    for kernel in ("triton", "torch"):
        torch.manual_seed(0)
        settings = solver(rtol=1e-8, atol=1e-8, kernel=kernel)
        layer = ImplicitQueryAttention(8, 2, query_input=True, solver=settings, adjoint=Implicit(settings), **options)
        x = torch.randn(3, 5, 8, dtype=F64) * torch.tensor([0.1, 1.0, 3.0], dtype=F64)[:, None, None]
        x = x.to(DEVICE).requires_grad_()
        solution = layer.to(DEVICE, F64).solve(x)
        solution.value.square().sum().backward()
        outcomes.append((solution.value, solution.abs_trace, solution.rel_trace, solution.steps, x.grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*outcomes, strict=True))


def test_transforms_of_unrolled_iterations():
    """Within them tensors have no memory of their own: torch measures."""
    b = torch.tensor([0.3, -0.2, 0.1], dtype=F64, device=DEVICE)

    def solved(b, kernel):
        start = torch.zeros(1, 3, dtype=F64, device=DEVICE)
        solver = Picard(rtol=1e-10, atol=1e-10, kernel=kernel)
        return fixed_point(lambda y, b: torch.cos(0.5 * y) + b, start, (b,), solver=solver, adjoint=Unrolled()).value

    for transform in (jacrev, jacfwd):
        assert torch.equal(transform(solved)(b, "triton"), transform(solved)(b, "torch"))
    with pytest.raises(Exception, match=r"torch.func.vmap does not allow"):
        vmap(lambda b: solved(b, "triton"))(b.expand(2, 3))


def test_a_kernel_that_cannot_measure_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="`kernel` must be one of 'auto', 'torch', 'triton'"):
        Picard(kernel="numba")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'`kernel` must be "auto" or "torch" unless a CUDA device.*on cpu'):
        fixed_point(torch.cos, torch.zeros(1, 2), solver=Picard(kernel="triton"))
    monkeypatch.setattr("implicit_attention.equilibrium.residual.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"implicit-attention\[gpu\]"):
        fixed_point(torch.cos, torch.zeros(1, 2), solver=Picard(kernel="triton"))


@pytest.mark.parametrize("version", ["3.5.1+git1", "3.6.0", "3.10.0", "3.6rc1", "unknown"])
def test_an_old_triton_is_an_error(version, monkeypatch):
    """Its compiler fails on some kernels; what cannot be read is taken for new."""
    monkeypatch.setattr(kernels, "import_module", lambda name: SimpleNamespace(__version__=version))
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    if not version.startswith("3.5"):
        kernels.check_version("kernel='triton'")
        return
    with pytest.raises(ImportError, match=r"needs Triton 3\.6 or newer.* and 3\.5\.1\+git1 is installed. Update"):
        fixed_point(torch.cos, torch.zeros(1, 2), solver=Picard(kernel="triton"))


EVERYTHING = ("norm", "turn", "bias", "added", "strict")


@pytest.mark.parametrize(
    ("room", "dtype", "plain", "stages"),
    [
        (227, torch.bfloat16, True, {64: (3, 3), 128: (3, 2), 256: (3, 2)}),  # Hopper
        (99, torch.float16, True, {64: (2, 3), 128: (2, 1), 256: None}),
        (99, torch.float16, False, {64: (2, 2), 128: (2, 1), 256: None}),
        (227, torch.float32, True, {64: (2, 1), 128: (2, 1), 256: (2, 1)}),
        (64, torch.float32, True, {64: (2, 1), 128: None}),
    ],
    ids=["hopper", "small", "small-biases", "hopper-float32", "tiny"],
)
def test_tiles_fit_into_shared_memory(room, dtype, plain, stages, monkeypatch):
    """Stages of products with Omega_Q, and of attention, by heads' dimension; None where not even one fits."""
    device = SimpleNamespace(shared_memory_per_block_optin=room * 1024)
    key = SimpleNamespace(device=torch.device("cuda"))
    for module in (sweeps, tiles):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    for dim, wanted in stages.items():
        system = SimpleNamespace(
            narrow=dtype, wide=torch.float32, dim=dim, heads=4, groups=4, batch=8, key=key,
            spec=SimpleNamespace(plain=plain),
        )  # fmt: skip
        found = tiles.tiles_for(system)
        assert sweeps.serves(system) == (wanted is not None)
        assert (found and (found.queries["num_stages"], found.attends["num_stages"])) == wanted, dim


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("forward", "bf16", *EVERYTHING),
        ("forward", "fp32", "given"),
        ("adjoint", "bf16", *EVERYTHING),
        ("adjoint", "fp64", "given"),
        ("merge", "fp16"),
        ("token", "bf16", "norm", "turn"),
        ("token-keys", "bf16", "turn"),
        ("token-ends", "fp16"),
        ("queries", "bf16", *EVERYTHING),
        ("queries", "fp32", "start", *EVERYTHING),
        ("attend", "bf16", "start", "strict"),
        ("attend", "fp32", "given"),
        ("judge", "fp32"),
        ("hand-over", "bf16"),
        ("list-rows", "bf16"),
        ("own-equations", "bf16", "turn", "strict"),
        ("compare-roots", "fp32"),
        ("pull-queries", "bf16", *EVERYTHING),
        ("through-map", "fp16"),
        ("own-columns", "bf16", *EVERYTHING),
        ("judge-adjoint", "bf16"),
        ("pull-values", "bf16", "given", "strict"),
        ("pull-keys", "fp32", "strict"),
        ("residual", "fp32"),
        ("residual", "fp64"),
    ],
    ids=lambda a: "-".join(a[:3]),
)
@pytest.mark.kernels
def test_compiles_for_a_device(arguments, tmp_path):
    """The interpreter takes what the compiler refuses: types that change in a loop, names that a branch leaves out."""
    assert "bytes of shared memory" in compiled(arguments, tmp_path)


def compiled(arguments, cache):
    """What `compile_triton` says of a kernel, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "compile_triton.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (("queries", "bf16", "norm"), 128),
        (("attend", "bf16", "start"), 128),
        (("through-map", "bf16"), 128),
        (("pull-queries", "bf16", "norm", "ungrouped"), 168),
        (("pull-values", "bf16", "ungrouped"), 168),
        (("pull-keys", "bf16", "ungrouped"), 168),
    ],
    ids=lambda a: a[0] if isinstance(a, tuple) else str(a),
)
@pytest.mark.kernels
def test_registers_leave_room_for_several_programs(arguments, most, tmp_path):
    """On Hopper, heads of 64: next to nothing is spilled, and a multiprocessor holds two programs or more."""
    said = compiled(arguments, tmp_path)
    assert int(re.search(r"(\d+) registers", said)[1]) <= most
    assert int(re.search(r"(\d+) bytes spill", said)[1]) <= 160
