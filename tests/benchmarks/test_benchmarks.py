"""The benchmarks at toy sizes: that they check before they measure, and measure what they say."""

import dataclasses
import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bidirectional, causal, choosing, decode, hard, measure, packing, page, peers, plotting, reference
from benchmarks.gate import Gate
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from studies import records

TINY = {"batch": 1, "length": 32, "embed_dim": 8, "repeats": 2}


def test_bidirectional_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert command.main(["bidirectional", *arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["correct"]
    assert result["shape"] == [1, 32, 8]
    assert result["dtype"] == "float32"
    assert result["versions"]["torch"] == torch.__version__
    for row in result["results"].values():
        assert len(row["seconds"]) == 2
        assert row["added_peak_bytes"] > 0
    assert "the targets" in result["verdict"]


def test_nothing_is_measured_when_the_results_differ(monkeypatch):
    monkeypatch.setattr(bidirectional, "TOLERANCE", 1e-9)  # out of reach of float32: the limits are too strict
    monkeypatch.setattr(bidirectional.Anderson, "max_steps", 3)
    real = bidirectional.ImplicitQueryAttention
    quiet = lambda *args, **options: real(*args, **options | {"on_failure": "ignore"})  # noqa: E731
    monkeypatch.setattr(bidirectional, "ImplicitQueryAttention", quiet)
    result = bidirectional.run(**TINY)
    assert not result["correct"]
    assert result["verdict"].startswith("WRONG")
    assert "results" not in result


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    for arguments in (["nothing"], ["bidirectional", "--out", str(tmp_path / "missing" / "a.json")]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
    assert "no such directory" in capsys.readouterr().err


def test_added_peak_is_what_stands_at_once():
    kept = torch.zeros(1 << 20)  # held before: not added

    def run():
        for _ in range(3):
            a = kept + 1  # 4 MiB, freed before the next one
            del a
        b = kept + 1
        return (b + kept).sum()

    added = measure.added_peak_bytes(run)
    assert 8 << 20 <= added < 9 << 20


def test_runs_take_turns():
    order = []
    seconds = measure.interleaved_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3, "one round to warm up, two to time"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert measure.timing([3.0, 1.0, 2.0])["median_seconds"] == 2.0


CAUSAL = ["--lengths", "32", "--repeats", "1", "--embed-dim", "64", "--num-heads", "4", "--threads", "1"]
ENTERED = ["ours", "unrolled", "seed", "torchdeq-anderson"]


@pytest.fixture(scope="module")
def causal_result(tmp_path_factory):
    out = tmp_path_factory.mktemp("causal") / "causal.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "GATE_LENGTH", 70)
        assert command.main(["causal", *CAUSAL, "--contestants", *ENTERED, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_causal_writes_its_figures(causal_result):
    result = causal_result
    installed = find_spec("torchdeq") is not None
    names = ["sdpa", *(name for name in ENTERED if installed or not name.startswith("torchdeq"))]
    assert list(result["absent"]) == ([] if installed else ["torchdeq-anderson"])
    assert all(result["gate"]["checks"][name]["correct"] for name in names)
    (shape,) = result["shapes"]
    assert (shape["length"], shape["batch"]) == (32, causal.batch_at(32))
    assert list(shape["rows"]) == names
    for row in shape["rows"].values():
        for figures in (row["forward"], row["forward_backward"]):
            assert len(figures["seconds"]) == 1
            assert figures["added_peak_bytes"] > 0
    assert shape["rows"]["sdpa"]["forward"]["time_ratio"] == 1
    assert shape["rows"]["ours"]["reached_tolerance"]
    ten = [shape["rows"][name]["largest_residual"] for name in ("unrolled", "seed")]
    assert ten[0] == pytest.approx(ten[1], rel=1e-3), "the same ten iterations, by other kernels"
    assert list(shape["memory_by_tolerance"]) == ["0.01", "0.0001", "1e-06"]


def test_shapes_are_those_of_the_targets():
    assert [causal.batch_at(n) for n in causal.LENGTHS] == [8, 4, 2, 1]
    assert set(causal.TIME_TARGETS) <= set(causal.LENGTHS)


def test_a_slow_pass_is_measured_once_and_a_long_one_is_left_out(monkeypatch):
    monkeypatch.setattr(causal, "SLOW_SECONDS", 0.0)
    short = dataclasses.replace(peers.CONTESTANTS["seed"], longest=16)
    monkeypatch.setitem(peers.CONTESTANTS, "seed", short)
    shape = causal.measure_shape(causal.make_layers(16, 2), ["sdpa", "unrolled", "seed"], 24, repeats=3)
    assert list(shape["left_out"]) == ["seed"]
    assert list(shape["rows"]) == ["sdpa", "unrolled"]
    for row in shape["rows"].values():
        assert [row[p]["once_because_slow"] for p in causal.PASSES] == [True, True]
        assert len(row["forward"]["seconds"]) == 1


@pytest.fixture(scope="module")
def gate():
    torch.manual_seed(0)
    return Gate(causal.make_cases(causal.make_layers(32, 4), 1, 70)["output"], 1e-4)


BROKEN = {"output": (1.001, 1.0), "gradient": (1.0, 1.05)}


@pytest.mark.parametrize("name", ["sdpa", "ours", "unrolled"])
@pytest.mark.parametrize("broken", [None, *BROKEN])
def test_the_gate_lets_right_contestants_pass_and_no_others(gate, name, broken):
    contestant = peers.CONTESTANTS[name]
    by_output, by_gradient = BROKEN.get(broken, (1.0, 1.0))

    class Spoilt(peers.Entrant):
        def forward(self):
            return super().forward() * by_output

        def forward_backward(self):
            y, gradients = super().forward_backward()
            return y * by_output, gradients | {"value": gradients["value"] * by_gradient}

    def enter(case, tolerance):
        entrant = contestant.enter(case, tolerance)
        return Spoilt(entrant.case, entrant.leaves, entrant.attend, entrant.failures)

    found = gate.check(dataclasses.replace(contestant, enter=enter))
    if broken == "output" and contestant.settles:  # as far from the equilibrium as its residual says, but not settled
        assert not found["reached_tolerance"]
    else:
        assert found["correct"] == (broken is None)


def test_nothing_is_measured_behind_a_closed_gate(monkeypatch):
    lame = dataclasses.replace(peers.CONTESTANTS["ours"], enter=peers.unrolled)  # ten steps settle nothing here
    monkeypatch.setitem(peers.CONTESTANTS, "ours", lame)
    monkeypatch.setattr(causal, "GATE_LENGTH", 20)
    result = causal.run(lengths=[32], repeats=1, contestants=["ours"], embed_dim=64, num_heads=4, threads=1)
    assert not result["correct"]
    assert result["verdict"] == "WRONG: ours; nothing was measured."
    assert "shapes" not in result


def test_reference_by_dense_linear_algebra():
    """Amplification and implicit gradient against the Jacobian as a matrix."""
    case = causal.make_cases(causal.make_layers(32, 4), 1, 9)["output"]
    y, gradients = reference.equilibrium(case.map, case.tensors, case.cotangent)
    wide = {name: t.double() for name, t in case.tensors.items()}
    torch.testing.assert_close(case.map(y, wide), y, rtol=0, atol=1e-12)
    n = y.numel()
    jacobian = torch.autograd.functional.jacobian(lambda at: case.map(at, wide), y).reshape(n, n)
    inverse = torch.linalg.inv(torch.eye(n).double() - jacobian)
    by_value = torch.autograd.functional.jacobian(lambda v: case.map(y, wide | {"value": v}), wide["value"])
    expected = (case.cotangent.double().flatten() @ inverse @ by_value.reshape(n, -1)).view_as(gradients["value"])
    torch.testing.assert_close(gradients["value"], expected, rtol=0, atol=1e-9)
    largest = float(torch.linalg.matrix_norm(inverse, 2))
    assert 0.9 * largest < reference.amplification(case.map, case.tensors, y, iterations=30) < 1.001 * largest


def test_torchdeq_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "pip install" in peers.available("torchdeq-picard")
    assert peers.available("ours") == ""


DECODE = {"batch": 2, "context": 20, "repeats": 3, "embed_dim": 16, "num_heads": 2, "threads": 1}


def test_decode_writes_its_figures():
    result = decode.run(**DECODE)
    assert result["correct"]
    assert set(result["rows"]) == {
        decode.SDPA, decode.ATTENTION_LAYER, decode.SOLVE, decode.LAYER, decode.PROJECTIONS, decode.BARE_SOLVE,
    }  # fmt: skip
    assert [len(row["seconds"]) for row in result["rows"].values()] == [3] * 6
    assert result["rows"][decode.SDPA]["ratio_to_sdpa"] == 1
    json.dumps(result)


def test_decode_measures_nothing_if_the_context_is_lost(monkeypatch):
    solve = ImplicitQueryAttention.solve
    monkeypatch.setattr(ImplicitQueryAttention, "solve", lambda self, x, cache: solve(self, x))
    result = decode.run(**DECODE)
    assert not result["correct"]
    assert "rows" not in result


def test_the_ordinary_step_is_causal_attention():
    x = torch.randn(2, 6, 8)
    step = decode.OrdinaryAttention(x[:, :4], 2, 6, project=False)
    found = torch.cat([step(x[:, 4:5]), step(x[:, 5:6])], 1)
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    whole = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.testing.assert_close(found, whole.transpose(1, 2).flatten(2)[:, 4:])


def test_packing_writes_its_figures():
    result = packing.run(documents=2, length=5, repeats=2, embed_dim=8, num_heads=2, threads=1)
    assert result["correct"]
    assert result["lengths"]["equal"] == [5, 5]
    assert len(result["lengths"]["mixed"]) == 4
    assert set(result["rows"]["equal"]) == {packing.SAMPLES, packing.PACKED, packing.ONE_BY_ONE}
    assert set(result["rows"]["mixed"]) == {packing.PADDED, packing.PACKED, packing.ONE_BY_ONE}
    assert "targets" in result["verdict"]


def test_packing_measures_nothing_if_documents_see_each_other(monkeypatch):
    real = packing.ImplicitQueryAttention.forward
    blind = lambda layer, x, *, segments=None: real(layer, x)  # noqa: E731
    monkeypatch.setattr(packing.ImplicitQueryAttention, "forward", blind)
    result = packing.run(documents=2, length=5, repeats=2, embed_dim=8, num_heads=2, threads=1)
    assert not result["correct"]
    assert result["verdict"].startswith("WRONG")
    assert "rows" not in result


@pytest.fixture(scope="module")
def hard_result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard, "SWEEP", {"scale": (1.0, 30.0), "num_heads": (1, 2), "length": (1, 9)})
        return hard.run(
            lengths=[8], deviations=[1.5], repeats=1, seeds=1, embed_dim=32, num_heads=2, threads=1
        )  # fmt: skip


def test_hard_writes_its_figures(hard_result):
    assert hard_result["correct"], hard_result["verdict"]
    assert [setting["qk_norm"] for setting in hard_result["settings"]] == [True, False]
    for setting in hard_result["settings"]:
        assert setting["rows"]["scores' std 1.5"]["score_std"] == pytest.approx(1.5, rel=0.03)
        for row in setting["rows"].values():
            assert row["residuals"]["float64"]["largest_residual"] <= 1e-12
    for swept in hard_result["sweep"].values():
        assert swept["rows"] == sum(cell["rows"] for cell in swept["cells"]) == 2 * 2 * (1 + 9)
    json.dumps(hard_result)


def test_a_row_that_fails_in_silence_is_found(monkeypatch):
    layer, x = hard.make_layer(16, 2, qk_norm=True), torch.randn(1, 9, 16)
    solve = ImplicitQueryAttention.solve

    def spoilt(self, x):
        solution = solve(self, x)
        solution.value[0, -1, 0] += 1e-3  # the last row: no other depends on it
        return solution

    solver = ForwardSubstitution(rtol=1e-5, atol=1e-5)
    assert hard.residual(layer, x, torch.float32, solver)["silent_failures"] == 0
    monkeypatch.setattr(ImplicitQueryAttention, "solve", spoilt)
    assert hard.residual(layer, x, torch.float32, solver)["silent_failures"] == 1


def test_the_page_is_what_the_json_makes_it():
    results = page.load()
    assert (page.DOCS / "causal.md").read_text(encoding="utf-8") == page.page(results)
    training = (page.DOCS / "training.md").read_text(encoding="utf-8")
    assert training == page.training_page(training, results.get("language_model"))
    convert = (page.DOCS / "convert.md").read_text(encoding="utf-8")
    assert convert == page.conversion_page(convert, results.get("conversion"), page.load_uptrained())
    guide = (page.DOCS / "choosing.md").read_text(encoding="utf-8")
    assert guide == choosing.filled(guide, records.load(page.DOCS / "data" / "eval"), results.get("contraction"))


def test_the_page_shows_every_figure(causal_result, hard_result):
    made = {"causal": causal_result, "decode": decode.run(**DECODE), "hard": hard_result}
    text = page.page(page.load() | made)
    (shape,) = causal_result["shapes"]
    for name, row in shape["rows"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {peers.CONTESTANTS[name].label} |"))
        for p in causal.PASSES:
            assert f" {row[p]['time_ratio']:.2f} " in line
    assert causal_result["processor"] in text
    for name in ("layer", "feedback"):
        for shape in page.load()[name]["shapes"]:
            for row in list(shape["rows"].values())[1:]:
                assert f" {row['forward']['time_ratio']:.2f} / {row['forward_backward']['time_ratio']:.2f} |" in text
    for row in page.load()["encoder"]["rows"]:
        assert f"| {row['batch']}, {row['length']} | {row['weights']} | {row['time_ratio']:.2f} |" in text
    assert "Not measured" not in text
    assert page.page({}).count("Not measured yet.") == len(page.TITLES)


def test_the_picture_has_a_curve_for_everybody(causal_result):
    drawn = plotting.figure(causal_result)
    rows = causal_result["shapes"][0]["rows"]
    for axes, quantity in zip(drawn.axes, plotting.PANELS, strict=True):
        curves = {line.get_label(): line.get_ydata() for line in axes.lines}
        for name in set(rows) - {"sdpa"}:
            assert curves[peers.CONTESTANTS[name].label] == [rows[name]["forward_backward"][quantity]]


def test_constraints_pin_what_the_benchmarks_need():
    root = Path(page.DOCS).parent
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line[0] != "#")
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {line.split(">=")[0] for line in extras["bench"]} <= set(pins)
