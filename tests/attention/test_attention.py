"""The attention operation: both implementations and the reference against NumPy, and every derivative."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.attention import AttentionSpec, attention, chunked, flash_cpu, reference
from implicit_attention.attention import spec as spec_module
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.positions import ALiBi, RelativeBias
from tests.bridge import array, close

TOL = 1e-12  # float64: rounding of sums of at most 400 terms of order one
SIZES = [(1, 1, 1, 1, 4), (2, 2, 7, 7, 4), (1, 2, 63, 64, 8), (1, 1, 65, 33, 3), (1, 2, 400, 65, 4), (2, 1, 1, 65, 4)]
KINDS = ["plain", "causal", "mask", "causal-mask", "dead-rows", "alibi", "relative", "self", "self-mask"]

sizes = pytest.mark.parametrize("size", SIZES, ids=["B{}-H{}-N{}-M{}-d{}".format(*s) for s in SIZES])
kinds = pytest.mark.parametrize("kind", KINDS)
implementations = pytest.mark.parametrize("implementation", ["flash_cpu", "chunked", "operation"])


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Nothing may read memory that nobody wrote."""


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 1)


def make(size, kind, dtype=torch.float64):
    """A call: spec, (query, key, value), self score or None, bias tensors."""
    B, H, N, M, d = size
    if kind.startswith("self"):
        M = N
    qkv = [torch.randn(B, H, n, d, dtype=dtype) for n in (N, M, M)]
    terms, tensors, own = [], [], None
    if kind.startswith("self"):
        own = torch.randn(B, H, N, dtype=dtype)
    if "mask" in kind:
        terms, tensors = [AdditiveMask(), AdditiveMask()], [torch.rand(1, 1, N, M) < 0.3, torch.randn(B, 1, 1, M)]
    if kind == "dead-rows":
        hidden = torch.rand(B, H, N, M) < 0.3
        hidden[..., N // 2, :] = True
        terms, tensors = [AdditiveMask()], [hidden]
    if kind in ("alibi", "relative"):
        encoding = ALiBi(H) if kind == "alibi" else RelativeBias(H, max_distance=40)
        term, tensor = encoding.bias()
        terms, tensors = [term], [tensor.detach().to(dtype) if kind == "alibi" else torch.randn_like(tensor).to(dtype)]
    causal = kind.startswith(("causal", "self"))
    return AttentionSpec(d**-0.5, causal, tuple(terms)), qkv, own, tuple(tensors)


def plain(spec, qkv, own, tensors):
    """The definition, in NumPy: output and log-sum-exp."""
    q, k, v = map(array, qkv)
    N, M = q.shape[-2], k.shape[-2]
    s = spec.scale * q @ k.swapaxes(-1, -2)
    if own is not None:
        s = np.where(np.eye(N, dtype=bool), array(own)[..., None], s)
    for term, tensor in zip(spec.terms, tensors, strict=True):
        s = s + array(term.block(tensor, slice(0, N), slice(0, M)))
    if spec.is_causal:
        s = np.where(np.tri(N, M, dtype=bool), s, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.logaddexp.reduce(s, axis=-1)
    p = np.exp(s - np.where(np.isfinite(lse), lse, 0.0)[..., None])
    return p @ v, lse


def run(implementation, spec, qkv, own, tensors):
    if implementation == "operation":
        return attention(*qkv, spec, self_score=own, terms=tensors)
    if implementation == "chunked":
        return chunked.forward(spec, None, (*qkv, own, *tensors))
    if not flash_cpu.serves(qkv[0], qkv[2], spec, own):
        pytest.skip("the stock kernel does not serve this call")
    return flash_cpu.forward(spec, (*qkv, own, *tensors))


def refer(spec, qkv, own, tensors):
    """`kernels.reference` on the whole call at once, and its log-sum-exp."""
    rows, cols = slice(0, qkv[0].shape[-2]), slice(0, qkv[1].shape[-2])
    return reference.attend(*qkv, scale=spec.scale, bias=spec.bias(tensors, rows, cols, qkv[0]), self_score=own)


@implementations
@kinds
@sizes
def test_outputs(size, kind, implementation, small_chunks):
    call = make(size, kind)
    out, lse = run(implementation, *call)
    expected, expected_lse = plain(*call)
    close(out, expected, TOL)
    assert np.array_equal(np.isneginf(array(lse)), np.isneginf(expected_lse))
    close(torch.nan_to_num(lse, neginf=0.0), np.where(np.isneginf(expected_lse), 0.0, expected_lse), TOL)


@kinds
@sizes
def test_reference_equals_the_definition(size, kind):
    call = make(size, kind)
    for found, expected in zip(refer(*call), plain(*call), strict=True):
        np.testing.assert_allclose(array(found), expected, rtol=TOL, atol=TOL)


def leaves_of(call):
    spec, qkv, own, tensors = call
    qkv = [t.clone().requires_grad_() for t in qkv]
    own = None if own is None else own.clone().requires_grad_()
    wants = [
        t.is_floating_point() and type(term) is not AdditiveMask for t, term in zip(tensors, spec.terms, strict=True)
    ]
    tensors = tuple(t.clone().requires_grad_() if w else t for t, w in zip(tensors, wants, strict=True))
    leaves = [t for t in (*qkv, own, *tensors) if t is not None and t.requires_grad]
    return (spec, qkv, own, tensors), leaves


@kinds
@sizes
def test_gradients(size, kind, small_chunks):
    call, leaves = leaves_of(make(size, kind))
    out, _ = run("operation", *call)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(refer(*call)[0], leaves, grad)
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        close(found, array(wanted), TOL)


@pytest.mark.parametrize("kind", ["plain", "causal", "self"])
def test_flash_and_chunked_backward_agree(kind, small_chunks):
    spec, qkv, own, tensors = make((2, 2, 65, 65, 4), kind)
    grad = torch.randn_like(qkv[0])
    out, lse = flash_cpu.forward(spec, (*qkv, own, *tensors))
    fast = flash_cpu.backward(spec, grad, (*qkv, own, *tensors), out, lse)
    slow = chunked.backward(spec, None, grad, (*qkv, own))
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, array(b), TOL)


@kinds
def test_first_and_second_derivatives_by_differences(kind, monkeypatch):
    monkeypatch.setattr(spec_module, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(spec_module, "MIN_CHUNK", 2)
    call, leaves = leaves_of(make((2, 1, 3, 3, 1), kind))
    spec, _, own, tensors = call

    def function(*values):
        found = iter(values)
        qkv = [next(found) for _ in range(3)]
        score = None if own is None else next(found)
        rest = tuple(next(found) if t.requires_grad else t for t in tensors)
        return attention(*qkv, spec, self_score=score, terms=rest)[0]

    inputs = tuple(t.detach().requires_grad_() for t in leaves)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@kinds
@sizes
def test_forward_mode(size, kind, small_chunks):
    call, leaves = leaves_of(make(size, kind))
    spec, _, own, tensors = call

    def rebuilt(function, *values):
        found = iter(values)
        qkv = [next(found) for _ in range(3)]
        score = None if own is None else next(found)
        return function(spec, qkv, score, tuple(next(found) if t.requires_grad else t for t in tensors))[0]

    points = tuple(t.detach() for t in leaves)
    tangents = tuple(torch.randn_like(t) for t in points)
    found, expected = (
        torch.func.jvp(partial(rebuilt, f), points, tangents)[1] for f in (partial(run, "operation"), refer)
    )
    close(found, array(expected), TOL)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, None), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "relative", "self"])
