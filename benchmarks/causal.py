"""Causal: the equilibrium against one attention pass on the same shapes, and against everything else that iterates.

First every contestant has to be right (`benchmarks.gate`). Then time and added peak memory are measured in one process,
in turn. Ratios are to one pass of `scaled_dot_product_attention(is_causal=True)`. Beside this figure, of the solve,
stands that of whole layers (`benchmarks.layer`), projections included. Everybody's first pass is a figure of its own.
"""

import argparse
import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from benchmarks import layer, measure
from benchmarks.gate import Gate, reached
from benchmarks.peers import CONTESTANTS, NEAR_SINGULAR, OURS, OURS_ALL, SDPA, Case, Entrant, available
from benchmarks.report import PASSES, add_layer_arguments, described, target, tell, verdict
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention

TOLERANCE = 1e-4
LENGTHS = (256, 1024, 4096, 16384)
GATE_LENGTH = 200  # three blocks of 64 and a bit
SLOW_SECONDS = 15.0  # a pass that takes longer is measured once
# At most so many times the time of one SDPA pass: forward, forward + backward.
TIME_TARGETS = {1024: (2.0, 1.6), 4096: (1.5, 1.25), 16384: (1.2, 1.1)}
MEMORY_TARGET = 1.5
TORCHDEQ_TARGET = (4096, 10.0)  # at this length so many times faster than the faster of torchdeq's solvers
TOLERANCES = (1e-2, TOLERANCE, 1e-6)  # must all need the same memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="N (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="timed runs (default: 5, and 3 from N = 16384 on)")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        help="default: all; sdpa always takes part",
    )
    add_layer_arguments(parser)


def run(
    *,
    lengths: Iterable[int] = LENGTHS,
    repeats: int | None = None,
    contestants: Iterable[str] = tuple(CONTESTANTS),
    embed_dim: int = 512,
    num_heads: int = 8,
    threads: int = 2,
) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = [name for name in CONTESTANTS if name in {SDPA, *contestants}]
    absent = {name: reason for name in chosen if (reason := available(name))}
    names = [name for name in chosen if name not in absent]
    layers = make_layers(embed_dim, num_heads)
    gate = check(layers, names)
    result = described("causal", embed_dim, num_heads) | {
        "passes": PASSES,
        "given": 'keys and values; with self_query="input" also the scores of tokens with their own values',
        "tolerance": TOLERANCE,
        "slow_seconds": SLOW_SECONDS,
        "memory_method": " ".join((measure.added_peak_bytes.__doc__ or "").split()),
        "absent": absent,
        "gate": gate,
    }
    wrong = [name for name, found in gate["checks"].items() if not found["correct"] or unsettled(name, found)]
    if wrong:
        return result | {"correct": False, "verdict": f"WRONG: {', '.join(wrong)}; nothing was measured."}
    shapes = [measure_shape(layers, names, length, repeats or repeats_at(length)) for length in lengths]
    found = targets(shapes)
    wrong = [f"{n} at N = {s['length']}" for s in shapes for n, row in s["rows"].items() if unsettled(n, row)]
    wrong += [
        f"{n} at N = {s['length']}" for s in shapes for n, row in s["layers"].items() if not row.get("correct", True)
    ]
    said = f"WRONG: tolerance missed by {', '.join(wrong)}." if wrong else verdict(found)
    return result | {"shapes": shapes, "targets": found, "correct": not wrong, "verdict": said}


def unsettled(name: str, figures: dict[str, Any]) -> bool:
    """Whether this library missed its tolerance, or said that it did. (Others may: that is reported with their row.)"""
    return name in OURS_ALL and (not figures["reached_tolerance"] or bool(set(figures["failures"]) - {NEAR_SINGULAR}))


def make_layers(embed_dim: int, num_heads: int) -> dict[str, ImplicitQueryAttention]:
    """Layers with the same random weights, by `self_query`."""
    layers = {
        self_query: ImplicitQueryAttention(
            embed_dim,
            num_heads,
            is_causal=True,
            qk_norm=True,
            self_query=self_query,
            solver="auto",
        )
        for self_query in ("output", "input")
    }
    layers["input"].load_state_dict(layers["output"].state_dict())
    return layers


def make_cases(layers: dict[str, ImplicitQueryAttention], batch: int, length: int) -> dict[str, Case]:
    x = torch.randn(batch, length, layers["output"].embed_dim)
    return {self_query: Case.of(layer, x) for self_query, layer in layers.items()}


def batch_at(length: int) -> int:
    """8 samples at N = 256, 4 at 1024, 2 at 4096, 1 at 16384: tokens and work both grow, and all of it fits."""
    return max(1, round(math.sqrt(16384 / length)))


def repeats_at(length: int) -> int:
    return 3 if length >= 16384 else 5


def check(layers: dict[str, ImplicitQueryAttention], names: list[str]) -> dict[str, Any]:
    gates = {s: Gate(case, TOLERANCE) for s, case in make_cases(layers, 1, GATE_LENGTH).items()}
    checks = {name: gates[CONTESTANTS[name].self_query].check(CONTESTANTS[name]) for name in names}
    return {"shape": [1, GATE_LENGTH, layers["output"].embed_dim], "checks": checks}


