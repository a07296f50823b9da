"""The benchmarks at toy sizes: that they check before they measure, and measure what they say."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import bidirectional, measure

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