def test_vmap(kind, in_dims):
    spec, qkv, own, tensors = make((2, 2, 5, 5, 4), kind)
    count = 3
    mapped = []
    for t, dim in zip(qkv, in_dims, strict=True):
        mapped.append(t if dim is None else torch.randn(count, *t.shape, dtype=t.dtype).movedim(0, dim))

    def function(*qkv):
        return attention(*qkv, spec, self_score=own, terms=tensors)[0]

    def gradient(*qkv):
        return torch.func.grad(lambda *t: function(*t).sin().sum(), argnums=(0, 1, 2))(*qkv)

    for f in (lambda *t: (function(*t),), gradient):
        found = torch.func.vmap(f, in_dims=in_dims)(*mapped)
        for i in range(count):
            one = [t if dim is None else t.select(dim, i) for t, dim in zip(mapped, in_dims, strict=True)]
            for a, b in zip(found, f(*one), strict=True):
                close(a[i], array(b), TOL)


def test_vmap_over_a_bias_table_that_the_batch_shares():
    spec, qkv, _, (table,) = make((2, 2, 5, 5, 4), "relative")
    tables = torch.randn(3, *table.shape, dtype=torch.float64)

    def gradient(table):
        return torch.func.grad(lambda t: attention(*qkv, spec, terms=(t,))[0].sin().sum())(table)

    found = torch.func.vmap(gradient)(tables)
    close(found, array(torch.stack([gradient(t) for t in tables])), TOL)


