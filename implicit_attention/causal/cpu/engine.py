"""What calls the kernels: their arguments, and what they leave."""

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from implicit_attention.causal.cpu import library
from implicit_attention.causal.diagonal import SLOW, hand_back
from implicit_attention.causal.diagonal_adjoint import NEAR_SINGULAR, BlockAdjoint, near_singular
from implicit_attention.causal.own_roots import SAME_ROOT
from implicit_attention.causal.system import CausalSystem

KEEPS_SLOPES = True  # the adjoint can return the cotangents of all scores
_WIDEST, _WIDEST_BIASED = 512, 128


def widest(system: CausalSystem, block: int) -> int:
    """Return how many rows one call should take: more where it need not be told the bias of every score."""
    return max(block, _WIDEST if system.spec.plain and not system.spec.dropout else _WIDEST_BIASED)


class Kernel:
    """One kernel and its arguments, the same for all blocks. Tensors whose addresses are among them live here."""

    def __init__(self, name: str, arguments: library.Arguments, system: CausalSystem, **numbers: float) -> None:
        self.name = name + ("32" if system.key.dtype == torch.float32 else "64")
        self.system, self.arguments, self.kept = system, arguments, dict[str, Tensor]()
        self.tell(
            bytes=ctypes.sizeof(arguments), batch=system.batch, heads=system.heads, groups=system.groups,
            length=system.length, dim=system.dim, scale=system.spec.scale, **numbers,
        )  # fmt: skip
        self.pass_strided("key", system.key, "bhn")
        self.pass_strided("value", system.value, "bgn")
        self.pass_contiguous(weight=system.weight, own_score=system.self_score, norm_weight=system.norm_weight)
        if system.rotation is not None:
            cosine, sine = system.rotation.to(system.key.dtype).contiguous()
            self.pass_contiguous(cosine=cosine, sine=sine)
            self.tell(turn_b=0 if len(cosine) == 1 else cosine.stride(0))

    def tell(self, **numbers: Any) -> None:
        """Set arguments that are numbers."""
        for name, value in numbers.items():
            setattr(self.arguments, name, value)

    def pass_contiguous(self, **tensors: Tensor | None) -> None:
        """Set arguments that are dense tensors; an absent or empty one stays null."""
        for name, t in tensors.items():
            if t is not None and t.numel():
                self.kept[name] = t = _stored(t).contiguous()
                setattr(self.arguments, name, _address(t))

    def pass_strided(self, name: str, t: Tensor, dims: str) -> None:
        """Set an argument that is a tensor with strides, those of `dims`."""
        t = _stored(t)
        self.kept[name] = t = t if t.stride(-1) == 1 else t.contiguous()
        setattr(self.arguments, name, _address(t))
        for dim, stride in zip(dims, t.stride(), strict=False):
            setattr(self.arguments, f"{name}_{dim}", stride)

    def run(self, rows: slice) -> None:
        """Run the kernel on some rows."""
        self.tell(first=rows.start, stop=rows.stop, threads=torch.get_num_threads())
        bias = self.system.compiled_bias(rows)
        if bias is not None:
            self.pass_contiguous(bias=bias[0])
            self.tell(bias_b=bias[1], bias_h=bias[2])
        if self.system.spec.dropout:
            self.pass_contiguous(keep=self.system.keep(rows))
        library.call(self.name, self.arguments)


def _stored(t: Tensor) -> Tensor:
    """The same numbers in memory: torch may only note that a tensor is zero, or is to be negated."""
    return t.clone() if t.is_neg() or t._is_zerotensor() else t


def _address(t: Tensor) -> int:
    """Where the numbers of a tensor are."""
    address = 0 if isinstance(t, FakeTensor) else t.data_ptr()
    if not address and t.numel():
        raise RuntimeError(
            f"The C++ kernels read numbers, and a {type(t).__name__} has none. Trace the layer with torch.compile or "
            "torch.export, which do not call them, or measure it with tensors that have numbers."
        )
    return address


