"""The benchmark for CUDA devices, where there is none: it says so, and its harness works at toy sizes on the CPU."""

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.peers import OURS, SDPA


def test_without_a_device_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["gpu"]) == 1
    shown = capsys.readouterr()
    assert "NO DEVICE: torch finds no CUDA device here, so nothing was measured." in shown.err
    assert '"correct": false' in shown.out


def test_the_harness_works_on_the_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "GATE_LENGTH", 20)
    monkeypatch.setattr(gpu, "NAMES", (SDPA, OURS, "unrolled"))
    picture = tmp_path / "gpu.png"
    result = gpu.run(
        lengths=(24,),
        head_dims=(8,),
        num_heads=2,
        repeats=1,
        plot=picture,
        device="cpu",
        dtype=torch.float32,
        systems=4,
    )
    assert result["correct"]
    assert result["matmul_flops_per_second"] > 0
    assert picture.stat().st_size > 0
    (shape,) = result["shapes"]
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


def test_wrong_results_are_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "check", lambda layer, names: {name: {"correct": name != OURS} for name in names})
    monkeypatch.setattr(gpu, "measure_shape", lambda *_: pytest.fail("it was measured"))
    result = gpu.run(lengths=(24,), head_dims=(8,), num_heads=2, device="cpu", dtype=torch.float32)
    assert not result["correct"]
    assert result["verdict"] == f"WRONG: {OURS} at d = 8; nothing was measured."


def test_a_shape_that_fails_does_not_lose_the_others(monkeypatch):
    def measure_shape(layer, names, batch, length, *_):
        if length == 48:
            raise torch.cuda.OutOfMemoryError("no room")
        return {"length": length}

    monkeypatch.setattr(gpu, "check", lambda layer, names: {})
    monkeypatch.setattr(gpu, "measure_shape", measure_shape)
    monkeypatch.setattr(gpu, "targets", lambda shapes: [])
    result = gpu.run(lengths=(48, 24), head_dims=(8,), num_heads=2, device="cpu", dtype=torch.float32, systems=4)
    assert result["shapes"] == [{"length": 24}]
    assert result["failed"] == {"d = 8, N = 48, batch 2": "OutOfMemoryError: no room"}
    assert not result["correct"]
    assert "NOT MEASURED: d = 8, N = 48, batch 2." in result["verdict"]


def test_targets_are_held_against_figures():
    def row(ratio, seconds):
        return {"forward_backward": {"time_ratio": ratio, "median_seconds": seconds}}

    rows = {OURS: row(1.6, 1.0), "unrolled": row(9.0, 9.0)}
    shape = {"length": 8192, "head_dim": 64, "rows": rows, "decode": {"time_ratio": 1.2}}
    assert [t["holds"] for t in gpu.targets([shape])] == [False, True, True]
