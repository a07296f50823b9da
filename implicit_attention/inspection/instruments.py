"""Instruments for a training loop: what the last solves of a model's layers were like, and what to do about it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from implicit_attention.equilibrium.reports import Reporting, SolveRecord

NEAR_ONE = 0.95  # at this gain, 1 / (1 - gain) amplifies gradients twentyfold


def solver_figures(model: nn.Module, prefix: str = "solver/") -> dict[str, float]:
    """Return figures of the last solve of every implicit layer, ready for a logger.

    Three lines in any loop:

        if step % 100 == 0:
            figures = solver_figures(model)
            wandb.log(figures, step=step)  # or writer.add_scalar, trackio.log, print

    Args:
        model: A layer, or a module that holds some.
        prefix: Of the names.

    Returns:
        For each layer by its path: `steps` (the most of any row), `residual` (the largest), `unconverged` (the share of
        rows above tolerance); after a backward pass `adjoint_residual` and `adjoint_unconverged`; and `gain` (the
        largest) if the solve measured gains, as models of `implicit_attention.hf` do with `output_gains=True`.

    Example:
        >>> import torch
        >>> from implicit_attention import ImplicitQueryAttention, solver_figures
        >>> layer = ImplicitQueryAttention(8, is_causal=True)
        >>> _ = layer(torch.randn(2, 5, 8))
        >>> sorted(solver_figures(layer))
        ['solver/residual', 'solver/steps', 'solver/unconverged']
    """
    named = [
        (f"{prefix}{path}/{name}" if path else f"{prefix}{name}", value)
        for path, record in _records(model)
        for name, value in _of(record)
    ]
    if not named:
        return {}
    values = torch.stack([value.double() for _, value in named]).tolist()  # one wait for the device
    return {name: value for (name, _), value in zip(named, values, strict=True)}


def _records(model: nn.Module) -> Iterator[tuple[str, SolveRecord]]:
    for path, module in model.named_modules():
        if isinstance(module, Reporting) and module.last_solve is not None and module.last_solve.steps.numel():
            yield path, module.last_solve


def _of(record: SolveRecord) -> Iterator[tuple[str, Tensor]]:
    yield "steps", record.steps.amax()
    yield "residual", record.residual.amax()
    yield "unconverged", (~record.converged).double().mean()
    if record.gain is not None:
        yield "gain", record.gain.amax()
    if record.adjoint is not None:
        yield "adjoint_residual", record.adjoint.residual.amax()
        yield "adjoint_unconverged", (~record.adjoint.converged).double().mean()


def advice(figures: dict[str, float]) -> dict[str, str]:
    """Return a sentence for each thing that is wrong, by the name of the figure that says so.

    Args:
        figures: Of `solver_figures`.
    """
    found = {}
    for name, value in figures.items():
        layer, _, kind = name.rpartition("/")
        if kind == "unconverged" and value > 0:
            found[name] = (
                f"{layer}: {value:.2%} of the rows miss the tolerance, so gradients are not exact. Lower the learning "
                'rate, raise the weight decay, or use self_query="input" (causal layers).'
            )
        elif kind == "adjoint_unconverged" and value > 0:
            found[name] = (
                f"{layer}: {value:.2%} of the adjoint equations miss the tolerance, so gradients are not exact. Keep "
                "gains down (diagnostics.gain_penalty, weight decay)."
            )
        elif kind == "gain" and not value < NEAR_ONE:
            found[name] = (
                f"{layer}: the largest gain is {value:.3f}. At 1 the equilibrium has no gradient; near 1 gradients are "
                'large. Lower the learning rate, add diagnostics.gain_penalty, or use self_query="input".'
            )
    return found
