"""Statistics of a run's solves, and warnings that say what to do."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_attention.equilibrium.reports import power_of_ten

NEAR_ONE = 0.95  # at this gain, 1 / (1 - gain) amplifies gradients twentyfold


@dataclass
class Health:
    """The statistics of the forward passes since `figures` was last called.

    Attributes:
        rate_flag: The flag of the learning rate, for advice.
        warned: How often each thing was wrong so far. It is reported the 1st, 10th, 100th ... time.
    """

    rate_flag: str = "--learning-rate"
    warned: dict[str, int] = field(default_factory=dict)
    _worst: dict[str, Tensor] = field(default_factory=dict)

    def add(self, outputs: Any) -> None:
        """Add the statistics of one forward pass, without waiting for the device.

        Args:
            outputs: The model's output. Its `solver_stats`, if any, has `[L]` figures for L implicit layers.
        """
        stats = getattr(outputs, "solver_stats", None)
        for name in ("steps", "residual", "unconverged", "gain"):
            value = getattr(stats, name, None)
            if value is not None:
                new = value.detach().float().amax()  # amax passes NaN on
                old = self._worst.get(name)
                self._worst[name] = new if old is None else torch.maximum(old, new)

    def figures(self) -> dict[str, float]:
        """Return the worst statistics since the last call, and start again.

        Returns:
            Those that the model reports of `solver_steps`, `residual`, `unconverged` (the share of a layer's rows above
            tolerance) and `gain`.
        """
        names = {"steps": "solver_steps"}
        figures = {names.get(name, name): float(value) for name, value in self._worst.items()}
        self._worst.clear()
        return figures

    def warnings(self, figures: dict[str, float], step: int) -> list[str]:
        """Return a warning for each kind of problem that appears for the first, tenth, hundredth ... time.

        Args:
            figures: The result of `figures`.
            step: The training step.

        Returns:
            Sentences that say what happened and what to do.
        """
        found = {}
        if figures.get("unconverged", 0) > 0:
            found["unconverged"] = (
                f"step {step}: up to {figures['unconverged']:.2%} of a layer's rows missed the solver's tolerance "
                f"(largest residual {figures['residual']:.1e}), so their gradients are not exact. If this continues, "
                f"lower {self.rate_flag}, raise --weight-decay, or train with --self-query input, which always has a "
                "solution."
            )
        gain = figures.get("gain", 0)
        if not gain < NEAR_ONE:
            found["gain"] = (
                f"step {step}: the largest gain of a row's equation is {gain:.3f}. At 1 the equilibrium has no "
                f"gradient; near 1 gradients are large and noisy. If the loss becomes unstable, lower {self.rate_flag} "
                "or --clip, or train with --self-query input, where every gain is 0."
            )
        said = []
        for kind, sentence in found.items():
            count = self.warned[kind] = self.warned.get(kind, 0) + 1
            if power_of_ten(count):
                said.append(sentence if count == 1 else f"{sentence} ({count} log entries so far.)")
        return said
