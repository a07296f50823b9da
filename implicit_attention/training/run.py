"""A run from its settings to its result."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from implicit_attention import files
from implicit_attention.errors import ConvergenceWarning, NonFiniteError
from implicit_attention.training import checkpoint as storage
from implicit_attention.training import corpus, uptraining
from implicit_attention.training.faults import RunError, SettingError, reason, unwritable
from implicit_attention.training.model import build
from implicit_attention.training.packed import pack
from implicit_attention.training.resolving import check_effect, resolve
from implicit_attention.training.settings import Settings
from implicit_attention.training.tensorboard import TensorBoard
from implicit_attention.training.tokenizer import byte_tokenizer
from implicit_attention.training.trainer import Checkpoints, TextTrainer
from implicit_attention.training.windows import HeldOutWindows, RandomWindows, Text

_MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
NAMING = {"out", "source", "train", "preset", "attention", "seed"}  # settings that name the directory of a run


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Attributes:
        settings: Its settings. Its directory must exist.
        resumed: The checkpoint it continues from; None for a new run.
        done: Steps taken already.
        fingerprint: Fingerprint of the data that the run started with; None for a new run.
    """

    settings: Settings
    resumed: Path | None = None
    done: int = 0
    fingerprint: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        bits_per_byte: On held-out text.
        held_out_bytes: How many bytes that was measured on.
        parameters: Weights of the model.
        learning: Those that learn.
        history: The log entries, as transformers keeps them.
        data: Where the text came from.
        training_bytes: Bytes of training text.
    """

    bits_per_byte: float
    held_out_bytes: int
    parameters: int
    learning: int
    history: Sequence[Mapping[str, Any]]
    data: str
    training_bytes: int


def plan(flags: Mapping[str, Any], file: Mapping[str, Any], *, resume: bool) -> Plan:
    """Make the plan of a run, and check its directory.

    Under an `accelerate launch` that asks for FSDP, `fsdp` is on.

    Args:
        flags: Settings of the command line.
        file: Settings of a file.
        resume: Whether to continue the run in the directory.

    Returns:
        The plan.

    Raises:
        SettingError: If the settings do not fit.
        RunError: If the directory does not.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        flags = {"fsdp": True, **flags}  # `training.sharding` does it instead of accelerate, on every device
    if resume:  # what names the directory; the run in it has the rest
        flags_of_name, file_of_name = ({n: part[n] for n in part if n in NAMING} for part in (flags, file))
        settings = resolve(flags_of_name, file_of_name)
    else:
        settings = resolve(flags, file)
    found = storage.checkpoints(settings.directory)
    if not resume:
        if found:
            raise RunError(
                f"--out {settings.directory} has a run already ({found[-1].name}): continue it with --resume, or "
                "choose another --out"
            )
        if model := next((name for name in _MODEL_FILES if (settings.directory / name).exists()), None):
            raise RunError(
                f"--out {settings.directory} has a model already ({model}), which would be lost: choose another --out"
            )
        if settings.data != "default" and settings.directory.resolve() == Path(settings.data).resolve():
            raise RunError(
                f"--out {settings.directory} is the directory of --data, and a run must not learn from its own files: "
                "choose another --out, which may be in it"
            )
        check_effect({**file, **flags}, settings)
        if settings.source is not None:
            settings = uptraining.fitted(settings, {**file, **flags})
        return Plan(settings)
    if not found:
        raise RunError(
            f"--out {settings.directory} has no checkpoint to resume from: leave out --resume to start a run"
        )
    content = storage.load_run(found[-1])
    settings = resolve({**flags, "out": str(settings.directory)}, file, content["settings"])
    check_effect({**file, **flags}, settings)
    if settings.steps < content["done"]:
        raise SettingError(
            "steps", f"the run in {settings.directory} is at step {content['done']} already, beyond {settings.steps}"
        )
    return Plan(settings, found[-1], content["done"], content["fingerprint"])


def run(plan: Plan, *, say: Callable[[str], None] = print, callbacks: Sequence[TrainerCallback] = ()) -> Result | None:
    """Train, evaluate, and leave the model in the directory of the run.

    Under `torchrun` or `accelerate launch` every process calls this and works on its part of each batch.

    Args:
        plan: The plan.
        say: Prints a sentence for the user.
        callbacks: Callbacks of the Trainer on the first process.

    Returns:
        The result; None on all processes but the first.

    Raises:
        RunError: If the run fails. The last checkpoint stays.
    """
    settings = plan.settings
    disable_progress_bar()  # of transformers' own
    first = int(os.environ.get("RANK", "0")) == 0
    text = corpus.read(settings.data, without=settings.directory)
    if plan.fingerprint not in (None, text.fingerprint):
        raise RunError(
            f"--data {settings.data} has changed since the run in {settings.directory} started, so it cannot continue: "
            "restore the data, or start a new run with another --out"
        )
    if plan.resumed is not None:
        say(f"resuming {settings.directory} at step {plan.done} of {settings.steps}")
    with _explained(settings), warnings.catch_warnings(), ExitStack() as stack:
        # `health` reports missed tolerances, with the step and a remedy.
        warnings.simplefilter("ignore", ConvergenceWarning)
        trainer = make_trainer(settings, text, say, plan.resumed, done=plan.done)
        trainer.add_callback(Checkpoints(trainer, fresh=plan.resumed is None))
        if first:
            files.remove_unfinished(settings.directory)
            board = stack.enter_context(TensorBoard(settings.directory / "tensorboard", done=plan.done))
            for callback in (board, *callbacks):
                trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(plan.resumed) if plan.resumed else None)
        trainer.save_result()
        held_out = HeldOutWindows(trainer.eval_dataset.text, settings.length, limit=settings.final_windows)
        metrics = trainer.evaluate(held_out, metric_key_prefix="final")
    parameters = sum(int(parameter.numel()) for parameter in trainer.model.parameters())
    learning = uptraining.learning(trainer.model)
    history, figures = trainer.state.log_history, (metrics["final_bits_per_byte"], int(metrics["final_bytes"]))
    trainer.end()
    return Result(*figures, parameters, learning, history, text.name, len(text.training)) if first else None


