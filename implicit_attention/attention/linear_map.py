"""What linear map a module is: its weight and bias, where a solve reads the map in place of calling it.

A solve applies the query map in every iteration, inside kernels that take a weight. What a user puts in its place
(adapters, norms of weights, hooks, quantised weights, a class with a forward of its own) is more than the attribute
`weight` says. Any affine map tells its weight and bias when it is called on the unit vectors and on zero.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from implicit_attention.equilibrium import maps
from implicit_attention.errors import Came, bad_value, first_non_finite, required

_SIZE = 64.0  # of the unit vectors, a power of two: beside a large bias the weight then keeps its digits
_ROUNDING = 2.0**-7  # relative; what a module computes in bfloat16 inside stays below
_QUANTISED = 2.0**-5  # the same where activations have 8 bits
_NOT_AFFINE = (
    "must be an affine map that treats every token alike, but got a module whose output for a combination of tokens is "
    "not that combination of its outputs. A solve applies it by its weight and bias alone: take away the hook or the "
    "forward that does something else."
)
_PER_CALL = {"adapter_names", "alora_offsets"}  # what peft passes to adapters, one entry per sample


class ZeroLinear(nn.Linear):
    """A linear map that is zero until it learns, whoever resets its parameters."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero, after the draws of a linear map: what is drawn later stays the same."""
        super().reset_parameters()
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class LinearMap(NamedTuple):
    """An affine map.

    Attributes:
        weight: `[out, in]`, differentiable in whatever the module is made of.
        bias: `[out]`, or None.
    """

    weight: Tensor
    bias: Tensor | None


def linear_map(module: nn.Module, name: str, like: Tensor, size: int) -> LinearMap:
    """Return the weight and bias that a call of a module amounts to.

    `nn.Linear` without hooks gives its parameters, at no cost. Anything else is called once, on about `size` rows: its
    hooks see these rows, not the tokens. An adapter's dropout, random per row, drops input features here: one mask for
    all tokens of a call and all iterations of its solve, as the layer's own dropout has it.

    Args:
        module: `nn.Linear`, or what stands in its place.
        name: Of the module in its layer, for errors.
        like: Tensor whose dtype and device its input has.
        size: Of its input.

    Raises:
        ValueError: If it is not affine, or does not treat every row alike. This is not checked under `torch.func`
            transforms, nor with active dropout.
    """
    if _is_plain(module):
        weight, bias = module.weight, module.bias  # read once each: a parametrization computes them
        if not _wrapped(weight):
            return LinearMap(weight, bias)  # type: ignore[arg-type]
    _refuse_per_sample(module, name)
    rows, combination = _rows(like, size)
    out = module(rows)
    bias = out[0, -2]
    weight = ((out[:, :-2] - bias).flatten(0, 1)[:size] / _SIZE).mT.contiguous()
    if not any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in module.modules()):
        holds = _is_affine(module, out.detach(), LinearMap(weight.detach(), bias.detach()), combination)
        weight = required(weight, holds, f"`{name}` {_NOT_AFFINE}")
    return LinearMap(weight, bias)


def checked_against(module: nn.Module | None) -> Tensor | None:
    """Return the weight whose dtype and device the input of a module must have; None if only the module knows.

    Args:
        module: `nn.Linear`, or what stands in its place: an offload hook moves its input, a quantised weight has a
            dtype of its own.
    """
    if module is None or "forward" in vars(module):  # accelerate's hooks move weights and inputs
        return None
    stored = next(iter(module.parameters()), None)  # not `weight`, which a parametrization computes anew
    return stored if stored is not None and stored.is_floating_point() else None


