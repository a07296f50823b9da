"""`implicit-attention train` and `generate` as a person meets them: help, figures, one line for each fault."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from implicit_attention.cli import faults
from implicit_attention.cli import train as command
from implicit_attention.cli.app import app
from implicit_attention.training import run
from implicit_attention.training.settings import FIELDS, flag

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
ROOT = Path(__file__).parents[2]
SMALL = ["--length", "16", "--embed-dim", "16", "--heads", "2", "--batch-size", "4", "--steps", "4", "--warmup", "50",
         "--learning-rate", "0.1", "--log-every", "1", "--eval-every", "2", "--save-every", "2",
         "--device", "cpu", "--kernel", "torch"]  # fmt: skip


def invoke(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="implicit-attention", **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"".join(b"line %d of %d\n" % (i, 7 * i) for i in range(400)))
    return path


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    """A run by the command, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "new" / "run"
    return out, invoke("train", "--data", text, "--out", out, *SMALL)


def test_train_prints_its_figure_and_leaves_model_summary_and_curve(done):
    out, result = done
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    line = f"held out: {summary['bits_per_byte']:.4f} bits per byte (implicit, tiny, 4 steps, seed 0, "
    assert result.stdout.startswith(line)
    assert result.stdout.count("\n") == 1
    assert result.stderr.count(": held out ") == 2, "a line for each evaluation"
    assert [f"step {i}/4: loss " in result.stderr for i in range(1, 5)] == [True] * 4, "and for each entry of the logs"
    assert "tokens/s" in result.stderr
    assert "residual" in result.stderr
    assert summary["settings"]["embed_dim"] == 16
    assert summary["versions"]["torch"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "training_args.bin").exists()


def test_generate_goes_on_from_a_prompt(done):
    out, _ = done
    result = invoke("generate", "--model", out, "--prompt", "lin", "--max-new-tokens", 5, "--greedy")
    assert result.exit_code == 0, result.output
    assert result.stdout_bytes.startswith(b"lin")
    assert len(result.stdout_bytes) == 8
    again = invoke("generate", "--model", out, "--prompt", "lin", "--max-new-tokens", 5, "--greedy")
    assert again.stdout_bytes == result.stdout_bytes


def test_resume_needs_nothing_but_the_directory(done, text, tmp_path):
    cut = tmp_path / "cut"
    assert invoke("train", "--data", text, "--out", cut, *SMALL, "--attention", "ordinary").exit_code == 0
    result = invoke("train", "--resume", "--out", cut)
    assert result.exit_code == 0
    assert "ordinary, tiny, 4 steps" in result.stdout
    assert f"resuming {cut} at step 4 of 4\n" in result.stderr


