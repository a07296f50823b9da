"""A trained decoder, converted: its outputs beside its own, and what a prompt, a token and the conversion cost.

The model is a directory of transformers' or a GGUF file, such as SmolLM2-135M-Instruct. All its layers are converted.
The text is English: docstrings of Python's standard library. Times are those of interleaved calls.
"""

import argparse
import importlib
import inspect
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import measure
from benchmarks.report import described, target, tell, verdict

MODULES = (
    "argparse", "datetime", "decimal", "difflib", "email", "fractions", "functools", "heapq", "logging", "random",
    "smtplib", "statistics", "string", "tarfile", "textwrap", "threading", "typing", "zipfile",
)  # fmt: skip
PROMPTS, PROMPT, CONTINUED = 10, 12, 32  # prompts, their tokens, and how many come after
TARGET = 1.3  # times the trained model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model."""
    parser.add_argument("--model", type=Path, required=True, help="directory or GGUF file of a trained decoder")
    for name, default in (("tokens", 512), ("repeats", 9), ("steps", 24), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")


def run(*, model: Path, tokens: int = 512, repeats: int = 9, steps: int = 24, threads: int = 1) -> dict[str, Any]:
    """Convert, compare, measure, and return everything for the JSON.

    Args:
        model: Directory or GGUF file.
        tokens: Of a text.
        repeats: Timed prompts.
        steps: Timed tokens after each of them.
        threads: Of torch.
    """
    from implicit_attention.hf import convert

    torch.set_num_threads(threads)
    tell("loading")
    trained, tokenizer = loaded(model)
    begun = time.process_time()
    tell("converting")
    converted = convert(trained)
    converting = time.process_time() - begun
    converted.eval()
    pair = {"trained": trained, "converted": converted}
    ids = torch.tensor(tokenizer(text())["input_ids"][: 2 * tokens]).view(2, -1)
    tell("comparing")
    check = compared(pair, ids)
    tell("timing")
    figures = times(pair, ids[:1], repeats, steps)
    size = trained.config
    result = described("conversion", size.hidden_size, size.num_attention_heads)
    result |= {
        "model": model.name, "layers": size.num_hidden_layers, "tokens": ids.shape[1], "repeats": repeats,
        "threads": threads, "check": check, "correct": check["relative"] < 1e-4, **figures,
        "conversion": {"processor_seconds": converting, **command(trained, tokenizer)},
    }  # fmt: skip
    found = [target(f"{what}: time", figures[what]["ratio"], TARGET) for what in figures]
    return result | {"targets": found, "verdict": verdict(found) if result["correct"] else "WRONG outputs."}


def loaded(model: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = (model.parent, {"gguf_file": model.name}) if model.suffix == ".gguf" else (model, {})
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    return found.eval(), AutoTokenizer.from_pretrained(folder, **file)


def text() -> str:
    """English prose that every Python has."""
    return "\n\n".join(inspect.getdoc(importlib.import_module(name)) or "" for name in MODULES)


@torch.no_grad()
def compared(pair: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Logits and losses on the text, and greedy continuations of pieces of it."""
    logits = {name: model(ids, use_cache=False).logits for name, model in pair.items()}
    off, largest = (logits["converted"] - logits["trained"]).abs().max(), logits["trained"].abs().max()
    starts = torch.linspace(0, ids.shape[1] - PROMPT, PROMPTS).long()
    prompts = torch.stack([ids[0, i : i + PROMPT] for i in starts.tolist()])
    made = {
        name: model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=CONTINUED,
                             min_new_tokens=CONTINUED, do_sample=False)
        for name, model in pair.items()
    }  # fmt: skip
    return {
        "difference": float(off), "largest": float(largest), "relative": float(off / largest),
        "loss": {name: float(cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
                 for name, out in logits.items()},
        "prompts": PROMPTS, "continued": CONTINUED,
        "equal": int((made["trained"] == made["converted"]).all(1).sum()),
    }  # fmt: skip


@torch.no_grad()
def times(pair: dict[str, Any], ids: Tensor, repeats: int, steps: int) -> dict[str, Any]:
    """A prompt, and a token after it, in turn."""
    caches: dict[str, Any] = {}

    def prefill(name: str) -> Callable[[], None]:
        def call() -> None:
            caches[name] = pair[name](ids, use_cache=True).past_key_values

        return call

    def token(name: str) -> Callable[[], None]:
        return lambda: pair[name](ids[:, :1], cache=caches[name], use_cache=True)

    prompt = measure.interleaved_seconds({name: prefill(name) for name in pair}, repeats)
    after = measure.interleaved_seconds({name: token(name) for name in pair}, repeats * steps)
    found = {}
    for what, seconds in (("prefill", prompt), ("token", after)):
        rounds = zip(seconds["converted"], seconds["trained"], strict=True)
        found[what] = {
            "ratio": statistics.median(ours / theirs for ours, theirs in rounds),
            "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        }
    return found


def command(trained: Any, tokenizer: Any) -> dict[str, float]:
    """Peak memory of `implicit-attention convert` above its imports, and the weights' size, in MB.

    The model is read from a directory: transformers dequantises a whole GGUF file at once, which takes more.
    """
    config = type(trained.config)(**{**trained.config.to_dict(), "quantization_config": None})
    plain = type(trained)(config)
    plain.load_state_dict(trained.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        for part in (plain, tokenizer):
            part.save_pretrained(f"{folder}/trained")
        call = [sys.executable, "-m", "implicit_attention.cli", "convert", "--model", f"{folder}/trained"]
        most = peak([*call, "--out", f"{folder}/converted"])
    imports = peak([sys.executable, "-c", "import implicit_attention.hf, transformers.models.llama.modeling_llama"])
    weights = sum(p.numel() * p.element_size() for p in trained.parameters())
    return {"peak_mb": most - imports, "weights_mb": weights / 1e6}


def peak(call: list[str]) -> float:
    """The largest resident set of a command, in MB."""
    wrapped = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", wrapped, *call], check=True, capture_output=True, text=True)
    return float(done.stdout)
