"""`implicit-attention inspect` as a person meets it: a page, words, one line for each fault."""

import json

import pytest
import torch
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from implicit_attention.training import model as building
from implicit_attention.training.settings import Settings
from implicit_attention.training.tokenizer import byte_tokenizer

pytest.importorskip("bokeh", reason="bokeh is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def invoke(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], prog_name="implicit-attention")


def made(path, **options):
    """Write a small model."""
    model = building.build(Settings(embed_dim=16, heads=2, layers=2, length=32, kernel="torch", **options))
    model.save_pretrained(path)
    byte_tokenizer(32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return made(tmp_path_factory.mktemp("model"), self_query="output")


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    return made(tmp_path_factory.mktemp("ordinary"), attention="ordinary")


def test_the_page_of_a_model(trained, tmp_path):
    (tmp_path / "text").write_bytes(b"two <b>\xff\n")
    result = invoke("--model", trained, "--text", tmp_path / "text", "--out", tmp_path / "new" / "page.html")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.partition(" settles")[0] for line in lines[:2]] == [
        "model.layers.0.attention",
        "model.layers.1.attention",
    ]
    html = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert lines[0].split(":")[0] in html
    one = invoke("--model", trained, "--text", "two", "--layer", 1, "--out", tmp_path / "one.html")
    assert one.exit_code == 0
    assert len(one.stdout.splitlines()) == 2
    assert one.stdout.startswith("model.layers.1")


@pytest.mark.parametrize("text", ["two", "two.", "...", " nothere.txt", "and / or", "see a.txt"])
def test_a_text_that_is_no_path_is_inspected(trained, tmp_path, text):
    result = invoke("--model", trained, "--text", text, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert f"all {len(text)} tokens" in result.stdout


def test_a_text_for_a_model_with_its_tokenizer(trained):
    from implicit_attention import inspect
    from implicit_attention.hf import ImplicitAttentionForCausalLM

    model = ImplicitAttentionForCausalLM.from_pretrained(trained)
    report = inspect(model, "héllo")
    assert len(report.tokens) == 6
    assert report.tokens[0] == "h"
    assert report.settles
    numbers = torch.tensor(list("héllo".encode()))
    torch.testing.assert_close(inspect(model, numbers).layers[1].gain, report.layers[1].gain)


def test_the_seed_example(tmp_path):
    result = invoke("--seed-example", "--out", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "collapses" in result.stdout
    assert "the original example" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --model DIR or --seed-example"),
        (["--model", "{model}", "--seed-example"], "give either"),
        (["--model", "/nonexistent", "--text", "a"], "is not a directory"),
        (["--model", "{other}", "--text", "a"], "is not a model of this program"),
        (["--model", "{model}"], "give --text"),
        (["--model", "{model}", "--text", ""], "has 0 bytes"),
        (["--model", "{model}", "--text", "a" * 33], "has 33 bytes: the model's sequences have 1 to 32"),
        (["--model", "{model}", "--text", "a", "--layer", "2"], "--layer 2 was not found: the model has 2"),
        (["--model", "{model}", "--text", "a", "--out", "{model}/config.json/page.html"], "cannot write to --out"),
        (["--seed-example", "--out", "{model}"], "cannot write to --out"),
        (["--seed-example", "--text", "a"], "--seed-example makes --text useless"),
        (["--model", "{model}", "--text", "a", "--out", "a.txt"], "the page is HTML: use --out a.html"),
        (
            ["--model", "{model}", "--text", "nothere.txt"],
            "--text nothere.txt is no file: to inspect it as a text, use --text ' nothere.txt'",
        ),
        (["--model", "{model}", "--text", "no/where"], "--text no/where is no file"),
        (
            ["--model", "{model}", "--text", "{model}/config.json"],
            "head -c 32 {model}/config.json > part.txt, then --text part.txt",
        ),
        (["--model", "{ordinary}", "--text", "a"], "--model {ordinary} has only ordinary layers"),
    ],
)
def test_bad_input_is_one_line_and_status_2(trained, ordinary, tmp_path, arguments, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    places = {"model": trained, "ordinary": ordinary, "other": tmp_path}
    said = [argument.format(**places) for argument in arguments]
    if "--out" not in said:
        said += ["--out", str(tmp_path / "page.html")]
    result = invoke(*said)
    assert result.exit_code == 2
    assert words.format(**places) in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
