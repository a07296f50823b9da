"""Decoding: one new token per sample and step, against a context that is already in the cache.

The ordinary step is SDPA with one query per sample, over preallocated keys and values. Every step, ours and theirs,
also writes the new token's entries, so the context grows by one per step, for all alike.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, reference
from benchmarks.peers import Case
from benchmarks.report import add_layer_arguments, described, target, verdict
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention

TOLERANCE = 1e-4
TIME_TARGET = 1.3  # times the ordinary step
GATE = (2, 130, 5)  # batch, context, steps
SDPA, ATTENTION_LAYER = "scaled_dot_product_attention", "attention layer: projections and SDPA"
SOLVE, LAYER = "implicit-attention: layer.solve", "implicit-attention: layer"
PROJECTIONS, BARE_SOLVE = "projections of layer.solve", "implicit-attention: layer.solve without projections"
Step = Callable[[Tensor], Tensor]  # new tokens [B, 1, D] -> outputs [B, 1, D]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default in (("batch", 8), ("context", 4096), ("repeats", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    add_layer_arguments(parser)


def run(
    *,
    batch: int = 8,
    context: int = 4096,
    repeats: int = 50,
    embed_dim: int = 512,
    num_heads: int = 8,
    threads: int = 2,
) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    result = described("decode", embed_dim, num_heads) | {"batch": batch, "context": context, "tolerance": TOLERANCE}
    layer = ImplicitQueryAttention(
        embed_dim, num_heads, is_causal=True, qk_norm=True,
        solver=ForwardSubstitution(rtol=TOLERANCE, atol=TOLERANCE), on_failure="raise",
    ).eval()  # fmt: skip
    with torch.no_grad():
        checks = check(layer)
        result |= {"check": checks, "correct": checks["correct"]}
        if not checks["correct"]:
            return result | {"verdict": "WRONG: decoded tokens do not solve the equation; nothing was measured."}
        steps = prepared(layer, torch.randn(batch, context, embed_dim), context + repeats + 1)
        return result | measured(steps, torch.randn(batch, 1, embed_dim), repeats)


def check(layer: ImplicitQueryAttention) -> dict[str, Any]:
    """Prefill and decode at a small size: together they have to solve the equation of the whole sequence.

    Measured by one application of the map, in float64, to all the outputs put together.
    """
    batch, context, count = GATE
    x = torch.randn(batch, context + count, layer.embed_dim)
    cache = layer.make_cache(batch, context + count)
    pieces = [slice(0, context), *(slice(i, i + 1) for i in range(context, context + count))]
    y = torch.cat([layer.solve(x[:, piece], cache=cache).value for piece in pieces], 1)
    case = Case.of(layer, x)
    residual, image = reference.residuals(case.map, y, case.tensors)
    rows = residual.abs().amax(-1)
    within = bool((rows <= TOLERANCE * (1 + image.abs().amax(-1))).all())
    return {"shape": [batch, context, count], "largest_residual": float(rows.max()), "correct": within}


class OrdinaryAttention(nn.Module):
    """Causal attention over preallocated keys and values, one token per call, with or without its projections."""

    def __init__(self, context: Tensor, num_heads: int, capacity: int, *, project: bool) -> None:
        super().__init__()
        batch, self.filled, dim = context.shape
        self.num_heads = num_heads
        self.projections = nn.ModuleList(nn.Linear(dim, dim, bias=False) if project else nn.Identity() for _ in "qkv")
        self.key, self.value = torch.zeros(2, batch, num_heads, capacity, dim // num_heads).unbind()
        self.key[:, :, : self.filled] = self.heads(self.projections[1](context))
        self.value[:, :, : self.filled] = self.heads(self.projections[2](context))

    def heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(project(x)) for project in self.projections)
        self.key[:, :, self.filled : self.filled + 1], self.value[:, :, self.filled : self.filled + 1] = key, value
        self.filled += 1
        out = F.scaled_dot_product_attention(query, self.key[:, :, : self.filled], self.value[:, :, : self.filled])
        return out.transpose(1, 2).flatten(2)


def prepared(layer: ImplicitQueryAttention, context: Tensor, capacity: int) -> dict[str, Step]:
    """Everybody with the context in place."""
    batch, heads = context.shape[0], layer.num_heads
    caches = [layer.make_cache(batch, capacity) for _ in range(2)]
    for cache in caches:
        layer.solve(context, cache=cache)
    return {
        SDPA: OrdinaryAttention(context, heads, capacity, project=False),
        ATTENTION_LAYER: OrdinaryAttention(context, heads, capacity, project=True),
        SOLVE: lambda x: layer.solve(x, cache=caches[0]).value,
        LAYER: lambda x: layer(x, cache=caches[1]),
        PROJECTIONS: lambda x: layer.W_K(x) + layer.Omega_V(x),
    }


def measured(steps: dict[str, Step], x: Tensor, repeats: int) -> dict[str, Any]:
    """Median seconds of a step, and its ratio to the ordinary step of the same extent.

    The solve without its projections is the difference to a run of these alone, round by round.
    """
    times = measure.interleaved_seconds({name: partial(step, x) for name, step in steps.items()}, repeats)
    times[BARE_SOLVE] = [a - b for a, b in zip(times[SOLVE], times[PROJECTIONS], strict=True)]
    rows = {name: measure.timing(seconds) for name, seconds in times.items()}
    for row in rows.values():
        row["ratio_to_sdpa"] = row["median_seconds"] / rows[SDPA]["median_seconds"]
        row["ratio_to_attention_layer"] = row["median_seconds"] / rows[ATTENTION_LAYER]["median_seconds"]
    found = [
        target("decode step without projections: time", rows[BARE_SOLVE]["ratio_to_sdpa"], TIME_TARGET),
        target("decode step of the whole layer: time", rows[LAYER]["ratio_to_attention_layer"], TIME_TARGET),
    ]
    return {"repeats": repeats, "rows": rows, "targets": found, "verdict": verdict(found)}
