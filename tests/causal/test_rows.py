"""Row problems: every row solved or flagged, its root the oracle's, whatever else is in the batch."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from implicit_attention.causal.curve import BRISK, CAREFUL, _land, follow_curve
from implicit_attention.causal.rows import RowProblem, solve_rows
from tests.causal.oracle_roots import largest_roots, row_root, scanned_root
from tests.causal.row_batches import F64, function, joined, linear, make, normed, residuals, single

each_kind = pytest.mark.parametrize("normed", [False, True], ids=["linear", "normed"])


def solved(problem, tolerance, **options):
    """The solution, with what it says of itself checked and every row within tolerance."""
    found = solve_rows(problem, tolerance, **options)
    assert bool(found.solved.all()), f"{int((~found.solved).sum())} rows of {len(found.solved)} are not solved"
    assert float(found.residual.max()) <= tolerance
    assert bool(((found.p >= 0) & (found.p <= 1)).all())
    return found


# One head


def one_head_rows(count):
    g = torch.Generator().manual_seed(0)
    beta, offset = (size * (2 * torch.rand(count, generator=g, dtype=F64) - 1) for size in (100, 50))
    return RowProblem(torch.zeros(count, 1, dtype=F64), beta[:, None, None], offset[:, None])


def test_one_head_finds_the_largest_root_of_all_rows():
    problem = one_head_rows(100_000)
    found = solved(problem, 1e-12)
    c, beta = problem.offset[:, 0].numpy(), problem.beta[:, 0, 0].numpy()
    expected = largest_roots(c, beta)
    slope = 1 - beta * expected * (1 - expected)  # of the residual: what its rounding means for p
    room = np.minimum(1e-12 / np.abs(slope) + 1e-14, np.sqrt(4e-12 / (1 + np.abs(beta))))
    assert (np.abs(found.p[:, 0].numpy() - expected) <= room).all()


def test_one_head_in_float32_with_scores_of_hundreds():
    problem = single(one_head_rows(10_000))
    problem = replace(problem, beta=5 * problem.beta, offset=5 * problem.offset)
    found = solved(problem, 1e-5)
    expected = largest_roots(problem.offset[:, 0].double().numpy(), problem.beta[:, 0, 0].double().numpy())
    assert (np.abs(found.p[:, 0].numpy() - expected) < 2e-3).mean() > 0.9999  # but where two roots nearly meet


def test_the_curve_of_one_head_leads_to_the_largest_root():
    """`t = (1 - p) / (1 - target(p))` is a function of p there, so the curve arrives at the largest root first."""
    problem = replace(one_head_rows(4000), offset=one_head_rows(4000).offset - 0.3 * one_head_rows(4000).beta[:, 0])
    found = follow_curve(problem, BRISK)[:, 0].numpy()
    expected = largest_roots(problem.offset[:, 0].numpy(), problem.beta[:, 0, 0].numpy())
    assert np.abs(found - expected).max() < 1e-6
    score = normed(60, 1, 8.0)
    found = follow_curve(score, BRISK)[:, 0].numpy()
    for row in range(60):
        f = function(score, row)
        assert found[row] == pytest.approx(scanned_root(lambda p, f=f: p - f(p[:, None])[:, 0]), abs=1e-9)


# Several heads: which root, and that there is one


@each_kind
def test_roots_are_the_oracles(normed):
    """All three ways are taken, and each leads to the root that it leads to in NumPy."""
    ways = []
    for heads, spread in [(2, 4.0), (3, 8.0), (4, 15.0)] + [(1, 12.0)] * normed:
        problem = make(normed, 14, heads, spread, seed=heads)
        found = solved(problem, 1e-12)
        for row in range(len(found.p)):
            root, way = row_root(function(problem, row), heads, 1e-13)
            ways.append(way)
            np.testing.assert_allclose(found.p[row], root, atol=1e-9, err_msg=f"{heads} heads, row {row}: {way}")
    assert set(ways) == {"picard", "newton", "curve"}


TELLING = {  # rows where another ratio, reach, length, least decrease, clamp or order would lead to another root
    "H2-linear": (
        linear(20_000, 2, 5.0, seed=11),
        [553, 1095, 1620, 3036, 1438, 2228, 1547, 3252, 7909, 8704, 307, 451, 256, 912],
    ),
    "H4-linear": (
        linear(20_000, 4, 10.0, seed=13),
        [193, 198, 3370, 7527, 454, 1018, 1, 148, 488, 1369, 147, 260, 41, 108, 4, 42, 65, 84],
    ),
    "H2-normed": (
        normed(20_000, 2, 8.0, seed=15),
        [219, 764, 3674, 5700, 1865, 2367, 1471, 5973, 673, 717, 16, 213],
    ),
}


@pytest.mark.parametrize("name", TELLING)
def test_roots_are_the_oracles_where_rules_matter(name):
    problem, rows = TELLING[name]
    problem = problem.rows(torch.tensor(rows))
    found = solved(problem, 1e-12)
    expected = np.stack([row_root(function(problem, row), found.p.shape[1], 1e-13)[0] for row in range(len(rows))])
    np.testing.assert_allclose(found.p, expected, atol=1e-9)


def test_an_arrival_where_t_falls_is_refused():
    """Of the roots 0.071, 0.5 and 0.929 of `p = sigmoid(-3 + 6 p)`, the middle one is no curve's first arrival."""
    beta, offset = torch.full((2, 1, 1), 6.0, dtype=F64), torch.full((2, 1), -3.0, dtype=F64)
    problem = RowProblem(torch.zeros(2, 1, dtype=F64), beta, offset)
    before, after = torch.tensor([[[0.94, 0.98], [0.6, 0.9]], [[0.92, 1.02], [0.4, 1.1]]], dtype=F64)
    landed = _land(problem, before, after, BRISK)
    assert float(landed[0, 0]) == pytest.approx(0.92928, abs=1e-5)
    assert bool(landed[1].isnan())