@implementations
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "self"])
def test_any_strides(kind, implementation):
    spec, qkv, own, tensors = make((2, 3, 9, 9, 4), kind)
    strided = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in qkv]
    assert not any(t.is_contiguous() for t in strided)
    own = None if own is None else own.mT.contiguous().mT
    for t in strided:
        t.requires_grad_()
    out, _ = run(implementation, spec, strided, own, tensors)
    close(out, plain(spec, qkv, own, tensors)[0], TOL)
    found = torch.autograd.grad(run("operation", spec, strided, own, tensors)[0].sin().sum(), strided)
    expected = torch.autograd.grad(refer(spec, strided, own, tensors)[0].sin().sum(), strided)
    for a, b in zip(found, expected, strict=True):
        close(a, array(b), TOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@implementations
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "dead-rows", "self"])
def test_lower_precision(kind, implementation, dtype):
    """No worse than three times what the reference itself loses in that dtype."""
    spec, qkv, own, tensors = make((2, 2, 65, 65, 8), kind, dtype)
    exact = plain(spec, qkv, own, tensors)[0]
    out, lse = run(implementation, spec, qkv, own, tensors)
    lost = np.abs(array(refer(spec, qkv, own, tensors)[0]) - exact).max()
    assert np.abs(array(out) - exact).max() <= 3 * lost
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


def test_huge_scores_do_not_overflow():
    spec, qkv, _, _ = make((1, 1, 5, 5, 4), "causal")
    qkv[0] = qkv[0] * 1e4
    for implementation in ("flash_cpu", "chunked"):
        close(run(implementation, spec, qkv, None, ())[0], plain(spec, qkv, None, ())[0], 1e-9)  # 1e4 roundings


def test_flash_serves_what_it_can():
    spec, (q, _, v), own, _ = make((1, 1, 5, 5, 4), "self")
    assert flash_cpu.serves(q, v, spec, own)
    assert not flash_cpu.serves(q, v[..., :2], spec, own)  # the stock kernel wants values as wide as queries
    assert not flash_cpu.serves(q, v, AttentionSpec(1.0, dropout=0.1), None)
    assert not flash_cpu.serves(q.to("meta"), v, spec, None)
    narrow = plain(spec, (q, q, v[..., :2]), None, ())[0]
    close(attention(q, q, v[..., :2], spec)[0], narrow, TOL)


@given(
    N=st.integers(1, 40),
    M=st.integers(1, 40),
    rows=st.integers(1, 9),
    hide=st.floats(0, 1),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunk_sizes_and_masks_do_not_matter(N, M, rows, hide, causal, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(2, 1, n, 3, dtype=torch.float64, generator=generator) for n in (N, M, M)]
    masks = (torch.rand(2, 1, N, M, generator=generator) < hide,)
    spec = AttentionSpec(0.7, causal, (AdditiveMask(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec_module, "BLOCK_ELEMENTS", 1)
        patch.setattr(spec_module, "MIN_CHUNK", rows)
        expected, _ = plain(spec, qkv, None, masks)
        for implementation in ("flash_cpu", "chunked"):
            close(run(implementation, spec, qkv, None, masks)[0], expected, TOL)


def test_a_third_derivative_is_refused():
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = attention(q, k, v, AttentionSpec(0.5))[0].square().sum()
    for _ in range(2):
        found = torch.autograd.grad(found, q, create_graph=True)[0].square().sum()
    with pytest.raises(NotImplementedError, match=r"differentiable twice.*reference\.attend"):
        torch.autograd.grad(found, q)
