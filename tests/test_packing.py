"""Packed documents: `segments` and `cu_seqlens` give what separate calls give, and no work is done in between."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap

from implicit_attention import (
    Anderson,
    Contraction,
    ForwardSubstitution,
    Implicit,
    ImplicitQueryAttention,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    fixed_point,
)
from implicit_attention.equation import prepare
from implicit_attention.equation.packing import Packing, grouped
from implicit_attention.inspection import diagnostics
from tests.bridge import array, close, make_layer
from tests.test_bad_input import refused

# Both sides are solved to 1e-13 and amplify it by less than 100; see tests/test_layer.py.
TOL = 1e-10
EXACT = ForwardSubstitution(rtol=1e-13, atol=1e-13)
IN_TORCH = ForwardSubstitution(rtol=1e-13, atol=1e-13, kernel="torch", block=4)

CONTRACTING = {"max_gain": 0.9, "solver": Contraction(rtol=1e-13)}
OPTIONS = {
    "seed": {},
    "window": {"window": 3, "num_heads": 2},
    "grouped-rope": {"num_heads": 4, "num_kv_heads": 2, "positions": "rope", "qk_norm": True},
    "query_input-bias": {"num_heads": 2, "query_input": True, "bias": True, "out_proj": True},
    "bias-one_head": {"bias": True},
    "alibi": {"num_heads": 2, "positions": "alibi"},
    "relative-bias": {"num_heads": 2, "positions": "relative", "bias": True},
    "identity": {"num_heads": 2, "values": "identity"},
    "input-rope": {"num_heads": 2, "self_query": "input", "positions": "rope", "query_input": True, "bias": True},
    "input-relative": {"self_query": "input", "positions": "relative", "num_heads": 2, "qk_norm": True},
    "feedback": {"self_query": "input", "values": "feedback", "num_heads": 2, "positions": "rope", "bias": True},
    "torch": {"num_heads": 2, "qk_norm": True, "positions": "rope", "bias": True, "solver": IN_TORCH},
    "keys": {"normalize_over": "keys", "num_heads": 2, "positions": "rope", "query_input": True},
    "picard": {"num_heads": 2, "solver": Picard(rtol=1e-13, atol=1e-13, max_steps=400)},
    "unmasked": {"is_causal": False, "num_heads": 2, "query_input": True, "positions": "rope"},
    "unmasked-keys": {"is_causal": False, "normalize_over": "keys", "num_heads": 2, "query_input": True},
    "contraction": {"is_causal": False, "num_heads": 2, "query_input": True, "positions": "rope", **CONTRACTING},
    "contraction-keys": {
        "is_causal": False,
        "normalize_over": "keys",
        "query_input": True,
        "bias": True,
        **CONTRACTING,
    },
}
LENGTHS = {
    "one": [11],
    "ones": [1] * 9,
    "long-and-short": [70, 1, 1, 3, 1, 2, 1],
    "equal": [5, 5, 5],
    "mixed": [4, 9, 1, 6, 9],
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(options, *, dtype=torch.float64, **more):
    options = {"is_causal": True, "gain": 0.5, **options}
    direct = options["is_causal"] and options.get("normalize_over") != "keys"
    options = ({"solver": EXACT} if direct else {}) | options | more
    return make_layer(8, **options).to(dtype)


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def numbered(lengths):
    """The same number for every second document: what counts is where it changes."""
    return torch.cat([torch.full((n,), 7 * (i % 2)) for i, n in enumerate(lengths)])


def separate(layer, x, lengths, padding=None, mask=None, **options):
    """One call for each document of a sample `[N, D]`."""
    nothing = [None] * len(lengths)
    paddings = nothing if padding is None else padding.split(lengths)
    if mask is not None:
        nothing = [part.split(lengths, 1)[i] for i, part in enumerate(mask.split(lengths))]
    parts = zip(x.split(lengths), paddings, nothing, strict=True)
    return [layer(d, key_padding_mask=p, attn_mask=m, **options) for d, p, m in parts]


def check(layer, x, lengths, tol=TOL, padding=None, mask=None):
    """Values, and gradients of x and of all parameters, for one sample."""
    x = x.detach().requires_grad_()
    inputs = [x, *layer.parameters()]
    packed = layer(x, segments=numbered(lengths), key_padding_mask=padding, attn_mask=mask)
    expected = torch.cat(separate(layer, x, lengths, padding, mask))
    close(packed, array(expected), tol)
    cotangent = torch.randn_like(x)
    found, wanted = (torch.autograd.grad(y, inputs, cotangent, allow_unused=True) for y in (packed, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, array(b), tol)


def tokens(lengths, dtype=torch.float64):
    return torch.randn(sum(lengths), 8, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_option
def test_documents_are_what_they_are_alone(options, lengths):
    check(make(options), tokens(lengths), lengths)


@pytest.mark.parametrize("kind", ["nothing", "hidden", "added"])
@every_option
def test_documents_that_a_mask_keeps_apart_are_what_they_are_alone(options, kind):
    lengths = LENGTHS["mixed"]
    hidden = torch.rand(sum(lengths), sum(lengths)) < (0.3 if kind == "hidden" else 0.0)
    mask = torch.randn(hidden.shape, dtype=torch.float64) if kind == "added" else hidden
    check(make(options), tokens(lengths), lengths, mask=mask)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    options=st.sampled_from(list(OPTIONS.values())),
    hidden=st.sampled_from(["none", "some", "end", "float"]),
    seed=st.integers(0, 2**16),
)
def test_documents_are_what_they_are_alone_whatever_their_lengths(lengths, options, hidden, seed):
    torch.manual_seed(seed)
    padding = {
        "none": None,
        "some": torch.rand(sum(lengths)) < 0.3,
        "end": torch.arange(sum(lengths)) >= sum(lengths) - 3,
        "float": torch.randn(sum(lengths), dtype=torch.float64),
    }[hidden]
    check(make(options), tokens(lengths), lengths, padding=padding)


@given(lengths=st.lists(st.integers(1, 80), min_size=1, max_size=6), seed=st.integers(0, 2**16))
def test_single_precision(lengths, seed):
    """Both sides are solved to 1e-6, and amplify it by less than 100."""
    torch.manual_seed(seed)
    solver = ForwardSubstitution(rtol=1e-6, atol=1e-6)
    check(make(OPTIONS["query_input-bias"], dtype=torch.float32, solver=solver), tokens(lengths, torch.float32),
          lengths, 1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_truth(dtype):
    lengths = LENGTHS["mixed"]
    layer, x = make(OPTIONS["query_input-bias"], solver="auto"), tokens(lengths)
    expected = array(layer(x, segments=numbered(lengths)))
    half = make(OPTIONS["query_input-bias"], dtype=dtype, solver="auto")
    close(half(x.to(dtype), segments=numbered(lengths)), expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        close(layer.float()(x.float(), segments=numbered(lengths)), expected, 0.1)


def test_samples_hold_documents_of_their_own():
    layer, x = make(OPTIONS["grouped-rope"]), torch.randn(2, 7, 8, dtype=torch.float64)
    rows = [[3, 4], [1, 1, 5]]
    segments = torch.stack([numbered(lengths) for lengths in rows]).int()
    found, solution = layer(x, segments=segments), layer.solve(x, segments=segments)
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (2, 7)
    assert bool(solution.converged.all())
    for i, lengths in enumerate(rows):
        close(found[i], array(torch.cat(separate(layer, x[i], lengths))), TOL)
        assert torch.equal(
            layer(x[i], cu_seqlens=boundaries(lengths)), layer(x[i : i + 1], segments=segments[i : i + 1])[0]
        )


def test_boundaries_say_the_same_as_numbers():
    layer, lengths = make(OPTIONS["alibi"]), LENGTHS["mixed"]
    x = tokens(lengths)
    expected = layer(x, segments=numbered(lengths))
    bounds = boundaries(lengths)
    with_empty = torch.cat([bounds[:1], bounds, bounds[-1:]]).long()  # documents without tokens
    for given_ in (bounds, with_empty):
        assert torch.equal(layer(x, cu_seqlens=given_), expected)
        assert torch.equal(layer(x[None], cu_seqlens=given_)[0], expected)


def test_a_number_that_comes_again_is_another_document():
    layer, x = make({}), tokens([2, 3, 2])
    again, other = torch.tensor([1, 1, 0, 0, 0, 1, 1]), torch.tensor([-3, -3, 5, 5, 5, 9, 9])
    assert torch.equal(layer(x, segments=again), layer(x, segments=other))


def test_documents_do_not_see_each_other():
    layer, lengths = make(OPTIONS["grouped-rope"]), LENGTHS["mixed"]
    x = tokens(lengths).requires_grad_()
    y = layer(x, segments=numbered(lengths))
    (by_x,) = torch.autograd.grad(y[4:13].sum(), x)
    assert bool((by_x[4:13] != 0).any())
    assert bool((by_x[:4] == 0).all())
    assert bool((by_x[13:] == 0).all())


@pytest.mark.parametrize("case", ["query_input-bias", "keys", "unmasked", "window"])
def test_weights_are_block_diagonal(case):
    layer = make(OPTIONS[case]).eval()
    x, rows = torch.randn(2, 9, 8, dtype=torch.float64), [[4, 2, 3], [8, 1]]
    segments = torch.stack([numbered(lengths) for lengths in rows])
    for average in (True, False):
        y, weights = layer(x, segments=segments, need_weights=True, average_attn_weights=average)
        close(y, array(layer(x, segments=segments)), 1e-13)
        for i, lengths in enumerate(rows):
            alone = separate(layer, x[i], lengths, need_weights=True, average_attn_weights=average)
            expected = torch.zeros_like(weights[i])
            for (_, block), end in zip(alone, torch.tensor(lengths).cumsum(0).tolist(), strict=True):
                expected[..., end - block.shape[-1] : end, end - block.shape[-1] : end] = block
            close(weights[i], array(expected), TOL)


@pytest.mark.parametrize("case", ["picard", "unmasked", "keys"])
def test_history_and_traces(case):
    layer, lengths = make(OPTIONS[case]), LENGTHS["mixed"]
    x = tokens(lengths)
    solution = layer.solve(x, segments=numbered(lengths), history=True)
    assert torch.equal(solution.history[-1], solution.value)
    assert len(solution.history) == len(solution.abs_trace) == len(solution.rel_trace)
    assert int(solution.steps.max()) == len(solution.history) - 1
    for start, document in zip(boundaries(lengths).tolist(), x.split(lengths), strict=False):
        alone, own = layer.solve(document, history=True), slice(start, start + len(document))
        for step, y in enumerate(alone.history):
            close(solution.history[step][own], array(y), 1e-12)
        trace = alone.abs_trace if alone.abs_trace.dim() == 2 else alone.abs_trace[:, None]
        close(solution.abs_trace[: len(trace), own], array(trace.expand(-1, len(document))), 1e-12)
        assert torch.equal(solution.steps[own], alone.steps.expand(len(document)))


@pytest.mark.parametrize("case", ["torch", "grouped-rope", "input-rope", "picard"])
def test_gains(case):
    layer, lengths = make(OPTIONS[case]), LENGTHS["mixed"]
    x = tokens(lengths)
    solution = layer.solve(x, segments=numbered(lengths), gains=True)
    expected = torch.cat([layer.solve(document, gains=True).gain for document in x.split(lengths)])
    close(solution.gain, array(expected), 1e-9)
    radius = diagnostics.spectral_radius(layer, x[None], segments=numbered(lengths)[None])
    close(radius, array(expected.amax()[None]), 1e-9)


def test_diagnostics_of_packed_documents():
    layer, lengths = make(OPTIONS["unmasked"]), LENGTHS["mixed"]
    x, segments = tokens(lengths)[None], numbered(lengths)[None]
    alone = [diagnostics.spectral_radius(layer, d, iterations=200) for d in x.split(lengths, 1)]
    found = diagnostics.spectral_radius(layer, x, iterations=200, segments=segments)
    close(found, array(torch.stack(alone).amax(0)), 1e-3)  # power iterations
    with refused(ValueError, "segments", "None", "packed documents", "document by document"):
        diagnostics.row_gains(make({}), x, segments=segments)
    with refused(ValueError, "segments", "None", "packed documents", "document by document"):
        diagnostics.contraction_bound(make({}), x, segments=segments)


@pytest.mark.parametrize("case", ["grouped-rope", "unmasked", "keys"])
def test_the_equation_is_the_one_that_is_solved(case):
    layer, lengths = make(OPTIONS[case]), LENGTHS["mixed"]
    x, segments = tokens(lengths)[None], numbered(lengths)[None]
    function, args, start = layer.equation(x, segments=segments)
    y = layer.solve(x, segments=segments).value
    close(function(y, *args), array(y), TOL)
    solver = Anderson(rtol=1e-13, atol=1e-13, max_steps=400)
    close(fixed_point(function, start, args, solver=solver).value, array(y), TOL)


@pytest.mark.parametrize(
    "adjoint",
    [Phantom(), Unrolled(), Implicit(Anderson(rtol=1e-13, max_steps=400))],
    ids=["phantom", "unrolled", "implicit"],
)
def test_other_gradients(adjoint):
    solver = "auto" if isinstance(adjoint, Unrolled) else EXACT
    solver = Anderson(rtol=1e-13, atol=1e-13, max_steps=400) if solver == "auto" else solver
    lengths = LENGTHS["mixed"]
    check(make(OPTIONS["grouped-rope"], adjoint=adjoint, solver=solver), tokens(lengths), lengths)


def test_second_derivatives():
    fallback = NewtonKrylov(rtol=1e-13, atol=1e-13)
    layer = make(OPTIONS["query_input-bias"], solver=ForwardSubstitution(rtol=1e-13, atol=1e-13, fallback=fallback))
    lengths = [3, 1, 4]
    x = tokens(lengths).requires_grad_()
    found = []
    for y in (layer(x, segments=numbered(lengths)), torch.cat(separate(layer, x, lengths))):
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.Omega_Q.weight]))
    for a, b in zip(*found, strict=True):
        close(a, array(b), 1e-9)


def test_transforms():
    layer, lengths = make(OPTIONS["grouped-rope"]), [3, 1, 4]
    x, segments = torch.randn(3, 8, 8, dtype=torch.float64), numbered(lengths)
    many = vmap(lambda one: layer(one, segments=segments))(x)
    close(many, array(layer(x, segments=segments.expand(3, -1))), TOL)
    parameters = dict(layer.named_parameters())
    found = grad(lambda p: functional_call(layer, p, (x[0],), {"segments": segments}).sin().sum())(parameters)
    expected = torch.autograd.grad(layer(x[0], segments=segments).sin().sum(), list(layer.parameters()))
    for a, b in zip(found.values(), expected, strict=True):
        close(a, array(b), TOL)


def test_dropout_is_that_of_a_batch_of_documents():
    layer = make({"num_heads": 2, "dropout": 0.3})
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    found = layer(x.reshape(1, 15, 8), segments=numbered([5, 5, 5])[None])
    close(found.view(3, 5, 8), array(expected), TOL)
    assert not torch.equal(expected, layer.eval()(x))


def test_linear_maps_see_the_tokens_as_they_are_packed():
    """Hooks and adapters: one call each, of the shape that came."""
    layer, seen = make(OPTIONS["query_input-bias"]), []
    for module in (layer.W_K, layer.Omega_V, layer.W_Q, layer.out_proj):
        module.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    layer(torch.randn(2, 9, 8, dtype=torch.float64), segments=torch.stack([numbered([4, 5]), numbered([1, 8])]))
    assert seen == [(2, 9, 8)] * 4


def test_padding_is_no_system_of_its_own():
    """Rows behind the end of a document: explicit, whatever the weights; they neither warn nor count nor get gradients.

    With these weights and biases rows have gains far above 1, which only the row solver finds: of real rows alone.
    """
    layer = make({"num_heads": 2, "bias": True, "query_input": True}, gain=30.0, solver=IN_TORCH)
    lengths = [9, 1, 2]
    assert grouped(tuple(lengths), padded=True) == ((0, 2, 1),)
    x = tokens(lengths).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = layer.solve(x, segments=numbered(lengths), gains=True)
        solution.value.sum().backward()
    assert bool(solution.converged.all())
    assert float(solution.gain.max()) > 1
    inputs = layer._inputs(x, None, segments=numbered(lengths))
    equation = prepare(layer, inputs)
    key = equation.args[equation.function.maps[0].names.index("key")]
    assert bool((key[1, :, 2:] == 0).all())  # no weight depends on an output
    assert bool((key[2, :, 1:] == 0).all())


def test_what_is_not_finite_stays_in_its_document():
    layer, lengths = make({}), LENGTHS["mixed"]
    x = tokens(lengths).requires_grad_()
    y = layer(x, segments=numbered(lengths))
    cotangent = torch.ones_like(y)
    cotangent[5, 0] = torch.nan  # in the second document
    (by_x,) = torch.autograd.grad(y, x, cotangent)
    assert bool(by_x[4:13].isnan().any())
    assert bool(by_x[:4].isfinite().all())
    assert bool(by_x[13:].isfinite().all())
    broken = x.detach().clone()
    broken[5, 0] = torch.nan
    with pytest.raises(ValueError, match="`x` holds 1 NaN"):
        layer(broken, segments=numbered(lengths))


def test_empty_batch():
    layer, x = make(OPTIONS["grouped-rope"]), torch.randn(0, 5, 8, dtype=torch.float64, requires_grad=True)
    segments = torch.zeros(0, 5, dtype=torch.long)
    y, weights = layer(x, segments=segments, need_weights=True)
    assert y.shape == (0, 5, 8)
    assert weights.shape == (0, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert bool(layer.solve(x, segments=segments).converged.all())


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), padded=st.booleans())
def test_batches(lengths, padded):
    lengths = tuple(lengths)
    groups = grouped(lengths, padded=padded)
    assert sorted(document for group in groups for document in group) == list(range(len(lengths)))
    own = [[lengths[document] for document in group] for group in groups]
    assert all(sizes[0] == max(sizes) for sizes in own)
    if padded:  # no worse than all together, or each length for itself
        cost = sum(len(sizes) * sizes[0] + 128 for sizes in own)
        assert cost <= len(lengths) * max(lengths) + 128
        assert cost <= sum(lengths) + 128 * len(set(lengths))
    else:
        assert all(len(set(sizes)) == 1 for sizes in own)


def test_batches_of_known_documents():
    assert grouped((5, 7, 5, 7), padded=False) == ((1, 3), (0, 2))
    assert grouped((128,) * 8, padded=True) == (tuple(range(8)),)
    assert grouped((1000, 1, 1, 2), padded=True) == ((0,), (3, 1, 2))
    assert grouped((200, 190, 210), padded=True) == ((2, 0, 1),)


@given(rows=st.lists(st.lists(st.integers(1, 3), min_size=12, max_size=12), min_size=1, max_size=3))
def test_unpacking_and_packing(rows):
    layer, segments = make({}), torch.tensor(rows)
    x = torch.randn(*segments.shape, 8, dtype=torch.float64)
    packing = Packing.of(layer._inputs(x, None, segments=segments), padded=True)
    parts = packing.unpack(x)
    assert torch.equal(packing.pack(parts), x)
    assert sum(int((part != 0).any(-1).sum()) for part in parts) == segments.numel()  # the rest is zero


BAD = {
    "both": (
        {"segments": torch.zeros(1, 6).long(), "cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "cu_seqlens",
        "None",
    ),
    "segments-float": ({"segments": torch.zeros(1, 6)}, TypeError, "segments", "int32 or int64"),
    "segments-bool": ({"segments": torch.zeros(1, 6).bool()}, TypeError, "segments", "int32 or int64"),
    "segments-list": ({"segments": [0] * 6}, TypeError, "segments", "int32 or int64"),
    "segments-shape": ({"segments": torch.zeros(6).long()}, ValueError, "segments", r"\(1, 6\)", r"\(6,\)"),
    "cu-float": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens", "int32 or int64"),
    "cu-dim": ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, "cu_seqlens", r"\[documents \+ 1\]"),
    "cu-one": ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens", r"\[documents \+ 1\]"),
    "cu-first": (
        {"cu_seqlens": torch.tensor([1, 6])},
        ValueError,
        "cu_seqlens",
        "rising from 0",
        r"6, but got \[1, 6\]",
    ),
    "cu-last": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens", "number of tokens, 6"),
    "cu-falls": ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens", "rising"),
}


@pytest.mark.parametrize(("options", "error", "parts"), [(o, e, p) for o, e, *p in BAD.values()], ids=BAD)
def test_bad_documents(options, error, parts):
    layer = make({})
    for call in (layer, layer.solve, layer.equation):
        with refused(error, *parts):
            call(torch.randn(1, 6, 8, dtype=torch.float64), **options)


def test_documents_and_what_does_not_go_with_them():
    layer, segments = make({}), torch.zeros(2, 6).long()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with refused(ValueError, "attn_mask", "None next to cu_seqlens", "by segments"):
        layer(x[0], attn_mask=torch.zeros(6, 6).bool(), cu_seqlens=torch.tensor([0, 6]))
    with refused(ValueError, "cache", "None next to segments", "document by document"):
        layer(x, cache=layer.make_cache(2, 6), segments=segments)
    with refused(ValueError, "context", "None next to segments", "own call"):
        make({"normalize_over": "keys"})(x, x, segments=segments)
    with refused(ValueError, "cu_seqlens", "None for a batch of 2", r"segments \[B, N\]"):
        layer(x, cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a graph ends
def test_compiled_layers_leave_the_graph():
    layer = ImplicitQueryAttention(8, 2, is_causal=True, positions="rope", out_proj=True)
    x, lengths = torch.randn(9, 8), [4, 5]
    expected = layer(x, segments=numbered(lengths))
    compiled = torch.compile(layer, backend="aot_eager")
    close(compiled(x, segments=numbered(lengths)), array(expected), 1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="lengths of packed documents"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, segments=numbered(lengths))
    torch._dynamo.reset()
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(whole(x, segments=numbered(lengths), attn_mask=torch.zeros(9, 9).bool()), array(expected), 1e-6)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"segments.*exported program.*next to an attn_mask"):
        torch.export.export(layer, (x,), {"segments": numbered(lengths)}, strict=False)
