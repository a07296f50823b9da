"""What the JSON of all causal benchmarks has in common: the head, and promises held against figures."""

import argparse
import sys
import time
from importlib import metadata
from typing import Any

from implicit_attention.cli.environment import environment
from studies.commit import checked_out

PASSES = {
    "forward": "without autograd",
    "forward_backward": "random cotangent; gradients of keys, values and Omega_Q's weights, for SDPA of q, k, v",
}


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """The layer's sizes, and torch's threads."""
    for name, default in (("embed-dim", 512), ("num-heads", 8), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")


def described(benchmark: str, embed_dim: int, num_heads: int) -> dict[str, Any]:
    """The JSON's head: what was measured, with which versions, on which machine."""
    found = environment()
    try:
        found["versions"]["torchdeq"] = metadata.version("torchdeq")
    except metadata.PackageNotFoundError:
        found["versions"]["torchdeq"] = None
    found["commit"] = checked_out()
    return {"benchmark": benchmark, **found, "embed_dim": embed_dim, "num_heads": num_heads, "dtype": "float32"}


def origin(result: dict[str, Any]) -> str:
    """Which commit a record was made by."""
    if commit := result.get("commit"):
        return f"Made by commit {commit[:7]}."
    return "The record names no commit; the kernels may have changed since."


def tell(what: str) -> None:
    """Say on stderr what is being measured now."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def target(what: str, measured: float, at_most: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "at_most": at_most, "holds": measured <= at_most}


def verdict(targets: list[dict[str, Any]]) -> str:
    missed = [f"{t['what']} {t['measured']:.3g} (at most {t['at_most']:g})" for t in targets if not t["holds"]]
    held = f"{len(targets) - len(missed)} of {len(targets)} targets hold."
    return f"{held} NOT: {'; '.join(missed)}." if missed else held
