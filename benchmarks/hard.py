"""Hard weights: scores so large that plain iteration does not converge. Time, residuals, and rows that failed.

Residuals are measured apart from the library: one application of the map (`benchmarks.reference`) to the value that was
returned, in its own dtype, and for float32 in float64 too, where the map's own rounding does not enter.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, reference
from benchmarks.causal import batch_at, perform
from benchmarks.peers import Case, implicit, iteration
from benchmarks.report import PASSES, add_layer_arguments, described, target, tell, verdict
from implicit_attention import ForwardSubstitution, Implicit, ImplicitQueryAttention

LENGTHS = (1024, 4096)
RANDOM = "random weights"
DEVIATIONS = (3.0, 10.0)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}  # on every component of every row's residual
RTOL = 1e-30  # a tolerance that is absolute alone
ROOM = 1.1  # how far above its limit a residual has to be to be called a failure; beside rounding, which is measured
TIME_TARGET = 2.0  # times the time at random weights
PICARD_STEPS = 100
CLOSE = 0.02  # how near the scores' standard deviation has to be to what is wanted, relative

SWEEP = {"scale": (1.0, 3.0, 10.0, 30.0), "num_heads": (1, 2, 4, 8), "length": (1, 63, 64, 65, 512)}
SWEEP_EMBED = 64
# All weights scaled by s scale the scores by s^3: at s = 30 to thousands, whose rounding in float32 alone is above
# tolerance. There only the weights of the scores are scaled, which makes s^2.
SWEPT = {
    torch.float32: (("Omega_Q", "W_K"), 1e-4),
    torch.float64: (("Omega_Q", "W_K", "Omega_V"), 1e-10),
}
FLAGGED_TARGET = 1e-4  # share of all rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="N (default: %(default)s)")
    parser.add_argument(
        "--deviations", type=float, nargs="+", default=DEVIATIONS, help="of the scores (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="of each combination of the sweep (default: %(default)s)")
    add_layer_arguments(parser)


def run(
    *,
    lengths: Iterable[int] = LENGTHS,
    deviations: Iterable[float] = DEVIATIONS,
    repeats: int = 5,
    seeds: int = 20,
    embed_dim: int = 512,
    num_heads: int = 8,
    threads: int = 2,
) -> dict[str, Any]:
    """Measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = [
        measure_setting(length, qk_norm, tuple(deviations), repeats, embed_dim, num_heads)
        for length in lengths
        for qk_norm in (True, False)
    ]
    swept = {short(dtype): swept_table(seeds, dtype) for dtype in SWEPT}
    found = targets(settings, swept)
    silent = sum(
        f["silent_failures"] for s in settings for row in s["rows"].values() for f in row["residuals"].values()
    )
    silent += sum(table["silent_failures"] for table in swept.values())
    return described("hard", embed_dim, num_heads) | {
        "passes": PASSES,
        "picard_steps": PICARD_STEPS,
        "settings": settings,
        "sweep": swept,
        "targets": found,
        "correct": silent == 0,
        "verdict": verdict(found) if silent == 0 else f"WRONG: {silent} rows are above tolerance and nothing said so.",
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def swept_table(seeds: int, dtype: torch.dtype) -> dict[str, Any]:
    """The sweep and its totals; on one thread, as its equations are small."""
    tell(f"sweep in {short(dtype)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cells = sweep(seeds, dtype)
    torch.set_num_threads(threads)
    scaled, tolerance = SWEPT[dtype]
    totals = {key: sum(cell[key] for cell in cells) for key in ("rows", "flagged", "silent_failures")}
    head = {"embed_dim": SWEEP_EMBED, "scaled": scaled, "tolerance": tolerance, "seeds": seeds}
    return head | totals | {"cells": cells}


def measure_setting(
    length: int, qk_norm: bool, deviations: tuple[float, ...], repeats: int, embed_dim: int, num_heads: int
) -> dict[str, Any]:
    """Random weights, then hard ones, at one shape: timed in turn."""
    tell(f"N = {length}, {'with' if qk_norm else 'without'} qk_norm")
    batch = batch_at(length)
    x = torch.randn(batch, length, embed_dim)
    layer = make_layer(embed_dim, num_heads, qk_norm)
    layers = {RANDOM: layer} | {f"scores' std {s:g}": hardened(layer, x, s) for s in deviations}
    cases = {name: Case.of(each, x) for name, each in layers.items()}
    limit = LIMITS[torch.float32]
    solver, adjoint = absolute(limit), Implicit(solver_for(limit))
    entrants = {name: implicit(case, solver, adjoint) for name, case in cases.items()}
    runs = {(name, p): partial(perform, entrant, p) for name, entrant in entrants.items() for p in PASSES}
    seconds = {key: measure.timing(s) for key, s in measure.interleaved_seconds(runs, repeats).items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        row: dict[str, Any] = {p: seconds[name, p] for p in PASSES}
        for p in PASSES:
            row[p]["time_ratio"] = row[p]["median_seconds"] / seconds[RANDOM, p]["median_seconds"]
        row["score_std"] = case.map.score_std(entrants[name].forward(), case.tensors)
        row["picard_residual"] = picard_residual(case)
        row["reported"] = entrants[name].failures
        row["residuals"] = {short(t): residual(layers[name], x, t, absolute(limit)) for t, limit in LIMITS.items()}
        rows[name] = row
    return {"length": length, "batch": batch, "qk_norm": qk_norm, "rows": rows}


def make_layer(embed_dim: int, num_heads: int, qk_norm: bool) -> ImplicitQueryAttention:
    return ImplicitQueryAttention(
        embed_dim, num_heads, is_causal=True, qk_norm=qk_norm, solver=solver_for(1e-5), on_failure="ignore"
    )


@torch.no_grad()
def hardened(layer: ImplicitQueryAttention, x: Tensor, deviation: float) -> ImplicitQueryAttention:
    """A copy whose scores have this standard deviation at its equilibrium, by temperature or by weights.

    Newton steps in logarithms, the slope taken from the last two scales.

    Raises:
        ArithmeticError: If no scale was found that gives it.
    """
    trial = copy.deepcopy(layer)
    trial.solver = solver_for(1e-3)
    scale, slope, before = 1.0, 1.0, (0.0, 0.0)
    for attempt in range(30):
        case = Case.of(trial, x)
        found = case.map.score_std(trial.solve(x).value, case.tensors)
        at = (math.log(scale), math.log(found))
        if abs(found / deviation - 1) < CLOSE:
            trial.solver = layer.solver
            return trial
        if attempt and at[0] != before[0]:
            slope = min(4.0, max(0.5, (at[1] - before[1]) / (at[0] - before[0])))
        factor = math.exp((math.log(deviation) - at[1]) / slope)
        scale, before = scale * factor, at
        multiply_scores(trial, factor)
    raise ArithmeticError(f"No scale gives scores of standard deviation {deviation:g}; the last gave {found:g}.")


def multiply_scores(layer: ImplicitQueryAttention, factor: float) -> None:
    """Scale all scores, for given outputs."""
    if layer.temperature is not None:
        layer.temperature *= factor
        return
    layer.W_K.weight *= factor**0.5
    layer.Omega_Q.weight *= factor**0.5


@torch.no_grad()
def picard_residual(case: Case) -> float:
    """The largest residual of plain iteration after some steps from y = V, each of them one SDPA pass."""
    t, y = case.tensors, case.start
    for _ in range(PICARD_STEPS):
        y = iteration(case, y, t["key"], t["value"], t.get("weight"))
    return float((iteration(case, y, t["key"], t["value"], t.get("weight")) - y).abs().max())


def solver_for(tolerance: float) -> ForwardSubstitution:
    """The solver as the causal benchmark takes it, with the compiled kernels."""
    return ForwardSubstitution(rtol=tolerance, atol=tolerance, kernel="auto")


def absolute(limit: float) -> ForwardSubstitution:
    """A solver for residuals below the limit: it is asked for half of it, since it judges by its own rounding."""
    return replace(solver_for(limit / 2), rtol=RTOL)


@torch.no_grad()
def residual(
    layer: ImplicitQueryAttention, x: Tensor, dtype: torch.dtype, solver: ForwardSubstitution
) -> dict[str, Any]:
    """Solve; return the largest residual, how many rows were flagged, and how many should have been but were not.

    A row that was not flagged has failed in silence if its residual is above tolerance by more than a tenth and
    twice the map's own rounding in this dtype: both evaluations round, the solver's and this one.
    """
    layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype)
    layer.solver = solver
    case, solution = Case.of(layer, x), layer.solve(x)
    image = case.map(solution.value, case.tensors)
    exact, exact_image = reference.residuals(case.map, solution.value, case.tensors)
    rows, sizes = (image - solution.value).abs().amax(-1), image.abs().amax(-1)  # [B, N]
    rtol, atol = solver.tolerances(dtype)
    rounding = (image - exact_image).abs().max()
    above = ~(rows <= ROOM * (atol + rtol * sizes) + 2 * rounding)  # so that NaN counts
    return {
        "rows": rows.numel(),
        "flagged": int((~solution.converged).sum()),
        "silent_failures": int((above & solution.converged).sum()),
        "largest_residual": float(rows.max()),
        "largest_residual_in_float64": float(exact.abs().max()),
    }


def sweep(seeds: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Scaled weights, heads, lengths around the block's size: what was flagged, and what should have been."""
    scaled, tolerance = SWEPT[dtype]
    cells = []
    for combination in itertools.product(*SWEEP.values()):
        scale, num_heads, length = combination
        cell: dict[str, Any] = dict(zip(SWEEP, combination, strict=True))
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            layer = make_layer(SWEEP_EMBED, num_heads, qk_norm=False)
            with torch.no_grad():
                for name in scaled:
                    getattr(layer, name).weight.mul_(scale)
            x = torch.randn(1, length, SWEEP_EMBED)
            found.append(residual(layer, x, dtype, solver_for(tolerance)))
        cell |= {key: sum(f[key] for f in found) for key in ("rows", "flagged", "silent_failures")}
        cells.append(cell | {"largest_residual": max(f["largest_residual"] for f in found)})
    return cells


def targets(settings: list[dict[str, Any]], swept: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, and what came out."""
    found = []
    for setting in settings:
        where = f"N = {setting['length']}, {'with' if setting['qk_norm'] else 'without'} qk_norm"
        for name, row in setting["rows"].items():
            if name == RANDOM:
                continue
            found += [target(f"{where}, {name}, {p}: time", row[p]["time_ratio"], TIME_TARGET) for p in PASSES]
            for dtype, figures in row["residuals"].items():
                what = f"{where}, {name}, {dtype}: largest residual"
                found.append(target(what, figures["largest_residual"], LIMITS[getattr(torch, dtype)]))
    for dtype, table in swept.items():
        share = table["flagged"] / max(1, table["rows"])
        found.append(target(f"sweep, {dtype}: share of rows flagged", share, FLAGGED_TARGET))
    return found
