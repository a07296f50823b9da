"""The layer against an ordinary attention layer of the same shapes: what a user pays, projections included.

Every layer has a causal mask, `qk_norm` and `out_proj`, and nothing else named. One more has `kernel="torch"`: what is
left where the C++ kernels are missing. Outputs are put through one application of the equation in plain PyTorch. The
first forward and backward pass of each layer is a figure of its own; that of the first shape is the first in the
process.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.peers import Case
from benchmarks.reference import CausalMap
from benchmarks.report import described, tell
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.tasks import OrdinaryAttention

SHAPES = (
    (2, 100, 64, 4),  # the quickstart's
    (1, 128, 128, 4),
    (16, 128, 128, 4),
    (8, 256, 256, 4),
    (4, 512, 512, 8),
    (4, 1024, 512, 8),
    (2, 4096, 512, 8),
    (1, 16384, 512, 8),
)  # B, N, D, H
ORDINARY = "ordinary attention layer"
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    'self_query="input"': {"self_query": "input"},
    'kernel="torch"': {"solver": ForwardSubstitution(kernel="torch")},
}
TORCH_UP_TO = 1024  # tokens; it is measured at lengths where it matters
LONG = 4096  # tokens; from here on a pass takes seconds, which neither a cold cache nor a neighbour changes much
COMMON = {"is_causal": True, "qk_norm": True, "out_proj": True, "on_failure": "raise"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s; at most 3 from 4096 tokens on")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--shape", type=int, nargs=4, action="append", metavar=("B", "N", "D", "H"), dest="shapes",
        help="batch, tokens, width, heads; may be given again; default: those of the README",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="next to the ordinary one; default: all"
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="count processor time, of all threads: for a busy machine"
    )


def run(
    *,
    repeats: int = 7,
    threads: int = 1,
    shapes: Sequence[Sequence[int]] | None = None,
    layers: Sequence[str] = tuple(LAYERS),
    processor_time: bool = False,
) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    clock = time.process_time if processor_time else time.perf_counter
    rtol, atol = ForwardSubstitution().tolerances(torch.float32)
    result = described("layer", 0, 0)
    del result["embed_dim"], result["num_heads"]  # they differ from shape to shape
    result |= {"options": {**COMMON}, "rtol": rtol, "atol": atol, "shapes": [], "correct": True}
    result["clock"] = "processor" if processor_time else "wall"
    for shape in SHAPES if shapes is None else shapes:
        tell(f"layer: {tuple(shape)}")
        found = measured(shape, repeats, rtol, atol, layers, clock)
        result["shapes"].append(found)
        result["correct"] &= all(row.get("correct", True) for row in found["rows"].values())
    return result | {"verdict": "All outputs solve the equation." if result["correct"] else "WRONG outputs."}


def made(embed_dim: int, num_heads: int, names: Sequence[str] = tuple(LAYERS)) -> dict[str, nn.Module]:
    """Layers of one size, the ordinary one first."""
    attention = OrdinaryAttention(embed_dim, num_heads, is_causal=True, qk_norm=True)
    layers: dict[str, nn.Module] = {ORDINARY: nn.Sequential(attention, nn.Linear(embed_dim, embed_dim, bias=False))}
    return layers | {
        name: ImplicitQueryAttention(embed_dim, num_heads, **COMMON, **LAYERS[name]) for name in LAYERS if name in names
    }


def measured(
    shape: Sequence[int],
    repeats: int,
    rtol: float,
    atol: float,
    names: Sequence[str] = tuple(LAYERS),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Residuals, seconds, and ratios to the ordinary layer, of one shape."""
    torch.manual_seed(0)
    batch, length, embed_dim, num_heads = shape
    repeats = repeats if length < LONG else min(repeats, 3)
    x, cotangent = torch.randn(2, batch, length, embed_dim).unbind()
    layers = made(embed_dim, num_heads, [n for n in names if "torch" not in n or length <= TORCH_UP_TO])
    rows: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for name, module in layers.items():
        begun = clock()
        forward_backward(module, x, cotangent)()
        rows[name]["first_call_seconds"] = clock() - begun
    for name in rows.keys() & LAYERS.keys():
        rows[name] |= check(layers[name], x, rtol, atol)
    for name, make in {"forward": forward, "forward_backward": forward_backward}.items():
        passes = {layer: make(module, x, cotangent) for layer, module in layers.items()}
        times = measure.interleaved_seconds(passes, repeats, apart=length < LONG, clock=clock)
        for layer, seconds in times.items():
            rows[layer][name] = measure.timing(seconds) | {"time_ratio": ratio(seconds, times[ORDINARY])}
    return {"batch": batch, "length": length, "embed_dim": embed_dim, "num_heads": num_heads, "repeats": repeats,
            "rows": rows}  # fmt: skip


def ratio(seconds: list[float], ordinary: list[float]) -> float:
    """The median ratio of a round: what else the machine does hits both times of a round alike."""
    return statistics.median(a / b for a, b in zip(seconds, ordinary, strict=True))


def check(layer: nn.Module, x: Tensor, rtol: float, atol: float) -> dict[str, Any]:
    """Whether every row solves the equation, by one application of it in float64."""
    assert isinstance(layer, ImplicitQueryAttention)
    with torch.no_grad():
        case, y = Case.of(layer, x), layer.solve(x).value
        tensors = {name: tensor.double() for name, tensor in case.tensors.items()}
        image = CausalMap(layer.scale, layer.qk_norm)(y.double(), tensors)
    residual = (image - y).abs().amax(-1)
    # One application in float64 differs from the layer's own, in float32, by rounding: some units of its epsilon.
    rounding = 64 * torch.finfo(x.dtype).eps * image.abs().amax()
    within = residual <= atol + rtol * image.abs().amax(-1) + rounding
    return {"largest_residual": float(residual.max()), "correct": bool(within.all())}


def forward(layer: nn.Module, x: Tensor, _: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(x)
        return out

    return call


def forward_backward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], object]:
    given = x.clone().requires_grad_()

    def call() -> object:
        return torch.autograd.grad(layer(given), [given, *layer.parameters()], cotangent)

    return call
