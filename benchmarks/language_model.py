"""A small language model, implicit and ordinary: what it learns in 1500 steps, and what a step and a new token cost.

Both arms are the models of `implicit-attention train --preset tiny`: the same block but for its attention, as many
weights, the same windows of text in the same order. They are trained one after another; then a training step and
generation of the trained models are timed in turn.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.report import described, target, verdict

ARMS = ("ordinary", "implicit")
BITS_TARGET = 2.10  # of the implicit model
STEP_TARGET, TOKEN_TARGET = 1.6, 1.5  # times the ordinary model's
PROMPT = b"    def __init__("
BATCHES = (1, 8)  # of generation
Model = Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="timed steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")


def run(
    *,
    seeds: Iterable[int] = (0, 1, 2),
    steps: int = 1500,
    repeats: int = 50,
    threads: int = 2,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, check, time, and return everything for the JSON.

    Args:
        seeds: Of the runs, one of each arm.
        steps: Of training.
        repeats: Timed steps; of generation a fifth as many.
        threads: Of torch.
        settings: Other settings of the runs, as `training.settings` has them.
    """
    torch.set_num_threads(threads)
    chosen = {"preset": "tiny", "steps": steps, "device": "cpu", **(settings or {})}
    with tempfile.TemporaryDirectory() as folder:
        runs = [trained(Path(folder), arm, seed, chosen) for seed in seeds for arm in ARMS]
        models = {arm: load(Path(folder), arm, next(iter(seeds))) for arm in ARMS}
        checks = {arm: cached_like_uncached(model) for arm, model in models.items()}
        step = step_seconds(chosen, repeats)
        tokens = {str(batch): token_seconds(models, batch, max(2, repeats // 5)) for batch in BATCHES}
    head = described("language_model", runs[0]["settings"]["embed_dim"], runs[0]["settings"]["heads"])
    found = targets(runs, step, tokens)
    return head | {
        "runs": runs, "check": checks, "correct": all(checks.values()), "step": step, "token": tokens,
        "repeats": repeats, "prompt_bytes": len(PROMPT), "targets": found, "verdict": verdict(found),
    }  # fmt: skip


def trained(folder: Path, arm: str, seed: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """One run, as the command makes it, with its curve."""
    from implicit_attention.training import run as training

    directory = folder / f"{arm}-{seed}"
    directory.mkdir()
    print(f"training: {arm}, seed {seed}", file=sys.stderr)
    plan = training.plan({**chosen, "attention": arm, "seed": seed, "out": str(directory)}, {}, resume=False)
    result = training.run(plan, say=partial(print, file=sys.stderr))
    assert result is not None
    logged = result.history
    speeds = [entry["tokens_per_second"] for entry in logged if "tokens_per_second" in entry]
    settings = plan.settings
    return {
        "arm": arm,
        "seed": seed,
        "settings": {name: getattr(settings, name) for name in
                     ("preset", "steps", "length", "embed_dim", "layers", "heads", "batch_size", "self_query")},
        "parameters": result.parameters,
        "training_bytes": result.training_bytes,
        "held_out_bytes": result.held_out_bytes,
        "bits_per_byte": result.bits_per_byte,
        "curve": {entry["step"]: entry["eval_bits_per_byte"] for entry in logged if "eval_bits_per_byte" in entry},
        "median_tokens_per_second": statistics.median(speeds),
        "unconverged": max((entry.get("unconverged", 0.0) for entry in logged), default=0.0),
    }  # fmt: skip


def load(folder: Path, arm: str, seed: int) -> Model:
    """A trained model."""
    from implicit_attention.training import generation

    return generation.load(folder / f"{arm}-{seed}", device="cpu")


def prompt(model: Model, batch: int) -> tuple[torch.Tensor, int]:
    """The prompt `[batch, n]`, and how many bytes go after it into the model's sequences."""
    tokens = torch.tensor([list(PROMPT)[: model.config.max_position_embeddings // 2]] * batch)
    return tokens, model.config.max_position_embeddings - tokens.shape[1]


def generate(model: Model, batch: int, *, use_cache: bool = True) -> torch.Tensor:
    """Go on from the prompt as far as sequences are long, always with the likeliest byte."""
    tokens, room = prompt(model, batch)
    made: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=room, max_new_tokens=room, do_sample=False,
        use_cache=use_cache,
    )  # fmt: skip
    return made


def cached_like_uncached(model: Model) -> bool:
    """Whether generation says the same with its cache and without."""
    return torch.equal(generate(model, 1), generate(model, 1, use_cache=False))


def step_seconds(chosen: dict[str, Any], repeats: int) -> dict[str, Any]:
    """A training step: forward, backward and optimizer, on random bytes."""
    from implicit_attention.training.model import build
    from implicit_attention.training.resolving import resolve

    runs = {}
    for arm in ARMS:
        settings = resolve({**chosen, "attention": arm}, {})
        torch.manual_seed(0)
        model = build(settings).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(256, (settings.batch_size, settings.length))
        runs[arm] = partial(train_step, model, optimizer, tokens)
    return compared(measure.interleaved_seconds(runs, repeats))


def train_step(model: Model, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step."""
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def token_seconds(models: dict[str, Model], batch: int, repeats: int) -> dict[str, Any]:
    """A new token of generation with its cache, the prompt's share included."""
    runs = {arm: partial(generate, model, batch) for arm, model in models.items()}
    with contextlib.redirect_stdout(sys.stderr):
        times = measure.interleaved_seconds(runs, repeats)
    rooms = {arm: prompt(model, batch)[1] for arm, model in models.items()}
    return compared({arm: [s / rooms[arm] for s in seconds] for arm, seconds in times.items()})


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """The times, and the implicit arm's to the ordinary's."""
    rows = {arm: measure.timing(seconds) for arm, seconds in times.items()}
    medians = {arm: statistics.median(seconds) for arm, seconds in times.items()}
    return {"rows": rows, "ratio": medians["implicit"] / medians["ordinary"]}


def targets(runs: list[dict[str, Any]], step: dict[str, Any], tokens: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised."""
    bits = [r["bits_per_byte"] for r in runs if r["arm"] == "implicit"]
    return [
        target("implicit, worst seed: bits per byte", max(bits), BITS_TARGET),
        target("training step: time", step["ratio"], STEP_TARGET),
        *(
            target(f"new token, batch {batch}: time", figures["ratio"], TOKEN_TARGET)
            for batch, figures in tokens.items()
        ),
    ]
