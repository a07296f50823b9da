"""The progress of a run: a bar with figures on a terminal, a line for each entry of the logs in a file."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from implicit_attention.errors import counted


class _Note(ProgressColumn):
    """The figures, cut off where the terminal ends; step, total and time left stay whole."""

    def get_table_column(self) -> Column:
        """Return the column that alone may be narrowed."""
        return Column(no_wrap=False)

    def render(self, task: Task) -> Text:
        """Return the figures."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Display:
    """The bar of a run."""

    def __init__(self, console: Console) -> None:
        """Make the bar. It is shown inside `with display.progress`.

        Args:
            console: Where to show it.
        """
        self.console = console
        self.progress = Progress(
            TextColumn("step"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            _Note(),
            console=console,
            disable=not console.is_terminal,
        )

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(f"[yellow]{escape(sentence)}[/yellow]", highlight=False, soft_wrap=True)

    def callback(self) -> TrainerCallback:
        """Return the callback for the Trainer."""
        return _Callback(self)


class _Callback(TrainerCallback):
    """Moves a bar, or without a terminal prints every entry of the logs. Prints the results of evaluations."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.bar: TaskID | None = None
        self.note = ""
        self.begun, self.first = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress = self.display.progress
        self.begun, self.first = time.monotonic(), state.global_step
        self.bar = progress.add_task("", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.bar is not None
        self.display.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            assert self.bar is not None
            self.note = note(logs)
            self.display.progress.update(self.bar, note=self.note)
            if not self.display.console.is_terminal:
                self._print(f"step {state.global_step}/{state.max_steps}: {self.note}, {self._left(state)} left")
        if "eval_bits_per_byte" in logs:
            figures = f"; {self.note}" if self.note else ""
            self._print(f"step {state.global_step}: held out {logs['eval_bits_per_byte']:.4f} bits per byte{figures}")

    def _print(self, line: str) -> None:
        self.display.console.print(escape(line), highlight=False, soft_wrap=True)

    def _left(self, state: TrainerState) -> timedelta:
        """How long the rest takes if it goes on like this."""
        done = max(1, state.global_step - self.first)
        left = (state.max_steps - state.global_step) * (time.monotonic() - self.begun) / done
        return timedelta(seconds=round(left))


def note(logs: dict[str, float]) -> str:
    """Return the figures of a log entry in one line.

    Args:
        logs: Of training steps.

    Returns:
        Those it has of: loss, bits per byte, speed, solver steps, residual and gain.
    """
    parts = [f"loss {logs['loss']:.3f}", f"{logs['bits_per_byte']:.3f} bits/byte"]
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "solver_steps" in logs:
        parts += [counted(round(logs["solver_steps"]), "solver step"), f"residual {logs['residual']:.0e}"]
    if "gain" in logs:
        parts.append(f"gain {logs['gain']:.2f}")
    return ", ".join(parts)
