"""The benchmark for CUDA devices, where there is none: it says so, and its harness works at toy sizes on the CPU."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.peers import OURS, SDPA
from studies.suite import tables


def test_without_a_device_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["gpu"]) == 1
    shown = capsys.readouterr()
    assert "NO DEVICE: torch finds no CUDA device here, so nothing was measured." in shown.err
    assert '"correct": false' in shown.out


SMALL = {"lengths": (24,), "head_dims": (8,), "num_heads": 2, "device": "cpu", "dtype": torch.float32, "systems": 4}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "GATE_LENGTH", 20)
    monkeypatch.setattr(gpu, "NAMES", (SDPA, OURS, "unrolled"))
    monkeypatch.setattr(gpu, "BLOCK_LENGTHS", (16,))
    monkeypatch.setattr(gpu, "BLOCK_HEADS", 2)
    monkeypatch.setattr(gpu, "BLOCK_DIM", 8)
    monkeypatch.setattr(gpu, "tables", lambda budget: tables("smoke"))


def test_the_harness_works_on_the_cpu(small, tmp_path):
    picture, kept = tmp_path / "gpu.png", tmp_path / "gpu.json"
    result = gpu.run(**SMALL, repeats=1, plot=picture, keep=kept)
    assert result["correct"]
    assert result["matmul_flops_per_second"] > 0
    assert result["kernel"].keys() == {8}
    assert picture.stat().st_size > 0
    block, shape, recall = result["rows"].values()
    assert (block["kind"], block["length"]) == ("block", 16)
    assert block["time_ratio"] > 0
    assert (recall["kind"], recall["steps"]) == ("recall", 2)
    assert 0 <= recall["score"] <= 1
    assert (shape["batch"], shape["length"], shape["head_dim"]) == (2, 24, 8)
    assert shape["rows"][SDPA]["forward_backward"]["time_ratio"] == 1.0
    assert shape["rows"][OURS]["reached_tolerance"]
    for name in (SDPA, OURS, "unrolled"):
        for passes in ("forward", "forward_backward"):
            assert shape["rows"][name][passes]["median_seconds"] > 0
            assert shape["rows"][name][passes]["share_of_matmul_rate"] > 0
    assert shape["decode"]["time_ratio"] > 0
    assert shape["iteration"].keys() == {SDPA, "map", "torch"}
    assert shape["blocks"] == {}, "the blocks are Triton's"
    assert torch.get_default_dtype() == torch.float32
    assert json.loads(kept.read_text())["rows"].keys() == result["rows"].keys()


def test_wrong_results_are_not_measured(monkeypatch):
    monkeypatch.setattr(gpu, "check", lambda layer, names: {name: {"correct": name != OURS} for name in names})
    monkeypatch.setattr(gpu, "measure_shape", lambda *_: pytest.fail("it was measured"))
    result = gpu.run(**SMALL)
    assert not result["correct"]
    assert result["verdict"] == f"WRONG: {OURS} at d = 8; nothing was measured."


@pytest.fixture
def stubbed(monkeypatch):
    """Rows that say how often they were measured; one of them fails."""
    measured = []

    def measure_shape(layer, names, batch, length, *_):
        measured.append(length)
        if length == 48:
            raise torch.cuda.OutOfMemoryError("no room")
        return {"length": length}

    monkeypatch.setattr(gpu, "check", lambda layer, names: {})
    monkeypatch.setattr(gpu, "BLOCK_LENGTHS", ())
    monkeypatch.setattr(gpu, "recall", lambda device: {"kind": "recall", "score": 1.0})
    monkeypatch.setattr(gpu, "measure_shape", measure_shape)
    monkeypatch.setattr(gpu, "shape_targets", lambda shape: [])
    return measured


def test_a_shape_that_fails_does_not_lose_the_others(stubbed):
    result = gpu.run(**{**SMALL, "lengths": (48, 24)})
    assert result["rows"].keys() == {"d = 8, N = 24, batch 2", "recall"}
    assert result["failed"] == {"d = 8, N = 48, batch 2": "OutOfMemoryError: no room"}
    assert not result["correct"]
    assert "NOT MEASURED: d = 8, N = 48, batch 2." in result["verdict"]


def test_a_second_call_measures_what_the_first_one_left(stubbed, tmp_path):
    kept = tmp_path / "gpu.json"
    first = gpu.run(**SMALL, keep=kept)
    assert first["correct"]
    assert stubbed == [24]
    second = gpu.run(**{**SMALL, "lengths": (24, 12)}, keep=kept)
    assert stubbed == [24, 12], "what is there is not measured again"
    assert second["rows"].keys() == {"d = 8, N = 24, batch 2", "d = 8, N = 12, batch 2", "recall"}
    third = gpu.run(**{**SMALL, "dtype": torch.float64}, keep=kept)
    assert stubbed == [24, 12, 24], "figures of another dtype are no figures of this one"
    assert third["rows"].keys() == {"d = 8, N = 24, batch 2", "recall"}


def test_no_row_begins_after_the_budget(stubbed):
    result = gpu.run(**SMALL, budget=0.0)
    assert (result["rows"], result["failed"], stubbed) == ({}, {}, [])
    assert result["left"] == ["d = 8, N = 24, batch 2", "recall"]
    assert "LEFT for the same command: d = 8, N = 24, batch 2; recall." in result["verdict"]
    assert result["correct"], "what had no time is not wrong"


def test_an_interrupted_row_is_left_and_the_others_are_kept(stubbed, monkeypatch, tmp_path):
    def interrupted(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "recall", interrupted)
    result = gpu.run(**SMALL, keep=tmp_path / "gpu.json")
    assert result["rows"].keys() == {"d = 8, N = 24, batch 2"}
    assert result["left"] == ["recall"]


def test_targets_are_held_against_figures():
    def row(ratio, seconds):
        return {"forward_backward": {"time_ratio": ratio, "median_seconds": seconds}}

    rows = {OURS: row(1.6, 1.0), "unrolled": row(9.0, 9.0)}
    shape = {"kind": "shape", "length": 8192, "head_dim": 64, "rows": rows, "decode": {"time_ratio": 1.2}}
    block, recall = {"kind": "block", "time_ratio": 1.6}, {"kind": "recall", "score": 0.995}
    found = gpu.targets({"block, N = 512": block, "recall": recall, "d = 64, N = 8192, batch 8": shape})
    assert [t["holds"] for t in found] == [False, True, False, True, True]
    assert found[0]["what"] == "training step of a block, N = 512"
