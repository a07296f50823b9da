"""`python -m studies.uptraining`: records that are not made twice, a table, a curve."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.training.tokenizer import byte_tokenizer
from studies import recall_probe, uptraining, uptraining_report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


def invoke(folder, *others):
    command = ["--model", f"{folder}/base{{seed}}", "--out", f"{folder}/out", "--few", "0", "--seeds", "0", "--steps",
               "4", "--length", "16", "--batch-size", "2", "--windows", "4", "--data", f"{folder}/text",
               *others]  # fmt: skip
    return CliRunner().invoke(uptraining.app, command)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = ImplicitAttentionConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=300,
        block_types=["attention"] * 2,
    )  # fmt: skip
    ImplicitAttentionForCausalLM(config).save_pretrained(tmp_path / "base0")
    byte_tokenizer(300).save_pretrained(tmp_path / "base0")
    (tmp_path / "text").write_text("a line of text\n" * 200)
    return tmp_path


def test_records_table_and_curve(folder):
    result = invoke(folder, "--arm", "few", "--arm", "lora-few")
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "out" / "few" / "rate-0.001-seed-0.json").read_text())
    assert [step for step, _ in record["curve"]] == [0, 1, 2, 3, 4]
    assert record["trained"] == 16 * 16
    assert {when: set(places) for when, places in record["recall"].items()} == {
        "before": {"near", "far"},
        "after": {"near", "far"},
    }
    table = (folder / "out" / "uptraining.md").read_text()
    assert "| `few` | 256 | 0.001 |" in table
    assert table in result.stdout
    assert (folder / "out" / "uptraining.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "out").glob("*/run-*"))
    before = (folder / "out" / "few" / "rate-0.001-seed-0.json").stat().st_mtime_ns
    assert invoke(folder, "--arm", "few").exit_code == 0
    assert (folder / "out" / "few" / "rate-0.001-seed-0.json").stat().st_mtime_ns == before, "not made twice"


def test_the_first_seed_tries_all_rates_and_the_best_counts(folder):
    shutil.copytree(folder / "base0", folder / "base1")
    assert invoke(folder, "--arm", "few", "--rates", "1e-2,1e-9", "--seeds", "0,1").exit_code == 0
    made = {path.name for path in (folder / "out" / "few").glob("*.json")}
    found = uptraining_report.load(folder / "out")["few"]
    ends = [json.loads((folder / "out" / "few" / f"rate-{r}-seed-0.json").read_text())["curve"][-1][1]
            for r in ("0.01", "1e-09")]  # fmt: skip
    best = "0.01" if ends[0] <= ends[1] else "1e-09"
    assert made == {"rate-0.01-seed-0.json", "rate-1e-09-seed-0.json", f"rate-{best}-seed-1.json"}
    assert [(run["settings"]["seed"], run["settings"]["rate"]) for run in found] == [(0, float(best)), (1, float(best))]
    assert uptraining_report.by_tokens({"few": found}).startswith("| tokens | 0 | 32 |")


@pytest.mark.parametrize("rates", ["", "0", "-1", "nan", "inf", "fast"])
def test_bad_rates_are_one_line(folder, rates):
    result = invoke(folder, "--arm", "few", "--rates", rates)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--rates: must be positive numbers such as" in result.stderr


def test_bad_input_is_one_line(folder):
    result = invoke(folder, "--arm", "odd")
    assert result.exit_code == 2
    assert "--arm: must be one of one, few" in result.stderr
    invoke(folder, "--arm", "few")
    result = invoke(folder, "--arm", "few", "--steps", "5")
    assert result.exit_code == 2
    assert "is of a run with other settings or without the probe: remove it" in result.stderr
    result = invoke(folder, "--arm", "few", "--seeds", "0-2")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--seeds: must be integers such as 0,1,2, but is 0-2" in result.stderr


def test_what_is_said_again_is_what_was_said():
    texts = recall_probe.texts(258, 8, seed=0)
    assert texts.shape == (16, 32)
    assert torch.equal(texts[:, :12], texts[:, -12:])
    assert not torch.equal(texts[0], texts[1])
