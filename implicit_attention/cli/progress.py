"""The progress of a run: a bar with figures on a terminal, and a line for each evaluation."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
            TextColumn("{task.fields[note]}"),
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
    """Moves the bar and prints the results of evaluations."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.bar: TaskID | None = None
        self.note = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress = self.display.progress
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
        if "eval_bits_per_byte" in logs:
            self.display.console.print(
                f"step {state.global_step}: held out {logs['eval_bits_per_byte']:.4f} bits per byte; {self.note}",
                highlight=False,
                soft_wrap=True,
            )


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
        parts += [f"{logs['solver_steps']:.0f} solver steps", f"residual {logs['residual']:.0e}"]
    if "gain" in logs:
        parts.append(f"gain {logs['gain']:.2f}")
    return ", ".join(parts)
