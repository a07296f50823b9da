"""Bad input: the exact exception, and a message that names the argument, what was expected, and what came."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from implicit_attention import (
    ALiBi,
    Anderson,
    Broyden,
    ConvergenceWarning,
    ForwardSubstitution,
    ImplicitQueryAttention,
    ImplicitQueryAttentionLinearV,
    NewtonKrylov,
    Phantom,
    Picard,
    RelativeBias,
    Rotary,
)
from implicit_attention.attention.positions import Positions
from implicit_attention.errors import NonFiniteError, all_finite

D, H, B, N = 4, 2, 2, 3
NAN, INF = float("nan"), float("inf")


def refused(error, *parts):
    """Raises exactly `error`, or NonFiniteError for a ValueError of NaN or Inf, with a message of all the parts.

    The argument is the first part, in backticks.
    """
    kinds = {error, NonFiniteError} if error is ValueError and "NaN" in " ".join(parts) else {error}
    pattern = "".join(f"(?=.*{part})" for part in (f"`{parts[0]}`", *parts[1:]))
    return pytest.raises(error, match=f"(?s)^{pattern}", check=lambda e: type(e) in kinds)


def layer(**options):
    return ImplicitQueryAttention(D, H, **options)


def x(*shape, **options):
    return torch.randn(*(shape or (B, N, D)), **options)


CONSTRUCTOR = {
    "embed_dim-zero": ({"embed_dim": 0}, ValueError, "embed_dim", "> 0", "got 0"),
    "embed_dim-float": ({"embed_dim": 4.0}, TypeError, "embed_dim", "an integer", "got 4.0"),
    "embed_dim-bool": ({"embed_dim": True}, TypeError, "embed_dim", "an integer", "got True"),
    "num_heads-zero": ({"num_heads": 0}, ValueError, "num_heads", "> 0", "got 0"),
    "num_heads-negative": ({"num_heads": -2}, ValueError, "num_heads", "> 0", "got -2"),
    "num_heads-text": ({"num_heads": "2"}, TypeError, "num_heads", "an integer", "2"),
    "num_heads-no-divisor": ({"num_heads": 3}, ValueError, "num_heads", "divisor of embed_dim=4", "got 3"),
    "self_query": ({"self_query": "both"}, ValueError, "self_query", "'output', 'input'", "both"),
    "self_query-unmasked": ({"self_query": "input"}, ValueError, "self_query", "is_causal=True", "input"),
    "self_query-keys": (
        {"self_query": "input", "is_causal": True, "normalize_over": "keys"},
        *(ValueError, "self_query", 'normalize_over="queries"', "no effect"),
    ),
    "normalize_over": ({"normalize_over": "rows"}, ValueError, "normalize_over", "'queries', 'keys'", "rows"),
    "values": ({"values": "none"}, ValueError, "values", "'linear', 'identity'", "none"),
    "is_causal": ({"is_causal": "yes"}, ValueError, "is_causal", "True, False", "yes"),
    "qk_norm": ({"qk_norm": 2}, ValueError, "qk_norm", "True, False", "2"),
    "positions": ({"positions": "sinus"}, ValueError, "positions", '"rope", "alibi" or "relative"', "sinus"),
    "positions-type": ({"positions": 3}, TypeError, "positions", '"rope"', "got 3"),
    "rope-odd": ({"embed_dim": 6, "positions": "rope"}, ValueError, "head_dim", "even", "got 3", "Change embed_dim"),
    "dropout-one": ({"dropout": 1.0}, ValueError, "dropout", r"\[0, 1\)", "got 1.0"),
    "dropout-negative": ({"dropout": -0.1}, ValueError, "dropout", r"\[0, 1\)", "got -0.1"),
    "dropout-nan": ({"dropout": NAN}, ValueError, "dropout", r"\[0, 1\)", "got nan"),
    "scale-zero": ({"scale": 0.0}, ValueError, "scale", "> 0", "got 0.0"),
    "scale-inf": ({"scale": INF}, ValueError, "scale", "finite", "got inf"),
    "scale-text": ({"scale": "big"}, TypeError, "scale", "a number", "big"),
    "solver": ({"solver": "newton"}, ValueError, "solver", '"auto" or a solver object', "newton"),
    "solver-class": ({"solver": Picard}, TypeError, "solver", r"Picard\(\)", "got <class"),
    "solver-number": ({"solver": 3}, TypeError, "solver", '"auto" or a solver object', "3"),
    "dropout-text": ({"dropout": "x"}, TypeError, "dropout", "a number", "'x'"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype", "floating-point", "int32"),
    "rotary-size": ({"positions": Rotary(8)}, ValueError, "positions", "heads of size", "Rotary"),
    "table-size": ({"positions": RelativeBias(3)}, ValueError, "positions", "num_heads=", "RelativeBias"),
    "slopes-size": ({"positions": ALiBi(3)}, ValueError, "positions", "num_heads=", "ALiBi"),
    "adjoint": ({"adjoint": "exact"}, ValueError, "adjoint", '"implicit", "unrolled", "phantom"', "exact"),
    "dtype-text": ({"dtype": "float32"}, TypeError, "dtype", "torch.float32", "got 'float32'"),
    "dtype-8-bits": ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype", "16 bits", "e4m3"),
    "on_failure": ({"on_failure": "shout"}, ValueError, "on_failure", "'warn', 'raise', 'ignore'", "shout"),
}


@pytest.mark.parametrize("case", CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_constructor(case):
    options, error, *parts = case
    with refused(error, *parts):
        ImplicitQueryAttention(**{"embed_dim": D, "num_heads": H} | options)


@pytest.mark.parametrize("make", [ImplicitQueryAttentionLinearV, Anderson], ids=lambda m: m.__name__)
def test_unknown_keywords_are_errors(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_casual'"):
        make(4, is_casual=True)


@pytest.mark.parametrize("make", [ImplicitQueryAttention, ImplicitQueryAttention.for_encoder], ids=["init", "encoder"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("is_casual", "Did you mean `is_causal`?"),
        ("heads", "Did you mean `num_heads`?"),
        ("d_model", "Did you mean `embed_dim`?"),
        ("batch_first", r"\[batch, tokens, width\] always"),
        ("rtol", r"ForwardSubstitution\(rtol=1e-5\)"),
        ("zzz", "lists all options"),
    ],
)
def test_unknown_options_say_what_they_may_have_meant(make, name, remedy):
    with pytest.raises(TypeError, match=f"a layer has no option `{name}`. .*{remedy}"):
        make(D, H, **{name: 1})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("key_pading_mask", "Did you mean `key_padding_mask`?"),
        ("attention_mask", "key_padding_mask=attention_mask == 0"),
        ("is_causal", r"ImplicitQueryAttention\(..., is_causal=True\)"),
        ("key", "query, key and value alike"),
        ("past_key_values", r"layer.make_cache\(...\)"),
        ("zzz", "It takes x, context, attn_mask"),
    ],
)
def test_unknown_inputs_say_what_they_may_have_meant(name, remedy):
    for call in (layer(), layer().solve):
        with pytest.raises(TypeError, match=f"`{name}` is no input of the layer. .*{remedy}"):
            call(x(), **{name: None})


def test_calls_like_those_of_multihead_attention_are_explained():
    with pytest.raises(TypeError, match=r"x is query, key and value alike: layer\(x\).*docs/using.md"):
        layer()(x(), x(), x())
    encoder = nn.TransformerEncoderLayer(D, H, batch_first=True).eval()
    encoder.self_attn = layer()
    with pytest.raises(AttributeError, match=r"unlike nn.MultiheadAttention.*docs/using.md"):
        encoder(x())
    assert "## In place of nn.MultiheadAttention" in (Path(__file__).parents[1] / "docs" / "using.md").read_text()


@pytest.mark.parametrize("cache", [{}, []], ids=["dict", "list"])
def test_a_cache_of_another_kind_is_refused(cache):
    with refused(TypeError, "cache", r"layer.make_cache\(batch_size, capacity\)"):
        layer(is_causal=True)(x(), cache=cache)


def test_long_values_are_described_in_short():
    with refused(TypeError, "x", r"an array of shape \(2, 500, 4\) \(ndarray\)", "torch.as_tensor"):
        layer()(np.zeros((2, 500, 4)))
    with refused(TypeError, "key_padding_mask", r"got \[\[\.\.\.\], .{30,60} \(list\)"):
        layer()(x(), key_padding_mask=[[False] * 500] * 20)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((D,), r"x\[None\]"), ((2, 2, 3, D), r"x.flatten\(0, -3\)"), ((2, 3, D + 1), "last dimension")],
)
def test_the_remedy_for_a_shape_is_that_of_its_fault(shape, remedy):
    with refused(ValueError, "x", remedy):
        layer()(torch.zeros(shape))


def test_a_mask_for_all_heads_is_expanded():
    with refused(ValueError, "attn_mask", rf"mask.expand\(-1, {H}, -1, -1\)"):
        layer()(x(), attn_mask=torch.zeros(2, 1, 3, 3))


def test_nan_in_padding_has_a_remedy():
    holes = x().index_fill(1, torch.tensor(2), NAN)
    hidden = torch.zeros(2, 3, dtype=torch.bool)
    hidden[:, 2] = True
    with refused(
        ValueError, "x", "NaN", "Hidden tokens count, too", r"masked_fill\(key_padding_mask\[..., None\], 0.0\)"
    ):
        layer(is_causal=True)(holes, key_padding_mask=hidden)
    fine = layer(is_causal=True)(holes.masked_fill(hidden[..., None], 0.0), key_padding_mask=hidden)
    assert fine.isfinite().all()


@pytest.mark.parametrize(("name", "written"), [("anderson", "Anderson"), ("newton_krylov", "NewtonKrylov")])
def test_a_solver_by_name_is_told_how_it_is_written(name, written):
    with refused(ValueError, "solver", rf"Write solver={written}\(\)"):
        layer(solver=name)


def test_warnings_point_to_the_line_that_called():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.Sequential(layer(solver=Picard(max_steps=1), query_input=True))(50 * x())
    assert [w.filename for w in caught] == [__file__]


SETTINGS = {
    "rtol-zero": (lambda: Picard(rtol=0.0), ValueError, "rtol", "> 0", "got 0.0"),
    "atol-negative": (lambda: Anderson(atol=-1e-3), ValueError, "atol", ">= 0", "got -0.001"),
    "rtol-nan": (lambda: Broyden(rtol=NAN), ValueError, "rtol", "> 0", "got nan"),
    "atol-inf": (lambda: NewtonKrylov(atol=INF), ValueError, "atol", "finite", "got inf"),
    "rtol-text": (lambda: Picard(rtol="1e-3"), TypeError, "rtol", "a number", "1e-3"),
    "max_steps-zero": (lambda: Picard(max_steps=0), ValueError, "max_steps", "> 0", "got 0"),
    "max_steps-float": (lambda: Picard(max_steps=1e2), TypeError, "max_steps", "an integer", "got 100.0"),
    "damping-zero": (lambda: Picard(damping=0), ValueError, "damping", "> 0", "got 0"),
    "damping-two": (lambda: Picard(damping=2.0), ValueError, "damping", r"\(0, 1\]", "got 2.0"),
    "memory": (lambda: Anderson(memory=0), ValueError, "memory", "> 0", "got 0"),
    "mixing": (lambda: Anderson(mixing=1.5), ValueError, "mixing", r"\(0, 1\]", "got 1.5"),
    "regularization": (lambda: Anderson(regularization=0.0), ValueError, "regularization", "> 0", "got 0.0"),
    "broyden-memory": (lambda: Broyden(memory=2.5), TypeError, "memory", "an integer", "got 2.5"),
    "restart": (lambda: NewtonKrylov(restart=0), ValueError, "restart", "> 0", "got 0"),
    "cycles": (lambda: NewtonKrylov(cycles=-1), ValueError, "cycles", "> 0", "got -1"),
    "forcing": (lambda: NewtonKrylov(forcing=0.0), ValueError, "forcing", "> 0", "got 0.0"),
    "phantom-steps": (lambda: Phantom(steps=0), ValueError, "steps", "> 0", "got 0"),
    "phantom-damping": (lambda: Phantom(damping=1.1), ValueError, "damping", r"\(0, 1\]", "got 1.1"),
    "rotary-odd": (lambda: Rotary(3), ValueError, "head_dim", "even", "got 3"),
    "rotary-base": (lambda: Rotary(4, base=0.0), ValueError, "base", "> 0", "got 0.0"),
    "alibi": (lambda: ALiBi(0), ValueError, "num_heads", "> 0", "got 0"),
    "relative": (lambda: RelativeBias(2, max_distance=0), ValueError, "max_distance", "> 0", "got 0"),
    "seed-iterations": (lambda: ImplicitQueryAttentionLinearV(4, -1), ValueError, "n_iters", ">= 0", "got -1"),
    "seed-dim": (lambda: ImplicitQueryAttentionLinearV(0), ValueError, "embed_dim", "> 0", "got 0"),
}


@pytest.mark.parametrize("case", SETTINGS.values(), ids=SETTINGS)
def test_settings(case):
    make, error, *parts = case
    with refused(error, *parts):
        make()


BOTH = {
    "no-tensor": ([[1.0] * D], TypeError, "x", "a float tensor", "list"),
    "integers": (torch.ones(B, N, D, dtype=torch.long), TypeError, "x", "a float tensor", "int64"),
    "complex": (x(dtype=torch.complex64), TypeError, "x", "a float tensor", "complex64"),
    "one-dimension": (x(D), ValueError, "x", r"\[N, 4\]", r"\(4,\)"),
    "width": (x(B, N, 5), ValueError, "x", "N, 4", r"\(2, 3, 5\)", "embed_dim=4"),
    "no-tokens": (x(B, 0, D), ValueError, "x", "N >= 1", r"\(2, 0, 4\)", "no equilibrium"),
    "dtype": (x(dtype=torch.float64), TypeError, "x", "float32", "float64", r"x\.to\(torch\.float32\)"),
    "float8": (x().to(torch.float8_e4m3fn), TypeError, "x", "float32", "float8", r"x\.to\(torch\.float32\)\)\.$"),
    "device": (x(device="meta"), ValueError, "x", "device, cpu", "on meta", r'or move it: x.to\("cpu"\)'),
    "nan": (x().index_fill(1, torch.tensor(1), NAN), ValueError, "x", "holds 8 NaN or Inf of 24", "Check what made it"),
    "inf": (x().index_fill(1, torch.tensor(1), INF), ValueError, "x", "holds 8 NaN or Inf of 24", "Check what made it"),
}


@pytest.mark.parametrize("make", [layer, lambda: ImplicitQueryAttentionLinearV(D)], ids=["equilibrium", "seed"])
@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
def test_input(case, make):
    value, error, *parts = case
    with refused(error, *parts):
        make()(value)


def test_four_dimensions_are_too_many_for_the_equilibrium():
    with refused(ValueError, "x", r"\[B, N, 4\] or \[N, 4\]", r"\(1, 2, 3, 4\)"):
        layer()(x(1, B, N, D))


MASKS = {
    "attn-shape": (
        {"attn_mask": torch.zeros(N, N + 1)},
        ValueError,
        "attn_mask",
        r"\(3, 3\), \(4, 3, 3\)",
        r"\(3, 4\)",
        "rows",
    ),
    "attn-heads": (
        {"attn_mask": torch.zeros(B, 1, N, N)},
        ValueError,
        "attn_mask",
        r"\(2, 2, 3, 3\)",
        r"\(2, 1, 3, 3\)",
    ),
    "attn-batch": ({"attn_mask": torch.zeros(B, N, N)}, ValueError, "attn_mask", r"\(4, 3, 3\)", r"\(2, 3, 3\)"),
    "attn-integers": ({"attn_mask": torch.zeros(N, N).int()}, TypeError, "attn_mask", "True = hidden", "int32"),
    "attn-list": ({"attn_mask": [[0.0]]}, TypeError, "attn_mask", "a dense tensor: bool", "list"),
    "attn-sparse": ({"attn_mask": torch.zeros(N, N).to_sparse()}, TypeError, "attn_mask", "dense", "sparse one"),
    "attn-float8": (
        {"attn_mask": torch.zeros(N, N).to(torch.float8_e4m3fn)},
        TypeError,
        "attn_mask",
        "16 bits",
        "e4m3",
    ),
    "attn-device": (
        {"attn_mask": torch.zeros(N, N, device="meta")},
        ValueError,
        "attn_mask",
        "device, cpu",
        "meta",
        "Move it",
    ),
    "attn-nan": ({"attn_mask": torch.full((N, N), NAN)}, ValueError, "attn_mask", "NaN"),
    "attn-inf": ({"attn_mask": torch.full((N, N), INF)}, ValueError, "attn_mask", "NaN or Inf"),
    "padding-shape": (
        {"key_padding_mask": torch.zeros(B, N + 1)},
        ValueError,
        "key_padding_mask",
        r"\(2, 3\)",
        r"\(2, 4\)",
    ),
    "padding-integers": (
        {"key_padding_mask": torch.zeros(B, N).long()},
        TypeError,
        "key_padding_mask",
        "bool",
        "int64",
    ),
    "padding-sparse": (
        {"key_padding_mask": torch.zeros(B, N).bool().to_sparse()},
        *(TypeError, "key_padding_mask", "dense", "sparse one"),
    ),
    "padding-nan": ({"key_padding_mask": torch.full((B, N), NAN)}, ValueError, "key_padding_mask", "NaN"),
}


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks(case):
    masks, error, *parts = case
    with refused(error, *parts):
        layer()(x(), **masks)


CONTEXTS = {
    "queries": ({}, x(), ValueError, "context", 'normalize_over="keys"', r"\(2, 3, 4\)", "no query side"),
    "batch": (
        {"normalize_over": "keys"},
        x(3, N, D),
        ValueError,
        "context",
        r"batched like x, \(2, 3, 4\)",
        r"\(3, 3, 4\)",
    ),
    "unbatched": ({"normalize_over": "keys"}, x(N, D), ValueError, "context", "batched like x", r"\(3, 4\)"),
    "width": ({"normalize_over": "keys"}, x(B, N, 5), ValueError, "context", "embed_dim=4", r"\(2, 3, 5\)"),
    "empty": ({"normalize_over": "keys"}, x(B, 0, D), ValueError, "context", "N >= 1", r"\(2, 0, 4\)"),
    "dtype": ({"normalize_over": "keys"}, x().double(), TypeError, "context", "float32", "float64", "Convert it"),
    "nan": ({"normalize_over": "keys"}, x() * NAN, ValueError, "context", "24 NaN or Inf"),
    "causal": (
        {"normalize_over": "keys", "is_causal": True},
        x(B, 5, D),
        ValueError,
        "context",
        "as long as x",
        r"\(2, 5, 4\)",
    ),
}


@pytest.mark.parametrize("case", CONTEXTS.values(), ids=CONTEXTS)
def test_context(case):
    options, context, error, *parts = case
    with refused(error, *parts):
        layer(**options)(x(), context)


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "name", ["Omega_Q.weight", "W_K.weight", "Omega_V.weight", "W_Q.bias", "temperature", "positions.table"]
)
def test_weights_that_are_not_finite(name, bad):
    made = layer(qk_norm=True, query_input=True, bias=True, positions="relative")
    with torch.no_grad():
        parameter = made.get_parameter(name).view(-1)
        parameter[128 if name == "positions.table" else 0] = bad  # the table's entry for i = j
    late = torch.zeros(N, N).masked_fill(torch.ones(N, N).triu(1) > 0, -INF)  # whose -Inf are not to blame
    for masks in ({}, {"attn_mask": late}):
        with refused(NonFiniteError, name, "holds 1 NaN or Inf"):
            made(x(), **masks)


@pytest.mark.parametrize("name", ["Omega_Q.weight", "W_K.weight", "Omega_V.weight"])
def test_seed_weights_that_are_not_finite(name):
    made = ImplicitQueryAttentionLinearV(D)
    with torch.no_grad():
        made.get_parameter(name)[0, 0] = NAN
    with refused(NonFiniteError, name, "holds 1 NaN or Inf"):
        made(x())


def test_out_proj_that_is_not_finite():
    made = layer(out_proj=True)
    with torch.no_grad():
        made.out_proj.weight[0, 0] = NAN
    with refused(NonFiniteError, "out_proj.weight", "holds 1 NaN or Inf"):
        made(x())


def test_infinite_scores_do_not_pass_for_hidden_ones():
    """All scores of a row at -Inf, through an infinite weight: an error, not a row of zeros."""
    made = ImplicitQueryAttention(1)
    with torch.no_grad():
        made.W_K.weight.fill_(INF)
        made.Omega_Q.weight.fill_(-1.0)
        made.Omega_V.weight.fill_(1.0)
    with refused(NonFiniteError, "W_K.weight", "NaN or Inf"):
        made(torch.ones(1, 2, 1))


def test_scores_that_overflow_are_told_apart_from_bad_input():
    with pytest.raises(ValueError, match=r"overflow though the inputs and weights are finite.*qk_norm=True"):
        layer()(torch.full((1, N, D), 1e38) * torch.tensor([1.0, -1.0, 1.0])[:, None])


def test_a_sum_that_overflows_is_no_fault():
    large = torch.full((4,), 3e38)
    assert all_finite(large)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(large.index_fill(0, torch.tensor([2]), bad))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("options", [{"query_input": True}, {"normalize_over": "keys"}, {"is_causal": True}], ids=str)
def test_zeros_are_no_overflow(n, options):
    """A row with one column, whose score and value are 0, has a log-sum-exp of 0, as an overflown one does."""
    mask = None if options.get("is_causal") else ~torch.eye(n, dtype=torch.bool)
    y = ImplicitQueryAttention(4, 2, **options)(torch.zeros(1, n, 4), attn_mask=mask)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize(
    ("typed", "meant"), [("self_qeury", "self_query"), ("max_gian", "max_gain"), ("sover", "solver")]
)
def test_a_misspelt_setting_changes_nothing_and_says_so(typed, meant):
    made = ImplicitQueryAttention.for_causal_lm(4, 2)
    with pytest.warns(UserWarning, match=f"no setting `{typed}`: this changes nothing. Did you mean `{meant}`"):
        setattr(made, typed, "input")
    made.note = made._scales = "of the user's own"  # not like a setting, or private
    made.dropout1 = torch.nn.Dropout(0.1)  # a module that a subclass adds


@pytest.mark.parametrize("query_input", [False, True])
def test_what_makes_a_map_contract_is_a_remedy_that_does_not_collapse(query_input):
    """`max_gain` alone would leave a layer without `query_input` at the mean of the values."""
    made = ImplicitQueryAttention(8, 2, query_input=query_input, solver=Picard(max_steps=2))
    remedy = "a layer with max_gain=0.9" if query_input else "a layer with query_input=True and max_gain=0.9"
    with pytest.warns(ConvergenceWarning, match=remedy):
        made(torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("positions", [ALiBi(2), RelativeBias(2), Rotary(2)], ids=lambda p: type(p).__name__)
def test_positions_of_other_heads_are_refused_when_they_are_exchanged(positions):
    made = ImplicitQueryAttention(16, 4, is_causal=True, positions="alibi")
    with refused(ValueError, "positions"):
        made.positions = positions
    made.positions = "rope"
    assert isinstance(made.positions, Rotary)


class Odd(Positions):
    """An encoding of the user's own that has the wrong shape."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def rotation(self, length, like, first=0):
        return torch.ones(2, length, 1, dtype=like.dtype) if self.kind == "rotation" else None

    def bias(self):
        return ALiBi(2).bias() if self.kind == "bias" else None


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["rotation", "bias"])
def test_encodings_of_the_wrong_shape_are_refused_and_not_read_beyond_their_end(kind, kernel):
    made = ImplicitQueryAttention(16, 4, is_causal=True, positions=Odd(kind), solver=ForwardSubstitution(kernel=kernel))
    with refused(ValueError, "positions", "What is put in its place has the same sizes"):
        made(torch.randn(1, 6, 16))
    if kind == "rotation":  # which would be broadcast without a mask
        with refused(ValueError, "positions"):
            ImplicitQueryAttention(16, 4, query_input=True, positions=Odd(kind))(torch.randn(1, 6, 16))


@pytest.mark.parametrize("given", [None, torch.nn.Parameter(torch.ones(1))], ids=["none", "one"])
@pytest.mark.parametrize("name", ["temperature", "key_norm", "query_norm"])
def test_an_exchanged_norm_has_the_sizes_of_the_settings(name, given):
    made = ImplicitQueryAttention(16, 4, is_causal=True, qk_norm=True if name == "temperature" else "weights")
    setattr(made, name, given)
    with refused(ValueError, name, r"\(4,\)"):
        made(torch.randn(1, 6, 16))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "given"), [("positions", Rotary(2)), ("temperature", None)], ids=["positions", "temperature"]
)
def test_what_is_exchanged_between_two_decode_steps_is_checked(name, given):
    made = ImplicitQueryAttention(16, 4, is_causal=True, positions="rope", qk_norm=True)
    cache = made.make_cache(1, 8)
    made(torch.randn(1, 6, 16), cache=cache)
    made._modules[name] = given  # past the check of `positions` when it is set
    made._parameters.pop(name, None)
    with refused(ValueError, name):
        made(torch.randn(1, 1, 16), cache=cache)
    assert cache.used == 6
