"""No mask: the equilibrium against the seed's own ten unrolled iterations, forward and backward.

First both must give the same: the seed's ten iterations have to have converged to the benchmark's tolerance, and
outputs and gradients have to agree within what that tolerance implies. Then time and added peak memory are measured
in the same process, in turn.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.seed import ImplicitQueryAttentionLinearV
from implicit_attention import Anderson, ImplicitQueryAttention, Picard
from implicit_attention.cli.environment import environment
from implicit_attention.inspection import diagnostics

TOLERANCE = 1e-4
TIMES_FASTER, SHARE_OF_MEMORY = 6.0, 0.1
SEED = "seed, 10 unrolled iterations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes, which default to those of the project's target."""
    for name, default in (("batch", 4), ("length", 2048), ("embed-dim", 64), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} unless told")


def run(*, batch: int = 4, length: int = 2048, embed_dim: int = 64, repeats: int = 7) -> dict[str, Any]:
    """Check, measure, and return everything for the JSON."""
    torch.manual_seed(0)
    seed = ImplicitQueryAttentionLinearV(embed_dim)
    layers: dict[str, nn.Module] = {SEED: seed}
    for solver in (Anderson, Picard):
        layer = ImplicitQueryAttention(embed_dim, solver=solver(rtol=TOLERANCE, atol=TOLERANCE), on_failure="raise")
        layer.load_state_dict(seed.state_dict())
        layers[solver.__name__] = layer
    x, cotangent = torch.randn(2, batch, length, embed_dim).unbind()
    checks = {name: check(layers[SEED], layer, x, cotangent) for name, layer in layers.items() if name != SEED}
    correct = all(c["output_agrees"] and c["gradient_agrees"] and c["seed_converged"] for c in checks.values())
    result: dict[str, Any] = {
        "benchmark": "bidirectional",
        **environment(),
        "shape": [batch, length, embed_dim],
        "dtype": "float32",
        "pass": "forward and backward, random cotangent, gradients of x and all weights",
        "tolerance": TOLERANCE,
        "checks": checks,
        "correct": correct,
    }
    if not correct:
        return result | {"verdict": "WRONG: outputs or gradients differ; nothing was measured."}
    passes = {name: forward_backward(layer, x, cotangent) for name, layer in layers.items()}
    return result | measured(passes, repeats)


def forward_backward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], list[Tensor]]:
    """Return the pass that is measured: output, then the gradients of x and of the weights."""
    leaf = x.clone().requires_grad_()

    def call() -> list[Tensor]:
        y = layer(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], cotangent)]

    return call


def check(seed: nn.Module, layer: ImplicitQueryAttention, x: Tensor, cotangent: Tensor) -> dict[str, Any]:
    """Compare a layer with the seed.

    With t the tolerance and rho the spectral radius, an iterate whose residual is within t (1 + max|y|) lies about
    t (1 + max|y|) / (1 - rho) from the equilibrium; two iterates at most twice that apart. The adjoint is solved to
    the same relative tolerance, at an equilibrium known to it, so gradients may differ by as much, for each of the
    two causes, relative to the size of the weights' gradients taken together. (Not each for itself: without a mask
    the seed settles where all tokens agree on the mean value, and there the gradients of Omega_Q and W_K are zero.)
    """
    with torch.no_grad():
        _, history = seed(x, track=True)
        last = float((history[-1] - history[-2]).abs().max())
    rho = float(diagnostics.spectral_radius(layer, x).max())
    expected, found = forward_backward(seed, x, cotangent)(), forward_backward(layer, x, cotangent)()
    names = ["x", *(name for name, _ in seed.named_parameters())]
    weights = float(torch.stack([g.norm() for g in expected[2:]]).norm())
    sizes = [float(expected[1].norm()), *(weights for _ in expected[2:])]
    errors = [float((f - e).norm()) / size for f, e, size in zip(found[1:], expected[1:], sizes, strict=True)]
    gradient = dict(zip(names, errors, strict=True))
    allowed = TOLERANCE * (1 + float(expected[0].abs().max()))
    output_error = float((found[0] - expected[0]).abs().max())
    limit, gradient_limit = 2 * allowed / (1 - rho), 4 * TOLERANCE / (1 - rho)
    return {
        "spectral_radius": rho,
        "seed_last_change": last,
        "seed_converged": rho < 1 and last <= allowed,
        "output_error": output_error,
        "output_limit": limit,
        "output_agrees": output_error <= limit,
        "seed_gradient_norms": dict(zip(names, [float(g.norm()) for g in expected[1:]], strict=True)),
        "gradient_relative_error": gradient,
        "gradient_limit": gradient_limit,
        "gradient_agrees": max(gradient.values()) <= gradient_limit,
    }


def measured(passes: dict[str, Callable[[], list[Tensor]]], repeats: int) -> dict[str, Any]:
    """Measure memory, then time, and hold them against the targets."""
    memory = {name: measure.added_peak_bytes(call) for name, call in passes.items()}
    seconds = {n: measure.timing(s) for n, s in measure.interleaved_seconds(passes, repeats).items()}
    rows = {}
    for name, figures in seconds.items():
        rows[name] = figures | {
            "added_peak_bytes": memory[name],
            "times_faster": seconds[SEED]["median_seconds"] / figures["median_seconds"],
            "share_of_memory": memory[name] / memory[SEED],
        }
    target = rows["Anderson"]
    holds = target["times_faster"] >= TIMES_FASTER and target["share_of_memory"] <= SHARE_OF_MEMORY
    verdict = (
        f"Anderson({TOLERANCE:g}) is {target['times_faster']:.1f} times faster than the seed (target "
        f"{TIMES_FASTER:g}) with {target['share_of_memory']:.3f} of its added peak memory (target "
        f"{SHARE_OF_MEMORY:g}): the targets {'hold' if holds else 'DO NOT hold'}."
    )
    method = measure.added_peak_bytes.__doc__ or ""
    return {
        "results": rows,
        "repeats": repeats,
        "targets_hold": holds,
        "memory_method": " ".join(method.split()),
        "verdict": verdict,
    }
