"""How far an iterate is from a fixed point, row by row: with torch, or in one pass over memory with Triton.

In torch the norms of `f - y` and of `f` read and write what they measure several times; beside a short attention pass
that is no small part of an iteration.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from implicit_attention.errors import Came, bad_value, missing_extra
from implicit_attention.triton_available import check_version, misplaced

KERNELS = ("auto", "torch", "triton")

Measure = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def measure_with(kernel: str, like: Tensor) -> Measure:
    """Return what measures `largest(f - y)` and `largest(f)`, as `measured` does.

    Args:
        kernel: "triton", which needs a CUDA device; or "torch", which "auto" stands for as long as Triton's kernel has
            not run on a device.
        like: A tensor of the iteration.

    Raises:
        ImportError: If triton is asked for and missing.
        ValueError: If it cannot serve where the tensor is.
    """
    if kernel != "triton":
        return measured
    if find_spec("triton") is None:
        raise missing_extra("kernel='triton'", "triton", "gpu")
    check_version("kernel='triton'")
    elsewhere = misplaced(like)
    if elsewhere:
        raise bad_value(
            "kernel", '"auto" or "torch" unless a CUDA device iterates', Came(f'"triton" where {elsewhere}')
        )
    return fused


def measured(y: Tensor, f: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the largest `|f - y|` and the largest `|f|` of each row, both `[S, R]`; NaN stays NaN.

    Args:
        y: Iterate, `[S, n]`.
        f: What the map makes of it, the same.
        rows: S and R; a row is n / R numbers.
    """
    return _largest(f - y, rows), _largest(f, rows)


def _largest(t: Tensor, rows: tuple[int, int]) -> Tensor:
    return t.detach().reshape(*rows, -1).abs().amax(-1)


def fused(y: Tensor, f: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the same, bit by bit; arguments as in `measured`, in float32 or float64."""
    if is_functorch_wrapped_tensor(y) or is_functorch_wrapped_tensor(f):  # has no memory that a kernel could read
        return measured(y, f, rows)
    from implicit_attention.equilibrium import residual_kernel as triton_kernel  # imports triton

    count, whole = rows[0] * rows[1], torch.int64 if f.dtype == torch.float64 else torch.int32
    length, found = f.numel() // count, torch.zeros(2, count, dtype=whole, device=f.device)
    span = triton_kernel.SPAN
    triton_kernel.largest_in_rows[(count * -(-length // span),)](
        y.detach().contiguous(), f.detach().contiguous(), found, length, count, span
    )
    residual, size = found.view(f.dtype).view(2, *rows).unbind()
    return residual, size
