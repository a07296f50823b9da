"""The arms: equally large, causal where they say so, and each what it is said to be."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from implicit_attention import ImplicitQueryAttention
from implicit_attention.tasks.models import Convolution
from studies import ARMS, BUDGETS, arm_named, build, flops, tables
from studies.models import matching_width, parameters
from studies.suite import chosen
from tests.studies.simple import SIZES, Before

CAUSAL, FREE = Before(), Before(is_causal=False)
TABLES = [pytest.param(table, id=f"{budget}-{name}") for budget in BUDGETS for name, table in tables(budget).items()]


@pytest.mark.parametrize("table", TABLES)
def test_parameters_are_within_two_percent(table):
    counts = [parameters(build(ARMS[row.arm], table.task, row.sizes, 0)) for row in table.rows.values()]
    assert max(counts) / min(counts) <= 1.02


def test_every_table_can_be_named_alone():
    for name in tables("cpu"):
        assert [table.name for table in chosen("cpu", name)] == [name]


def test_a_width_that_cannot_match_is_refused():
    with pytest.raises(ValueError, match=r"`mlp` must be so wide that ordinary-2 can have \d+ parameters within 2%"):
        matching_width(ARMS["ordinary-2"], CAUSAL, replace(SIZES, mlp=1))


def test_arms_of_a_seed_share_their_embedding():
    embeddings = [build(arm, CAUSAL, SIZES, 3).embedding.weight for arm in ARMS.values() if not arm.free_only]
    assert all(torch.equal(embeddings[0], other) for other in embeddings[1:])
    assert not torch.equal(embeddings[0], build(ARMS["gru"], CAUSAL, SIZES, 4).embedding.weight)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if not arm.free_only])
def test_causal_arms_do_not_look_ahead(name):
    model = build(ARMS[name], CAUSAL, SIZES, 0)
    for parameter_name, parameter in model.named_parameters():  # biases of zero would hide a mask that is shifted
        if parameter_name.endswith("table"):
            parameter.data.normal_()
    tokens = torch.randint(5, (2, 12))
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 5
    with torch.no_grad():
        before, after = model(tokens), model(later)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=2e-3, rtol=0)  # equilibria are solved to 1e-4
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 0.05


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.causal_only])
def test_arms_that_need_a_mask_say_so(name):
    with pytest.raises(ValueError, match="`arm` must be one that exists without a causal mask"):
        build(ARMS[name], FREE, SIZES, 0)


def test_the_bounded_arm_is_a_contraction_and_has_no_mask():
    (layer,) = [m for m in build(ARMS["bounded"], FREE, SIZES, 0).modules() if isinstance(m, ImplicitQueryAttention)]
    assert layer.max_gain == 0.9
    with pytest.raises(ValueError, match="`arm` must be one that exists under a causal mask"):
        build(ARMS["bounded"], CAUSAL, SIZES, 0)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_precision_is_that_of_the_equilibria(name):
    model = build(ARMS["implicit"], CAUSAL, replace(SIZES, precision=name, tolerance=3e-2), 0)
    logits, solutions = model.solve(torch.randint(5, (2, 12)))
    assert (logits.dtype, solutions[0].value.dtype) == (torch.float32, getattr(torch, name))
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_precision_without_autocast_is_refused():
    with pytest.raises(ValueError, match="`precision` must be one of float32, bfloat16, float16"):
        replace(SIZES, precision="float64")


def test_unknown_arm_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'implicit'"):
        arm_named("implict")


def test_the_implicit_arms_differ_in_one_option_each():
    made = {}
    for name in ("implicit", "strict", "feedback"):
        (layer,) = [m for m in build(ARMS[name], CAUSAL, SIZES, 0).modules() if isinstance(m, ImplicitQueryAttention)]
        made[name] = (layer.self_query, layer.values)
    assert made == {"implicit": ("output", "linear"), "strict": ("input", "linear"), "feedback": ("input", "feedback")}


def test_recurrent_rows_attend_to_outputs_of_the_rows_before():
    """Against the definition, in float64, one score at a time."""
    model = build(ARMS["recurrent"], CAUSAL, replace(SIZES, qk_norm=False), 0).double()
    (block,) = model.blocks
    attention, x = block.attention, torch.randn(1, 6, 16, dtype=torch.float64)
    attention.positions.table.data.normal_()
    outputs = []
    for i in range(6):
        sources = [block.norm_mixer(y) for y in outputs] + [block.norm_mixer(x[0, i])]
        query = attention.W_Q(block.norm_mixer(x[0, i]))
        mixed = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            scores = torch.stack([
                query[part] @ attention.W_K(s)[part] * 8**-0.5 + attention.positions.table[h, min(i - j, 4) + 4]
                for j, s in enumerate(sources)
            ])  # fmt: skip
            mixed.append(sum(w * attention.W_V(s)[part] for w, s in zip(scores.softmax(0), sources, strict=True)))
        h1 = x[0, i] + attention.out_proj(torch.cat(mixed))
        outputs.append(h1 + block.mlp(block.norm_mlp(h1)))
    torch.testing.assert_close(block.apply_to(x)[0][0], torch.stack(outputs), atol=1e-12, rtol=1e-12)


def test_looped_is_its_own_blocks_in_a_row():
    model = build(ARMS["looped"], CAUSAL, SIZES, 0)
    twice = copy.deepcopy(model)
    twice.blocks.extend(copy.deepcopy(model.blocks))
    twice.loops = 1
    tokens = torch.randint(5, (2, 12))
    torch.testing.assert_close(model(tokens), twice(tokens))
    assert parameters(model) == parameters(build(ARMS["ordinary"], CAUSAL, SIZES, 0))


@pytest.mark.parametrize("name", ["ordinary", "ordinary-2", "looped"])
def test_operations_are_those_that_torch_counts(name):
    """Without a mask: torch counts the scores that a mask hides, the formula does not."""
    model, tokens = build(ARMS[name], FREE, SIZES, 0), torch.randint(5, (3, 12))
    with FlopCounterMode(display=False) as counted:
        model(tokens).sum().backward()
    assert flops.training_step(model, 3, 12) == counted.get_total_flops()


def test_queries_that_start_from_values_cost_the_query_map_once_more():
    """Layers with `self_query="input"` apply Omega_Q to the start, and then to the solution."""
    models = [build(ARMS[name], CAUSAL, replace(SIZES, mlp=64), 0) for name in ("implicit", "strict")]
    for model in models:
        model.blocks[0].mlp = models[0].blocks[0].mlp
    iterated, strict = (flops.training_step(model, 3, 12, [1]) for model in models)
    assert strict - iterated == 3 * 3 * 12 * 2 * 16 * 16


def test_operations_of_an_equilibrium_grow_with_its_steps():
    model = build(ARMS["implicit"], CAUSAL, SIZES, 0)
    one, two, three = (flops.training_step(model, 3, 12, [steps]) for steps in (1, 2, 3))
    again = 2 * 12 * 16 * 16 + 4 * 16 * 12 * 13 / 2  # Omega_Q of 12 tokens; 78 pairs, all within one block
    assert two - one == three - two == 3 * 3 * again


def test_the_delta_rule_is_its_definition():
    """In float64, one token and head at a time."""
    torch.manual_seed(0)
    (block,) = build(ARMS["delta"], CAUSAL, SIZES, 0).double().blocks
    mixer, x = block.mixer, torch.randn(2, 6, 16, dtype=torch.float64)
    for convolution in mixer.convolutions:
        convolution.taps.data.normal_()
    expected = torch.zeros(2, 6, 16, dtype=torch.float64)
    q, k, v = (F.silu(c(w(x))) for w, c in zip(mixer.projections, mixer.convolutions, strict=True))
    for b in range(2):
        for h in range(2):
            part, state = slice(8 * h, 8 * h + 8), torch.zeros(8, 8, dtype=torch.float64)
            for t in range(6):
                query, key = (z[b, t, part] / z[b, t, part].norm() for z in (q, k))
                decay = torch.exp(-mixer.log_speed[h].exp() * F.softplus(mixer.decay(x[b, t])[h]))
                write = 2 * torch.sigmoid(mixer.write(x[b, t])[h])
                state = decay * state
                state = state + write * torch.outer(key, v[b, t, part] - key @ state)
                expected[b, t, part] = mixer.norm(query @ state)
    wanted = mixer.out_proj(expected * F.silu(mixer.gate(x)))
    torch.testing.assert_close(mixer.mix(x)[0], wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("taps", [2, 4])
def test_a_convolution_adds_its_last_tokens(taps):
    convolution, x = Convolution(3, taps), torch.randn(1, 5, 3)
    torch.testing.assert_close(convolution(x), x)
    convolution.taps.data.normal_()
    expected = x.clone()
    for i in range(5):
        for back in range(min(taps, i + 1)):
            expected[0, i] += convolution.taps[:, 0, taps - 1 - back] * x[0, i - back]
    torch.testing.assert_close(convolution(x), expected)
    (block,) = build(ARMS[f"keys-{taps}"], CAUSAL, SIZES, 0).blocks
    assert block.mixer.convolution.taps.shape == (16, 1, taps)


@pytest.mark.parametrize(("name", "implicit"), [("strict", 4), ("strict-one", 1), ("strict-half", 2)])
def test_some_arms_are_implicit_in_some_blocks_only(name, implicit):
    model = build(ARMS[name], CAUSAL, replace(SIZES, blocks=4), 0)
    layers = [any(isinstance(m, ImplicitQueryAttention) for m in block.modules()) for block in model.blocks]
    assert sum(layers) == implicit
    assert layers[0]
    assert layers[2] == (name != "strict-one")