def test_settings_come_from_a_yaml_file_too(text, tmp_path):
    config = tmp_path / "settings.yaml"
    lines = [f"{SMALL[i][2:]}: {SMALL[i + 1]}" for i in range(0, len(SMALL), 2)]
    config.write_text("\n".join([*lines, f"data: {text}", "attention: ordinary", "seed: 5"]))
    result = invoke("train", "--config", config, "--out", tmp_path / "run", "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "(ordinary, tiny, 1 step, seed 5" in result.stdout


def test_help_shows_every_setting_with_its_default():
    page = invoke("train", "--help", env={"COLUMNS": "100"}).stdout
    for name in FIELDS:
        assert flag(name) in page
    words = " ".join(page.replace("│", " ").split())
    for sentence in (
        "learns the source of Python's standard library, in minutes on two CPU cores.",
        "--resume --out DIR",
        "torchrun --nproc-per-node 8 -m implicit_attention.cli train",
        "[default: 0.003, 0.001 with small, 0.0006 with base, 0.0001 with --from]",
        "[default: runs/PRESET-ATTENTION-seedSEED]",
        "tiny|small|base",
        "auto|torch|cpp Kernels of the implicit layers.",
        "exactly one solution. output: the original equation. Both cost about the same.",
        "--embed-dim divided by them must be an even number.",
    ):
        assert sentence in words
    words = " ".join(invoke("generate", "--help", env={"COLUMNS": "100"}).stdout.replace("│", " ").split())
    assert "Text to continue. [default: (a line break)]" in words


def refused(*arguments):
    """The one line that a command ends with."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.strip()


def test_each_fault_is_one_line_and_status_2(text, tmp_path, done):
    out = tmp_path / "run"
    head = "implicit-attention train: "
    assert refused("train", "--data", tmp_path / "no", "--out", out) == (
        f"{head}cannot read --data {tmp_path}/no: No such file or directory"
    )
    (tmp_path / "short").write_bytes(b"short")
    assert refused("train", "--data", tmp_path / "short", "--out", out).startswith(f"{head}--data has too little text")
    assert refused("train", "--steps", "-1") == f"{head}--steps: must be an integer of at least 1, but is -1."
    assert refused("train", "--attention", "odd").startswith(f"{head}--attention: must be one of implicit, ordinary")
    assert refused("train", "--config", tmp_path / "no.yaml").startswith(f"{head}cannot read --config")
    assert refused("train", "--out", done[0]).startswith(f"{head}--out {done[0]} has a run already")
    assert refused("train", "--out", text) == f"{head}cannot read --out {text}: Not a directory"
    assert refused("train", "--resume", "--out", tmp_path).startswith(f"{head}--out {tmp_path} has no checkpoint")
    head = "implicit-attention generate: "
    assert refused("generate", "--model", tmp_path / "no").startswith(f"{head}--model {tmp_path}/no is not a directory")
    assert refused("generate", "--model", done[0], "--max-new-tokens", 99).startswith(
        f"{head}--prompt has 1 byte and 99"
    )
    assert refused("generate", "--model", done[0], "--greedy", "--top-p", 0.5).startswith(f"{head}--greedy makes")
    assert refused("generate", "--model", done[0], "--temperature", 0) == (
        f"{head}--temperature 0 must be at least 1e-06: for the most likely byte, use --greedy"
    )


def test_a_setting_is_named_as_it_was_given(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("map-rate: 0.5\nheads: 3\n")
    head = "implicit-attention train: "
    assert refused("train", "--config", config).startswith(f"{head}heads: must divide embed_dim")
    assert refused("train", "--config", config, "--heads", "2").startswith(f"{head}map_rate: only acts with --from")
    assert refused("train", "--map-rate", "0.5").startswith(f"{head}--map-rate: only acts with --from")
    assert refused("train", "--from", tmp_path / "no").startswith(f"{head}--from: {tmp_path}/no does not exist")


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(monkeypatch, text, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command.output.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("work was done"))
    line = refused("train", "--data", text, "--out", tmp_path / "run", *SMALL)
    assert line == f"implicit-attention train: cannot write to --out {tmp_path}/run: Permission denied"


def test_figures_that_cannot_be_written_are_told(monkeypatch, text, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.output, "write_figure", full)
    result = invoke("train", "--data", text, "--out", tmp_path / "run", *SMALL, "--attention", "ordinary")
    assert result.exit_code == 2
    assert result.stderr.endswith(f"train: cannot write to --out {tmp_path}/run: No space left on device\n")


def test_a_diverging_run_ends_with_one_line_and_keeps_its_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    result = invoke("train", "--data", text, "--out", out, *SMALL, "--learning-rate", "1e36", "--attention", "ordinary",
                    "--warmup", "0", "--weight-decay", "0")  # fmt: skip
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("implicit-attention")]
    assert f"{out}/checkpoint-0 is the last good checkpoint: continue with --resume and a --learning-rate below" in line


@pytest.mark.parametrize("saved", [True, False])
def test_interrupting_tells_how_to_go_on(monkeypatch, text, tmp_path, saved):
    def interrupt(plan, **_):
        if saved:
            (plan.settings.directory / "checkpoint-0").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupt)
    result = invoke("train", "--data", text, "--out", tmp_path / "a run", *SMALL)
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"stopped; to continue: implicit-attention train --resume --out '{tmp_path}/a run'\n"
        if saved
        else "stopped before the first checkpoint: start again with the same command\n"
    )


@pytest.mark.parametrize("name", ["train", "generate"])
def test_without_its_extra_the_command_says_how_to_install_it(monkeypatch, tmp_path, name):
    for module in [m for m in sys.modules if m.startswith("implicit_attention.training.")]:
        if module.rpartition(".")[2] not in ("faults", "settings"):
            monkeypatch.delitem(sys.modules, module)
    import implicit_attention.training as package

    for attribute in ("run", "generation"):
        monkeypatch.delattr(package, attribute, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = refused(name, *(["--model", tmp_path] if name == "generate" else ["--out", tmp_path]))
    assert line.endswith("transformers is missing: pip install 'implicit-attention[train]'")


def test_a_module_of_our_own_that_is_missing_is_no_extra():
    with pytest.raises(ModuleNotFoundError, match="nowhere"), faults.one_line("train"):
        raise ModuleNotFoundError("nowhere", name="implicit_attention.nowhere")


def test_other_processes_than_the_first_print_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")
    result = invoke("train", "--data", tmp_path / "no", "--out", tmp_path / "run")
    assert (result.exit_code, result.output) == (2, "")


KILLED = """
import os, signal
from implicit_attention.cli import main
from implicit_attention.training import trainer

on_step_end = trainer.Checkpoints.on_step_end

def killed(self, args, state, control, **rest):
    if state.global_step == 27:  # between two checkpoints, whatever the machine's speed
        os.kill(os.getpid(), signal.SIGKILL)
    return on_step_end(self, args, state, control, **rest)

trainer.Checkpoints.on_step_end = killed
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["implicit", "ordinary"])
def test_a_killed_run_goes_on_bit_by_bit(text, tmp_path, attention):
    flags = [
        "--data",
        text,
        *SMALL,
        "--attention",
        attention,
        "--steps",
        "400",
        "--eval-every",
        "100",
        "--save-every",
        "10",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command_line = [sys.executable, "-c", KILLED, "train", *map(str, flags), "--out", str(cut)]
    killed = subprocess.run(
        command_line, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (cut / "checkpoint-20").exists()
    assert invoke("train", "--out", cut, "--resume").exit_code == 0
    assert invoke("train", "--out", whole, *flags).exit_code == 0
    histories = [json.loads((out / "summary.json").read_text())["history"] for out in (whole, cut)]
    losses = [[(e["step"], e[n]) for e in h for n in ("loss", "eval_loss", "final_loss") if n in e] for h in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 405
