"""The equation as solvers see it."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicit_attention.equilibrium import maps


class System:
    """The equation `y = F(y)` in the form of the solvers: S independent systems of n unknowns, iterates `[S, n]`.

    Iterates are float32 or wider, also if the map computes in a half type, so that solver algebra loses no digits.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], y0: Tensor, system_ndim: int, *, linear: bool = False
    ) -> None:
        """Wrap a map.

        Args:
            function: Map from tensors like y0 to tensors like y0.
            y0: Start; its leading `system_ndim` dimensions count the systems.
            system_ndim: Number of these dimensions.
            linear: Whether the map is affine. Then a Jacobian product is a difference of two evaluations.
        """
        self.evaluations = 0
        self._function = function
        self._like = y0
        self._count = y0.shape[:system_ndim].numel()
        self._linear = linear
        self._origin: Tensor | None = None

    def flatten(self, y: Tensor) -> Tensor:
        """Return `y` as `[S, n]` in the solvers' dtype."""
        return y.reshape(self._count, -1).to(torch.promote_types(y.dtype, torch.float32))

    def unflatten(self, y: Tensor) -> Tensor:
        """Return a flat iterate in the shape and dtype of the start."""
        return y.to(self._like.dtype).reshape(self._like.shape)

    def __call__(self, y: Tensor) -> Tensor:
        """Return `F(y)`, flat."""
        self.evaluations += 1
        return self.flatten(self._function(self.unflatten(y)))

    def jvp(self, y: Tensor, tangent: Tensor) -> Tensor:
        """Return the product of the Jacobian of F at `y` with `tangent`, both flat."""
        if self._linear:
            if self._origin is None:
                self._origin = self(torch.zeros_like(y))
            return self(tangent) - self._origin
        self.evaluations += 1
        out = maps.jvp(self._function, self.unflatten(y), self.unflatten(tangent))
        return self.flatten(out)
