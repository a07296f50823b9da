"""The examples run as they stand, a few steps each, and say what they reached."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Steps, and what the last line says: a share or a number that a model which learned nothing does not reach.
REACHED = {
    "digits": (12, r"(\d+\.\d)% of 450 unseen digits right", lambda share: share > 15),
    "encoder_layer": (6, r"ImplicitQueryAttention: (\d+\.\d)% of the values recalled", lambda share: share > 0),
    "fine_tuning": (8, r"(\d+\.\d)% of 200 unseen snippets right", lambda share: share > 50),
    "training_loop": (10, r"(\d+\.\d+) bits per byte on source it has not seen", lambda bits: bits < 6),
}


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(REACHED)


@pytest.mark.parametrize("name", REACHED)
def test_example_runs(name, monkeypatch, capsys, tmp_path):
    steps, line, is_learning = REACHED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(steps)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    found = re.search(line, capsys.readouterr().out.splitlines()[-1])
    assert found
    assert is_learning(float(found[1]))
    assert not list(tmp_path.iterdir())
