"""The settings of a run: one list of names for flags, the YAML file and checkpoints."""

import contextlib
import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from implicit_attention import recommended
from implicit_attention.causal.engines import RENAMED
from implicit_attention.training.faults import RunError, SettingError


def _setting(
    default: Any,
    text: str,
    panel: str,
    *,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = False,
    metavar: str | None = None,
    flag: str | None = None,
) -> Any:
    """A setting: default, help text, panel of the help page, range, whether a resumed run must keep it, its flag."""
    metadata = {
        "help": text, "panel": panel, "low": low, "high": high, "fixed": fixed, "metavar": metavar, "flag": flag,
    }  # fmt: skip
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
        "Implicit only: what token i's own query is made from in row i. [bold]input[/bold]: exactly one solution. "
        "[bold]output[/bold]: the original equation. Both cost about the same.",
        "Model",
        fixed=True,
    )
    values: Literal["linear", "feedback"] = _setting(
        "linear",
        "Implicit only: what values are made from. [bold]linear[/bold]: the input. [bold]feedback[/bold]: the input, "
        "and for later tokens the output too, so that a layer keeps state. With --attention ordinary: which model's "
        "weights to match.",
        "Model",
        fixed=True,
    )
    length: int = _setting(
        128,
        "Longest sequence in bytes, with --from in tokens, N. If you do not name it with --from, it is no larger than "
        "the model's.",
        "Model",
        low=2,
        fixed=True,
    )
    embed_dim: int = _setting(128, "Width of a token, D.", "Model", low=1, fixed=True)
    layers: int | str = _setting(
        1,
        "Number of blocks. With --from: which layers become implicit, [bold]all[/bold], [bold]none[/bold], or such as "
        "0,4,8-16, counted from 0; all of a model that has no implicit layer yet.",
        "Model",
        low=0,
        fixed=True,
        metavar="NUMBER|WHICH",
    )
    heads: int = _setting(
        4, "Attention heads. --embed-dim divided by them must be an even number.", "Model", low=1, fixed=True
    )
    source: str | None = _setting(
        None,
        "Train on a model that is trained already: a directory of transformers, converted or not, or a GGUF file. Text "
        "then goes through its own tokenizer.",
        "Train on (with --from)",
        fixed=True,
        metavar="DIR",
        flag="from",
    )
    train: Literal["query-map", "lora", "all"] = _setting(
        "query-map",
        "Which weights learn: [bold]query-map[/bold], those that read outputs (Omega_Q, Psi_V); [bold]lora[/bold], "
        "these and low-rank changes of the attention's other maps; [bold]all[/bold].",
        "Train on (with --from)",
        fixed=True,
    )
    map_rate: float = _setting(
        1e-3, "Largest learning rate of the weights that read outputs.", "Train on (with --from)", low=0
    )
    lora_weights: int = _setting(
        0,
        "With lora: about how many weights the low-rank changes have. 0 means as many as those that read outputs, with "
        "--layers none as many as those of all layers would be.",
        "Train on (with --from)",
        low=0,
        fixed=True,
    )
    data: str = _setting(
        "default",
        "Text to learn: a file, a directory of files, or [bold]default[/bold], the source of Python's standard "
        "library. It is read as bytes, in any encoding; with --from as UTF-8.",
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
    eval_windows: int = _setting(
        512, "Most held-out sequences in an evaluation during training, at even distances.", "Run", low=1
    )
    final_windows: int = _setting(4096, "Most held-out sequences in the last evaluation.", "Run", low=1)
    save_every: int = _setting(250, "Steps between checkpoints.", "Run", low=1)
    keep: int = _setting(2, "Number of newest checkpoints to keep.", "Run", low=1)
    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "Device to compute on.", "Run")
    kernel: Literal["auto", "torch", "cpp"] = _setting(
        "auto",
        "Kernels of the implicit layers. [bold]auto[/bold]: cpp on a CPU, Triton's on a CUDA device if they pass a "
        "self-test, torch elsewhere.",
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
            check(name, getattr(self, name))
        if self.source is None and not (isinstance(self.layers, int) and self.layers > 0):
            raise SettingError("layers", f"must be an integer of at least 1 without --from, but is {self.layers!r}.")
        if self.embed_dim % (2 * self.heads):
            raise SettingError(
                "heads",
                f"must divide embed_dim into parts of even size, but embed_dim is {self.embed_dim} and heads "
                f"{self.heads}.",
            )
        if self.values == "feedback" and self.self_query == "output":
            raise SettingError("values", "feedback needs self_query input: elsewhere an equation may have no solution.")
        if self.batch_size % self.accumulate:
            raise SettingError(
                "accumulate",
                f"must divide batch_size, but batch_size is {self.batch_size} and accumulate {self.accumulate}.",
            )

    @property
    def directory(self) -> Path:
        """The directory of the run's files."""
        source = "" if self.source is None else Path(self.source).name.removesuffix(".gguf")
        name = f"{self.preset}-{self.attention}" if self.source is None else f"{source}-{self.train}"
        return Path(self.out or f"runs/{name}-seed{self.seed}")

    @property
    def rate(self) -> tuple[str, float]:
        """The flag and the value of the learning rate of all weights, or of those that learn."""
        if self.source is not None and self.train == "query-map":
            return "--map-rate", self.map_rate
        return "--learning-rate", self.learning_rate

    @property
    def kind(self) -> str:
        """What is trained, in a few words."""
        if self.source is None:
            return f"{self.attention}, {self.preset}"
        return f"{Path(self.source).name}, layers {self.layers}, {self.train}"


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
# What replaces a preset with --from. Its model has its own sizes.
UPTRAINING: Mapping[str, Any] = {
    "layers": "auto", "length": 512, "steps": 500, "batch_size": 8, "learning_rate": 1e-4, "warmup": 50,
    "weight_decay": 0.0, "eval_every": 100, "save_every": 100,
    "eval_windows": 64, "final_windows": 256,
}  # fmt: skip
OF_A_NEW_MODEL, OF_A_TRAINED_MODEL = (
    ("preset", "attention", "embed_dim", "heads"),
    ("train", "map_rate", "lora_weights"),
)
FLAGS: Mapping[str, str] = {f.metadata["flag"]: name for name, f in FIELDS.items() if f.metadata["flag"]}


def flag(name: str) -> str:
    """Return the flag of a setting, such as `--learning-rate`.

    Args:
        name: The setting.
    """
    return f"--{FIELDS[name].metadata['flag'] or name}".replace("_", "-")


def known(name: str) -> str:
    """Return the name of a setting.

    Args:
        name: What may be one.

    Raises:
        RunError: If it is none.
    """
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
        raise RunError(f"unknown setting {name!r}: did you mean {near[0]!r}?")
    return name


def plain_type(name: str) -> tuple[Any, tuple[str, ...]]:
    """Return the type of a setting, without None, and the words it is limited to, if any.

    Args:
        name: The setting.

    Returns:
        `int`, `float`, `bool` or `str` (of several, the last); and the words.
    """
    kind = TYPES[name]
    if get_origin(kind) in (Union, types.UnionType):
        kind = [part for part in get_args(kind) if part is not type(None)][-1]
    if get_origin(kind) is Literal:
        return str, get_args(kind)
    return kind, ()


def check(name: str, value: Any) -> Any:
    """Return a value in its setting's type.

    Args:
        name: The setting.
        value: What it is to be.

    Raises:
        SettingError: If it cannot be that.
    """
    if value is None and FIELDS[name].default is None:
        return None
    kind, words = plain_type(name)
    if name == "kernel":
        value = RENAMED.get(value, value)  # in the record of an older run
    if TYPES[name] == int | str:  # a number, however it is written, or else words
        with contextlib.suppress(TypeError, ValueError):
            value = value if isinstance(value, (bool, float)) else int(value)
        kind = int if type(value) is not str else str
    if kind is float and not isinstance(value, bool):
        # PyYAML reads YAML 1.1, in which 3e-3 is a string.
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)
    if type(value) is not kind:
        raise SettingError(name, f"must be {_KINDS[kind]}, but is {value!r}.")
    if words and value not in words:
        raise SettingError(name, f"must be one of {', '.join(words)}, but is {value!r}.")
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    if kind in (int, float) and not low <= value <= (sys.float_info.max if high is None else high):
        bound = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise SettingError(name, f"must be {_KINDS[kind]} {bound}, but is {value}.")
    return value


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
