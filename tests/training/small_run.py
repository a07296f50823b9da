"""Runs small enough to be tests: a text of numbered lines, a model of some thousand weights."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from implicit_attention.training import checkpoint, run
from implicit_attention.training.settings import Settings
from implicit_attention.training.tokenizer import byte_tokenizer

TEXT = b"".join(b"line %d of %d\n" % (i, 7 * i) for i in range(400))
# While the learning rate still rises it does not depend on the number of steps.
SETTINGS = {
    "length": 16, "embed_dim": 16, "heads": 2, "batch_size": 4, "steps": 6, "warmup": 50, "learning_rate": 0.1,
    "log_every": 1, "eval_every": 3, "save_every": 2, "device": "cpu",
}  # fmt: skip
TIMES = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def text(folder: Path) -> Path:
    path = folder / "text"
    path.write_bytes(TEXT)
    return path


def make_trained(folder: Path) -> Path:
    """Write a tiny decoder of transformers, with a tokenizer whose tokens are bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(64).save_pretrained(folder)
    return folder


def settings(folder: Path, **changes) -> Settings:
    return replace(Settings(data=str(text(folder)), out=str(folder / "run"), **SETTINGS), **changes)


def train(chosen: Settings, *, resume: bool = False, callbacks=(), say=lambda sentence: None):
    """Do what the command does: plan, make the directory, run."""
    flags = {"out": chosen.out} if resume else vars(chosen)
    plan = run.plan({**flags, "steps": chosen.steps}, {}, resume=resume)
    plan.settings.directory.mkdir(parents=True, exist_ok=True)
    return run.run(plan, say=say, callbacks=callbacks)


def curve(history) -> list[dict]:
    """What was logged, without how long it took."""
    entries = [{name: value for name, value in entry.items() if name not in TIMES} for entry in history]
    return [entry for entry in entries if "train_loss" not in entry]


def kept_history(directory: Path) -> list[dict]:
    """The history in the newest checkpoint."""
    return json.loads((checkpoint.checkpoints(directory)[-1] / checkpoint.STATE).read_text())["log_history"]


def listing(directory: Path) -> list[str]:
    """Every path below a directory."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
