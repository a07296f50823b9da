"""`max_gain`: how near the default comes to the equilibrium, and how strongly the map contracts there.

Outputs in float32 with the default tolerance, against the same layer and inputs in float64, where the default is 1e-10.
An error of outputs is the largest of any component, relative to the sample's largest output; one of gradients is that
of all gradients together, relative to their norm. The radius is the spectral radius of the map's Jacobian at the
equilibrium; `max_gain` bounds it.
"""

import argparse
import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.encoder import sharpen
from benchmarks.report import described, tell
from implicit_attention import ImplicitQueryAttention
from implicit_attention.inspection import diagnostics

MAX_GAIN = 0.9
DRIFT = 0.1  # standard deviation of the change from one input to the next, whose own is 1 at first


@dataclass(frozen=True)
class Setting:
    """Layers of one kind, and their inputs in turn."""

    title: str
    lengths: tuple[int, ...]
    embed_dim: int
    num_heads: int
    sharpness: tuple[float, ...] = (1.0, 4.0)  # of Omega_Q, W_K and W_Q; scores grow with the square
    scale: float | None = None
    layers: int = 3  # of each length and sharpness
    batch: int = 2
    inputs: int = 1  # each `DRIFT` from the last; from the second on the solve starts from the last equilibrium
    gradients: bool = False


SETTINGS = {
    "tokens": Setting("64, 256 or 1024 tokens of width 64", (64, 256, 1024), 64, 4, gradients=True),
    "warm": Setting("16 or 100 tokens of width 64, 60 inputs in turn", (16, 100), 64, 4, inputs=60),
    "few": Setting("2 to 4 tokens of width 16, 60 inputs in turn", (2, 3, 4), 16, 4, inputs=60),
    "tiny": Setting(
        "2 tokens of width 2, one head, `scale=5`", (2,), 2, 1, sharpness=(1.0,), scale=5.0, layers=1000, batch=50
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the settings are the rows of a table in docs/choosing.md."""


def run() -> dict[str, Any]:
    """Measure, and return everything for the JSON."""
    torch.set_num_threads(1)
    result = described("contraction", SETTINGS["tokens"].embed_dim, SETTINGS["tokens"].num_heads)
    result |= {"max_gain": MAX_GAIN, "drift": DRIFT, "settings": {}}
    for name, setting in SETTINGS.items():
        tell(f"contraction: {name}")
        result["settings"][name] = asdict(setting) | measured(setting)
    bounded = all(figures["radius"]["largest"] <= MAX_GAIN for figures in result["settings"].values())
    return result | {"correct": bounded, "verdict": "All radii are within max_gain." if bounded else "A radius is not."}


def measured(setting: Setting) -> dict[str, Any]:
    """The errors and radii of a setting: their median, ninth decile and maximum."""
    outputs, gradients, radii = [], [], []
    for length in setting.lengths:
        for sharpness in setting.sharpness:
            for seed in range(setting.layers):
                torch.manual_seed(seed)
                layer = made(setting, sharpness)
                exact = copy.deepcopy(layer).double()
                x = torch.randn(setting.batch, length, setting.embed_dim)
                if setting.gradients:
                    gradients.append(gradient_error(layer, exact, x))
                outputs += output_errors(layer, exact, x, setting.inputs)
                radii.append(diagnostics.contraction(exact, x.double()).radius)
    found = {"outputs": torch.cat(outputs), "radius": torch.cat(radii)}
    if gradients:
        found["gradients"] = torch.tensor(gradients)
    return {name: quantiles(values) for name, values in found.items()}


def made(setting: Setting, sharpness: float) -> ImplicitQueryAttention:
    layer = ImplicitQueryAttention(
        setting.embed_dim, setting.num_heads, query_input=True, max_gain=MAX_GAIN, scale=setting.scale
    )
    sharpen(layer, sharpness)
    return layer


@torch.no_grad()
def output_errors(layer: ImplicitQueryAttention, exact: ImplicitQueryAttention, x: Tensor, inputs: int) -> list[Tensor]:
    """The error of each sample, `[B]`, for `inputs` inputs in turn."""
    errors, start = [], None
    for _ in range(inputs):
        start = layer.solve(x, start=start).value
        y = exact.solve(x.double()).value
        errors.append((start - y).abs().amax((1, 2)) / y.abs().amax((1, 2)))
        x = x + DRIFT * torch.randn_like(x)
    return errors


def gradient_error(layer: ImplicitQueryAttention, exact: ImplicitQueryAttention, x: Tensor) -> float:
    cotangent = torch.randn_like(x)
    found = torch.cat([g.double().flatten() for g in gradients_of(layer, x, cotangent)])
    known = torch.cat([g.flatten() for g in gradients_of(exact, x.double(), cotangent.double())])
    return float((found - known).norm() / known.norm())


def gradients_of(layer: ImplicitQueryAttention, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], cotangent)


def quantiles(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {
        "count": values.numel(),
        "median": float(values.median()),
        "ninth_decile": float(values.quantile(0.9)),
        "largest": float(values.max()),
    }
