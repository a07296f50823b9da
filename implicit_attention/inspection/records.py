"""The figures of one layer, by head and token, and what is wrong with it."""

from dataclasses import dataclass

from torch import Tensor

from implicit_attention.errors import check_choice, counted

SETTLED = "settled"


@dataclass(frozen=True)
class Trouble:
    """Something that a layer's user should know.

    Attributes:
        kind: "unsettled", "collapse", "several roots", "near the fold", "adjoint", or of plain iteration alone
            "cycle" and "no plain convergence".
        grave: Whether outputs or gradients are not to be trusted. Otherwise it is a note.
        tokens: Which tokens it concerns.
        sentence: What happens.
        advice: What to do.
    """

    kind: str
    grave: bool
    tokens: tuple[int, ...]
    sentence: str
    advice: str


@dataclass(frozen=True, eq=False, repr=False)
class LayerReport:
    """One layer on one sample: N tokens, H heads, M tokens that are seen (M = N unless there is a context).

    *Plain iteration* is `y <- F(y)` from `y = V`. A causal layer is solved by forward substitution, which has no
    iterates of the whole sequence; plain iteration shows what they would be.

    Attributes:
        name: Path of the layer in its model, or its class.
        structure: "causal" (solved token by token), "unmasked" (all tokens are one system) or "independent" (tokens do
            not depend on each other).
        settings: The layer's settings, as it prints them.
        solver: The layer's solver.
        tolerance: Residual that counts as settled, by token, `[N]`.
        steps: Steps of the layer's solver (of forward substitution: sweeps over the token's block), `[N]`.
        residual: Largest `|F(y) - y|` at what the solver returned, `[N]`.
        converged: Whether that is within tolerance, `[N]`.
        trace: The residual of plain iteration after t steps, `[T + 1, H, N]`.
        plain_steps: Steps after which plain iteration stays within tolerance, `[H, N]`; -1 if it does not get there.
        rate: Factor by which a step of plain iteration reduces the residual, the geometric mean over the last half of
            its steps above rounding, `[H, N]`; NaN if fewer than two are.
        period: Length of the cycle in which plain iteration ends, `[N]`; 0 if it settles, -1 if it does neither.
        gain: Spectral radius of the token's own block of dF/dy, `[N]`: how much it feeds itself.
        fold: Smallest `|1 - eigenvalue|` of dF/dy, `[N]`. At 0 the equilibrium has no derivative.
        leading: Largest eigenvalue of dF/dy in magnitude, complex, `[N]`.
        radius: Spectral radius of dF/dy. Below 1, plain iteration converges from nearby.
        method: How fold, leading and radius were found: exactly, or by which estimate. Gains are always exact.
        other_start: Largest difference to what iteration from two other starts finds, `[N]`; NaN where neither settles.
        adjoint_residual: Residual of the adjoint equation for a random cotangent; None if the gradient solves none.
        collapsed: Whether all outputs are one vector though the values differ.
        iterations: The iterations t of `maps`; the first is 0.
        maps: Attention weights after t steps of plain iteration, `[K, H, N, M]`. That of t = 0 is the *ordinary pass*:
            attention with queries made from the values.
        settled_map: Attention weights at what the solver returned, `[H, N, M]`.
        troubles: What is wrong, the grave first.
    """

    name: str
    structure: str
    settings: str
    solver: str
    tolerance: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor
    trace: Tensor
    plain_steps: Tensor
    rate: Tensor
    period: Tensor
    gain: Tensor
    fold: Tensor
    leading: Tensor
    radius: float
    method: str
    other_start: Tensor
    adjoint_residual: float | None
    collapsed: bool
    iterations: tuple[int, ...]
    maps: Tensor
    settled_map: Tensor
    troubles: tuple[Trouble, ...] = ()

    def __repr__(self) -> str:
        """In one line, without the tensors."""
        heads, tokens, _ = self.settled_map.shape
        troubles = ", ".join(trouble.kind for trouble in self.troubles) or "none"
        return (
            f"LayerReport({self.name!r}, {self.structure}, {heads} heads, {tokens} tokens, settles={self.settles}, "
            f"radius={self.radius:.3g}, troubles: {troubles})"
        )

    @property
    def settles(self) -> bool:
        """Whether every token is within tolerance."""
        return bool(self.converged.all())

    def at(self, iteration: int | str) -> Tensor:
        """Return the attention weights `[H, N, M]` at an iteration that was kept, or "settled".

        Args:
            iteration: One of `iterations`, or "settled".

        Raises:
            ValueError: If it is another.
        """
        if iteration == SETTLED:
            return self.settled_map
        check_choice("iteration", iteration, (*self.iterations, SETTLED))
        return self.maps[self.iterations.index(int(iteration))]

    def summary(self) -> str:
        """Return a paragraph: does the layer settle, where not, why, and what to do."""
        count, missed = len(self.converged), int((~self.converged).sum())
        if self.settles:
            first = f"{self.name} settles: all {count} tokens are within tolerance"
        else:
            first = f"{self.name} does not settle: {missed} of {count} tokens miss the tolerance"
        if self.settles and self.structure == "causal" and not bool(self.gain.any()):
            head = f"{first}. No token depends on itself, so each follows from those before it, and all gains are 0."
            return " ".join([head, *(f"{t.sentence} {t.advice}" for t in self.troubles)])
        steps = f"after at most {counted(int(self.steps.max()), 'step')} of {self.solver.partition('(')[0]}"
        exactly = "" if self.method.startswith("exact") else " (an estimate)"
        head = (
            f"{first} {steps}. Largest gain {float(self.gain.max()):.3g}, spectral radius {self.radius:.3g}{exactly}."
        )
        return " ".join([head, *(f"{t.sentence} {t.advice}" for t in self.troubles)])