def expected(layer: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype in which a layer computes, as far as its parameters and accelerate's hooks tell.

    Args:
        layer: The layer.
        module: Its map that sees the input first.
    """
    like = checked_against(module)
    if like is None:
        like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    if like is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return _execution_device(module) if like.is_meta else like.device, like.dtype


def _execution_device(module: nn.Module) -> torch.device:
    """Where accelerate's hook brings the weights of a module that is called; the meta device without a hook."""
    hook = vars(module).get("_hf_hook")
    for part in (hook, *getattr(hook, "hooks", ())):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("meta")


def check_weights_are_here(layer: nn.Module, module: nn.Module, method: str) -> None:
    """Refuse a call other than `forward` if hooks, which see `forward` alone, bring the weights.

    Args:
        layer: The layer.
        module: One of its maps: what shards a layer shards all of them.
        method: Name of the method that is called.

    Raises:
        ValueError: If a weight is sharded (FSDP2) or offloaded (accelerate).
    """
    own = [p for p in layer._parameters.values() if p is not None]  # a solve reads these without a call
    if any(hasattr(p, "full_tensor") for p in (*own, *module._parameters.values())):  # a DTensor
        once = 'call torch.distributed.fsdp.register_fsdp_forward_method(layer, "solve") once'
        around = "call layer.unshard() before and layer.reshard() after"
        raise bad_value(
            "layer", f"one that holds its weights for `{method}`", Came("one whose weights are sharded (FSDP2)"),
            f"They are gathered for `forward` alone: call layer(x, need_solution=True), or "
            f"{once if method == 'solve' else around}.",
        )  # fmt: skip
    if "_hf_hook" in vars(layer) and any(p.is_meta for p in own):
        raise bad_value(
            "layer", f"one that holds its weights for `{method}`", Came("one whose weights are offloaded (accelerate)"),
            "They are brought for `forward` alone: call layer(x, need_solution=True).",
        )  # fmt: skip


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of a module is `F.linear` with its weight and bias and nothing else."""
    kind = type(module)
    return (
        isinstance(module, nn.Linear)
        and kind.forward is nn.Linear.forward
        and kind.__call__ is nn.Module.__call__
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and not (torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
    )


def _wrapped(weight: Any) -> bool:
    """Whether a weight is a tensor subclass that computes products its own way, such as a quantised one."""
    return not isinstance(weight, Tensor) or not weight.is_floating_point() or is_traceable_wrapper_subclass(weight)


def _quantised(module: nn.Module) -> bool:
    stored = list(module.parameters())
    return not stored or any(_wrapped(parameter) for parameter in stored)


def _refuse_per_sample(module: nn.Module, name: str) -> None:
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            keywords: dict[str, Any] = hook.keywords if isinstance(hook, partial) else {}
            for argument in _PER_CALL & keywords.keys():
                raise bad_value(
                    argument, f"absent, since `{name}` has an adapter", Came(f"{keywords[argument]!r}"),
                    f"A solve applies `{name}` to all samples at once: make one call per adapter (set_adapter), or "
                    f"leave `{name}` out of target_modules.",
                )  # fmt: skip


def _rows(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return what a module is called on, `[2, size / 2 + 2, size]`, and the combination in it, `[size]`.

    Two samples, each with half of the unit vectors, zero, and the combination, which tells on a module that is not
    affine. It has the size of ordinary inputs. Two, because what depends on a row's neighbours then differs.
    """
    half = (size + 1) // 2
    units = _SIZE * torch.eye(2 * half, size, dtype=like.dtype, device=like.device)
    numbers = torch.arange(size, device=like.device)
    combination = (numbers * 7 % 11 % 3 - 1).to(like.dtype)  # of -1, 0 and 1, which 8 bits hold exactly
    ends = torch.stack([torch.zeros_like(combination), combination]).expand(2, -1, -1)
    return torch.cat([units.view(2, half, size), ends], 1), combination


def _not_finite(module: nn.Module, out: Tensor) -> bool:
    """Whether the unit vectors or zero give NaN or Inf though all parameters are finite: a division by a norm, say."""
    if torch.compiler.is_compiling() or maps.transforms_active() or bool(torch.isfinite(out).all()):
        return False
    return first_non_finite(dict(module.named_parameters())) is None


def _is_affine(module: nn.Module, out: Tensor, found: LinearMap, combination: Tensor) -> Tensor:
    weight, bias = (t.to(torch.promote_types(out.dtype, torch.float32)) for t in found if t is not None)
    combination = combination.to(weight.dtype)
    rounding = _QUANTISED if _quantised(module) else max(torch.finfo(out.dtype).eps ** 0.5, _ROUNDING)
    allowed = rounding * (weight.abs() @ combination.abs() + bias.abs())
    off = torch.maximum((out[:, -1] - weight @ combination - bias).abs(), (out[:, -2] - bias).abs())
    holds = ~(off > allowed).any()  # NaN in a parameter passes: the solve names it
    return torch.zeros_like(holds) if _not_finite(module, out) else holds
