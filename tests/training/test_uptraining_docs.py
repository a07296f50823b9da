"""docs/convert.md and docs/uptraining.md do what they say: their code runs, page by page."""

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from implicit_attention.cli.app import app
from implicit_attention.training.settings import FIELDS, flag

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"^```(python|bash)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n" * 200)
    space = {"__name__": "__page__"}
    for language, code in blocks("uptraining.md"):
        if language == "python":
            exec(compile(code, "uptraining.md", "exec"), space)
            continue
        command = [*shlex.split(code)[1:], "--data", "text", "--device", "cpu"]
        result = CliRunner().invoke(app, command, prog_name="implicit-attention")
        assert result.exit_code == 0, result.output
    assert len(space["moved"]) == 2
    assert min(space["moved"].values()) > 0
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert not [name for name in load_file(tmp_path / "baseline" / "model.safetensors") if "lora" in name]


def test_the_code_of_the_page_on_conversion_runs():
    space = {"__name__": "__page__"}
    for language, code in blocks("convert.md"):
        if language == "python":
            exec(compile(code, "convert.md", "exec"), space)


def test_every_flag_on_the_page_is_one():
    known = {flag(name) for name in FIELDS} | {f"--{name.replace('_', '-')}" for name in FIELDS}
    known |= {"--out", "--resume", "--model"}
    page = (DOCS / "uptraining.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page)) <= known
