"""transformers' Trainer, with atomic checkpoints and figures in bits per byte."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from implicit_attention import RelativeBias
from implicit_attention.inspection.evaluating import evaluating
from implicit_attention.training import checkpoint as storage
from implicit_attention.training import rates
from implicit_attention.training.faults import RunError, unwritable
from implicit_attention.training.health import Health
from implicit_attention.training.lora import merged
from implicit_attention.training.sharding import shard
from implicit_attention.training.tensors import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from implicit_attention.training.windows import HeldOutWindows, RandomWindows

LOG_2 = math.log(2)


class TextTrainer(Trainer):
    """Trains a model on text, in bytes or in tokens.

    It also logs bits per byte, tokens per second and solver statistics. It stops before a step whose gradient is not
    finite. Its checkpoints are those of `training.checkpoint`, which one process, several processes and sharded weights
    (`fsdp`) all write and read.
    """

    # Trainer types these as optional or as unions.
    model: PreTrainedModel
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    train_dataset: RandomWindows
    eval_dataset: HeldOutWindows
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        fsdp: bool,
        keep: int,
        run: Mapping[str, Any],
        say: Callable[[str], None],
        rate: Callable[[str], float | None] = lambda name: None,
        gains: bool = False,
        **others: Any,
    ) -> None:
        """Make the Trainer.

        Args:
            model: The model.
            args: transformers' settings of the run.
            fsdp: Shard the model over the processes.
            keep: Checkpoints kept.
            run: Stored in each checkpoint.
            say: Prints a sentence for the user.
            rate: The largest learning rate of a parameter with this name; None for that of `args`.
            gains: Measure how much each row feeds itself.
            **others: `train_dataset`, `eval_dataset`, `processing_class` and `callbacks`, as for `Trainer`.
        """
        super().__init__(model, args, **others)
        self.health = Health()
        self._keep, self._run, self._say = keep, run, say
        self._tokens, self._since = 0, 0.0
        self._rate, self._gains = rate, gains
        # Nats per token over these are bits per byte.
        self._byte = LOG_2 * self.eval_dataset.bytes_per_token
        self._learned_byte = LOG_2 * self.train_dataset.bytes_per_token
        if fsdp:
            shard(self.model, bf16=args.bf16)
            # Tells Trainer that the model is sharded, so that it does not wrap or shard it again.
            self.is_distributed_loading_by_transformers = True

    # Figures

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and collect solver statistics."""
        if not self._tokens:
            self._since = time.perf_counter()
        inputs = {**inputs, "output_gains": True} if self._gains else inputs
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.health.add(outputs)
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures. Training steps also log bits per byte, speed and solver statistics."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._since
            logs |= {"bits_per_byte": logs["loss"] / self._learned_byte, "tokens_per_second": self._tokens / seconds}
            figures = self._everyones(self.health.figures())
            logs |= figures
            for sentence in self.health.warnings(figures, self.state.global_step):
                self._say(sentence)
            self._tokens = 0
        super().log(logs, start_time)

    def _everyones(self, figures: dict[str, float]) -> dict[str, float]:
        """The largest of each figure over all processes."""
        if self.args.world_size == 1 or not figures:
            return figures
        mine = torch.tensor(list(figures.values()), device=self.args.device)
        largest = self.accelerator.gather(mine[None]).amax(0)
        return dict(zip(figures, largest.tolist(), strict=True))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer. Parameters with a learning rate of their own have groups of their own.

        Args:
            model: As in `Trainer`.
        """
        made: Optimizer = super().create_optimizer(model)
        rates.split(made, self.model, self._rate)
        return made

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay: those of matrices, but not tables of relative biases.

        Args:
            model: The model.
        """
        tables = {id(module.table) for module in model.modules() if isinstance(module, RelativeBias)}
        matrices = {n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm, the same on every process. Raise if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm):
            raise RunError(
                f"step {self.state.global_step + 1}: the gradient is {float(norm)}, and the step was not taken"
            )
        return norm

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Reduce after every part of a batch: gradients that wait for the last part are not sharded."""
        return nullcontext()

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss and the bits per byte on `HeldOutWindows`, no byte counted twice.

        The result is the same for any number of processes. transformers' own loop weights an incomplete last batch like
        a full one.

        Raises:
            RunError: If there is no token to predict.
        """
        windows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(windows, HeldOutWindows)
        total, count = self._sum_losses(windows)
        if not count:  # the first token of a document is not predicted
            raise RunError("--data has no held-out token to predict: its documents have one token each, give it longer")
        metrics = {
            f"{metric_key_prefix}_loss": total / count,
            f"{metric_key_prefix}_bits_per_byte": total / count / self._byte,
            f"{metric_key_prefix}_bytes": round(count * windows.bytes_per_token),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _sum_losses(self, windows: HeldOutWindows) -> tuple[float, int]:
        """The sum of the losses of all tokens that are predicted, in nats, and their number."""
        size, world, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        # All processes gather sharded weights together, so each must run as many batches; the last may be a dummy.
        batches = range(0, len(windows), size)
        mine = [batches[i] if i < len(batches) else None for i in range(rank, -(-len(batches) // world) * world, world)]
        total, count = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with evaluating(self.model):
            for start in mine:
                chosen = range(start, min(start + size, len(windows))) if start is not None else range(1)
                items = [windows[i] for i in chosen]
                inputs = {name: torch.stack([item[name] for item in items]).to(self.args.device) for name in items[0]}
                labels = inputs.pop("labels")[:, 1:].flatten()
                logits = self.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                loss = F.cross_entropy(logits, labels, reduction="none")  # 0 where a label counts for nothing
                if start is not None:
                    total += loss.double().sum()
                    count += (labels >= 0).sum()
        return float(self.accelerator.reduce(total, "sum")), int(self.accelerator.reduce(count, "sum"))

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint. All processes gather it, the first one writes it."""
        del model, trial
        tensors = {
            storage.WEIGHTS: model_tensors(self.model),
            storage.OPTIMIZER: optimizer_tensors(self.model, self.optimizer),
            storage.RANDOM: self._random_states(),
        }
        self.on_first_process(lambda directory: storage.save(
            directory, self.model, self.processing_class, tensors, self.state, self._run, keep=self._keep
        ))  # fmt: skip

    def save_result(self) -> None:
        """Write the model into the directory of the run. All processes gather it, the first one writes it.

        Raises:
            RunError: If it cannot be written.
        """
        weights = merged(model_tensors(self.model))
        self.on_first_process(lambda directory: storage.save_model(
            directory, self.model, self.processing_class, weights, self._run, done=self.state.global_step
        ))  # fmt: skip

    def on_first_process(self, write: Callable[[Path], object]) -> None:
        """Write something on the first process, and raise on all processes if that fails.

        Args:
            write: Called with the directory of the run.

        Raises:
            RunError: If it cannot be written.
        """
        directory = Path(self.args.output_dir or ".")
        fault = None
        if self.args.process_index == 0:
            try:
                write(directory)
            except OSError as error:
                fault = unwritable("--out", directory, error)
        failed = torch.tensor(float(fault is not None), device=self.args.device)
        if float(self.accelerator.reduce(failed, "sum")):
            raise fault or RunError(f"cannot write to --out {directory}: see the error of the first process")

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.args.device)
        everyones = {name: self.accelerator.gather(state[None].to(self.args.device)) for name, state in states.items()}
        return {name: state.cpu() for name, state in everyones.items()}  # [processes, bytes]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights."""
        path = Path(resume_from_checkpoint, storage.WEIGHTS)
        load_model_tensors(self.model if model is None else model, storage.load_tensors(path), str(path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's moments, and set the learning rate to that of the schedule, which may have changed."""
        if checkpoint is None:
            return
        path = Path(checkpoint, storage.OPTIMIZER)
        load_optimizer_tensors(self.model, self.optimizer, storage.load_tensors(path), str(path))
        scheduler, step = self.lr_scheduler, self.state.global_step
        scheduled = [rate * shape(step) for rate, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": scheduled}
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load this process's random states if as many processes wrote the checkpoint; else keep those of the seed."""
        if checkpoint is None:
            return
        states = storage.load_tensors(Path(checkpoint, storage.RANDOM))
        rank, kind = self.args.process_index, self.args.device.type
        if len(states["cpu"]) == self.args.world_size:
            torch.set_rng_state(states["cpu"][rank].clone())  # torch reads a view out of bounds
            if kind == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"][rank].clone(), self.args.device)


class Checkpoints(TrainerCallback):
    """Writes a checkpoint before the first step, and logs at every checkpoint."""

    def __init__(self, trainer: TextTrainer, *, fresh: bool) -> None:
        """Make it.

        Args:
            trainer: The Trainer, which writes them.
            fresh: Whether the run is new. Then it gets a checkpoint before its first step, so it can always be resumed.
        """
        self.trainer, self.fresh = trainer, fresh

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the first checkpoint. Of a resumed run, take the intervals of its settings."""
        state.compute_steps(args, state.max_steps)  # the state in a checkpoint brings those it was made with
        if self.fresh:
            self.trainer._save_checkpoint(self.trainer.model, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log at every checkpoint, so that a resumed run logs the same figures as an uninterrupted one."""
        control.should_log |= control.should_save
        return control
