"""On a CUDA device: a block of a model, then the solve and a decode step against flash attention and who else iterates.

First the solvers have to be right in float32 (`benchmarks.gate`). Then time, memory and the share of the device's
measured matmul rate are taken in the layer's dtype. The unit is SDPA by PyTorch's flash kernel; "sdpa-default" is SDPA
as PyTorch picks its kernel itself (cuDNN's on Hopper), and what the others iterate on too. What takes minutes is not
asked of the longest sequences. Without a device nothing is measured, and the exit status says so.

Figures are written to --out after each row, the promised ones first. Rows that --out holds already are not measured
again, so a second call goes on where --budget ended the first.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import decode, measure
from benchmarks.gate import Gate, reached
from benchmarks.peers import CONTESTANTS, OURS, SDPA, Case, Contestant, Entrant, available, merged
from benchmarks.report import PASSES, described, target, tell, verdict
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention, Picard, Solution, fixed_point
from studies import records
from studies.run import perform
from studies.suite import tables

LENGTHS = (8192, 32768, 2048, 512, 65536)  # those with a target first
BLOCK_LENGTHS, BLOCK_BATCH, BLOCK_HEADS, BLOCK_DIM = (1024, 512, 2048), 32, 12, 64
HEAD_DIMS = (64, 128)
SYSTEMS = 128  # batch times heads, at least
TOLERANCE = 1e-2  # in bfloat16; the gate is held in float32 to GATE_TOLERANCE
GATE_TOLERANCE, GATE_LENGTH = 1e-4, 200
NAMES = (SDPA, OURS, "unrolled", "torchdeq-picard")
DEFAULT, FLEX = "sdpa-default", "flex"
COMPILED_AT = 8192  # the one length that FlexAttention is compiled for, which takes seconds
LONGEST = {"unrolled": 32768, "torchdeq-picard": 8192, "iteration": 8192, "reached": 8192}
BLOCKS = (128, 256, 512, 1024)  # rows of the blocks that are swept first
# At most so many times one pass of SDPA, forward + backward; a decode step; at least so much faster than unrolled.
TIME_TARGETS = {(64, 8192): 1.5, (64, 32768): 1.1, (128, 8192): 1.6, (128, 32768): 1.25}  # by d and N
BLOCK_TARGET, DECODE_TARGET, UNROLLED_TARGET, RECALL_TARGET = 1.5, 1.3, 6.0, 0.99
NO_DEVICE = "NO DEVICE: torch finds no CUDA device here, so nothing was measured. Run it on a machine that has one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="N (default: %(default)s)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, help="d (default: %(default)s)")
    parser.add_argument("--num-heads", type=int, default=16, help="H (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no row begins")
    parser.add_argument("--trace", type=Path, help="write a profile of one training step of a block here (JSON)")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (PNG)")


def run(
    *,
    lengths: Sequence[int] = LENGTHS,
    head_dims: Sequence[int] = HEAD_DIMS,
    num_heads: int = 16,
    repeats: int = 10,
    budget: float = math.inf,
    trace: Path | None = None,
    plot: Path | None = None,
    keep: Path | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    systems: int = SYSTEMS,
) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON. Another device than CUDA is for tests of this file alone."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"benchmark": "gpu", "correct": False, "verdict": NO_DEVICE}
    begun = time.perf_counter()
    torch.manual_seed(0)
    names = [name for name in NAMES if not available(name)]
    result = described("gpu", num_heads * max(head_dims), num_heads) | {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype),
        "passes": PASSES,
        "tolerance": TOLERANCE,
        "matmul_flops_per_second": matmul_rate(device, dtype),
        "absent": {name: reason for name in NAMES if (reason := available(name))},
    }
    gates = {d: check(make_layer(num_heads, d, device, torch.float32), names) for d in head_dims}
    result |= {"gate": gates, "kernel": {d: kernel(make_layer(num_heads, d, device, dtype)) for d in head_dims}}
    wrong = [f"{n} at d = {d}" for d, found in gates.items() for n, row in found.items() if not row["correct"]]
    if wrong:
        return result | {"correct": False, "verdict": f"WRONG: {', '.join(wrong)}; nothing was measured."}
    jobs = jobs_of(
        lengths, head_dims, num_heads, names, systems, repeats, result["matmul_flops_per_second"], device, dtype
    )
    rows, failed = finished_before(keep, result), {}
    left = [where for where in jobs if where not in rows]
    while left and time.perf_counter() - begun < budget:
        where = left.pop(0)
        tell(where)
        try:
            rows[where] = jobs[where]()
        except KeyboardInterrupt:  # no more; what has been measured is kept
            left.insert(0, where)
            break
        except Exception as error:  # out of memory or registers: the others count
            failed[where] = f"{type(error).__name__}: {error}"
            tell(f"not measured: {failed[where]}")
        if keep is not None:
            records.write(keep, result | {"rows": rows, "failed": failed, "left": left})
    if trace is not None and device == "cuda":
        try:
            profile(BLOCK_LENGTHS[0], device, dtype, trace)
        except Exception as error:  # what has been measured counts
            failed["trace"] = f"{type(error).__name__}: {error}"
    found = targets(rows)
    if plot is not None and (shapes := [row for row in rows.values() if row["kind"] == "shape"]):
        draw(shapes, plot)
    said = verdict(found) + "".join(f" NOT MEASURED: {where}." for where in failed)
    said += f" LEFT for the same command: {'; '.join(left)}." if left else ""
    result |= {"rows": rows, "failed": failed, "left": left}
    return result | {"targets": found, "correct": not failed, "verdict": said}


def jobs_of(
    lengths: Sequence[int], head_dims: Sequence[int], num_heads: int, names: list[str], systems: int, repeats: int,
    rate: float, device: str, dtype: torch.dtype,
) -> dict[str, Callable[[], dict[str, Any]]]:  # fmt: skip
    """What makes each row, the promised ones first."""
    batch = max(1, math.ceil(systems / num_heads))
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        f"block, N = {n}": partial(block_step, n, device, dtype, repeats) for n in BLOCK_LENGTHS
    }
    for n in lengths:
        for d in head_dims:
            shape = partial(shape_of, d, n, num_heads, names, batch, repeats, rate, device, dtype)
            jobs[f"d = {d}, N = {n}, batch {batch}"] = shape
    return jobs | {"recall": partial(recall, device)}


def finished_before(keep: Path | None, now: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier call on the same device and commit."""
    if keep is None or not keep.exists():
        return {}
    before = json.loads(keep.read_text(encoding="utf-8"))
    same = all(before.get(key) == now[key] for key in ("device", "dtype", "commit", "versions"))
    return dict(before.get("rows", {})) if same else {}