def make_trainer(
    settings: Settings,
    text: corpus.Corpus,
    say: Callable[[str], None] = print,
    resumed: Path | None = None,
    *,
    done: int = 0,
) -> TextTrainer:
    """Return the Trainer of a run.

    Args:
        settings: The settings of the run.
        text: What it learns from.
        say: Prints a sentence for the user.
        resumed: The checkpoint that it goes on from, if there is one.
        done: Steps of that checkpoint.

    Raises:
        RunError: If the settings do not fit, or the model of `source` cannot be read.
    """
    training: Text = text.training
    held_out: Text = text.held_out
    tokenizer: PreTrainedTokenizerBase
    if settings.source is None:
        model, tokenizer = build(settings), byte_tokenizer(settings.length)
    else:
        model, tokenizer = uptraining.start(settings, resumed)
        training, held_out = pack(text, tokenizer, model.config.vocab_size)
        say(f"{uptraining.learning(model):,} of {model.num_parameters():,} weights learn.")
    trainer = TextTrainer(
        model,
        arguments(settings, measured_first=settings.source is not None and not done),
        fsdp=settings.fsdp,
        keep=settings.keep,
        run={"settings": asdict(settings), "fingerprint": text.fingerprint},
        say=say,
        rate=lambda name: settings.map_rate if settings.source and uptraining.query_map(name) else None,
        gains=settings.source is not None and model.config.self_query == "output",
        train_dataset=RandomWindows(
            training, settings.length, count=settings.steps * settings.batch_size, seed=settings.seed
        ),
        eval_dataset=HeldOutWindows(held_out, settings.length, limit=settings.eval_windows),
        processing_class=tokenizer,
    )
    trainer.health.rate_flag = settings.rate[0]
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(settings: Settings, *, measured_first: bool = False) -> TrainingArguments:
    """Return the arguments of transformers' Trainer for a run.

    Args:
        settings: The settings of the run.
        measured_first: Whether to evaluate before the first step.

    Returns:
        The arguments of a `Trainer`.

    Raises:
        SettingError: If the settings do not fit this machine or the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    part, rest = divmod(settings.batch_size, world * settings.accumulate)
    if rest:
        raise SettingError(
            "batch_size",
            f"must be a multiple of accumulate x processes = {settings.accumulate} x {world}, "
            f"but is {settings.batch_size}.",
        )
    if settings.fsdp and world == 1:
        raise SettingError(
            "fsdp",
            "needs several processes: use torchrun --nproc-per-node 2 -m implicit_attention.cli train ..., or "
            "--no-fsdp for one process",
        )
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise SettingError("device", "no CUDA device was found: use --device cpu.")
    return TrainingArguments(
        output_dir=str(settings.directory),
        max_steps=settings.steps,
        per_device_train_batch_size=part,
        per_device_eval_batch_size=part,
        gradient_accumulation_steps=settings.accumulate,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=settings.clip,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=measured_first,
        save_strategy="steps",
        save_steps=settings.save_every,
        seed=settings.seed,
        use_cpu=settings.device == "cpu" or not cuda,
        bf16=settings.bf16,
        torch_compile=settings.compile,
        activation_checkpointing=settings.checkpointing,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=cuda and settings.device != "cpu",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )


@contextmanager
def _explained(settings: Settings) -> Iterator[None]:
    """Turn errors of a step into one line that says what to do."""
    try:
        yield
    except RunError as fault:
        if str(fault).startswith("step "):
            raise RunError(f"{fault}. {_last_good(settings)}") from None
        raise
    except NonFiniteError as error:
        raise RunError(f"the weights are no longer finite: {reason(error)} {_last_good(settings)}") from None
    except OSError as error:
        raise unwritable("--out", settings.directory, error) from None
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory ({reason(error)}): raise --accumulate, or use --bf16, --checkpointing or, on several "
            "devices, --fsdp"
        ) from None


def _last_good(settings: Settings) -> str:
    found = storage.checkpoints(settings.directory)
    kept = f"{found[-1]} is the last good checkpoint: continue with --resume and a" if found else "Start again with a"
    flag, rate = settings.rate
    return f"{kept} {flag} below {rate:g}"
