"""What the models return: transformers' own outputs, with the statistics of the solves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from implicit_attention.equilibrium.solvers import Solution

Stats = dict[str, Tensor]  # of one layer, by the names of `SolverStats`
_NAMES = ("steps", "residual", "unconverged", "gain")


class SolverStats:
    """How the equilibria were found: one entry per implicit layer, `[L]`, from the first to the last.

    No `ModelOutput`: transformers takes the first dimension of what those hold for the batch, and its pipelines cut
    it up by sample. A figure here is one of all samples.

    Attributes:
        steps: Most steps (for the causal engine: sweeps) that any token took.
        residual: Largest absolute residual `|F(y) - y|` of any token, in float32 or wider.
        unconverged: Share of the systems (tokens, or samples without a causal mask) above their tolerance.
        gain: Largest gain of any token's own equation, None if it was not measured: near 1, gradients become
            ill-conditioned.
    """

    def __init__(self, figures: Iterable[Tensor | None]) -> None:
        """Hold the figures.

        Args:
            figures: All of the attributes, in their order. (From such an iterable, and by iterating,
                `nn.DataParallel` gathers what several devices return.)
        """
        self.steps, self.residual, self.unconverged, self.gain = figures

    def __iter__(self) -> Iterator[Tensor | None]:
        """Return the figures, in the order of the attributes."""
        return iter((self.steps, self.residual, self.unconverged, self.gain))

    def __getitem__(self, key: int | str) -> Self | Tensor | None:
        """Return figures by their name; for a number, the statistics: what a pipeline is to take for one sample."""
        if isinstance(key, int):
            return self
        return vars(self)[key]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Return the figures by name."""
        return f"SolverStats({', '.join(f'{name}={figures}' for name, figures in vars(self).items())})"


def _measured(stats: SolverStats) -> dict[str, Tensor]:
    return {name: figures for name, figures in vars(stats).items() if figures is not None}


# As transformers does for its outputs, for export and torch.func, which takes no None for an output.
pytree.register_pytree_node(
    SolverStats,
    lambda stats: (list(_measured(stats).values()), list(_measured(stats))),
    lambda figures, names: SolverStats(map(dict(zip(names, figures, strict=True)).get, _NAMES)),
    serialized_type_name=f"{SolverStats.__module__}.{SolverStats.__name__}",
    flatten_with_keys_fn=lambda stats: (
        [(pytree.GetAttrKey(name), figures) for name, figures in _measured(stats).items()],
        list(_measured(stats)),
    ),
)


@dataclass
class ImplicitModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with statistics.

    Attributes:
        last_hidden_state: `[B, n, D]`.
        solver_stats: One entry per implicit layer; None if there is none.
    """

    last_hidden_state: Tensor = None  # type: ignore[assignment] # a model always gives it
    solver_stats: SolverStats | None = None

    def shared(self) -> dict[str, Any]:
        """Return what a model with a head hands on as it is."""
        return {name: getattr(self, name) for name in ("hidden_states", "attentions", "solver_stats")}


@dataclass
class ImplicitCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with statistics.

    Attributes:
        solver_stats: One entry per implicit layer; None if there is none.
    """

    solver_stats: SolverStats | None = None


@dataclass
class ImplicitMaskedLMOutput(MaskedLMOutput):
    """`MaskedLMOutput` with statistics.

    Attributes:
        solver_stats: One entry per implicit layer; None if there is none.
    """

    solver_stats: SolverStats | None = None


@dataclass
class ImplicitClassifierOutput(SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` with statistics.

    Attributes:
        solver_stats: One entry per implicit layer; None if there is none.
    """

    solver_stats: SolverStats | None = None


@dataclass
class ImplicitTokenClassifierOutput(TokenClassifierOutput):
    """`TokenClassifierOutput` with statistics.

    Attributes:
        solver_stats: One entry per implicit layer; None if there is none.
    """

    solver_stats: SolverStats | None = None


@dataclass
class ImplicitSpanOutput(QuestionAnsweringModelOutput):
    """`QuestionAnsweringModelOutput` with statistics.

    Attributes:
        solver_stats: One entry per implicit layer; None if there is none.
    """

    solver_stats: SolverStats | None = None


def layer_stats(solution: Solution) -> Stats:
    """Return one layer's part of `SolverStats`, by name."""
    found: Stats = {
        "steps": _largest(solution.steps),
        "residual": _largest(solution.residual).detach(),
        "unconverged": _share(solution.converged),
    }
    return found if solution.gain is None else found | {"gain": _largest(solution.gain).detach()}


# One figure is its own mean and maximum: a decode step is made of small operations, and these would be some of them.
def _share(converged: Tensor) -> Tensor:
    """The share that is not converged, 0 in an empty batch."""
    if converged.numel() == 1:
        return converged.logical_not().float().view(())
    return 1 - converged.float().mean() if converged.numel() else converged.new_zeros((), dtype=torch.float32)


def _largest(figures: Tensor) -> Tensor:
    """The largest figure, 0 in an empty batch."""
    if figures.numel() == 1:
        return figures.reshape(())
    return figures.amax() if figures.numel() else figures.new_zeros(())


def stack_stats(layers: list[Stats]) -> SolverStats | None:
    """Return the statistics of all implicit layers, on the first one's device; None if there are none."""
    if not layers:
        return None
    device = layers[0]["steps"].device  # a device map may put each layer on a device of its own
    return SolverStats(
        [torch.stack([layer[n].to(device) for layer in layers]) if n in layers[0] else None for n in _NAMES]
    )