def shape_of(
    head_dim: int, length: int, num_heads: int, names: list[str], batch: int, repeats: int, rate: float, device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """The row of one shape."""
    layer = make_layer(num_heads, head_dim, device, dtype)
    return {"kind": "shape", **measure_shape(layer, names, batch, length, repeats, rate)}


def blocks_of(length: int, device: str, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor]:
    """A block of `--preset base` with its MLP, ordinary and implicit with every option at its default, and an input."""
    from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionModel

    found: dict[str, nn.Module] = {}
    for kind in ("attention", "implicit"):
        config = ImplicitAttentionConfig(
            vocab_size=256, hidden_size=BLOCK_HEADS * BLOCK_DIM, num_hidden_layers=1, num_attention_heads=BLOCK_HEADS,
            max_position_embeddings=max(BLOCK_LENGTHS), block_types=[kind],
        )  # fmt: skip
        torch.manual_seed(0)
        found[kind] = ImplicitAttentionModel(config).to(device, dtype)
    return found, torch.randint(256, (BLOCK_BATCH if device == "cuda" else 1, length), device=device)


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """Forward and backward through a model, with gradients of all its weights."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, use_cache=False).last_hidden_state.float().square().mean().backward()

    return step


def block_step(length: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """A training step of a block with its MLP: where people train."""
    models, tokens = blocks_of(length, device, dtype)
    steps = {kind: training_step(model, tokens) for kind, model in models.items()}
    seconds = {kind: measure.timing(taken) for kind, taken in timed(steps, repeats).items()}
    ratio = seconds["implicit"]["median_seconds"] / seconds["attention"]["median_seconds"]
    peaks = {kind: added_peak_bytes(step) for kind, step in steps.items()}
    tell(f"times an ordinary block: {ratio:.3f}")
    return {"kind": "block", "length": length, "steps": seconds, "time_ratio": ratio, "added_peak_bytes": peaks}


def profile(length: int, device: str, dtype: torch.dtype, path: Path) -> None:
    """Write what host and device do in one training step of the implicit block, for Perfetto or chrome://tracing."""
    models, tokens = blocks_of(length, device, dtype)
    step = training_step(models["implicit"], tokens)
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def recall(device: str) -> dict[str, Any]:
    """Accuracy of an implicit block that learned recall in bfloat16 under autocast on the device."""
    found = perform(tables("cpu")["precision"].run("implicit-bfloat16", 0, 1e-2), device=device)
    return {"kind": "recall", "steps": found["last_step"], "score": found["score"], "end": found["end"]}


def make_layer(num_heads: int, head_dim: int, device: str, dtype: torch.dtype) -> ImplicitQueryAttention:
    layer = ImplicitQueryAttention(
        num_heads * head_dim, num_heads, is_causal=True, qk_norm=True, on_failure="ignore",
        solver=ForwardSubstitution(rtol=TOLERANCE, atol=TOLERANCE),
    )  # fmt: skip
    return layer.to(device, dtype)


def make_case(layer: ImplicitQueryAttention, batch: int, length: int) -> Case:
    like = layer.W_K.weight
    return Case.of(layer, torch.randn(batch, length, layer.embed_dim, device=like.device, dtype=like.dtype))


def check(layer: ImplicitQueryAttention, names: list[str]) -> dict[str, Any]:
    gate = Gate(make_case(layer, 1, GATE_LENGTH), GATE_TOLERANCE)
    return {name: gate.check(CONTESTANTS[name]) for name in names}


def kernel(layer: ImplicitQueryAttention) -> str:
    """What `kernel="auto"` takes for a layer."""
    case = make_case(layer, 1, GATE_LENGTH)
    return ForwardSubstitution().kernel_for(case.function, tuple(case.tensors.values()))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large product of matrices: what the device really does."""
    size = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    seconds = timed({"matmul": lambda: a @ b}, 10)["matmul"]
    return 2.0 * size**3 / min(seconds)


def timed(runs: dict[Any, Callable[[], object]], repeats: int) -> dict[Any, list[float]]:
    """As `measure.interleaved_seconds`, each run until the device has finished it."""

    def finished(run: Callable[[], object]) -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return measure.interleaved_seconds({key: partial(finished, run) for key, run in runs.items()}, repeats)


def added_peak_bytes(run: Callable[[], object]) -> int | None:
    """How far a run raises the memory held on the device; None on a CPU, where this is not the way to know."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def flex(case: Case, tolerance: float) -> Entrant:
    """One causal pass of FlexAttention, compiled, queries given."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    del tolerance
    with torch.no_grad():
        query = case.map.queries(case.start, case.tensors)
    length = case.start.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=case.start.device)
    attend = torch.compile(flex_attention)
    leaves = {"query": query.detach().requires_grad_(), **case.leaves("key", "value")}
    scale = case.layer.scale
    return Entrant(case, leaves, lambda q, k, v: merged(attend(k, q, v, block_mask=mask, scale=scale)))


def measure_shape(
    layer: ImplicitQueryAttention, names: list[str], batch: int, length: int, repeats: int, rate: float
) -> dict[str, Any]:
    """Everybody's time and memory at one shape, and the decode step after it."""
    case = make_case(layer, batch, length)
    chosen = {name: CONTESTANTS[name] for name in names}
    if case.start.is_cuda:
        chosen |= {DEFAULT: CONTESTANTS[SDPA]}
        if length == COMPILED_AT:
            chosen |= {FLEX: Contestant("FlexAttention, one pass", flex)}
    chosen = {name: contestant for name, contestant in chosen.items() if length <= LONGEST.get(name, length)}
    entrants = {name: contestant.enter(case, TOLERANCE) for name, contestant in chosen.items()}
    runs: dict[tuple[str, str], Callable[[], object]] = {
        (n, p): getattr(entrant, p) for n, entrant in entrants.items() for p in PASSES
    }
    if case.start.is_cuda:
        runs |= {(SDPA, p): partial(by_flash, runs[SDPA, p]) for p in PASSES}
    seconds = timed(runs, repeats)
    rows: dict[str, dict[str, Any]] = {name: {} for name in entrants}
    for (name, passes), taken in seconds.items():
        figures = measure.timing(taken) | {"added_peak_bytes": added_peak_bytes(runs[name, passes])}
        figures["time_ratio"] = figures["median_seconds"] / measure.timing(seconds[SDPA, passes])["median_seconds"]
        work = 2.0 * batch * layer.embed_dim * length**2 * (1.0 if passes == "forward" else 3.5)
        figures["share_of_matmul_rate"] = work / figures["median_seconds"] / rate
        rows[name][passes] = figures
    rows[OURS]["failures"] = entrants[OURS].failures
    if length <= LONGEST["reached"]:
        rows[OURS] |= reached(case, entrants[OURS].forward(), TOLERANCE)
    found = {"length": length, "batch": batch, "head_dim": layer.embed_dim // layer.num_heads, "rows": rows}
    if length <= LONGEST["iteration"]:
        found["iteration"] = iteration(layer, batch, length, repeats)
    found |= {"decode": decode_step(layer, batch, length, 5 * repeats), "blocks": blocks(case, repeats)}
    tell(json.dumps(told(found)))
    return found


def told(shape: dict[str, Any]) -> dict[str, Any]:
    """What is said of a shape when it has been measured: milliseconds by contestant and pass, and the decode step."""
    rows = {f"{n}, {p}": round(1e3 * row[p]["median_seconds"], 3) for n, row in shape["rows"].items() for p in PASSES}
    return rows | {"decode": round(shape["decode"]["time_ratio"], 3)}


def by_flash(run: Callable[[], object]) -> object:
    """Run with PyTorch's own flash kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return run()


def blocks(case: Case, repeats: int) -> dict[int, float]:
    """Seconds of ours, forward and backward, by the rows of the widest blocks: they set how deep the recursion goes."""
    if not case.start.is_cuda:
        return {}
    from implicit_attention.causal.triton import sweeps

    def of(rows: int) -> None:
        before = sweeps.WIDEST
        sweeps.WIDEST = ((0, rows),)
        try:
            ours.forward_backward()
        finally:
            sweeps.WIDEST = before

    ours = CONTESTANTS[OURS].enter(case, TOLERANCE)
    runs = {rows: partial(of, rows) for rows in BLOCKS if rows <= case.start.shape[1]}
    return {rows: measure.timing(taken)["median_seconds"] for rows, taken in timed(runs, repeats).items()}


def iteration(layer: ImplicitQueryAttention, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """One of Picard's iterations without a mask, its residual by torch and by Triton's kernel, against one SDPA pass.

    No iterate is good enough, so as many iterations are taken as are allowed. "map" is the map alone: what the others
    are more is what it costs to iterate.
    """
    like, steps = layer.W_K.weight, 8
    free = ImplicitQueryAttention(layer.embed_dim, layer.num_heads, qk_norm=True).to(like.device, like.dtype)
    x = torch.randn(batch, length, layer.embed_dim, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        equation = free.equation(x)
        q, k, v = (torch.randn_like(x).view(batch, length, layer.num_heads, -1).transpose(1, 2) for _ in range(3))

    def iterate(kernel: str) -> Solution:
        tiny = torch.finfo(torch.float32).tiny
        solver = Picard(rtol=tiny, atol=tiny, max_steps=steps, kernel=kernel)
        return fixed_point(equation.function, equation.start, equation.args, solver=solver, on_failure="ignore")

    kernels = [kernel for kernel in ("torch", "triton") if kernel == "torch" or like.is_cuda]
    with torch.no_grad():
        runs: dict[str, Callable[[], object]] = {
            SDPA: partial(F.scaled_dot_product_attention, q, k, v),
            "map": partial(equation.function, equation.start, *equation.args),
            **{name: partial(iterate, name) for name in kernels},
        }
        seconds = {name: measure.timing(taken)["median_seconds"] for name, taken in timed(runs, repeats).items()}
    return {name: seconds[name] / seconds[SDPA] / (steps + 1 if name in kernels else 1) for name in runs}


def decode_step(layer: ImplicitQueryAttention, batch: int, context: int, repeats: int) -> dict[str, Any]:
    """One new token per sample after a context, against SDPA over preallocated keys and values."""
    like = layer.W_K.weight
    # cuDNN's kernel would prepare itself anew at every step, for some 40 ms: the context has another length each time.
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if like.is_cuda else nullcontext()
    with torch.no_grad(), defaults(like), flash:
        steps = decode.prepared(layer, torch.randn(batch, context, layer.embed_dim), context + repeats + 2)
        x = torch.randn(batch, 1, layer.embed_dim)
        chosen = {name: partial(steps[name], x) for name in (decode.ATTENTION_LAYER, decode.SOLVE)}
        figures = {name: measure.timing(taken) for name, taken in timed(chosen, repeats).items()}
    ratio = figures[decode.SOLVE]["median_seconds"] / figures[decode.ATTENTION_LAYER]["median_seconds"]
    return {"steps": figures, "time_ratio": ratio}


@contextmanager
def defaults(like: torch.Tensor) -> Iterator[None]:
    """New tensors are like this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with like.device:
            yield
    finally:
        torch.set_default_dtype(before)


def targets(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is promised, against what was measured."""
    found = []
    for where, row in rows.items():
        if row["kind"] == "block":
            found.append(target(f"training step of a {where}", row["time_ratio"], BLOCK_TARGET))
        elif row["kind"] == "recall":
            found.append(target("recall: errors", 1.0 - row["score"], 1.0 - RECALL_TARGET))
        else:
            found += shape_targets(row)
    return found


def shape_targets(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of one shape."""
    where, found = f"at N = {shape['length']}, d = {shape['head_dim']}", []
    ours = shape["rows"][OURS]["forward_backward"]
    if at_most := TIME_TARGETS.get((shape["head_dim"], shape["length"])):
        found.append(target(f"time of SDPA {where}", ours["time_ratio"], at_most))
        if (unrolled := shape["rows"].get("unrolled")) is not None:
            share = ours["median_seconds"] / unrolled["forward_backward"]["median_seconds"]
            found.append(target(f"time of ten unrolled iterations {where}", share, 1.0 / UNROLLED_TARGET))
    return [*found, target(f"decode step {where}", shape["decode"]["time_ratio"], DECODE_TARGET)]


def draw(shapes: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward together, relative to SDPA, one panel per head dimension."""
    from matplotlib.figure import Figure

    dims = sorted({shape["head_dim"] for shape in shapes})
    figure = Figure(figsize=(4.6 * len(dims), 4.2), dpi=150, layout="constrained")
    for axes, dim in zip(figure.subplots(1, len(dims), squeeze=False)[0], dims, strict=True):
        at = [shape for shape in shapes if shape["head_dim"] == dim]
        for name in at[0]["rows"]:
            there = [shape for shape in at if name in shape["rows"]]
            ratios = [shape["rows"][name]["forward_backward"]["time_ratio"] for shape in there]
            axes.plot([shape["length"] for shape in there], ratios, marker="o", label=name)
        axes.set(title=f"head dimension {dim}", xlabel="tokens N", xscale="log", yscale="log")
        axes.legend(frameon=False)
    figure.supylabel("forward + backward, relative to SDPA")
    figure.savefig(path)