@each_kind
@pytest.mark.parametrize(("heads", "spread"), [(2, 30.0), (4, 30.0), (8, 5.0), (8, 30.0), (16, 5.0)])
def test_rows_are_solved_in_both_precisions(heads, spread, normed):
    problem = make(normed, 1000 // heads, heads, spread, seed=1)
    found = solved(problem, 1e-12)
    assert (residuals(problem, found.p) <= 2e-12).all()
    problem = single(problem)
    found = solved(problem, 1e-5)
    assert found.p.dtype == torch.float32
    assert (residuals(problem, found.p) <= 2e-5).all()


@each_kind
@pytest.mark.parametrize("spread", [5.0, 30.0])
@pytest.mark.parametrize("heads", [2, 4, 8, 16])
def test_all_of_two_thousand_rows_are_solved(heads, spread, normed):
    solved(make(normed, 2000, heads, spread, seed=3), 1e-12)


@pytest.mark.parametrize(
    "problem",
    [linear(5000, 3, 5.0, seed=7), normed(10_000, 1, 3.0, seed=7), normed(8000, 2, 8.0, seed=7)],
    ids=["H3-linear", "H1-normed", "H2-normed"],
)
def test_brisk_and_careful_curves_agree(problem):
    """Among so many rows, a few show jumps to a piece that runs the other way, or past t = 1 and back."""
    torch.testing.assert_close(follow_curve(problem, BRISK), follow_curve(problem, CAREFUL), rtol=0, atol=1e-8)


def test_an_unsolved_row_is_flagged_and_leaves_the_others_alone():
    problem = linear(20, 3, 6.0)
    expected = solved(problem, 1e-12)
    for bad in (problem.alpha, problem.beta, problem.offset):
        bad[7] = torch.nan
    found = solve_rows(problem, 1e-12)
    assert found.solved.tolist() == [row != 7 for row in range(20)]
    rest = torch.arange(20) != 7
    torch.testing.assert_close(found.p[rest], expected.p[rest], rtol=0, atol=1e-12)
    one_head = one_head_rows(3)
    one_head.beta[1] = torch.nan
    assert solve_rows(one_head, 1e-12).solved.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_what_cannot_be_reached_is_said(dtype):
    """Tolerances below rounding: `solved` is the residual's own word."""
    problem = linear(300, 4, 10.0)
    problem = problem if dtype == F64 else single(problem)
    found = solve_rows(problem, 1e-17)
    assert torch.equal(found.solved, found.residual <= 1e-17)
    assert not bool(found.solved.all())
    assert float(found.residual.max()) < 200 * torch.finfo(dtype).eps


def test_no_rows():
    for heads, kind in [(1, False), (1, True), (3, False), (3, True)]:
        found = solve_rows(make(kind, 0, heads, 3.0), 1e-12)
        assert found.p.shape == (0, heads)
        assert found.solved.shape == found.residual.shape == (0,)


def test_rows_that_need_the_curve_are_left_if_asked():
    problem = linear(300, 4, 20.0)
    quick, whole = solve_rows(problem, 1e-12, thorough=False), solved(problem, 1e-12)
    assert 0 < int(quick.solved.sum()) < 300
    torch.testing.assert_close(quick.p[quick.solved], whole.p[quick.solved], rtol=0, atol=0)


# A row depends on itself alone


@each_kind
def test_a_row_alone_equals_the_row_in_a_batch(normed):
    problem = joined(*(make(normed, 20, 4, spread, seed=2) for spread in (1.0, 5.0, 20.0)))
    for part, tolerance in ((problem, 1e-12), (single(problem), 1e-5)):
        whole = solved(part, tolerance)
        alone = torch.cat([solved(part.rows(slice(r, r + 1)), tolerance).p for r in range(60)])
        torch.testing.assert_close(alone, whole.p, rtol=0, atol=1e-9 if part is problem else 1e-6)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(solved(part.rows(order), tolerance).p, alone[order], rtol=0, atol=1e-6)


def test_threads_do_not_matter():
    problem = linear(3000, 4, 10.0)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(solved(problem, 1e-12).p)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


# Rows without others, rows without themselves


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_infinite_offsets_in_every_combination(heads, dtype, normed):
    choices = torch.tensor(list(product([-torch.inf, torch.inf, 0.7], repeat=heads)), dtype=F64)
    problem = make(normed, len(choices) * 8, heads, 12.0, seed=5)
    offset = choices.repeat(8, 1)
    problem = replace(problem, offset=torch.where(offset.isinf(), offset, problem.offset))
    problem = problem if dtype == F64 else single(problem)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    found = solved(problem, tolerance)
    assert bool((found.p[torch.isposinf(offset)] == 1).all())
    assert bool((found.p[torch.isneginf(offset)] == 0).all())
    assert (residuals(problem, found.p) <= 2 * tolerance).all()
    curve = follow_curve(problem.double(), BRISK)
    assert not bool(curve.isnan().any())


# Branches


def low_and_high():
    """Two heads that do not mix, each `p = sigmoid(-3 + 6 p)`: roots near 0.071, 0.5 and 0.929."""
    beta = 6.0 * torch.eye(2, dtype=F64).expand(4, 2, 2)
    problem = RowProblem(torch.zeros(4, 2, dtype=F64), beta, torch.full((4, 2), -3.0, dtype=F64))
    return problem, 0.07072, 0.92928


def test_a_nearby_root_keeps_its_branch():
    problem, low, high = low_and_high()
    nan = torch.nan
    near = torch.tensor([[low, low], [low, high], [nan, nan], [low, 0.2]], dtype=F64)
    found = solved(problem, 1e-12, near=near)
    expected = torch.tensor([[low, low], [low, high], [high, high], [high, high]], dtype=F64)
    torch.testing.assert_close(found.p, expected, rtol=0, atol=1e-4)
    assert bool(near[2].isnan().all()), "`near` is the caller's"
    moved = replace(problem, offset=problem.offset + torch.tensor([[0.005], [0.5], [0.0], [0.0]], dtype=F64))
    found = solved(moved, 1e-12, near=expected)
    assert float(found.p[0].max()) < 0.1
    assert float(found.p[1].min()) > 0.9, "the scores changed by half a nat: solved anew, from p = 1"


def test_near_roots_may_be_saturated_in_float32():
    problem = single(linear(200, 4, 30.0))
    roots = solved(problem, 1e-5).p
    assert bool(((roots == 1) | (roots < 1e-9)).any())
    moved = replace(problem, alpha=problem.alpha + 1e-4)
    found = solve_rows(moved, 1e-5, roots, thorough=False)
    assert float(found.solved.float().mean()) > 0.95, "most need no curve, however hard they were at first"
    kept = found.solved & ((found.p - roots).abs().amax(-1) < 1e-2)
    assert float(kept.float().mean()) > 0.95


def test_the_last_bit_of_a_saturated_weight_does_not_cost_the_branch():
    beta = torch.diag(torch.tensor([0.0, 6.0])).expand(3, 2, 2)
    problem = RowProblem(torch.zeros(3, 2), beta, torch.tensor([16.6, -3.0]).expand(3, 2))
    ulp = 2.0**-24
    near = torch.tensor([[1.0, 0.07072], [1.0 - ulp, 0.07072], [1.0 - 2 * ulp, 0.07072]])
    assert float(solved(problem, 1e-5, near=near).p[:, 1].max()) < 0.1
