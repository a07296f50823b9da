"""Whole solves, gradients and decoding steps under the sanitizer: bounds, races, barriers, fresh memory, order.

Each is run again with the programs of its launches in another order, and with NaN in what is allocated: all bits have
to be the same. Sizes are the smallest that have every kind of edge.
"""

import ast
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

import implicit_attention
from implicit_attention import Implicit, ImplicitQueryAttention, Picard
from implicit_attention.causal import forward_substitution as substitution
from implicit_attention.causal.triton import kernels as room
from implicit_attention.causal.triton import launches, sweeps
from implicit_attention.causal.triton.engine import AdjointKernel
from implicit_attention.causal.triton.kernels import merge
from implicit_attention.causal.triton.tiles import Tiles
from implicit_attention.equilibrium import residual_kernel as residual
from implicit_attention.equilibrium.triton_available import interpreted
from tests.bridge import decoded
from tests.causal.triton.sanitizer import sanitized
from tests.causal.triton.test_triton_blocks import DEVICE, F64, OPTIONS, Block, inputs, make, run
from tests.causal.triton.test_triton_sweeps import with_two_roots
from tests.test_decoding import cached, case

pytestmark = pytest.mark.kernels

if not interpreted():
    pytest.skip("this looks into the interpreter; on a device there is compute-sanitizer", allow_module_level=True)

