"""The arms: models that differ only in how they mix tokens.

All have the same embedding and head, and those with attention the same relative bias. The width of the MLPs is chosen
so that all have as many weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicit_attention.attention.contraction import Contraction
from implicit_attention.attention.positions import RelativeBias
from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.equilibrium.adjoints import Implicit as ImplicitAdjoint
from implicit_attention.equilibrium.adjoints import Phantom
from implicit_attention.equilibrium.solvers import Anderson
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.recommended import MAX_GAIN
from implicit_attention.tasks.models import Convolution
from implicit_attention.tasks.task import Task
from studies.blocks import Block, ParallelBlock, RecurrentBlock
from studies.mixers import GRU, Behind, GatedDeltaNet, Implicit, Mixer, Ordinary, WithStates
from studies.names import known

ADJOINTS = {"implicit": ImplicitAdjoint(), "phantom": Phantom(), "one step": Phantom(steps=1, damping=1.0)}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTRACTIONS = (1e-1, 1e-2, 1e-3, 1e-4)  # tolerances of `Contraction` that are compared
MOST_STEPS = 24  # of an iterative solver: a row that does not settle makes all others wait


@dataclass(frozen=True)
class Sizes:
    """The sizes of a table's models. The reference is `blocks` blocks of ordinary attention.

    Attributes:
        embed_dim: D.
        num_heads: H.
        mlp: Width of the reference's MLPs. Those of other arms follow from it.
        max_distance: Offsets beyond it share an entry of the relative bias.
        blocks: Blocks of an arm; some arms have twice as many.
        loops: How often the looped arm applies its blocks.
        qk_norm: RMS norm of queries and keys, in every arm that has queries and keys.
        query_input: Whether implicit layers add `W_Q x` to their queries.
        positions: Positions of implicit layers, as in `ImplicitQueryAttention`. All other arms have the relative bias.
        adjoint: Gradient of implicit layers, a name in `ADJOINTS`.
        tolerance: Tolerance of equilibria in training and evaluation, absolute and relative.
        kernel: Kernel of `ForwardSubstitution`.
        precision: Dtype of matrix products, a name in `PRECISIONS`. All but "float32" use autocast.
        bias_rate: Learning rate of relative biases, as a multiple of that of all other weights.
    """

    embed_dim: int = 64
    num_heads: int = 4
    mlp: int = 256
    max_distance: int = 64
    blocks: int = 1
    loops: int = 4
    qk_norm: bool = True
    query_input: bool = True
    positions: str | None = "relative"
    adjoint: str = "implicit"
    tolerance: float = 1e-4
    kernel: str = "auto"
    precision: str = "float32"
    bias_rate: float = 10.0

    def __post_init__(self) -> None:
        """Refuse an unknown precision."""
        known("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Arm:
    """One of the arms.

    Attributes:
        name: Its name in commands and files.
        title: Its name in tables and pictures.
        mixer: Makes one block from the task, the sizes and the width of the MLP.
        depth: Blocks for each block of other arms.
        looped: Whether its blocks are applied `Sizes.loops` times.
        causal_only: Whether it exists only under a causal mask.
        free_only: Whether it exists only without one.
        ours: Whether it has the library's layer, and is no baseline.
        every: The mixer is that of the first block and of each `every`-th after it; the others are ordinary attention.
            0: of the first block alone.
    """

    name: str
    title: str
    mixer: Callable[[Task, Sizes, int], Block]
    depth: int = 1
    looped: bool = False
    causal_only: bool = False
    free_only: bool = False
    ours: bool = False
    every: int = 1

    def block(self, index: int, task: Task, sizes: Sizes, width: int) -> Block:
        """Return the block at an index, from 0.

        Args:
            index: Of the block.
            task: The task.
            sizes: The sizes of the table.
            width: Of the MLP.
        """
        own = index % self.every == 0 if self.every else index == 0
        return (self.mixer if own else _ordinary)(task, sizes, width)


def _attention(task: Task, sizes: Sizes, taps: int = 0, *, shifted: bool = False) -> Ordinary:
    return Ordinary(
        sizes.embed_dim, sizes.num_heads, is_causal=task.is_causal, qk_norm=sizes.qk_norm,
        positions=_positions(sizes), taps=taps, shifted=shifted,
    )  # fmt: skip


def _ordinary(task: Task, sizes: Sizes, width: int) -> Block:
    return ParallelBlock(_attention(task, sizes), sizes.embed_dim, width)


def _recurrent(task: Task, sizes: Sizes, width: int) -> Block:
    return RecurrentBlock(_attention(task, sizes), sizes.embed_dim, width)


def _gru(task: Task, sizes: Sizes, width: int) -> Block:
    return ParallelBlock(GRU(sizes.embed_dim), sizes.embed_dim, width)


def _implicit(task: Task, sizes: Sizes, width: int) -> ParallelBlock:
    return _equilibrium(task, sizes, width)


def _strict(task: Task, sizes: Sizes, width: int) -> ParallelBlock:
    return _equilibrium(task, sizes, width, self_query="input")


def _feedback(task: Task, sizes: Sizes, width: int) -> Block:
    return _equilibrium(task, sizes, width, self_query="input", values="feedback")


def _feedback_plain(task: Task, sizes: Sizes, width: int) -> Block:
    return _equilibrium(task, sizes, width, self_query="input", values="feedback", feedback_norm=False)


def _feedback_alone(task: Task, sizes: Sizes, width: int) -> Block:
    return _equilibrium(task, sizes, width, self_query="input", values="feedback", query_output=False)


def _keys(taps: int) -> Callable[[Task, Sizes, int], Block]:
    return lambda task, sizes, width: ParallelBlock(_attention(task, sizes, taps), sizes.embed_dim, width)


def _shifted(task: Task, sizes: Sizes, width: int) -> Block:
    return ParallelBlock(_attention(task, sizes, shifted=True), sizes.embed_dim, width)


def _convolved(taps: int) -> Callable[[Task, Sizes, int], Block]:
    return lambda task, sizes, width: _behind_taps(taps, _attention(task, sizes), sizes, width)


def _strict_convolved(task: Task, sizes: Sizes, width: int) -> Block:
    return _behind_taps(4, _strict(task, sizes, width).mixer, sizes, width)


def _behind_taps(taps: int, mixer: Mixer, sizes: Sizes, width: int) -> Block:
    return ParallelBlock(Behind(Convolution(sizes.embed_dim, taps), mixer), sizes.embed_dim, width)


def _gru_attention(task: Task, sizes: Sizes, width: int) -> Block:
    return ParallelBlock(Behind(WithStates(sizes.embed_dim), _attention(task, sizes)), sizes.embed_dim, width)


def _delta(speed: float | None = None) -> Callable[[Task, Sizes, int], Block]:
    return lambda task, sizes, width: ParallelBlock(
        GatedDeltaNet(sizes.embed_dim, sizes.num_heads, speed=speed), sizes.embed_dim, width
    )


def _bounded(rtol: float | None = None) -> Callable[[Task, Sizes, int], Block]:
    return lambda task, sizes, width: _equilibrium(task, sizes, width, max_gain=MAX_GAIN, contraction=rtol)


def _equilibrium(
    task: Task, sizes: Sizes, width: int, *, max_gain: float | None = None, contraction: float | None = None,
    **options: Any,
) -> ParallelBlock:  # fmt: skip
    rtol = atol = sizes.tolerance
    iterative = (
        Anderson(rtol=rtol, atol=atol, max_steps=MOST_STEPS) if max_gain is None else Contraction(rtol=contraction)
    )
    layer = ImplicitQueryAttention(
        sizes.embed_dim,
        sizes.num_heads,
        is_causal=task.is_causal,
        query_input=sizes.query_input,
        qk_norm=sizes.qk_norm,
        max_gain=max_gain,
        positions=_positions(sizes) if sizes.positions == "relative" else sizes.positions,
        out_proj=True,
        solver=ForwardSubstitution(kernel=sizes.kernel, rtol=rtol, atol=atol) if task.is_causal else iterative,
        adjoint=ADJOINTS[known("adjoint", sizes.adjoint, ADJOINTS)],
        on_failure="ignore",  # each run records the share of rows that missed the tolerance
        **options,
    )
    return ParallelBlock(Implicit(layer), sizes.embed_dim, width)


def _positions(sizes: Sizes) -> RelativeBias:
    return RelativeBias(sizes.num_heads, sizes.max_distance)


_BOUNDED = "implicit, `max_gain=0.9`"
_STRICT, _FEEDBACK = 'implicit, `self_query="input"`', 'implicit, `values="feedback"`'
_baseline = functools.partial(Arm, causal_only=True)
_ours = functools.partial(Arm, causal_only=True, ours=True)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("ordinary", "ordinary attention", _ordinary),
        Arm("ordinary-2", "ordinary attention, twice the layers", _ordinary, depth=2),
        Arm("looped", "ordinary attention, looped", _ordinary, looped=True),
        _baseline("shifted", "ordinary attention, keys of the token before", _shifted),
        _baseline("keys-2", "ordinary attention, 2-tap convolution on keys", _keys(2)),
        _baseline("keys-4", "ordinary attention, 4-tap convolution on keys", _keys(4)),
        _baseline("keys-8", "ordinary attention, 8-tap convolution on keys", _keys(8)),
        _baseline("convolved", "ordinary attention behind a 4-tap convolution", _convolved(4)),
        _baseline(
            "convolved-2", "ordinary attention behind a 4-tap convolution, twice the layers", _convolved(4), depth=2
        ),
        _baseline("convolved-9", "ordinary attention behind a 9-tap convolution", _convolved(9)),
        _baseline("recurrent", "keys and values of its own outputs, row by row", _recurrent),
        _baseline("delta", "Gated DeltaNet", _delta()),
        _baseline("delta-slow", "Gated DeltaNet, slow decay at the start", _delta(0.1)),
        _baseline("gru", "GRU", _gru),
        _baseline("gru-attention", "ordinary attention behind a GRU", _gru_attention),
        Arm("implicit", "implicit", _implicit, ours=True),
        Arm("bounded", _BOUNDED, _bounded(), free_only=True, ours=True),
        *(
            Arm(f"bounded-{rtol:.0e}", f"{_BOUNDED}, tolerance {rtol:g}", _bounded(rtol), free_only=True, ours=True)
            for rtol in CONTRACTIONS
        ),
        _ours("strict", _STRICT, _strict),
        _ours("strict-one", f"{_STRICT}, in the first block", _strict, every=0),
        _ours("strict-half", f"{_STRICT}, in every other block", _strict, every=2),
        _ours("strict-convolved", f"{_STRICT}, behind a 4-tap convolution", _strict_convolved),
        _ours("feedback", _FEEDBACK, _feedback),
        _ours("feedback-one", f"{_FEEDBACK}, in the first block", _feedback, every=0),
        _ours("feedback-half", f"{_FEEDBACK}, in every other block", _feedback, every=2),
        _ours("feedback-plain", f"{_FEEDBACK}, `feedback_norm=False`", _feedback_plain),
        _ours("feedback-alone", f"{_FEEDBACK}, `query_output=False`", _feedback_alone),
    )
}
REFERENCE = ARMS["ordinary"]


def arm_named(name: str) -> Arm:
    """Return an arm.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is none of that name.
    """
    return ARMS[known("arm", name, ARMS)]
