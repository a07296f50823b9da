"""The settings of a run: one list of names for flags, the YAML file and checkpoints.

A setting comes from the first of these that has it: the flag, the YAML file, the run that is resumed, the preset, the
default.
"""

import contextlib
import dataclasses
import difflib
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from implicit_attention import recommended
from implicit_attention.training.faults import RunError, reason, unreadable


def _setting(
    default: Any,
    text: str,
    panel: str,
    *,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = False,
    metavar: str | None = None,
) -> Any:
    """A setting: its default, help text, panel of the help page, range, and whether a resumed run must keep it."""
    metadata = {"help": text, "panel": panel, "low": low, "high": high, "fixed": fixed, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does. Each field is a flag and a key of the YAML file."""

    preset: Literal["tiny", "small", "base"] = _setting(
        "tiny",
        "Sizes to start from: [bold]tiny[/bold], one block, minutes on two CPU cores; [bold]small[/bold], 6 blocks, "
        "one GPU; [bold]base[/bold], 12 blocks of GPT-2's size, several GPUs.",
        "Model",
        fixed=True,
    )
    attention: Literal["implicit", "ordinary"] = _setting(
        "implicit",
        "Implicit-query attention; or ordinary attention in a model with as many weights, to compare with.",
        "Model",
        fixed=True,
    )
    self_query: Literal["input", "output"] = _setting(
        recommended.CAUSAL_LM["self_query"],
        "Implicit only: what token i's own query is made from in row i. [bold]input[/bold]: exactly one solution, and "
        "the cheapest. [bold]output[/bold]: the original equation.",
        "Model",
        fixed=True,
    )
    values: Literal["linear", "feedback"] = _setting(
        "linear",
        "Implicit only: what values are made from. [bold]linear[/bold]: the input. [bold]feedback[/bold]: the input, "
        "and for later tokens the output too, so that a layer keeps state.",
        "Model",
        fixed=True,
    )
    length: int = _setting(128, "Longest sequence in bytes, N.", "Model", low=2, fixed=True)
    embed_dim: int = _setting(128, "Width of a token, D.", "Model", low=1, fixed=True)
    layers: int = _setting(1, "Number of blocks.", "Model", low=1, fixed=True)
    heads: int = _setting(4, "Attention heads, a divisor of embed-dim.", "Model", low=1, fixed=True)
    data: str = _setting(
        "default",
        "Text to learn: a file, a directory of files, or [bold]default[/bold], the source of Python's standard "
        "library. It is read as bytes, in any encoding.",
        "Training",
        fixed=True,
        metavar="FILE|DIR|default",
    )
    steps: int = _setting(1500, "Optimizer steps of the whole run.", "Training", low=1)
    seed: int = _setting(0, "Seed of weights, data order and dropout.", "Training", low=0, high=2**32 - 1, fixed=True)
    batch_size: int = _setting(12, "Sequences in an optimizer step, over all processes.", "Training", low=1, fixed=True)
    accumulate: int = _setting(
        1, "Compute a batch in this many parts, one after another, to save memory.", "Training", low=1
    )
    learning_rate: float = _setting(3e-3, "Largest learning rate of AdamW.", "Training", low=0)
    warmup: int = _setting(
        100,
        "Steps in which the learning rate rises from 0. After them it falls along a cosine. If you do not name it and "
        "--steps is no larger, it is a tenth of --steps.",
        "Training",
        low=0,
    )
    weight_decay: float = _setting(0.1, "Weight decay of matrices.", "Training", low=0)
    clip: float = _setting(1.0, "Largest norm of the gradient. 0 means no limit.", "Training", low=0)
    out: str | None = _setting(None, "Directory of the run, for checkpoints, logs and the model.", "Run", metavar="DIR")
    log_every: int = _setting(10, "Steps between log entries.", "Run", low=1)
    eval_every: int = _setting(250, "Steps between evaluations on a sample of the held-out text.", "Run", low=1)
    save_every: int = _setting(250, "Steps between checkpoints.", "Run", low=1)
    keep: int = _setting(2, "Number of newest checkpoints to keep.", "Run", low=1)
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "Device to compute on.", "Run")
    kernel: Literal["auto", "torch", "cpp", "numba"] = _setting(
        "auto",
        "Kernels of the implicit layers. [bold]auto[/bold]: cpp on a CPU, torch elsewhere. [bold]numba[/bold] is the "
        "old name of cpp.",
        "Run",
    )
    bf16: bool = _setting(False, "Compute in bfloat16, with weights in float32.", "Run")
    compile: bool = _setting(False, "Compile the model with torch.compile.", "Run")
    checkpointing: bool = _setting(False, "Recompute each block in the backward pass, to save memory.", "Run")
    fsdp: bool = _setting(
        False, "Shard weights and optimizer over the processes of torchrun or accelerate launch (FSDP2).", "Run"
    )

    def __post_init__(self) -> None:
        """Raise a `RunError` about the first setting that is invalid."""
        for name in FIELDS:
            _check(name, getattr(self, name))
        if self.embed_dim % (2 * self.heads):
            raise RunError(
                f"heads: must divide embed_dim into parts of even size, but embed_dim is {self.embed_dim} and heads "
                f"{self.heads}."
            )
        if self.values == "feedback" and self.self_query == "output":
            raise RunError("values: feedback needs self_query input: elsewhere an equation may have no solution.")
        if self.batch_size % self.accumulate:
            raise RunError(
                f"accumulate: must divide batch_size, but batch_size is {self.batch_size} and accumulate "
                f"{self.accumulate}."
            )

    @property
    def directory(self) -> Path:
        """The directory of the run's files."""
        return Path(self.out or f"runs/{self.preset}-{self.attention}-seed{self.seed}")


FIELDS: Mapping[str, "dataclasses.Field[Any]"] = {f.name: f for f in dataclasses.fields(Settings)}
TYPES: Mapping[str, Any] = get_type_hints(Settings)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {},
    "small": {
        "length": 512, "embed_dim": 384, "layers": 6, "heads": 6,
        "steps": 5000, "batch_size": 32, "learning_rate": 1e-3, "warmup": 200, "eval_every": 500, "save_every": 500,
    },
    "base": {
        "length": 1024, "embed_dim": 768, "layers": 12, "heads": 12,
        "steps": 50_000, "batch_size": 256, "learning_rate": 6e-4, "warmup": 1000,
        "eval_every": 1000, "save_every": 1000,
    },
}  # fmt: skip