BLOCK = 8  # rows that are left to the kernels of one program per sample
ORDERS = {
    "backwards": lambda count: range(count)[::-1],
    "shuffled": lambda count: np.random.default_rng(count).permutation(count),
}
# What is loaded goes into the store at the same place and nowhere else: whoever stores has read what it stores over,
# and what another warp reads later is thrown away.
HARMLESS = {
    ("merge_rows", "y"), ("_move", "work"), ("pull_values", "d_value"), ("pull_keys", "d_key"),
    ("pull_keys", "largest"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _narrow_blocks(brisk_interpreter):
    """Sweep over 32 rows, so that 45 are a whole block and a part of one, and not 16 times before the first look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "WIDEST", ((0, 32),))
        patch.setattr(sweeps, "_MANY", 8)
        yield


def solve(batch, n, dtype=F64, tol=1e-4, *, dim=16, heads=2, block=BLOCK, **options):
    """Outputs, residuals and all gradients of a layer."""
    x = inputs(batch, n, dim * heads, dtype)
    solution, grads = run("triton", x, tol, heads=heads, block=block, **options)
    return [solution.value, solution.residual, *grads]


def with_own_columns(**options):
    """As `solve`, where the rows' own columns are solved for even if it would do without."""
    plain = sweeps.AdjointSweeps.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps.AdjointSweeps, "solve", lambda self, rows, exactly: plain(self, rows, exactly=True))
        return solve(1, BLOCK + 1, tol=1e-3, **options)


def with_tiles_of_a_device():
    """Tiles that are larger than the blocks, or that hold more heads than there are, or than are left."""
    one = {"num_warps": 4, "num_stages": 1}
    tiles = Tiles(rows=128, width=64, depth=64, queries=one, attended=64, against=64, attends=one, pulls=one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "WIDEST", ((0, 80),))
        for module in (sweeps, launches):
            patch.setattr(module, "tiles_for", lambda system: tiles)
        return solve(1, 101, torch.float32, 1e-2, heads=3)


def with_views():
    """Keys and values that are every second row, and not all columns, of tensors that are NaN elsewhere."""
    layer = make("triton", 1e-4, F64, embed=32, block=BLOCK)
    with torch.no_grad():
        equation = layer.equation(inputs(2, 45, 32))
    args = []
    for name, a in zip(equation.function.names, equation.args, strict=True):
        args.append(a)
        if name in ("key", "value"):
            wider = a.new_full((*a.shape[:2], 2 * a.shape[2] + 1, a.shape[3] + 3), torch.nan)
            args[-1] = wider[:, :, 1::2, 2:-1].copy_(a)
    return both_ways(layer.solver, equation.function, tuple(args))


def with_another_root(row, batch):
    solver = substitution.ForwardSubstitution(rtol=1e-6, atol=1e-6, kernel="triton", block=BLOCK)
    return both_ways(solver, *with_two_roots(row, batch))


@torch.no_grad()
def both_ways(solver, function, args):
    """The equilibrium of a map, and gradients of all of its tensors."""
    found = solver.equilibrium(function, args, F64)
    pulled = solver.adjoint(function, args, found.value, found.memo, found.value, (True,) * len(args))
    return [found.value, found.residual, pulled.residual, *pulled.by_arg]


def after_a_cache(**options):
    """Rows that see columns before the first, some of which are padding."""
    layer, x = make("triton", 1e-4, F64, embed=32, block=BLOCK, **options), inputs(2, 34, 32)
    cache, padding = layer.make_cache(2, 34), torch.zeros(2, 13, dtype=torch.bool, device=DEVICE)
    padding[1, :4] = True
    with torch.no_grad():
        layer.solve(x[:, :13], cache=cache, key_padding_mask=padding)
    new = x[:, 13:].clone().requires_grad_()
    value = layer.solve(new, cache=cache).value
    return [value, *torch.autograd.grad(value.square().sum(), new)]


@torch.no_grad()
def token(name, batch=3, dtype=F64):
    """Decode a token after four."""
    layer, x = case(name, batch=batch, n=5)
    layer, x = layer.to(dtype), x.to(dtype)
    tol = 8 * torch.finfo(dtype).eps ** 0.5
    layer.solver = substitution.ForwardSubstitution(rtol=tol, atol=tol, kernel="triton")
    cache = cached(layer, x[:, :-1])
    found = decoded(layer, x[:, -1:], cache)
    assert found is not None, "the kernels have not solved it"
    return [found.value, found.residual, *cache.past()[:2]]


def iterations():
    """Without a causal mask: residuals alone are the kernel's, of rows that fill no program and more than one."""
    torch.manual_seed(0)
    picard = Picard(rtol=1e-4, atol=1e-4, kernel="triton")
    layer = ImplicitQueryAttention(8, 2, query_input=True, solver=picard, adjoint=Implicit(picard))
    x = torch.randn(3, 5, 8, dtype=F64, device=DEVICE, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "SPAN", 32)
        value = layer.to(DEVICE, F64).solve(x).value
        return [value, *torch.autograd.grad(value.square().sum(), x)]


SOLVES = {
    "sweeps-B3-N45": lambda: solve(3, 45),
    "sweeps-B1-N9-float32-H3": lambda: solve(1, 9, torch.float32, heads=3),
    "sweeps-B2-N33-bfloat16-d32": lambda: solve(2, 33, torch.bfloat16, 2e-2, dim=32),
    "sweeps-rope": lambda: solve(1, 41, torch.float32, 1e-2, **OPTIONS["rope"]),
    "sweeps-groups-alibi": lambda: solve(1, 45, **OPTIONS["groups"], positions="alibi"),
    "sweeps-window": lambda: solve(1, 37, **OPTIONS["window"]),
    "sweeps-relative": lambda: solve(1, 45, positions="relative"),
    "sweeps-query-input": lambda: solve(2, 37, torch.bfloat16, 2e-2, **OPTIONS["input"]),
    "sweeps-self-input": lambda: solve(1, 45, tol=1e-3, **OPTIONS["self-input"]),
    "sweeps-self-input-alibi": lambda: solve(1, 45, **OPTIONS["self-input-alibi"], heads=3),
    "sweeps-tiles-of-a-device": with_tiles_of_a_device,
    "sweeps-other-root": lambda: with_another_root(40, 3),
    "sweeps-views": with_views,
    "sweeps-cache": after_a_cache,
    "sweeps-cache-alibi": lambda: after_a_cache(positions="alibi"),
    "own-columns-norm": lambda: solve(1, 14, tol=1e-3, qk_norm=True),
    "own-columns-groups-rope": lambda: with_own_columns(heads=4, num_kv_heads=2, positions="rope", qk_norm=True),
    "one-program-B3-N1": lambda: solve(3, 1, block=64),
    "one-program-blocks": lambda: solve(1, 45, block=20, dim=8),
    "one-program-bfloat16-d24": lambda: solve(2, 18, torch.bfloat16, 2e-2, dim=24, block=64),
    "one-program-rope-groups": lambda: solve(1, 17, torch.float32, 1e-2, dim=8, block=64, heads=4, num_kv_heads=2,
                                             **OPTIONS["rope"]),
    "one-program-alibi": lambda: solve(3, 17, block=64, **OPTIONS["alibi"]),
    "one-program-query-input-window": lambda: solve(2, 18, block=64, **OPTIONS["input"], window=5),
    "one-program-self-input-alibi": lambda: solve(2, 18, block=64, **OPTIONS["self-input-alibi"]),
    "one-program-hard-H1": lambda: solve(1, 12, tol=1e-6, dim=16, heads=1, block=64, hard=15.0),
    "one-program-hard-norm-rope": lambda: solve(1, 12, block=64, hard=10.0, **OPTIONS["input"], **OPTIONS["rope"]),
    "token": lambda: token("qk_norm-rope"),
    "token-groups-float32-B1": lambda: token("groups", 1, torch.float32),
    "token-query-input-window": lambda: token("query_input") + token("window"),
    "token-one-head": lambda: token("one-head-qk_norm") + token("identity"),
    "iterations": iterations,
}  # fmt: skip


# An interpreted solve takes seconds. The order of programs is changed where each kernel runs, and over several samples.
EACH_KERNEL = ("own-columns-norm", "one-program-blocks", "one-program-hard-H1", "token", "iterations")
TWICE = (
    *EACH_KERNEL,
    "sweeps-B3-N45",
    "sweeps-groups-alibi",
    "sweeps-views",
    "one-program-alibi",
    "token-groups-float32-B1",
)
MEANT = {"sweeps": "attend_rows", "own": "own_columns", "one": "solve_block", "token": "settle_token"}


@cache
def seen(name):
    """What a solve finds, and what the sanitizer has seen of it."""
    with sanitized(harmless=HARMLESS) as first:
        found = SOLVES[name]()
    assert MEANT.get(name.split("-")[0], "largest_in_rows") in first.launches
    return found, first


@pytest.mark.parametrize("name", [name for name in SOLVES if name not in TWICE])
def test_solves_are_clean(name, poisoned):
    assert all(bool(torch.isfinite(t).all()) for t in seen(name)[0])


@pytest.mark.parametrize("name", TWICE)
def test_solves_are_clean_and_know_no_order(name, request):
    wanted, first = seen(name)
    order = list(ORDERS)[TWICE.index(name) % len(ORDERS)]
    request.getfixturevalue("poisoned")
    with sanitized(ORDERS[order], HARMLESS) as second:
        found = SOLVES[name]()
    assert first.launches == second.launches
    for mine, other in zip(found, wanted, strict=True):
        assert bool(torch.isfinite(mine).all())
        assert torch.equal(mine, other), order


@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 3), (4, 2)]),
    st.sampled_from([8, 16, 24]), st.sampled_from([torch.float32, torch.bfloat16, F64]),
)  # fmt: skip
@settings(max_examples=5)
def test_any_sizes_are_clean(batch, n, heads, dim, dtype):
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-2
    with sanitized(harmless=HARMLESS):
        found = solve(batch, n, dtype, tol, dim=dim, heads=heads[0], num_kv_heads=heads[1])
    assert all(bool(torch.isfinite(t).all()) for t in found)


