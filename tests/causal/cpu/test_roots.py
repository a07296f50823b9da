"""The row solver in C++ against `rows.solve_rows`."""

import ctypes

import pytest
import torch

from implicit_attention.causal.cpu import library
from implicit_attention.causal.rows import RowProblem, solve_rows


def solve(alpha, beta, offset, gram):
    """One row; None if it is not solved."""
    p = torch.zeros_like(alpha)
    addresses = [None if t is None else t.contiguous() for t in (alpha, beta, offset, gram)]
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*addresses, p)]
    sizes = ctypes.c_int64(len(alpha)), ctypes.c_int64(0 if gram is None else 1)
    return p if library.load().implicit_attention_solve_row(*sizes, *pointers) else None


@pytest.mark.parametrize("normed", [False, True], ids=["linear", "normed"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8], ids=lambda h: f"H{h}")
def test_roots_are_those_of_the_row_solver(heads, normed):
    """Offsets and slopes of standard deviation 3 to 30: rows for each of its methods, the curve among them."""
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count, size = 300, torch.tensor([3.0, 10.0, 30.0], dtype=torch.float64).repeat_interleave(100)[:, None, None]
    query, key = draw(count, 1 + heads, 16), draw(count, heads, 16) * size / 4.0
    score = key @ query.mT
    gram = query @ query.mT / 16.0 if normed else None
    whole = None if gram is None else gram[:, None].expand(-1, heads, -1, -1)
    problem = RowProblem(score[..., 0], score[..., 1:], draw(count, heads) * size[..., 0] - 2.0, whole)
    wanted = solve_rows(problem, 1e-12)
    assert bool(wanted.solved.all())
    for row in range(count):
        p = solve(problem.alpha[row], problem.beta[row], problem.offset[row], None if gram is None else gram[row])
        assert p is not None
        torch.testing.assert_close(p, wanted.p[row], rtol=0.0, atol=1e-9)
