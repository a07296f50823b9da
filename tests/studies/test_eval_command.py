"""`implicit-attention eval` as a person meets it: help, a table, going on where it stopped, one line for each fault."""

import json

import pytest
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from studies import command

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = ["recall-64", "--budget", "smoke", "--arm", "ordinary", "--arm", "implicit", "--workers", "1"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="implicit-attention", terminal_width=200)


def test_help_teaches():
    page = " ".join(invoke("eval", "--help").output.replace("│", " ").split())
    for words in (
        "recall-64 --arm ordinary --arm implicit",
        "eval list",
        "--all --budget cpu",
        "--seeds",
        "0-4",
        "seed-N",
        "[default: all of the table's]",
        "[default: one for each core]",
    ):
        assert words in page


def test_list_shows_tables_and_arms():
    page = invoke("eval", "list").output
    for words in ("recall", "parity", "digits", "convolved"):
        assert words in page


def test_runs_a_table_and_goes_on_where_it_stopped(tmp_path):
    first = invoke("eval", *SMALL, "--seeds", "0", "--out", tmp_path)
    assert first.exit_code == 0, first.output
    kept = json.loads((tmp_path / "recall-64" / "implicit" / "seed-0.json").read_text())
    assert kept["environment"]["versions"]["torch"]
    again = invoke("eval", *SMALL, "--seeds", "0-1", "--out", tmp_path)
    assert "2 of 4 runs are finished already" in again.output
    assert json.loads((tmp_path / "recall-64" / "implicit" / "seed-0.json").read_text()) == kept
    assert "0 of 2" in again.output
    assert "## Recall: 4 pairs in 64 tokens" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "images" / "eval-recall-64.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recal"], "Did you mean 'recall'?"),
        (["recall-64", "--arm", "implict"], "Did you mean 'implicit'?"),
        (["recall-64", "--budget", "cpus"], "Did you mean 'cpu'?"),
        (["recall-64", "--seeds", "a"], "--seeds must look like 0-4"),
        (["recall-64", "--seeds", "3-1"], "--seeds must name at least one seed"),
        ([], "name a task, or use --all"),
        (["recall", "--all"], "name a task, or use --all"),
    ],
)
def test_faults_are_one_sentence(tmp_path, arguments, sentence):
    result = invoke("eval", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert sentence in result.output
    assert result.output.startswith("implicit-attention eval: ")


def test_all_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "run it from the root of the checkout" in invoke("eval", "--all").output


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("eval", *SMALL, "--out", tmp_path / "file")
    assert (result.exit_code, "cannot write to --out" in result.output) == (2, True)


def test_stopping_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("studies.campaign.perform", stop)
    result = invoke("eval", *SMALL, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command continues from there" in result.output


def test_a_missing_package_is_one_line(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr("implicit_attention.cli.eval.import_module", absent)
    result = invoke("eval", "list")
    assert result.exit_code == 2
    assert result.output == "implicit-attention eval: absent is missing: pip install 'implicit-attention[all]'\n"


def test_places():
    assert command._places(None, "cpu", False) == (command.Path("runs/eval-cpu"), command.Path("runs/eval-cpu"))
    assert command._places(None, "cpu", True) == (command.RECORDS, command.DOCS)
