"""The README is true: its Python runs as it stands, its commands and their options exist."""

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.report import PASSES
from studies import records

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


class Block(NamedTuple):
    language: str
    line: int
    text: str


def fenced_blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", text, flags=re.M | re.S)
    return [Block(fence[1], text.count("\n", 0, fence.start()) + 2, fence[2]) for fence in fences]


def commands(block: Block) -> list[list[str]]:
    """Split a shell block into commands; in a console block only the lines after a `$` are typed."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|"):
                command.append(word)
            elif command:
                found.append(command)
                command = []
    return found


PYTHON = [block for block in fenced_blocks() if block.language in ("python", "py")]
SHELL = [
    (block.line, command)
    for block in fenced_blocks()
    if block.language in ("bash", "sh", "shell", "console")
    for command in commands(block)
]


def shell_commands(*program: str) -> list:
    """Return what follows `program` (such as `python -m benchmarks`) in the README's commands that run it."""
    found = []
    for line, command in SHELL:
        words = [Path(command[0]).name, *command[1:]]
        if tuple(words[: len(program)]) == program:
            found.append(pytest.param(words[len(program) :], id=f"line{line}-{' '.join(words)}"))
    return found


@cache
def help_text(*arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-")]


def test_readme_shows_python():
    assert PYTHON, "README.md has no ```python block"


@pytest.mark.parametrize("block", [pytest.param(block, id=f"line{block.line}") for block in PYTHON])
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    padding = "\n" * (block.line - 1)  # so that a traceback names the README's own line
    exec(compile(padding + block.text, str(README), "exec"), {"__name__": "__readme__"})


@pytest.mark.parametrize("words", shell_commands("make"))
def test_make_target_exists(words):
    done = subprocess.run(["make", "-n", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", shell_commands("implicit-attention"))
def test_command_line_exists(words):
    subcommand = [words[0]] if words and not words[0].startswith("-") else []
    shown = help_text("-c", "from implicit_attention.cli import main; main()", *subcommand)
    assert [option for option in options(words) if option not in shown] == []


@pytest.mark.parametrize("words", shell_commands("python", "-m", "benchmarks"))
def test_benchmark_exists(words):
    shown = help_text("-m", "benchmarks", *[word for word in words[:1] if not word.startswith("-")])
    assert [option for option in options(words) if option not in shown] == []


def test_generation_fits_the_model_that_is_trained():
    """The model of `train --preset tiny` takes `Settings.length` bytes, prompt included."""
    from implicit_attention.training.settings import Settings

    commands = [p.values[0] for p in shell_commands("implicit-attention", "generate")]
    assert commands
    for words in commands:
        given = dict(itertools.pairwise(words))
        assert len(given["--prompt"].encode()) + int(given["--max-new-tokens"]) <= Settings().length


def test_prices_are_those_that_were_measured():
    shapes = json.loads((ROOT / "docs" / "data" / "causal.json").read_text(encoding="utf-8"))["shapes"]
    found = {s["length"]: [f"{s['rows']['ours'][p]['time_ratio']:.1f}" for p in PASSES] for s in shapes}
    (forward, both), (short_forward, short_both) = found[4096], found[1024]
    sentence = (
        f"took {forward} times one attention pass forward and {both} times forward and backward at 4096 tokens, "
        f"{short_forward} and {short_both} times at 1024"
    )
    assert sentence in " ".join(README.read_text(encoding="utf-8").split())


@cache
def results():
    return records.load(ROOT / "docs" / "data" / "eval")


def score(table, row):
    runs = results()[table][row]
    return f"{abs(statistics.mean(run['score'] for run in runs)):.3f}"


def price(table):
    """Seconds of a step of training, relative to one ordinary layer."""
    rows = results()[table]
    implicit, ordinary = (
        statistics.mean(run["seconds"] / run["last_step"] for run in rows[row]) for row in ("implicit", "ordinary")
    )
    return implicit / ordinary


def test_results_are_those_that_were_measured():
    text = " ".join(README.read_text(encoding="utf-8").split())
    recall = "recall-64", "recall-128"
    implicit, ordinary, two = (
        [score(table, row) for table in recall] for row in ("implicit", "ordinary", "ordinary-2")
    )
    states = "parity", "words-s3"
    gru, chance = ([score(table, row) for table in states] for row in ("gru", "implicit"))
    for sentence in (
        f"with each of five seeds (accuracy {implicit[0]} and {implicit[1]})",
        f"came to {ordinary[0]} and {ordinary[1]}, and two layers to {two[0]} and {two[1]}",
        f"which a GRU learned to {gru[0]} and {gru[1]}, it left at chance ({chance[0]} and {chance[1]})",
        f"it needed {score('bytes-1', 'implicit')} bits where two ordinary",
        f"layers needed {score('bytes-1', 'ordinary-2')}",
        f"in four blocks {score('bytes-4', 'implicit')} where a GRU needed {score('bytes-4', 'gru')}",
        f"without a causal mask {price('digits'):.0f} times",
        f"error of {score('digits', 'implicit')}, ordinary attention, looped, with {score('digits', 'looped')}",
    ):
        assert sentence in text
    assert all(2 <= round(price(table)) <= 3 for table in ("recall-64", "recall-128", "parity", "words-s3", "khop-48"))
    assert all(run["solved_at"] for table in recall for run in results()[table]["implicit"])
    assert [len(results()[table]["implicit"]) for table in recall] == [5, 5]
    solved = {
        row: [bool(run["solved_at"]) for run in results()["recall-256"][row]] for row in ("implicit", "ordinary-2")
    }
    assert [sum(of) for of in solved.values()] == [4, 0], "four of five seeds, and none"
    assert [len(of) for of in solved.values()] == [5, 5]