class ForwardKernel:
    """Settles rows in place."""

    def __init__(self, system: CausalSystem, into: dict[str, Tensor], block: int, rtol: float, atol: float) -> None:
        """Prepare what is the same for all calls.

        Args:
            system: The map, float32 or float64 on the CPU.
            into: The tensors of the recursion by name: y `[B, N, H, d]` and lse `[B, H, N]`, which hold attention
                over the columns before the rows of a call; query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without
                a norm), residual, size, sweeps `[B, N]`.
            block: The most rows of a call.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        self.system, self.into = system, into
        numbers = {"rtol": rtol, "atol": atol, "same_root": SAME_ROOT, "slow": SLOW}
        self._call = call = Kernel(
            "forward", library.ForwardArguments(), system, eps=system.function.query_map.eps, **numbers
        )
        assert all(t.is_contiguous() for t in into.values())
        call.pass_contiguous(**into, constant=system.bias, added=system.added)
        self._settled = system.key.new_zeros(system.batch, dtype=torch.long)
        call.pass_contiguous(settled=self._settled)

    def settle(self, rows: slice) -> int:
        """Settle rows up to the first few that want another solver; the rest is left as it was.

        Args:
            rows: The rows.

        Returns:
            The first row that is not settled; the end if all are.
        """
        system, n = self.system, rows.stop - rows.start
        y = system.key.new_empty(system.batch, n, system.heads, system.dim)
        lse = system.key.new_empty(system.batch, system.heads, n)
        self._call.pass_contiguous(before_y=y, before_lse=lse)
        self._call.run(rows)
        return hand_back(self.into, y, lse, rows, self._settled.tolist())


class AdjointKernel:
    """Solves the adjoint of some rows."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, later: Tensor, allowed: Tensor, block: int,
        *, slopes: bool = False,
    ) -> None:  # fmt: skip
        """Prepare what is the same for all calls.

        Args:
            system: The map, as for `ForwardKernel`.
            at: The equilibrium: y `[B, N, H, d]`, query `[B, N, G, d]`, inverse `[B, N, G, 1]` (empty without a
                norm), normed `[B, N, G, d]` (empty without weights of the norm), lse `[B, H, N]`.
            grad: Cotangent, `[B, N, H, d]`.
            later: Cotangent of the queries from rows after those of a call, `[B, N, G, d]`; the caller keeps it.
            allowed: Tolerance per sample, `[B]`.
            block: The most rows of a call.
            slopes: Whether the cotangents of all scores are wanted, for the gradients of biases.
        """
        self.system, self._slopes = system, slopes
        norm = 1.0 if system.weight is None else float(system.weight.detach().square().sum(0).max().sqrt())
        self._call = call = Kernel(
            "adjoint", library.AdjointArguments(), system, norm=norm, near_singular=NEAR_SINGULAR
        )
        dtype = system.key.dtype
        assert later.is_contiguous()
        call.pass_contiguous(**at, later=later, allowed=allowed.to(dtype))
        call.pass_strided("grad", grad.to(dtype), "bnh")

    def solve(self, rows: slice) -> BlockAdjoint | None:
        """Solve some rows; None if some want another solver.

        Args:
            rows: The rows.

        Returns:
            The solution; `slope` is its diagonal alone, `[B, H, n, 1]`, unless all of it is wanted.
        """
        system, n = self.system, rows.stop - rows.start
        batch, heads, groups, d = system.batch, system.heads, system.groups, system.dim
        new, zeros = system.key.new_empty, partial(system.key.new_zeros, dtype=torch.long)
        found = {
            "lam": new(batch, n, heads, d), "made": new(batch, n, groups * d), "d_key": new(batch, heads, n, d),
            "d_value": new(batch, groups, n, d), "own_slope": new(batch, heads, n, 1), "residual": new(batch),
            "gain": new(batch, n, heads, heads), "suspect": zeros((batch, n)),
            "sweeps": zeros(batch), "solved": zeros(batch),
        }  # fmt: skip
        if self._slopes:
            found["slope"] = system.key.new_zeros(batch, heads, n, n)
        self._call.pass_contiguous(**found)
        self._call.run(rows)
        if not all(found["solved"].tolist()):
            return None
        return BlockAdjoint(
            lam=found["lam"],
            d_made=found["made"],
            d_key=found["d_key"],
            d_value=found["d_value"],
            slope=found["slope" if self._slopes else "own_slope"],
            residual=found["residual"],
            sweeps=int(found["sweeps"].max()),
            near_singular=near_singular(found["gain"][found["suspect"] > 0]),
        )
