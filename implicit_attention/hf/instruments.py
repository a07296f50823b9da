"""A callback for transformers' Trainer: figures of the solves in its logs, warnings with advice, reports."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from implicit_attention import inspect, solver_figures
from implicit_attention.equilibrium.reports import power_of_ten
from implicit_attention.errors import ConvergenceWarning, bad_value, check_positive
from implicit_attention.inspection.instruments import advice


class SolverCallback(TrainerCallback):
    """Puts the figures of `solver_figures` into every training log, for whatever `report_to` names.

    `SolverCallback.attach(trainer)` places it before the callbacks that write logs. It warns with advice, at the 1st,
    10th, 100th ... log of each kind and layer. With `sample` it writes a report of that sample every so many steps.
    """

    def __init__(self, *, sample: Tensor | None = None, report_every: int | None = None) -> None:
        """Make the callback.

        Args:
            sample: Tokens of one text, `[1, N]`, of which reports are made.
            report_every: Steps between reports, which go to `output_dir/inspection/step-N.html`.

        Raises:
            ValueError: If only one of both is given, or it is not positive.
            TypeError: If `report_every` is no integer.
        """
        if (sample is None) != (report_every is None):
            raise bad_value("sample", "given with report_every, and only then", sample)
        if report_every is not None:
            check_positive("report_every", report_every, integer=True)
        self.sample, self.report_every = sample, report_every
        self._warned: Counter[str] = Counter()

    @classmethod
    def attach(cls, trainer: Trainer, *, sample: Tensor | None = None, report_every: int | None = None) -> Self:
        """Add one to a Trainer, before the callbacks that write logs.

        Args:
            trainer: The Trainer.
            sample: As in the constructor.
            report_every: Likewise.

        Returns:
            The callback.
        """
        callback = cls(sample=sample, report_every=report_every)
        trainer.callback_handler.callbacks.insert(0, callback)  # those of `report_to` are there before any other
        return callback

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Add the figures to a log entry of training, and warn."""
        if logs is None or "loss" not in logs or model is None:
            return
        figures = solver_figures(model)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        for name, sentence in advice(figures).items():
            self._warned[name] += 1
            if power_of_ten(self._warned[name]):
                warnings.warn(f"step {state.global_step}: {sentence}", ConvergenceWarning, stacklevel=2)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Write a report if it is time."""
        if self.sample is None or self.report_every is None or state.global_step % self.report_every:
            return
        if not state.is_world_process_zero:
            return
        directory = Path(args.output_dir or ".") / "inspection"
        directory.mkdir(parents=True, exist_ok=True)
        report = inspect(model, self.sample.to(model.device))
        page = report.to_html(f"step {state.global_step}")
        (directory / f"step-{state.global_step}.html").write_text(page, encoding="utf-8")
