"""A map `y -> F(y, *args)` and its derivatives, by automatic differentiation of any function."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from implicit_attention.errors import bad_type

MapFunction = Callable[..., Tensor]  # (y, *args) -> tensor like y


class Linearization:
    """One evaluation of a map with its graph: the value, and products with the transposed Jacobian.

    The backward pass reuses the graph, so it needs no second evaluation. The graph holds what one evaluation saves.

    Attributes:
        y: Point of the linearisation.
        value: `F(y, *args)`, detached.
    """

    def __init__(self, function: MapFunction, y: Tensor, args: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Evaluate the map.

        Args:
            function: The map.
            y: Point, any shape.
            args: The other arguments of the map.
            needs: For each of `args`, whether its gradient is needed.
        """
        with torch.enable_grad():
            self.y = y.detach().requires_grad_()
            self._args = [a.detach().requires_grad_(n) for a, n in zip(args, needs, strict=True)]
            self._output = function(self.y, *self._args)
        self.value = self._output.detach()

    def vjp(self, lam: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Return `lam^T dF/dy` and the list of `lam^T dF/darg`, None if not needed or if F does not depend on it."""
        wanted = [self.y, *(a for a in self._args if a.requires_grad)]
        if not self._output.requires_grad:
            return torch.zeros_like(self.y), [None] * len(self._args)
        dy, *rest = torch.autograd.grad(self._output, wanted, lam, retain_graph=True, allow_unused=True)
        found = iter(rest)
        by_arg = [next(found) if a.requires_grad else None for a in self._args]
        return (torch.zeros_like(self.y) if dy is None else dy), by_arg

    def captured(self) -> Tensor | None:
        """Return a leaf that the map reads through a closure instead of its arguments, None without one."""
        known = {id(self.y), *(id(a) for a in self._args)}
        seen, stack = set(), [self._output.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                return leaf  # type: ignore[no-any-return]
            stack.extend(n for n, _ in node.next_functions)
        return None


def jvp(function: MapFunction, y: Tensor, tangent: Tensor) -> Tensor:
    """Return the product of the Jacobian of `function` at `y` with `tangent`, by forward-mode autodiff."""
    out: Tensor = torch.func.jvp(function, (y,), (tangent,))[1]
    return out


def lift(function: MapFunction | nn.Module, args: tuple[Tensor, ...]) -> tuple[MapFunction, tuple[Tensor, ...]]:
    """Return the map as a pure function; a module's parameters and buffers become arguments.

    Args:
        function: A pure function of `(y, *args)`, or a module whose forward has that signature.
        args: Its arguments after y.

    Raises:
        TypeError: If `function` is not callable, or an argument is not a tensor.
    """
    if not callable(function):
        raise bad_type("function", "a callable (y, *args) -> tensor like y", function)
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            raise bad_type(
                f"args[{i}]", "a tensor", arg, "Close over values that are not tensors instead of passing them."
            )
    if not isinstance(function, nn.Module):
        return function, args
    module, count = function, len(args)
    # Each module once: `functional_call` leaves tensors in the place of parameters of one that it meets twice.
    held = {
        f"{path}.{name}".removeprefix("."): tensor
        for path, part in module.named_modules()
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    }
    distinct = list({id(tensor): tensor for tensor in held.values()}.values())
    place = {id(tensor): count + i for i, tensor in enumerate(distinct)}

    def call(y: Tensor, *rest: Tensor) -> Tensor:
        named = {name: rest[place[id(tensor)]] for name, tensor in held.items()}
        out = torch.func.functional_call(module, named, (y, *rest[:count]), tie_weights=False)
        return out  # type: ignore[no-any-return]

    return call, (*args, *distinct)


def with_autocast(function: MapFunction, device: str) -> MapFunction:
    """Return a map that runs under the autocast of now, wherever it is called: a backward pass has none of its own.

    Args:
        function: The map.
        device: Type of the device of its tensors.
    """
    if not torch.amp.is_autocast_available(device):
        return function
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def call(y: Tensor, *args: Tensor) -> Tensor:
        # No cache: each evaluation has leaves of its own, whose copies would stay until autocast ends.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            return function(y, *args)

    return call


def transforms_active() -> bool:
    """Return whether the caller runs inside a `torch.func` transform (grad, vmap, jvp ...)."""
    active: Any = torch._C._are_functorch_transforms_active()
    return bool(active)


def closes_over_mapped(function: MapFunction, y: Tensor, args: tuple[Tensor, ...]) -> bool:
    """Return whether a `torch.func` transform around the call differentiates or maps a tensor that is no argument.

    Args:
        function: The map. A function in Python is evaluated once, if a transform is active and no argument has a
            gradient.
        y: Where.
        args: Its arguments after y.
    """
    known = (y, *args)
    if not (transforms_active() and isinstance(function, FunctionType)) or any(t.requires_grad for t in known):
        return False
    level: Callable[[Tensor], int] = torch._C._functorch.maybe_get_level
    out = function(y, *args)
    return out.requires_grad or level(out) > max(map(level, known))


def makes_plain_tensors(like: Tensor) -> bool:
    """Return whether what a call makes now are plain tensors, which later calls may use again.

    Args:
        like: A tensor of the call; one without numbers makes more of its kind.
    """
    plain = type(like) in (Tensor, nn.Parameter)
    return plain and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
