"""What values that read outputs cost: row after row, beside the layers that compute rows at once and beside a GRU.

`Psi_V` is orthogonal, so that the state of a row matters in all later ones. The output is put through one application
of the equation in plain PyTorch before anything is timed. Times are those of the processor, all threads together: what
else runs on the machine then counts less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import layer
from benchmarks.report import described, tell
from implicit_attention import ForwardSubstitution, ImplicitQueryAttention

SHAPES = ((16, 128, 128, 4), (4, 1024, 512, 8))  # B, N, D, H
FEEDBACK: dict[str, Any] = {"self_query": "input", "values": "feedback"}
LAYERS: dict[str, dict[str, Any]] = {
    'self_query="input"': {"self_query": "input"},
    'values="feedback"': FEEDBACK,
    'values="feedback", query_output=False': FEEDBACK | {"query_input": True, "query_output": False},
}
GRU = "torch.nn.GRU"


class Recurrent(nn.Module):
    """A GRU as wide as a token."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.cells = nn.GRU(embed_dim, embed_dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.cells(x)[0]
        return states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")


def run(*, repeats: int = 7, threads: int = 1) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(threads)
    rtol, atol = ForwardSubstitution().tolerances(torch.float32)
    result = described("feedback", 0, 0)
    del result["embed_dim"], result["num_heads"]
    result |= {"rtol": rtol, "atol": atol, "shapes": [], "correct": True}
    for shape in SHAPES:
        tell(f"feedback: {shape}")
        found = measured(shape, repeats, rtol, atol)
        result["shapes"].append(found)
        result["correct"] &= found["check"]["correct"]
    return result | {"verdict": "All outputs solve the equation." if result["correct"] else "WRONG outputs."}


def measured(shape: tuple[int, int, int, int], repeats: int, rtol: float, atol: float) -> dict[str, Any]:
    """The residual, seconds of the processor, and ratios to the ordinary layer, of one shape."""
    torch.manual_seed(0)
    batch, length, embed_dim, num_heads = shape
    x, cotangent = torch.randn(2, batch, length, embed_dim).unbind()
    layers = {layer.ORDINARY: layer.made(embed_dim, num_heads)[layer.ORDINARY]}
    for name, options in LAYERS.items():
        layers[name] = made = ImplicitQueryAttention(embed_dim, num_heads, **layer.COMMON, **options)
        if made.Psi_V is not None:
            nn.init.orthogonal_(made.Psi_V.weight)
    checked = layer.check(layers['values="feedback"'], x, rtol, atol)
    layers[GRU] = Recurrent(embed_dim)
    rows: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for name, make in {"forward": layer.forward, "forward_backward": layer.forward_backward}.items():
        passes = {each: make(module, x, cotangent) for each, module in layers.items()}
        times = processor_seconds(passes, repeats)
        for each, seconds in times.items():
            ratio = layer.ratio(seconds, times[layer.ORDINARY])
            rows[each][name] = {"median_seconds": statistics.median(seconds), "seconds": seconds, "time_ratio": ratio}
    return {"batch": batch, "length": length, "embed_dim": embed_dim, "num_heads": num_heads, "repeats": repeats,
            "check": checked, "rows": rows}  # fmt: skip


def processor_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time every run in turn, again and again, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, call in runs.items():
            begun = time.process_time()
            call()
            if round_:
                seconds[name].append(time.process_time() - begun)
    return seconds
