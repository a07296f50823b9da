"""The README and the pages are true: Python runs as it stands, commands, options, extras and links exist, and figures
are those of the records."""

import contextlib
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import page as measured
from benchmarks import readme
from studies import records, report, suite, verdicts
from tests.test_scaffold import ORDER

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TRANSFORMERS = ROOT / "docs" / "transformers.md"  # tests/hf/test_hf_docs.py runs its Python
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "implicit_attention").rglob("README.md"))


class Block(NamedTuple):
    page: Path
    language: str
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fenced_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", text, flags=re.M | re.S)
    return [Block(page, fence[1], text.count("\n", 0, fence.start()) + 2, fence[2]) for fence in fences]


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


def spoken(page: Path) -> list[tuple[str, list[str]]]:
    """The commands in code spans, `make test` say, that name a program of ours; placeholders and all."""
    spans = re.findall(r"`((?:make|implicit-attention|python -m \w+) [^`\n]+)`", page.read_text(encoding="utf-8"))
    return [(f"{page.relative_to(ROOT)}", shlex.split(span)) for span in spans]


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]
# Their blocks build on each other and have tests of their own: test_hf_docs.py, test_uptraining_docs.py.
TOLD_AS_ONE = {TRANSFORMERS, ROOT / "docs" / "uptraining.md"}
PYTHON = [block for block in BLOCKS if block.language in ("python", "py") and block.page not in TOLD_AS_ONE]
SHELL = [
    (block.name, command)
    for block in BLOCKS
    if block.language in ("bash", "sh", "shell", "console")
    for command in commands(block)
]
SHELL += [found for page in PAGES for found in spoken(page)]


def shell_commands(*program: str) -> list:
    """Return what follows `program` (such as `python -m benchmarks`) in the pages' commands that run it."""
    found = []
    for where, command in SHELL:
        words = [Path(command[0]).name, *command[1:]]
        for start in range(len(words)):
            if tuple(words[start : start + len(program)]) == program and (start == 0 or program[0] == "-m"):
                found.append(pytest.param(words[start + len(program) :], id=f"{where}-{' '.join(words)}"))
    return found


@cache
def help_text(module: str, *arguments: str) -> str:
    """What `python -m module ... --help` prints, in this process, which has imported most of it."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments, "--help"])
        for name, value in {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(name, value)
        patch.delitem(sys.modules, f"{module}.__main__", raising=False)  # else it would run a second time
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__")
    assert not left.value.code, shown.getvalue()
    return shown.getvalue()


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-")]


def test_readme_is_short_and_shows_python():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120
    assert [block for block in PYTHON if block.page == README]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in PYTHON])
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    padding = "\n" * (block.line - 1)  # so that a traceback names the page's own line
    exec(compile(padding + block.text, str(block.page), "exec"), {"__name__": "__page__"})


@pytest.mark.parametrize("words", shell_commands("make"))
def test_make_target_exists(words):
    done = subprocess.run(["make", "-n", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", shell_commands("implicit-attention") + shell_commands("-m", "implicit_attention.cli"))
def test_command_line_exists(words):
    subcommand = [words[0]] if words and not words[0].startswith("-") else []
    shown = help_text("implicit_attention.cli", *subcommand)
    assert [option for option in options(words) if option not in shown] == []


@pytest.mark.parametrize("words", shell_commands("python", "-m", "benchmarks"))
def test_benchmark_exists(words):
    shown = help_text("benchmarks", *[word for word in words[:1] if not (word.startswith("-") or word.isupper())])
    assert [option for option in options(words) if option not in shown] == []


def test_generation_fits_the_model_that_is_trained():
    """The model of `train --preset tiny` takes `Settings.length` bytes, prompt included."""
    from implicit_attention.training.settings import Settings

    commands = [p.values[0] for p in shell_commands("implicit-attention", "generate")]
    commands = [words for words in commands if "--max-new-tokens" in words]
    assert commands
    for words in commands:
        given = dict(itertools.pairwise(words))
        assert len(given["--prompt"].encode()) + int(given["--max-new-tokens"]) <= Settings().length


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [words[-1] for _, words in SHELL if words[:2] == ["pip", "install"]]
    assert named
    for target in named:
        assert target.startswith(".["), f"{target}: the package is installed from a checkout"
        assert set(target[2:-1].split(",")) <= set(extras)


def test_contributing_names_the_rooms_in_their_order():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
    named = [re.sub(r"\.py$|/$", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert [name for name in named if not name.startswith("make ")] == ORDER


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_tables_of_the_readme_are_those_of_the_records():
    text = README.read_text(encoding="utf-8")
    costs, found = measured.load(), records.load(ROOT / "docs" / "data" / "eval")
    assert text == readme.filled(text, costs.get("layer"), costs.get("layer-xeon"), found)


def test_what_the_readme_says_of_its_tables_holds():
    found = records.load(ROOT / "docs" / "data" / "eval")
    shown = {name: found[name] for name in readme.TASKS if name in found}
    assert shown
    assert {len(rows[row]) for rows in shown.values() for row in rows} <= {3, 5, 8}
    every = [(table, found[name]) for name, table in suite.tables("cpu").items() if name in found]
    ahead = not report.no_help(every)[0].startswith("In all ")
    assert ahead != ("are they ahead of all baselines" in README.read_text(encoding="utf-8"))


def test_the_readme_says_how_many_steps_recall_takes():
    found = records.load(ROOT / "docs" / "data" / "eval")
    tables = [found[f"recall-{length}"] for length in (64, 128, 256)]
    for arm in ("shifted", "keys-2", "keys-4", "strict"):
        assert all(run["solved_at"] for rows in tables for run in rows[arm])

    def fewest(*arms):
        return [min(verdicts.median(rows[arm], verdicts.steps_to_solve) for arm in arms) for rows in tables]

    text = " ".join(README.read_text(encoding="utf-8").split())
    for steps in (fewest("shifted"), fewest("keys-2", "keys-4"), fewest("strict")):
        assert "{:.0f}, {:.0f} and {:.0f}".format(*steps) in text


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="must have the lines"):
        readme.between("no marks", "costs", "a table")