def resolve(
    flags: Mapping[str, Any], file: Mapping[str, Any] | None = None, run: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings of a run.

    Args:
        flags: Settings of the command line.
        file: Settings of the YAML file.
        run: Settings of the run that is resumed, if there is one.

    Returns:
        The settings.

    Raises:
        RunError: If a setting is unknown or invalid, or contradicts the run that is resumed.
    """
    said = {**(file or {}), **flags}
    for name, value in said.items():
        _known(name)
        said[name] = _check(name, value)
    if said.get("data", "default") != "default":
        said["data"] = os.path.abspath(said["data"])  # a run may be resumed from another directory
    if run is not None:
        _check_agreement(said, run)
    known = {name: value for name, value in (run or {}).items() if name in FIELDS}
    layers = {**known, **said}
    preset = _check("preset", layers.get("preset", FIELDS["preset"].default))
    settings = Settings(**{**PRESETS[preset], **layers})
    if "warmup" not in layers and settings.steps <= settings.warmup:  # the learning rate would never be reached
        return dataclasses.replace(settings, warmup=settings.steps // 10)
    return settings


def _check_agreement(said: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for name, value in said.items():
        if FIELDS[name].metadata["fixed"] and name in run and run[name] != value:
            raise RunError(
                f"{name}: {value} contradicts the run that is resumed, which has {run[name]}: "
                "leave it out, or choose another --out for a new run."
            )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file. Tags that build objects are refused.

    Args:
        path: A file with a mapping of settings, such as `learning_rate: 0.001`. `-` and `_` mean the same in a name.

    Returns:
        The settings in the file.

    Raises:
        RunError: If the file cannot be read, has another content, or names an unknown setting.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise unreadable("--config", path, error) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: invalid UTF-8, invalid dates
        raise RunError(f"--config {path} is not a YAML file of settings: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RunError(
            f"--config {path} must hold a mapping from settings to values, but holds {type(content).__name__}."
        )
    try:
        settings = {name.replace("-", "_"): value for name, value in content.items()}
        return {_known(name): _check(name, value) for name, value in settings.items()}
    except RunError as fault:
        raise RunError(f"--config {path}: {reason(fault)}") from None


def _known(name: str) -> str:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
        raise RunError(f"unknown setting {name!r}: did you mean {near[0]!r}?")
    return name


def plain_type(name: str) -> tuple[Any, tuple[str, ...]]:
    """Return the type of a setting, without None, and the words it is limited to, if any.

    Args:
        name: The setting.

    Returns:
        `int`, `float`, `bool` or `str`; and the words.
    """
    kind = TYPES[name]
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return str, get_args(kind)
    return kind, ()


def _check(name: str, value: Any) -> Any:
    """Return a value in its setting's type, or raise a `RunError`."""
    if value is None and FIELDS[name].default is None:
        return None
    kind, words = plain_type(name)
    if kind is float and not isinstance(value, bool):
        # PyYAML reads YAML 1.1, in which 3e-3 is a string.
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)
    if type(value) is not kind:
        raise RunError(f"{name}: must be {_KINDS[kind]}, but is {value!r}.")
    if words and value not in words:
        raise RunError(f"{name}: must be one of {', '.join(words)}, but is {value!r}.")
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    if kind in (int, float) and not low <= value <= (sys.float_info.max if high is None else high):
        bound = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise RunError(f"{name}: must be {_KINDS[kind]} {bound}, but is {value}.")
    return value


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
