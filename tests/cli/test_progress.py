"""What a run shows as it goes: on a terminal of 80 columns, and where there is no terminal."""

import re
from io import StringIO

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from implicit_attention.cli.progress import Display, note

LOGS = {
    "loss": 1.2345, "bits_per_byte": 1.781, "tokens_per_second": 123456.0, "solver_steps": 12.0, "residual": 3e-6,
    "gain": 0.42,
}  # fmt: skip


def shown(*, terminal, width=80, every=10, steps=30):
    page = StringIO()
    console = Console(file=page, force_terminal=terminal, width=width, color_system=None)
    display = Display(console)
    callback = display.callback()
    state, control = TrainerState(max_steps=15_000, global_step=12_340), TrainerControl()
    with display.progress:
        callback.on_train_begin(None, state, control)
        for _ in range(steps):
            state.global_step += 1
            callback.on_step_end(None, state, control)
            if state.global_step % every == 0:
                callback.on_log(None, state, control, logs=dict(LOGS))
        display.progress.refresh()
    return page.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_keeps_step_total_and_time_left(width):
    page = re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "\n", shown(terminal=True, width=width))
    last = [line for line in page.replace("\r", "\n").splitlines() if line.strip()][-1]
    assert len(last) <= width
    assert "12370/15000" in last
    assert re.search(r"(\d+:)?\d\d?:\d\d|-:--:--", last)
    assert "loss 1.2" in last
    assert ("gain 0.42" in last) == (width == 200)


def test_without_a_terminal_each_entry_of_the_logs_is_a_line():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 3
    for step, line in zip((12_350, 12_360, 12_370), lines, strict=True):
        assert re.fullmatch(rf"step {step}/15000: loss 1.234, .* gain 0.42, (\d+ days?, )?\d+:\d\d:\d\d left", line), (
            line
        )


def test_one_step_is_no_steps():
    assert ", 1 solver step, " in note({**LOGS, "solver_steps": 1.0})
    assert ", 12 solver steps, " in note(LOGS)


def test_an_evaluation_before_the_first_step_has_no_figures_of_training():
    page = StringIO()
    callback = Display(Console(file=page, width=80)).callback()
    callback.on_log(None, TrainerState(global_step=0), TrainerControl(), logs={"eval_bits_per_byte": 6.13374})
    assert page.getvalue() == "step 0: held out 6.1337 bits per byte\n"