def measure_shape(
    layers: dict[str, ImplicitQueryAttention], names: list[str], length: int, repeats: int
) -> dict[str, Any]:
    """Everybody's time and memory at one length."""
    tell(f"N = {length}")
    batch = batch_at(length)
    cases = make_cases(layers, batch, length)
    left_out = {n: why for n in names if (why := too_long(n, length))}
    entrants = {
        n: CONTESTANTS[n].enter(cases[CONTESTANTS[n].self_query], TOLERANCE) for n in names if n not in left_out
    }
    runs = {(n, p): partial(perform, entrant, p) for n, entrant in entrants.items() for p in PASSES}
    first_call = {key: first_seconds(run) for key, run in runs.items()}
    first = {key: measure.peak_and_seconds(run) for key, run in runs.items()}
    slow = {key for key, (_, seconds) in first.items() if seconds > SLOW_SECONDS}
    seconds = measure.interleaved_seconds({k: r for k, r in runs.items() if k not in slow}, repeats, warm=True)
    seconds |= {key: [first[key][1]] for key in slow}
    rows: dict[str, dict[str, Any]] = {n: {} for n in entrants}
    for n, p in runs:
        figures = measure.timing(seconds[n, p]) | {"added_peak_bytes": first[n, p][0]}
        figures["first_call_seconds"] = first_call[n, p]
        figures["once_because_slow"] = (n, p) in slow
        rows[n][p] = figures
    for n, row in rows.items():
        for p in PASSES:
            row[p]["time_ratio"] = row[p]["median_seconds"] / rows[SDPA][p]["median_seconds"]
            row[p]["memory_ratio"] = row[p]["added_peak_bytes"] / rows[SDPA][p]["added_peak_bytes"]
        if n != SDPA:
            row |= reached(entrants[n].case, entrants[n].forward(), TOLERANCE) | {"failures": entrants[n].failures}
    result = {"length": length, "batch": batch, "repeats": repeats, "left_out": left_out, "rows": rows}
    result["layers"] = whole_layers(layers["output"], batch, length, repeats) if OURS in rows else {}
    return result | ({"memory_by_tolerance": memory_by_tolerance(cases["output"])} if OURS in rows else {})


def first_seconds(run: measure.Run) -> float:
    """How long the first pass takes: of the shape, and for the first shape of the process."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def whole_layers(of: ImplicitQueryAttention, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """The figures of whole layers with nothing named, tolerance included, against an ordinary one."""
    tell(f"N = {length}: layers")
    rtol, atol = ForwardSubstitution().tolerances(torch.float32)
    names = [name for name in layer.LAYERS if "torch" not in name]
    rows: dict[str, Any] = layer.measured((batch, length, of.embed_dim, of.num_heads), repeats, rtol, atol, names)[
        "rows"
    ]
    return rows


def perform(entrant: Entrant, name: str) -> object:
    return entrant.forward() if name == "forward" else entrant.forward_backward()


def too_long(name: str, length: int) -> str:
    longest = CONTESTANTS[name].longest
    return CONTESTANTS[name].why if longest is not None and length > longest else ""


def memory_by_tolerance(case: Case) -> dict[str, dict[str, Any]]:
    """Added peak bytes of our passes, by tolerance; and what was reported as failed, which float32 may bring about."""
    figures: dict[str, dict[str, Any]] = {}
    for tolerance in TOLERANCES:
        entrant = CONTESTANTS[OURS].enter(case, tolerance)
        figures[f"{tolerance:g}"] = {p: measure.peak_and_seconds(partial(perform, entrant, p))[0] for p in PASSES}
        figures[f"{tolerance:g}"]["failures"] = entrant.failures
    return figures


def targets(shapes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, and what came out, for the shapes that were measured."""
    found = []
    for shape in shapes:
        rows, n = shape["rows"], shape["length"]
        if OURS not in rows:
            continue
        for p, limit in zip(PASSES, TIME_TARGETS.get(n, ()), strict=False):
            found.append(target(f"N = {n}, {p}: time", rows[OURS][p]["time_ratio"], limit))
        for p in PASSES if n in TIME_TARGETS else ():  # shorter: the blocks' own scores are most of it
            found.append(target(f"N = {n}, {p}: memory", rows[OURS][p]["memory_ratio"], MEMORY_TARGET))
        for p in PASSES:
            needed = [figures[p] for figures in shape["memory_by_tolerance"].values()]
            what = f"N = {n}, {p}: memory, largest over smallest of all tolerances"
            found.append(target(what, max(needed) / min(needed), 1.01))
        theirs = [
            row["forward_backward"]["median_seconds"] for name, row in rows.items() if name.startswith("torchdeq")
        ]
        if n == TORCHDEQ_TARGET[0] and theirs:
            share = rows[OURS]["forward_backward"]["median_seconds"] / min(theirs)
            found.append(target(f"N = {n}, forward_backward: share of torchdeq's time", share, 1 / TORCHDEQ_TARGET[1]))
    return found
