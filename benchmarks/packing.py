"""Packed documents against the same documents as samples: equal lengths, and mixed ones, padded or one by one.

First packed and separate documents must give the same, in float64. Then forward and backward passes are timed in one
process, in turn.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.report import add_layer_arguments, described, target, verdict
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention

TIME_TARGET = 1.1  # times the same tokens as samples of equal length
LIMIT = 1e-10  # relative difference of outputs and of every gradient in the gate
EXACT = 1e-13  # tolerance of the gate's solves
PACKED, SAMPLES, PADDED, ONE_BY_ONE = "packed", "samples of equal length", "padded to the longest", "one call each"
Pass = Callable[[], list[Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default in (("documents", 8), ("length", 128), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    add_layer_arguments(parser)


def run(
    *,
    documents: int = 8,
    length: int = 128,
    repeats: int = 15,
    embed_dim: int = 512,
    num_heads: int = 8,
    threads: int = 2,
) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options: dict[str, Any] = {"is_causal": True, "qk_norm": True, "positions": "rope", "out_proj": True}
    layer = ImplicitQueryAttention(embed_dim, num_heads, on_failure="raise", **options)
    shapes = {"equal": [length] * documents, "mixed": mixed_lengths(documents, length)}
    result = described("packing", embed_dim, num_heads) | {"lengths": shapes, "layer": options, "repeats": repeats}
    checks = {name: check(layer, lengths) for name, lengths in shapes.items()}
    correct = all(found["correct"] for found in checks.values())
    result |= {"checks": checks, "limit": LIMIT, "correct": correct}
    if not correct:
        return result | {"verdict": "WRONG: packed documents are not what they are alone; nothing was measured."}
    rows = {name: measured(layer, lengths, repeats) for name, lengths in shapes.items()}
    found = [target("packed, equal lengths: time", rows["equal"][PACKED]["ratio"], TIME_TARGET)]
    return result | {"rows": rows, "targets": found, "verdict": verdict(found)}


def mixed_lengths(documents: int, length: int) -> list[int]:
    """Twice as many documents, of lengths between 1 and twice the length."""
    return [int(n) for n in torch.randint(1, 2 * length + 1, (2 * documents,))]


def passes(layer: ImplicitQueryAttention, lengths: list[int]) -> dict[str, Pass]:
    """Forward and backward of the same documents in every form: outputs in their order, then all gradients."""
    like = layer.W_K.weight
    packed, cotangent = (torch.randn(sum(lengths), layer.embed_dim, dtype=like.dtype) for _ in range(2))
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(packed.split(lengths), batch_first=True)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def through(forward: Callable[[Tensor], Tensor], x: Tensor) -> Pass:
        leaf = x.clone().requires_grad_()

        def call() -> list[Tensor]:
            y = forward(leaf)
            by_x, *gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent)
            return [y.detach(), by_x if by_x.dim() == 2 else by_x[real], *gradients]

        return call

    batch = SAMPLES if len(set(lengths)) == 1 else PADDED
    return {
        batch: through(lambda x: layer(x)[real], padded),
        PACKED: through(lambda x: layer(x, segments=segments), packed),
        ONE_BY_ONE: through(lambda x: torch.cat([layer(document) for document in x.split(lengths)]), packed),
    }


def check(layer: ImplicitQueryAttention, lengths: list[int]) -> dict[str, Any]:
    """Compare packed documents with one call each, outputs and all gradients, in float64."""
    exact = deepcopy(layer).double()
    exact.solver = ForwardSubstitution(rtol=EXACT, atol=EXACT)
    calls = passes(exact, lengths)
    pairs = zip(calls[PACKED](), calls[ONE_BY_ONE](), strict=True)
    names = ["output", "x", *(name for name, _ in exact.named_parameters())]
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    return {"relative_errors": dict(zip(names, errors, strict=True)), "correct": max(errors) <= LIMIT}


def measured(layer: ImplicitQueryAttention, lengths: list[int], repeats: int) -> dict[str, Any]:
    """Times of every form, and their ratio to that of the batch of samples."""
    seconds = measure.interleaved_seconds(passes(layer, lengths), repeats)
    rows: dict[str, Any] = {name: measure.timing(s) for name, s in seconds.items()}
    batch = next(iter(rows.values()))
    for row in rows.values():
        row["ratio"] = row["median_seconds"] / batch["median_seconds"]
    return rows
