"""Two processes, replicated (DDP) and sharded (FSDP2): the losses of one process, and one kind of checkpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_run import SETTINGS, curve, make_trained, settings, text, train
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from implicit_attention.training import checkpoint, run

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning"),
]


def launch(*arguments, launcher=("torch.distributed.run",), status=0):
    """Run the command in two processes."""
    address = ["--nproc-per-node", "2", "--standalone"]
    if "accelerate" in launcher[0]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--main_process_port", str(port)]  # fmt: skip
    command = [sys.executable, "-m", *launcher, *address, "-m", "implicit_attention.cli", "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=environment)
    assert result.returncode == status, result.stderr
    return result


def flags(chosen):
    pairs = {"data": chosen.data, "out": chosen.out, **{name: getattr(chosen, name) for name in SETTINGS}}
    return [part for name, value in pairs.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The figures of twelve steps in one process."""
    return curve(train(settings(tmp_path_factory.mktemp("alone"), steps=12)).history)


def same(history, expected):
    for entry, other in zip(history, expected, strict=False):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert entry.get(name) == pytest.approx(other.get(name), abs=1e-5), (name, entry["step"])


def test_losses_are_those_of_one_process_and_checkpoints_go_from_mode_to_mode(tmp_path, alone):
    chosen = settings(tmp_path, steps=3)
    result = launch(*flags(chosen))
    assert result.stdout.count("held out:") == 1, "the first process alone reports"
    launch("--out", chosen.out, "--resume", "--steps", "6", "--fsdp")
    launch("--out", chosen.out, "--resume", "--steps", "9", "--no-fsdp", launcher=("accelerate.commands.launch",))
    plan = run.plan({"out": chosen.out, "steps": 12}, {}, resume=True)
    history = curve(run.run(plan).history)
    steps = [entry for entry in history if "loss" in entry]
    same(steps, [entry for entry in alone if "loss" in entry])
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    last = [entry for entry in history if "eval_loss" in entry][-1]
    same([last], [[entry for entry in alone if "eval_loss" in entry][-1]])


def test_sharded_training_from_the_start_gives_the_weights_of_one_process(tmp_path):
    one = settings(tmp_path, steps=3, out=str(tmp_path / "one"))
    train(one)
    two = settings(tmp_path, steps=3, out=str(tmp_path / "two"), accumulate=2)
    launch(*flags(two), "--accumulate", "2", "--fsdp")
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        a, b = (load_file(chosen.directory / "checkpoint-3" / name) for chosen in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            assert (a[key] - b[key]).abs().max() < 1e-5, key
    summary = json.loads((two.directory / "summary.json").read_text())
    assert summary["settings"]["fsdp"]


def test_a_fault_ends_all_processes_with_one_line(tmp_path):
    chosen = settings(tmp_path, batch_size=3)
    result = launch(*flags(chosen), status=1)  # the launcher's own status
    assert (
        result.stderr.count("implicit-attention train: --batch-size: must be a multiple of accumulate x processes") == 1
    )
    assert "exitcode  : 2" in result.stderr


@pytest.mark.parametrize("options", [[], ["--train", "lora", "--learning-rate", "0.01"]], ids=["query-map", "lora"])
@pytest.mark.parametrize("fsdp", ["--fsdp", "--no-fsdp"])
def test_a_trained_model_goes_on_as_in_one_process(tmp_path, options, fsdp):
    source = make_trained(tmp_path / "trained")
    flags = ["--from", source, "--data", text(tmp_path), "--length", 16, "--batch-size", 4, "--steps", 3, "--warmup", 0,
             "--map-rate", 0.1, "--log-every", 1, "--save-every", 2, "--device", "cpu",
             "--layers", 1, *options]  # fmt: skip
    launch(*flags, "--out", tmp_path / "two", fsdp)
    result = CliRunner().invoke(app, ["train", *map(str, flags), "--out", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["history"] for name in ("one", "two"))
    same(curve(two), curve(one))
    weights = [load_file(tmp_path / name / checkpoint.WEIGHTS) for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0]) < 1e-4