def launched_kernels():
    """The names of Triton functions that the package launches, `kernel[grid](...)`, found by reading it."""
    names = set()
    for path in Path(implicit_attention.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                of = node.func.value
                names.add(of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", ""))
    modules = [importlib.import_module(f"{room.__name__}.{of.name}") for of in pkgutil.iter_modules(room.__path__)]
    modules.append(residual)
    return {name for name in names if any(isinstance(getattr(m, name, None), InterpretedFunction) for m in modules)}


def test_every_kernel_is_seen_and_every_excuse_is_needed():
    enough = [seen(name)[1] for name in EACH_KERNEL]
    assert {name for one in enough for name in one.launches} == launched_kernels()
    assert set().union(*(one.excused for one in enough)) == HARMLESS


# At sizes that no memory here holds: what is wanted lies outside of the tensors, and the finding says where.


def merged_rows_far_apart():
    y, lse = numbers(64).view(1, 4, 1, 16), numbers(4).view(1, 1, 4)
    merge.merge_rows[(1, 1)](y, lse, y, lse, 0, 0, 2**30, 0, 0, 4, 0, 4, 1, 16, 16, merge.MERGED)


def settled_rows_far_on():
    layer = make("triton", 1e-4, F64)
    equation = layer.equation(inputs(1, 18))
    system = substitution.CausalSystem(equation.function, tuple(a.detach() for a in equation.args))
    kernel = substitution._Forward(system, layer.solver, "triton", F64).kernel
    kernel.told |= {"key_n": 2**20, "value_n": 2**20}
    kernel.settle(slice(3072, 3088))


def solved_rows_far_on():
    block = Block(18)
    at = block.at()
    named = {"y": at.y, "query": at.query, "inverse": at.inverse, "lse": at.lse}
    kernel = AdjointKernel(at.system, named, block.grad, block.later, block.allowed, 18)
    kernel.told |= {"key_n": 2**20, "value_n": 2**20}
    kernel.solve(slice(3072, 3088))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize(
    ("work", "arguments"),
    [(merged_rows_far_apart, ["out"]), (settled_rows_far_on, ["key", "value"]), (solved_rows_far_on, ["key", "value"])],
    ids=["merge", "forward", "adjoint"],
)
def test_rows_are_found_beyond_32_bits(work, arguments):
    with pytest.raises(AssertionError, match="out of bounds") as found, sanitized(harmless=HARMLESS):
        work()
    for argument in arguments:
        assert re.search(rf"load of `{argument}`, element 32\d{{8}},", str(found.value)), argument


# What the sanitizer is there to find.


@triton.jit
def shift(x, y, n, by, masked: tl.constexpr, span: tl.constexpr):
    """Each program copies `span` numbers to where they are so many further on."""
    at = tl.program_id(0) * span + tl.arange(0, span)
    inside = at < n
    if masked:
        inside = inside & (at + by < n) & (at + by >= 0)
    tl.store(y + at + by, tl.load(x + at, mask=inside), mask=inside)


@triton.jit
def take_numbers(counter, taken, looks: tl.constexpr):
    """Each program takes the next number, or, if it looks, the last."""
    number = tl.atomic_add(counter, 1.0)
    if looks:
        tl.debug_barrier()
        number = tl.load(counter)
    tl.store(taken + tl.program_id(0), number)


@triton.jit
def leave_numbers(x, each: tl.constexpr, span: tl.constexpr):
    """Each program stores its number in one place, or its lanes two by two."""
    at = tl.arange(0, span) // each
    tl.store(x + at, (tl.program_id(0) + at).to(tl.float32))


@triton.jit
def turn_around(x, scratch, again: tl.constexpr, barriers: tl.constexpr, span: tl.constexpr):
    """Through scratch, whose elements other threads load than those that stored them."""
    at = tl.arange(0, span)
    tl.store(scratch + at, tl.load(x + at))
    if barriers:
        tl.debug_barrier()
    last = tl.load(scratch + span - 1 - at)
    if again:
        tl.store(scratch + at, last)
    tl.store(x + span + at, last)


def numbers(count):
    return torch.arange(count, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(
    ("by", "n", "said"),
    [
        (0, 17, r"load of `x`, element 16, \+1 from its own; shift\(2, 0, 0\), shift:\d+"),
        (1, 16, r"store of `y`, element 16, \+1 from its own; shift\(1, 0, 0\)"),
        (-1, 16, r"store of `y`, element -1, -1 from its own; shift\(0, 0, 0\)"),
    ],
    ids=["load", "store", "before"],
)
def test_one_element_too_far_is_found(by, n, said):
    """Where another tensor of the launch is, too."""
    x, y = numbers(32).chunk(2)
    with pytest.raises(AssertionError, match="^out of bounds: " + said), sanitized():
        shift[(3,)](x, y, n, by, False, 8)
    assert x.tolist() == list(range(16)), "what is found is not done"
    with sanitized() as clean:
        shift[(3,)](x, y, 16, by, True, 8)
    assert clean.launches == {"shift": 1}


def test_what_lies_between_the_rows_of_a_view_is_found():
    x, y = numbers(32).view(4, 8)[:, :6], numbers(32)
    with pytest.raises(AssertionError, match=r"^out of bounds: load of `x`, element 6, \+1 from its own"), sanitized():
        shift[(1,)](x, y, 8, 0, True, 8)
    with sanitized():
        shift[(1,)](x, y, 6, 0, True, 8)


RACE = r"^race: {} of `{}`, element {}, {} by program \({}, 0, 0\) before; \w+\({}, 0, 0\)"


@pytest.mark.parametrize(
    ("order", "said"),
    [(range, ("load", "x", 8, "store", 0, 1)), (ORDERS["backwards"], ("store", "y", 8, "load", 1, 0))],
    ids=["forwards", "backwards"],
)
def test_what_one_program_loads_and_another_stores_is_found(order, said):
    x = numbers(24)
    with pytest.raises(AssertionError, match=RACE.format(*said)), sanitized(order):
        shift[(2,)](x, x, 16, 8, False, 8)
    with sanitized(order):
        shift[(2,)](x[:8], x, 8, 8, False, 8)


def test_what_two_programs_store_is_found():
    with pytest.raises(AssertionError, match=RACE.format("store", "x", 0, "store", 0, 1)), sanitized():
        leave_numbers[(2,)](numbers(4), 1, 4)
    with pytest.raises(AssertionError, match=r"^two lanes: store of `x`, to one element"), sanitized():
        leave_numbers[(1,)](numbers(4), 2, 4)
    with sanitized():
        leave_numbers[(1,)](numbers(4), 1, 4)


def test_what_is_loaded_beside_atomics_is_found():
    with pytest.raises(AssertionError, match=RACE.format("atomic", "counter", 0, "load", 0, 1)), sanitized():
        take_numbers[(2,)](numbers(1), numbers(2), True)


def test_what_depends_on_the_order_shows():
    """Atomics among themselves are no race, whatever is made of what they return."""
    found = []
    for order in (range, *ORDERS.values()):
        found.append(numbers(8))
        with sanitized(order):
            take_numbers[(8,)](numbers(1), found[-1], False)
    assert found[0].tolist() == list(range(8))
    assert found[1].tolist() == list(range(8))[::-1]
    assert sorted(found[2].tolist()) == found[0].tolist() != found[2].tolist()


def test_what_lacks_a_barrier_is_found():
    with pytest.raises(AssertionError, match=r"^no barrier since store: load of `scratch`"), sanitized():
        turn_around[(1,)](numbers(16), numbers(8), False, False, 8)
    with pytest.raises(AssertionError, match=r"^no barrier since load: store of `scratch`"), sanitized():
        turn_around[(1,)](numbers(16), numbers(8), True, True, 8)
    with pytest.raises(AssertionError, match=r"^no barrier since load by the same lanes: store of `y`"), sanitized():
        shift[(1,)](*[numbers(8)] * 2, 8, 0, True, 8)
    with sanitized(harmless={("shift", "y")}):
        turn_around[(1,)](numbers(16), numbers(8), False, True, 8)


def test_fresh_memory_that_is_read_shows(poisoned):
    found = numbers(8)
    shift[(1,)](torch.empty_like(found), found, 8, 0, True, 8)
    assert bool(found.isnan().all())
