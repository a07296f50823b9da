"""The models of the arms, drawn from a seed, and as large as the reference."""

import torch

from implicit_attention.errors import Came, bad_value
from implicit_attention.tasks.task import Task
from studies.arms import PRECISIONS, REFERENCE, Arm, Sizes
from studies.blocks import SequenceModel

MARGIN = 0.02  # largest relative difference between the numbers of parameters of two arms of a table


def build(arm: Arm, task: Task, sizes: Sizes, seed: int) -> SequenceModel:
    """Return an arm's model for a task, its weights drawn from a seed.

    Args:
        arm: The arm.
        task: The task.
        sizes: The sizes of the table.
        seed: Of the weights; arms get the same embedding from the same seed.

    Raises:
        ValueError: If the arm does not exist with the task's mask, or no width of its MLPs gives it as many parameters
            as the reference.
    """
    if arm.causal_only and not task.is_causal:
        raise bad_value("arm", "one that exists without a causal mask", arm.name)
    if arm.free_only and task.is_causal:
        raise bad_value("arm", "one that exists under a causal mask", arm.name)
    width = matching_width(arm, task, sizes)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = _model(arm, task, sizes, width)
    torch.set_rng_state(generator_state)
    return model


def matching_width(arm: Arm, task: Task, sizes: Sizes) -> int:
    """Return the width of MLPs that gives an arm as many parameters as the reference.

    Args:
        arm: The arm.
        task: The task.
        sizes: The sizes of the table.

    Raises:
        ValueError: If no width comes within 2 %.
    """
    with torch.device("meta"):
        wanted = parameters(_model(REFERENCE, task, sizes, sizes.mlp))
        one, two = (parameters(_model(arm, task, sizes, width)) for width in (1, 2))
        width = max(1, 1 + round((wanted - one) / (two - one)))
        got = parameters(_model(arm, task, sizes, width))
    if abs(got - wanted) > MARGIN * wanted:
        raise bad_value(
            "mlp", f"so wide that {arm.name} can have {wanted} parameters within {MARGIN:.0%}",
            Came(f"{sizes.mlp}, with which it has {got} at least"), "Widen it, or use fewer blocks.",
        )  # fmt: skip
    return width


def parameters(model: torch.nn.Module) -> int:
    """Return how many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def _model(arm: Arm, task: Task, sizes: Sizes, width: int) -> SequenceModel:
    # The embedding is drawn first: the arms of a seed share it.
    tokens, loops = takes_tokens(task), sizes.loops if arm.looped else 1
    model = SequenceModel(
        task.inputs, task.outputs, [], sizes.embed_dim, tokens=tokens, loops=loops,
        precision=PRECISIONS[sizes.precision],
    )  # fmt: skip
    model.blocks.extend(arm.block(i, task, sizes, width) for i in range(sizes.blocks * arm.depth))
    return model


def takes_tokens(task: Task) -> bool:
    """Return whether a task's inputs are tokens, and not features."""
    with torch.device("cpu"):
        batch = next(iter(task.held_out(1, 0).values()))
    return not batch.inputs.is_floating_point()
