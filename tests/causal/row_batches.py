"""Batches of row problems for tests, and each row's equation in NumPy."""

import numpy as np
import torch

from implicit_attention.causal.rows import RowProblem
from tests.causal.oracle_roots import sigmoid

F64 = torch.float64


def linear(count, heads, spread, *, seed=0, alpha=0.0, offset=5.0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((count, heads), (count, heads, heads), (count, heads))
    a, b, o = (torch.randn(shape, generator=g, dtype=F64) for shape in shapes)
    return RowProblem(alpha * a, spread * b, offset * o)


def normed(count, heads, temperature, *, seed=0, dim=16, offset=5.0):
    """Keys of rms 1 and a query map's raw output `query (1, p)`, as the layer makes them."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(count, heads, heads + 1, dim, generator=g, dtype=F64) / heads**0.5
    key = torch.randn(count, heads, dim, generator=g, dtype=F64)
    key = key / key.square().mean(-1, keepdim=True).sqrt()
    score = temperature * dim**-0.5 * (key[:, :, None] * query).sum(-1)
    gram = query @ query.mT / dim
    gram[..., 0, 0] += 1e-6
    return RowProblem(score[..., 0], score[..., 1:], offset * torch.randn(count, heads, generator=g, dtype=F64), gram)


def make(kind, *args, **options):
    return (normed if kind else linear)(*args, **options)


def single(problem):
    gram = None if problem.gram is None else problem.gram.float()
    return RowProblem(problem.alpha.float(), problem.beta.float(), problem.offset.float(), gram)


def joined(*problems):
    """One batch of several."""
    parts = zip(*((q.alpha, q.beta, q.offset) for q in problems), strict=True)
    gram = None if problems[0].gram is None else torch.cat([q.gram for q in problems])
    return RowProblem(*(torch.cat(part) for part in parts), gram)


def function(problem, row):
    """The right side of row's equation in NumPy, `[C, H] -> [C, H]`."""
    alpha, beta, offset = (t[row].double().numpy() for t in (problem.alpha, problem.beta, problem.offset))
    gram = None if problem.gram is None else problem.gram[row].double().numpy()

    def f(p):
        score = alpha + p @ beta.T
        if gram is not None:
            one_p = np.concatenate([np.ones_like(p[:, :1]), p], -1)
            score = score / np.sqrt(np.einsum("ci,hij,cj->ch", one_p, gram, one_p))
        return sigmoid(score + offset)

    return f


def residuals(problem, p):
    p = p.double().numpy()
    return np.array([np.abs(function(problem, r)(p[r : r + 1])[0] - p[r]).max() for r in range(len(p))])
