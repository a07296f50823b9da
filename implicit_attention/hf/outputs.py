"""What the models return: transformers' own outputs, with the statistics of the solves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from implicit_attention.equilibrium.solvers import Solution

Stats = dict[str, Tensor]  # of one layer, by the names of `SolverStats`


@dataclass
class SolverStats(ModelOutput):
    """How the equilibria were found: one entry per implicit layer, `[L]`, from the first to the last.

    Attributes:
        steps: Most steps (for the causal engine: sweeps) that any token took.
        residual: Largest absolute residual `|F(y) - y|` of any token, in float32 or wider.
        unconverged: Share of the systems (tokens, or samples without a causal mask) above their tolerance.
        gain: Largest gain of any token's own equation, where the solver reports it: near 1, gradients become
            ill-conditioned.
    """

    steps: Tensor | None = None
    residual: Tensor | None = None
    unconverged: Tensor | None = None
    gain: Tensor | None = None


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


def _share(converged: Tensor) -> Tensor:
    """The share that is not converged, 0 in an empty batch."""
    return 1 - converged.float().mean() if converged.numel() else converged.new_zeros((), dtype=torch.float32)


def _largest(figures: Tensor) -> Tensor:
    """The largest figure, 0 in an empty batch."""
    return figures.amax() if figures.numel() else figures.new_zeros(())


def stack_stats(layers: list[Stats]) -> SolverStats | None:
    """Return the statistics of all implicit layers, None if there are none."""
    if not layers:
        return None
    return SolverStats(**{name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})
