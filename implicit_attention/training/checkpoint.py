"""Checkpoints: safetensors and JSON, no pickle; written whole or not at all; the same on one process and on several.

checkpoint-250/
  config.json generation_config.json model.safetensors     the model, as transformers saves it
  tokenizer.json tokenizer_config.json
  optimizer.safetensors                                    moments and counts, by the parameters' names
  random.safetensors                                       the generators' states, a row for each process
  trainer_state.json                                       the step, and the curves so far
  run.json                                                 the settings, and a fingerprint of the data
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from implicit_attention.files import remove_directory, whole_directory, whole_files
from implicit_attention.training.faults import RunError, reason, unreadable

WEIGHTS, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, RUN = "trainer_state.json", "run.json"
_ONE_FILE = 1 << 60  # bytes, so that transformers does not split the weights
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first.

    Args:
        directory: Directory of the run.

    Raises:
        RunError: If the directory cannot be read.
    """
    try:
        found = {int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable("--out", directory, error) from None
    return [found[step] for step in sorted(found)]


def newest_model(directory: Path) -> Path | None:
    """Return where the newest model of a run is, its directory or one of its checkpoints; None if there is none.

    Args:
        directory: Directory of the run, or of a model alone.

    Raises:
        RunError: If the directory cannot be read, or its record is damaged.
    """
    found = checkpoints(directory)
    done = load_json(directory / RUN).get("done") if (directory / RUN).is_file() else None
    newer = [path for path in found if isinstance(done, int) and _step(path) > done]
    places = [*reversed(newer), directory, *reversed(found[: len(found) - len(newer)])]
    return next((path for path in places if (path / "config.json").is_file() and (path / WEIGHTS).is_file()), None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def save(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: TrainerState,
    run: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `keep`.

    Args:
        directory: Directory of the run.
        model: The model, whose configuration is saved.
        tokenizer: Its tokenizer.
        tensors: The tensors of each file: `WEIGHTS`, `OPTIMIZER` and `RANDOM`.
        state: State of the Trainer.
        run: Content of `run.json`.
        keep: Number of checkpoints to keep, this one included.

    Returns:
        The checkpoint.

    Raises:
        OSError: If it cannot be written. Then no part of it is left, and no other checkpoint is removed.
    """
    path = directory / f"checkpoint-{state.global_step}"
    with whole_directory(path) as new:
        _save_model(new, model, tokenizer, tensors[WEIGHTS])
        for name in (OPTIMIZER, RANDOM):
            _save_tensors(dict(tensors[name]), new / name)
        state.save_to_json(str(new / STATE))
        _save_run(new, run)
    for old in checkpoints(directory)[:-keep]:
        remove_directory(old)
    return path


def save_model(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor],
    run: Mapping[str, Any],
    *,
    done: int,
) -> None:
    """Write a trained model into the directory of its run, for `from_pretrained`.

    Args:
        directory: Directory of the run, which exists.
        model: The model, whose configuration is saved.
        tokenizer: Its tokenizer.
        weights: Its weights, whole.
        run: As for `save`.
        done: Steps taken.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_files(directory) as new:
        _save_model(new, model, tokenizer, weights)
        _save_run(new, {**run, "done": done})


def _save_model(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, Tensor]
) -> None:
    config = model.config
    training = config.use_cache, config.solver
    # The Trainer turns the cache off, and a run may have chosen a kernel for training. A saved model should generate on
    # any machine.
    config.use_cache, config.solver = True, "auto"
    try:
        model.save_pretrained(path, state_dict=dict(weights), max_shard_size=_ONE_FILE)
    except SafetensorError as error:  # how safetensors reports a full disk, among others
        raise OSError(reason(error)) from error
    finally:
        config.use_cache, config.solver = training
    tokenizer.save_pretrained(path)


def _save_run(path: Path, run: Mapping[str, Any]) -> None:
    (path / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(reason(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors.

    Args:
        path: A safetensors file.

    Returns:
        Its tensors by name, on the CPU.

    Raises:
        RunError: If it cannot be read, or is damaged.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise unreadable("the checkpoint", path, error) from None
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from None


def load_run(checkpoint: Path) -> dict[str, Any]:
    """Read the settings and the progress of a checkpoint's run.

    Args:
        checkpoint: Directory of the checkpoint.

    Returns:
        The `run` argument of `save`, which has `settings` and `fingerprint`; and `done`, the steps taken.

    Raises:
        RunError: If it cannot be read, or is damaged.
    """
    content, state = load_json(checkpoint / RUN), load_json(checkpoint / STATE)
    if not (isinstance(content.get("settings"), dict) and isinstance(content.get("fingerprint"), str)):
        raise damaged(checkpoint / RUN, KeyError("settings and fingerprint"))
    if not isinstance(state.get("global_step"), int):
        raise damaged(checkpoint / STATE, KeyError("global_step"))
    return {**content, "done": state["global_step"]}


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        RunError: If it cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable("the checkpoint", path, error) from None
    except ValueError as error:
        raise damaged(path, error) from None
    if not isinstance(content, dict):
        raise damaged(path, TypeError("no object"))
    return content


def damaged(path: Path, error: Exception) -> RunError:
    """Return the error for a damaged file of a checkpoint, or of the model that a run has left.

    Args:
        path: The file.
        error: What is wrong with it.
    """
    directory = path.parent
    if _NAME.fullmatch(directory.name):
        remedy = f"remove {directory} to continue from the checkpoint before it, if there is one"
    elif checkpoints(directory):
        remedy = f"use one of its checkpoints, or write it again: {resuming(directory)}"
    else:
        remedy = "copy the model again"
    return RunError(f"{path} is damaged ({reason(error)}): {remedy}")


def resuming(directory: Path) -> str:
    """Return the command that continues a run.

    Args:
        directory: Directory of the run.
    """
    return f"implicit-attention train --resume --out {shlex.quote(str(directory))}"
