"""How work that reads numbers on the host leaves the graph that `torch.compile` is making."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(work: Callable[P, R], reason: str, remedy: str) -> Callable[P, R]:
    """End the graph that is being compiled. With `fullgraph=True`, torch refuses with the reason and the remedy.

    Args:
        work: What is to run outside it.
        reason: Why, as a sentence.
        remedy: What can be done instead of compiling without `fullgraph=True`, likewise.

    Returns:
        The same, which torch.compile leaves alone.

    Raises:
        ValueError: If a program is being exported, which has no place outside its graph.
    """
    if torch.compiler.is_exporting():
        raise ValueError(f"{reason} An exported program has no place for that. {remedy}")
    torch._dynamo.graph_break(msg=f"{reason} Compile without fullgraph=True. {remedy}")
    outside: Callable[P, R] = torch.compiler.disable(work)  # type: ignore[no-untyped-call]
    return outside
