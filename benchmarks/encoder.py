"""No mask: the recommended layer, a contraction by construction, against `nn.MultiheadAttention`.

Forward and backward, in processor time of one thread, round by round in turn. Every shape is measured twice: with new
weights, and with the weights that make scores (`Omega_Q`, `W_K`, `W_Q`) four times as large. The bound is then about
50, as after some hundred steps of training. `nn.MultiheadAttention` has no positions, so that the layer is measured
without its own, too. Outputs are put through one application of the map first.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.layer import ratio
from benchmarks.report import described, target, tell, verdict
from implicit_attention import ImplicitQueryAttention
from implicit_attention.inspection import diagnostics

SHAPES = ((16, 64), (8, 256), (2, 1024))  # batch, tokens
TARGETS = (4.0, 2.5, 2.2)  # times nn.MultiheadAttention
SHARPNESS = {"new": 1.0, "sharp": 4.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes."""
    for name, default in (("embed-dim", 64), ("num-heads", 4), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")


def run(*, embed_dim: int = 64, num_heads: int = 4, repeats: int = 15) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.set_num_threads(1)
    result = described("encoder", embed_dim, num_heads)
    result |= {"clock": "processor time of one thread", "repeats": repeats, "rows": [], "correct": True}
    targets = []
    for (batch, length), at_most in zip(SHAPES, TARGETS, strict=True):
        for name, sharpness in SHARPNESS.items():
            tell(f"encoder: {batch} x {length}, {name}")
            row = measured(batch, length, embed_dim, num_heads, sharpness, repeats)
            result["rows"].append({"batch": batch, "length": length, "weights": name, **row})
            result["correct"] &= row["correct"]
            targets.append(target(f"{batch} x {length}, {name}", row["time_ratio"], at_most))
    return result | {"targets": targets, "verdict": verdict(targets) if result["correct"] else "WRONG outputs."}


def measured(batch: int, length: int, embed_dim: int, num_heads: int, sharpness: float, repeats: int) -> dict[str, Any]:
    """Evaluations, bound, radius and times of one shape."""
    torch.manual_seed(0)
    x, cotangent = torch.randn(2, batch, length, embed_dim).unbind()
    peer = nn.MultiheadAttention(embed_dim, num_heads, bias=False, batch_first=True)
    layer = ImplicitQueryAttention.for_encoder(embed_dim, num_heads, on_failure="raise")
    plain = ImplicitQueryAttention.for_encoder(embed_dim, num_heads, positions=None, on_failure="raise")
    sharpen(layer, sharpness)
    plain.load_state_dict(layer.state_dict())
    passes = {
        name: forward_backward(each, x, cotangent)
        for name, each in (("peer", peer), ("layer", layer), ("plain", plain))
    }
    times = measure.interleaved_seconds(passes, repeats, clock=time.process_time)
    last = layer.last_solve
    assert last is not None
    assert last.adjoint is not None
    known = diagnostics.contraction(layer, x)
    return {
        "correct": within(layer, x) and within(plain, x),
        "time_ratio": ratio(times["layer"], times["peer"]),
        "time_ratio_without_positions": ratio(times["plain"], times["peer"]),
        "evaluations": last.evaluations,
        "adjoint_steps": int(last.adjoint.steps.max()),
        "bound": float(known.bound.mean()),
        "radius": float(known.radius.max()),
        "seconds": {name: measure.timing(seconds) for name, seconds in times.items()},
    }


@torch.no_grad()
def sharpen(layer: ImplicitQueryAttention, factor: float) -> None:
    """Multiply the weights that make scores, which grow with the square."""
    for module in (layer.Omega_Q, layer.W_K, layer.W_Q):
        module.weight.mul_(factor)


def forward_backward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    call = (lambda: layer(leaf, leaf, leaf, need_weights=False)[0]) if _is_peer(layer) else (lambda: layer(leaf))
    return lambda: torch.autograd.grad(call(), [leaf, *layer.parameters()], cotangent)


def within(layer: ImplicitQueryAttention, x: Tensor) -> bool:
    """Whether the outputs are as near to the equilibrium as `Contraction` promises, by one application in float64.

    Within a fifth of the tolerance: one application then moves them by at most twice that.
    """
    with torch.no_grad():
        y, (function, args, _) = layer.solve(x).value.double(), layer.equation(x)
        image = function(y, *(a.double() for a in args))
        rtol, _ = layer.solver.tolerances(x.dtype)
        return bool(((image - y).abs().amax((1, 2)) <= 2 * rtol / 5 * image.abs().amax((1, 2))).all())


def _is_peer(layer: nn.Module) -> bool:
    return isinstance(layer, nn.MultiheadAttention)
