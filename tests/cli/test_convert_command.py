"""`implicit-attention convert`: a directory there and back, and bad input in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from implicit_attention.hf import ImplicitAttentionForCausalLM
from implicit_attention.hf.conversion import files


def invoke(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="implicit-attention")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny trained model, with what a tokenizer leaves beside it."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "tekken.json").write_text("[]")
    return folder


def test_a_model_is_converted(trained, tmp_path):
    before = {path: path.read_bytes() for path in trained.rglob("*.*")}
    out = tmp_path / "new"
    result = invoke("--model", trained, "--layers", "1-2", "--out", out, "--max-shard-size", "20KB")
    assert result.exit_code == 0, result.output
    assert "2 of 3 layers are implicit; the largest difference of a logit is" in result.stdout
    assert {path: path.read_bytes() for path in trained.rglob("*.*")} == before
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert (out / "tekken.json").read_text() == "[]"
    assert len(list(out.glob("*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is ImplicitAttentionForCausalLM
    assert model.config.block_types == ["full_attention", "implicit", "implicit"]
    source, ids = tf.AutoModelForCausalLM.from_pretrained(trained), torch.tensor([[5, 9, 3]])
    found, expected = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, source))
    assert torch.equal(found, expected)


def changed(trained, tmp_path, **options):
    """A copy of the model whose configuration says something else."""
    folder = tmp_path / "changed"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    return folder


def nothing(tmp_path):
    (tmp_path / "void").mkdir()
    return tmp_path / "void"


def truncated(trained, tmp_path):
    folder = changed(trained, tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    return folder


def foreign(trained, tmp_path):
    """A model with code of its own: it is not run, and nobody is asked."""
    named = {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.Model"}
    folder = changed(trained, tmp_path, model_type="strange", auto_map=named)
    (folder / "code.py").write_text("raise SystemExit(7)\n")
    return folder


BAD = {
    "more-layers": (lambda t, p: ["--model", changed(t, p, num_hidden_layers=5)], "lacks 18 weights, such as model"),
    "fewer-layers": (lambda t, p: ["--model", changed(t, p, num_hidden_layers=2)], "has no place for 9 weights"),
    "truncated": (lambda t, p: ["--model", truncated(t, p)], "cannot be read"),
    "heads": (lambda t, p: ["--model", changed(t, p, num_attention_heads=5)], "cannot be read"),
    "padding": (lambda t, p: ["--model", changed(t, p, pad_token_id=60)], "cannot be read"),
    "eps": (lambda t, p: ["--model", changed(t, p, rms_norm_eps=0.0)], "`rms_norm_eps` must be"),
    "class": (lambda t, p: ["--model", changed(t, p, architectures=["MyLlama"])], "is of no class of transformers"),
    "span": (
        lambda t, p: ["--model", changed(t, p, architectures=["LlamaForQuestionAnswering"])],
        "A LlamaForQuestionAnswering cannot be converted",
    ),
    "code": (lambda t, p: ["--model", foreign(t, p)], "cannot be read"),
    "size": (lambda t, p: ["--model", t, "--max-shard-size", "apples"], "must be such as 5GB or 200MB"),
    "unit": (
        lambda t, p: ["--model", t, "--max-shard-size", "100KiB"],
        "must be such as 5GB or 200MB, but is '100KiB'",
    ),
    "no-size": (lambda t, p: ["--model", t, "--max-shard-size", "0GB"], "must be such as 5GB or 200MB"),
    "tolerance": (lambda t, p: ["--model", t, "--tolerance", "0"], "more than a part of 0 (`tolerance`)"),
    "empty": (lambda t, p: ["--model", nothing(p)], "has no config.json"),
    "nothing": (
        lambda t, p: ["--model", p / "x"],
        "x does not exist, and models of the hub are not downloaded: run "
        "hf download NAME --local-dir DIR, and name DIR.",
    ),
    "layers": (lambda t, p: ["--model", t, "--layers", "2-3"], "the model has layers 0 to 2, but 3 was asked for"),
    "layer": (
        lambda t, p: ["--model", changed(t, p, num_hidden_layers=1), "--layers", "1"],
        "the model has layer 0 alone, but 1 was asked for",
    ),
    "words": (lambda t, p: ["--model", t, "--layers", "some"], '`layers` must be "all", "none", or such as'),
    "another": (lambda t, p: ["--model", changed(t, p, model_type="gpt2")], "Models of type 'gpt2' cannot be"),
    "quantised": (
        lambda t, p: ["--model", changed(t, p, quantization_config={"quant_method": "gptq", "bits": 4})],
        "The weights are quantised",
    ),
    "weights": (lambda t, p: ["--model", changed(t, p, hidden_size=16)], "has another shape for 30 weights"),
    "self-query": (lambda t, p: ["--model", t, "--self-query", "both"], "--self-query: must be one of input, output"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(trained, tmp_path, arguments, message):
    given = arguments(trained, tmp_path)
    there = sorted(tmp_path.iterdir())
    result = invoke(*given, "--out", tmp_path / "new")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("implicit-attention convert: ")
    assert message in last
    assert sorted(tmp_path.iterdir()) == there


def test_a_converted_model_is_named(trained, tmp_path):
    assert invoke("--model", trained, "--out", tmp_path / "new").exit_code == 0
    result = invoke("--model", tmp_path / "new", "--out", tmp_path / "newer")
    assert result.exit_code == 2
    assert f"{tmp_path / 'new'} has implicit layers already: train it as it is." in result.stderr


def test_a_directory_that_exists_is_refused(trained, tmp_path):
    result = invoke("--model", trained, "--out", tmp_path)
    assert result.exit_code == 2
    assert "it exists" in result.stderr
    result = invoke("--model", trained, "--out", tmp_path / "a" / "b")
    assert "does not exist" in result.stderr


def test_the_trained_model_is_only_read(trained, tmp_path):
    folder = changed(trained, tmp_path)
    before = sorted(folder.iterdir())
    result = invoke("--model", folder, "--out", folder / "new")
    assert result.exit_code == 2
    assert "is within the trained model's directory, which is only read" in result.stderr
    assert sorted(folder.iterdir()) == before


def converted_by(script, trained, out):
    """The command in a process of its own, by a script that runs it."""
    given = ["convert", "--model", str(trained), "--out", str(out)]
    return subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True)


def test_a_command_that_is_terminated_leaves_nothing(trained, tmp_path):
    ended_while_writing = (
        "import os, signal, sys\n"
        "from implicit_attention.cli.app import app\n"
        "from implicit_attention.hf.conversion import files\n"
        "files.shutil.copyfile = lambda *paths: os.kill(os.getpid(), signal.SIGTERM)\n"
        "app(sys.argv[1:])\n"
    )
    done = converted_by(ended_while_writing, trained, tmp_path / "new")
    assert done.returncode == 143, done.stderr
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_written_are_told_in_one_line(trained, tmp_path):
    limited = (
        "import resource, signal, sys\n"
        "from implicit_attention.cli.app import app\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "app(sys.argv[1:])\n"
    )
    done = converted_by(limited, trained, tmp_path / "new")
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f"implicit-attention convert: cannot write to --out {tmp_path / 'new'}: ")
    )
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        result = invoke("--model", trained, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "the disk has 0 MB left" in result.stderr
    assert not list(tmp_path.iterdir())

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.shutil, "copyfile", fails)
    result = invoke("--model", trained, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())
