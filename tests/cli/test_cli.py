"""The command line: the demo end to end at toy size, its refusals, and what it says without its extras."""

import importlib
import json
import sys
import warnings
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

import implicit_attention
from implicit_attention import cli
from implicit_attention.cli import demo, environment, output, report, stages
from implicit_attention.cli.app import app

# The first Jacobian product of a process imports a part of torch that warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
TOY = demo.Scale(training_steps=3, length=24, repeats=1)
SOLVERS = ["Picard", "Picard, damped", "Anderson", "Broyden", "Newton-Krylov", "Forward substitution"]


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, prog_name="implicit-attention")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a toy demo wrote, returned and printed."""
    out, page = tmp_path_factory.mktemp("demo"), StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        summary = demo.run(out, 0, TOY, Console(file=page, width=200))
    return out, summary, page.getvalue()


def test_demo_writes_its_pictures_and_figures_and_nothing_else(shown):
    out, summary, _ = shown
    assert sorted(path.name for path in out.iterdir()) == sorted(demo.FILES)
    for name in demo.FILES[:3]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "summary.json").read_text()) == summary


def test_demo_summary_tells_everything(shown):
    _, summary, _ = shown
    assert summary["seed"] == 0
    assert summary["threads"] >= 1
    assert {"implicit-attention", "python", "torch"} <= set(summary["versions"])
    assert len(summary["seed_example"]["differences"]) == 10
    assert [[row["solver"] for row in case["solvers"]] for case in summary["text"]] == [SOLVERS, SOLVERS]
    assert all(len(row["steps"]) == 4 for case in summary["text"] for row in case["solvers"])
    models = summary["recall"]["models"]
    assert set(models) == {stages.IMPLICIT, stages.ORDINARY, stages.CONVOLVED}
    assert all([step["step"] for step in model["steps"]] == [1, 2, 3] for model in models.values())
    assert models[stages.IMPLICIT]["steps_with_unconverged_systems"] == 0
    assert models[stages.IMPLICIT]["largest_solver_steps"] > 0


def test_demo_prints_a_page_for_people(shown):
    out, _, page = shown
    for words in ("The original example", "gradient of sum(y)", *SOLVERS, "Associative recall", "held out", str(out)):
        assert words in page


def test_a_python_without_its_source_is_told_before_any_work(monkeypatch, tmp_path):
    def absent():
        raise FileNotFoundError("no source of the standard library in /x: this Python was installed without it")

    monkeypatch.setattr("implicit_attention.tasks.text.standard_library_files", absent)
    monkeypatch.setattr(demo, "standard_library_files", absent, raising=False)
    result = invoke("demo", "--quick", "--out", str(tmp_path / "demo"))
    assert result.exit_code == 2
    assert result.stderr == (
        "implicit-attention demo: no source of the standard library in /x: this Python was installed without it. "
        "Use a Python that has it\n"
    )
    assert not list(tmp_path.iterdir())


def test_demo_shows_and_keeps_warnings():
    page = StringIO()
    with demo._noted(Console(file=page, width=200)) as notes:
        warnings.showwarning(implicit_attention.ConvergenceWarning("not solved"), implicit_attention.ConvergenceWarning)
    assert notes == ["ConvergenceWarning: not solved"]
    assert "ConvergenceWarning: not solved" in page.getvalue()


def test_failures_are_put_in_sentences():
    bad = {"solver": "Picard", "converged": [True, False], "steps": [3, 9], "residual": 0.5}
    model = {"steps_with_unconverged_systems": 1, "steps": [0, 0], "unconverged_share": 0.25}
    summary = {"text": [{"case": "loud", "solvers": [bad]}], "recall": {"models": {"m": model}}}
    first, second = report.failures(summary)
    assert first == "Picard did not settle 1 of 2 texts, loud, in 9 steps (residual 5.0e-01)."
    assert second == "m: 1 of 2 training steps had unconverged rows (25.00% of all rows)."


@pytest.mark.parametrize("arguments", [("--seed", "7"), ("--quick",)], ids=["full", "quick"])
def test_command_line_arguments_reach_the_demo(monkeypatch, tmp_path, arguments):
    called = []
    monkeypatch.setattr(demo, "run", lambda *args: called.append(args))
    result = invoke("demo", "--out", str(tmp_path / "new" / "deep"), *arguments)
    assert result.exit_code == 0
    ((out, seed, scale, _),) = called
    assert out.is_dir(), "missing parents are made"
    assert (seed, scale) == ((7, demo.FULL) if "--seed" in arguments else (0, demo.QUICK))


@pytest.mark.parametrize("case", ["file", "below a file", "taken name", "forbidden"])
def test_out_that_cannot_be_written_is_refused_before_any_work(monkeypatch, tmp_path, case):
    out = tmp_path / "out"
    if case == "file":
        out.write_text("")
    elif case == "below a file":
        out.write_text("")
        out = out / "sub"
    elif case == "taken name":
        (out / "summary.json").mkdir(parents=True)
    else:

        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("work was done"))
    result = invoke("demo", "--out", str(out))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"implicit-attention demo: cannot write to --out {out}: ")
    assert result.stderr.count("\n") == 1


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    output.write(path, "old")
    with pytest.raises(TypeError):
        output.write(path, 3)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_version_and_help():
    assert invoke("--version").stdout == f"implicit-attention {implicit_attention.__version__}\n"
    page = invoke("demo", "--help").stdout
    for words in ("--out", "--seed", "--quick", "recall", "summary.json"):
        assert words in page
    assert invoke("demo", "--seed", "-1").exit_code == 2


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "typer"])
def test_without_its_extras_the_command_says_how_to_install_them(monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert missing in capsys.readouterr().err.partition(" is missing: pip install 'implicit-attention[cli]'")[0]


def test_environment_without_what_only_some_systems_tell(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(environment.Path, "read_text", absent)
    found = environment.environment()
    assert found["processor"]
    assert environment._version("no-such-package") is None
    json.dumps(found)


def test_main_runs_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["implicit-attention", "--version"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("implicit-attention ")


@pytest.mark.parametrize(("status", "expected"), [(0, [0]), (2, [])])
def test_processes_of_torchrun_that_are_done_end_at_once(status, expected, monkeypatch):
    """Without the interpreter's ending, in which Gloo's threads may abort a process whose work is done."""
    left = []

    def end(prog_name):
        raise SystemExit(status)

    monkeypatch.setattr(importlib.import_module("implicit_attention.cli.app"), "app", end)
    monkeypatch.setattr("os._exit", left.append)
    for world in ("2", None):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if world:
            monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SystemExit):
            cli.main()
        assert left == expected
