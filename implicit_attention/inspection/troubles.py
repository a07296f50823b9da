"""From the figures of a layer to words: what is wrong, why, and what to do."""

import torch
from torch import Tensor

from implicit_attention.inspection.records import LayerReport, Trouble
from implicit_attention.settings import Settings

FOLD = 0.05  # an eigenvalue so close to 1 multiplies gradients by 20 and more
GRAVE = 1e-2  # and here by 100
OTHER = 1e-2  # two equilibria differ by this share of the largest output, or more
_SHOWN = 6  # tokens named in a sentence


def troubles(layer: LayerReport, settings: Settings, scale: float, adjoint_missed: bool) -> tuple[Trouble, ...]:
    """Return what is wrong with a layer, the grave first.

    Args:
        layer: Its figures.
        settings: Its settings, which the advice depends on.
        scale: The largest output in magnitude.
        adjoint_missed: Whether the adjoint equation missed its tolerance.

    Returns:
        The troubles; none if all is well.
    """
    found = [
        _unsettled(layer, settings),
        _collapse(layer, settings),
        _roots(layer, settings, scale),
        _fold(layer, settings),
        _adjoint(layer, adjoint_missed),
        _plain(layer),
    ]
    said = [trouble for trouble in found if trouble is not None]
    return tuple(sorted(said, key=lambda trouble: not trouble.grave))


def _unsettled(layer: LayerReport, settings: Settings) -> Trouble | None:
    where = _indices(~layer.converged)
    if not where:
        return None
    sentence = (
        f"The solver misses its tolerance at {_tokens(where)} (largest residual {float(layer.residual.max()):.1e}). "
        f"{_behaviour(layer, ~layer.converged)}"
    )
    return Trouble("unsettled", True, where, sentence, _remedy(layer, settings))


def _behaviour(layer: LayerReport, where: Tensor) -> str:
    """What plain iteration does at tokens that do not settle."""
    period = layer.period[where]
    strength = f"the leading eigenvalue is {_number(_strongest(layer, where))}"
    if bool((period == 0).all()):
        return "Plain iteration settles there."
    cycles = period[period > 0]
    if len(cycles) and len(cycles) >= 0.5 * int((period != 0).sum()):
        k = int(cycles.mode().values)
        kind = "alternates between two points (a 2-cycle)" if k == 2 else f"runs through a cycle of {k} points"
        return f"Plain iteration {kind}; {strength}."
    slow = layer.rate.amax(0)[where]
    slow = slow[slow.isfinite()]
    if len(slow) and float(slow.max()) < 1 and layer.radius < 1:
        return f"Plain iteration is slow: a step leaves {float(slow.max()):.3f} of the residual."
    return f"Plain iteration wanders without settling or repeating; {strength}."


def _remedy(layer: LayerReport, settings: Settings) -> str:
    if layer.structure == "unmasked" and settings.qk_norm:
        return (
            "Without a causal mask and with qk_norm solvers mostly find no equilibrium: use is_causal=True, or "
            "query_input=True with max_gain=0.9 or with qk_norm=False. NewtonKrylov() sometimes finds one, in minutes."
        )
    if layer.structure == "causal":
        return 'Use solver="auto" (forward substitution), or self_query="input", which always has one solution.'
    if settings.max_gain is not None:
        return "Raise the tolerance, or compute in a wider dtype."
    return f"Use {settings.contracting}, which makes the map contract; or try more max_steps, or NewtonKrylov(): slow."


def _collapse(layer: LayerReport, settings: Settings) -> Trouble | None:
    if not layer.collapsed:
        return None
    what = "the mean of the values" if settings.rows_are_keys else "the same vector"
    return Trouble(
        "collapse", True, tuple(range(len(layer.gain))),
        f"The layer collapses: every output is {what}, so what the tokens attend to does not matter.",
        "Use query_input=True or is_causal=True." if settings.rows_are_keys else "Use query_input=True.",
    )  # fmt: skip


def _roots(layer: LayerReport, settings: Settings, scale: float) -> Trouble | None:
    where = _indices((layer.other_start > OTHER * scale) & layer.converged)
    if not where:
        return None
    return Trouble(
        "several roots", False, where,
        f"There are several roots: another start leads to another equilibrium at {_tokens(where)} "
        f"(difference {float(layer.other_start.nan_to_num(0).max()):.2g}).",
        "You get the one that belongs to the start y = V. If outputs jump when weights or inputs change a little, use "
        'self_query="input" (one equilibrium) or diagnostics.gain_penalty.' if layer.structure == "causal" else
        f"You get the one that the layer's solver reaches from y = V. With {settings.contracting} there is only one.",
    )  # fmt: skip


def _fold(layer: LayerReport, settings: Settings) -> Trouble | None:
    where = _indices((layer.fold < FOLD) & layer.converged)
    if not where:
        return None
    least = float(layer.fold.min())
    advice = (
        'Keep gains down: diagnostics.gain_penalty, or self_query="input", whose gains are 0.'
        if layer.structure == "causal" else f"With {settings.contracting} no eigenvalue comes closer to 1 than 0.1."
    )  # fmt: skip
    return Trouble(
        "near the fold", least < GRAVE, where,
        f"The gain is near 1 at {_tokens(where)}, near the fold: an eigenvalue is {least:.1e} away from 1, where the "
        f"equilibrium has no derivative. Gradients are up to {1 / max(least, 1e-12):.3g} times as large there.",
        advice,
    )  # fmt: skip


def _adjoint(layer: LayerReport, missed: bool) -> Trouble | None:
    if not missed or not layer.settles:
        return None
    return Trouble(
        "adjoint", True, tuple(range(len(layer.gain))),
        f"The adjoint equation misses its tolerance (residual {layer.adjoint_residual:.1e}): gradients are not exact.",
        "Give the gradient a solver of its own, adjoint=Implicit(NewtonKrylov()), or more steps.",
    )  # fmt: skip


def _plain(layer: LayerReport) -> Trouble | None:
    """What only plain iteration, as in the original layer, would suffer from."""
    failing = (layer.period != 0) & layer.converged
    where = _indices(failing)
    if not where or layer.collapsed:
        return None
    kind = "cycle" if bool((layer.period[failing] > 0).any()) else "no plain convergence"
    return Trouble(
        kind, False, where,
        f"A fixed number of plain iterations would not do at {_tokens(where)}. {_behaviour(layer, failing)}",
        "The layer's own solver settles, so there is nothing to do.",
    )  # fmt: skip


def _strongest(layer: LayerReport, where: Tensor) -> complex:
    values = layer.leading[where]
    return complex(values[values.abs().argmax()])


def _number(value: complex) -> str:
    if abs(value.imag) <= 1e-6 * abs(value):
        return f"{value.real:.3g}"
    return f"{value.real:.3g} ± {abs(value.imag):.3g}i"


def _indices(where: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(where)[:, 0].tolist())


def _tokens(where: tuple[int, ...]) -> str:
    if len(where) == 1:
        return f"token {where[0]}"
    shown = ", ".join(map(str, where[:_SHOWN]))
    return f"{len(where)} tokens ({shown}{', ...' if len(where) > _SHOWN else ''})"
