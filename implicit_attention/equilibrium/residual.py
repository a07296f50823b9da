"""The residual of an iterate, row by row: in torch, or in one pass over memory in Triton.

In torch the norms of `f - y` and of `f` read and write these tensors several times. Next to a short attention pass that
is a large part of an iteration.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from implicit_attention.equilibrium.triton_available import check_version, launching_on, misplaced
from implicit_attention.errors import Came, bad_value, missing_extra

KERNELS = ("auto", "torch", "triton")

Measure = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def measure_with(kernel: str, like: Tensor) -> Measure:
    """Return the function that measures the largest `|f - y|` and `|f|` of each row, `measured` or `fused`.

    Args:
        kernel: "torch", "triton" (needs a CUDA device) or "auto". "auto" is "torch": Triton's kernel has not been
            measured on a device yet.
        like: A tensor of the iteration.

    Raises:
        ImportError: If `kernel` is "triton" and Triton is not installed or too old.
        ValueError: If `kernel` is "triton" and no kernel runs on the tensor's device.
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
        f: `F(y)`, `[S, n]`.
        rows: S and R; a row has n / R numbers.
    """
    return _largest(f - y, rows), _largest(f, rows)


def _largest(t: Tensor, rows: tuple[int, int]) -> Tensor:
    return t.detach().reshape(*rows, -1).abs().amax(-1)


def fused(y: Tensor, f: Tensor, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return what `measured` returns, bit by bit, from one Triton kernel; arguments in float32 or float64."""
    if is_functorch_wrapped_tensor(y) or is_functorch_wrapped_tensor(f):  # wrapped tensors have no memory to read
        return measured(y, f, rows)
    from implicit_attention.equilibrium import residual_kernel as triton_kernel  # imports triton

    count, whole = rows[0] * rows[1], torch.int64 if f.dtype == torch.float64 else torch.int32
    length, found = f.numel() // count, torch.zeros(2, count, dtype=whole, device=f.device)
    span = triton_kernel.SPAN
    with launching_on(f.device):
        triton_kernel.largest_in_rows[(count * -(-length // span),)](
            y.detach().contiguous(), f.detach().contiguous(), found, length, count, span
        )
    residual, size = found.view(f.dtype).view(2, *rows).unbind()
    return residual, size
