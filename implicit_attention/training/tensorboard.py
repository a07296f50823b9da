"""Log entries as curves in TensorBoard."""

from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from implicit_attention import solver_figures

_PARTS = {"eval_": "held out (sample)", "final_": "held out"}


class TensorBoard(TrainerCallback):
    """Writes every figure that is logged. transformers' own callback stops before the last evaluation."""

    def __init__(self, directory: Path, *, done: int) -> None:
        """Begin to write.

        Args:
            directory: Where the logs go.
            done: Step that the run continues from. What a killed run logged after it is dropped; of step 0 everything,
                since a run that begins there measures again.

        Raises:
            OSError: If they cannot be written.
        """
        self.writer = SummaryWriter(str(directory), purge_step=done + 1 if done else 0)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left, and end."""
        self.writer.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Write the figures of a log entry; of training also those of each implicit layer's last solve."""
        for name, value in (logs or {}).items():
            prefix = next((prefix for prefix in _PARTS if name.startswith(prefix)), "")
            self.writer.add_scalar(f"{_PARTS.get(prefix, 'training')}/{name[len(prefix) :]}", value, state.global_step)
        if "loss" in (logs or {}) and model is not None:
            for name, value in solver_figures(model).items():
                self.writer.add_scalar(name, value, state.global_step)
        self.writer.flush()
