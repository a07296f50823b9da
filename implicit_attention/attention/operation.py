"""The attention operation: the choice of an implementation, and all derivatives."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention import chunked, flash_cpu, flash_cuda
from implicit_attention.attention.spec import AttentionSpec


def stock(query: Tensor, value: Tensor, spec: AttentionSpec, self_score: Tensor | None = None) -> ModuleType | None:
    """Return the module whose flash kernel of PyTorch computes a call, None if there is none.

    Args:
        query: As in `attention`.
        value: As in `attention`.
        spec: As in `attention`.
        self_score: As in `attention`.

    Returns:
        `flash_cpu`, `flash_cuda` or None.
    """
    if flash_cpu.serves(query, value, spec, self_score):
        return flash_cpu
    return flash_cuda if flash_cuda.serves(query, value, spec, self_score) else None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    *,
    self_score: Tensor | None = None,
    seeds: Tensor | None = None,
    terms: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    r"""Return `softmax(scale q k^T + bias) v` and its log-sum-exp, without an N x M matrix.

    The result is differentiable twice in every float tensor, once in forward mode, and under `torch.func`
    transforms. PyTorch's flash kernels compute what they serve (see `stock`). The chunked implementation computes the
    rest: dropout, gradients of learned biases, and on CUDA devices float32, float64 and biases.

    Args:
        query: `[B, H, N, d]`; row i of the output belongs to query i.
        key: `[B, H, M, d]`, same dtype.
        value: `[B, H, M, d_v]`, same dtype.
        spec: Scale, causality, bias terms and dropout.
        self_score: `[B, H, N]`, replaces `scale q_i . k_i` on the diagonal.
        seeds: `[B]` int64, one per sample; the dropout masks are hashes of them.
        terms: The tensors of `spec.terms`, each with leading dimension 1 or B.

    Returns:
        Output `[B, H, N, d_v]`, zero in rows that see no column, and log-sum-exp `[B, H, N]` in float32 or wider. The
        log-sum-exp is not differentiable; see `log_sum_exp`.
    """
    out, lse = _Attention.apply(spec, seeds, query, key, value, self_score, *terms)  # type: ignore[no-untyped-call]
    return out, lse


def partial_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    *,
    seeds: Tensor | None = None,
    terms: tuple[Tensor, ...] = (),
    bias_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a **part** of a softmax, given the output and log-sum-exp of the whole.

    Args:
        grad: Cotangent of the whole output, `[B, H, N, d_v]`.
        query: `[B, H, N, d]`.
        key: The part's keys, `[B, H, M, d]`.
        value: The part's values, `[B, H, M, d_v]`.
        out: The whole output, `[B, H, N, d_v]`.
        lse: The whole log-sum-exp, `[B, H, N]`.
        spec: The part's call.
        seeds: As in `attention`.
        terms: As in `attention`.
        bias_grad: Whether to return the terms' gradients too. PyTorch's flash kernels do not compute them.

    Returns:
        Gradients of query, key, value and each term (None unless `bias_grad`).
    """
    kernel, inputs = None if bias_grad else stock(query, value, spec), (query, key, value, None, *terms)
    if kernel is not None:
        narrow = query.dtype  # the flash kernels take all tensors in one dtype
        found = kernel.backward(spec, grad.to(narrow), inputs, out.to(narrow), lse)
        return *found[:3], *(None for _ in terms)
    return chunked.partial_backward(spec, seeds, grad, inputs, out, lse, bias_grad=bias_grad)


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    spec: AttentionSpec,
    *,
    terms: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return the log-sum-exp of the scores, `[B, H, N]`, differentiable once in query, key and terms.

    Args:
        query: `[B, H, N, d]`.
        key: `[B, H, M, d]`.
        spec: As in `attention`, without dropout.
        terms: As in `attention`.
    """
    lse: Tensor = _LogSumExp.apply(spec, query, key, *terms)  # type: ignore[no-untyped-call]
    return lse


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, query: Tensor, key: Tensor, *terms: Tensor) -> Tensor:
        # Values of 1: an output of 0 next to a log-sum-exp of 0 would be taken for a row with NaN among its scores.
        _, lse = attention(query, key, torch.ones_like(key), spec, terms=terms)
        ctx.spec = spec
        ctx.save_for_backward(lse, query, key, *terms)
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`d lse = sum_j P_ij d S_ij`: the backward pass of attention over constant values 1 / d with output 0."""
        # With cotangent g in all d entries, g . v_j = g, so the slope of a score is P_ij (g - 0).
        lse, query, key, *terms = ctx.saved_tensors
        ones = grad[..., None].to(query.dtype).expand_as(query).contiguous()
        value = torch.full_like(key, 1.0 / key.shape[-1])
        bias_grad = any(ctx.needs_input_grad[3:])
        d_query, d_key, _, *d_terms = partial_backward(
            ones, query, key, value, torch.zeros_like(query), lse, ctx.spec, terms=tuple(terms), bias_grad=bias_grad
        )
        return None, d_query, d_key, *d_terms


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(spec: AttentionSpec, seeds: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
        kernel = stock(inputs[0], inputs[2], spec, inputs[3])
        if kernel is None:
            return chunked.forward(spec, seeds, inputs)
        out, lse = kernel.forward(spec, inputs)
        return out, lse

    # setup_context apart from forward, and vmap by hand: what torch.func transforms require.
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        seeds, *inputs, out, lse = ctx.saved_tensors
        bias_grad = any(ctx.needs_input_grad[6:])
        grads = _AttentionGradient.apply(ctx.spec, bias_grad, seeds, out, lse, grad, *inputs)  # type: ignore[no-untyped-call]
        return (None, None, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        seeds, *inputs = ctx.saved_tensors
        return chunked.jvp(ctx.spec, seeds, tuple(inputs), tangents[2:]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, *tensors: Any) -> Any:
        batch = _batch_size(tensors[1], in_dims[2])
        folded = _fold(info.batch_size, batch, tensors, in_dims[1:])
        out, lse = _Attention.apply(spec, *folded)  # type: ignore[no-untyped-call]
        return tuple(t.unflatten(0, (info.batch_size, batch)) for t in (out, lse)), (0, 0)


class _AttentionGradient(torch.autograd.Function):
    """The backward pass of `_Attention`, a separate operation so that it can be differentiated again."""

    @staticmethod
    def forward(
        spec: AttentionSpec,
        bias_grad: bool,
        seeds: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grad: Tensor,
        *inputs: Any,
    ) -> tuple[Tensor | None, ...]:
        kernel = None if bias_grad else stock(inputs[0], inputs[2], spec, inputs[3])
        if kernel is None:
            return chunked.backward(spec, seeds, grad, inputs)
        return *kernel.backward(spec, grad, inputs, out, lse), *(None for _ in inputs[4:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.spec, _, seeds, _, _, *tensors = inputs
        ctx.save_for_backward(seeds, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        seeds, *tensors = ctx.saved_tensors
        grads = _AttentionSecondGradient.apply(ctx.spec, seeds, *tensors, *cotangents)  # type: ignore[no-untyped-call]
        return (None, None, None, None, None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, bias_grad: bool, *tensors: Any) -> Any:
        batch = _batch_size(tensors[3], in_dims[5])
        folded = _fold(info.batch_size, batch, tensors, in_dims[2:], per_sample=True)
        grads = _AttentionGradient.apply(spec, bias_grad, *folded)  # type: ignore[no-untyped-call]
        return _unfold(grads, info.batch_size, batch, tensors[4:], in_dims[6:])


class _AttentionSecondGradient(torch.autograd.Function):
    """The backward pass of `_AttentionGradient`: takes its grad and inputs, and one cotangent per input."""

    @staticmethod
    def forward(spec: AttentionSpec, seeds: Tensor | None, *tensors: Any) -> tuple[Tensor | None, ...]:
        count = (len(tensors) - 1) // 2
        inputs, cotangents = tensors[1 : 1 + count], tensors[1 + count :]
        return chunked.double_backward(spec, seeds, tensors[0], inputs, cotangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "Attention is differentiable twice, and a third derivative was asked for. "
            "`attention.reference.attend` can be differentiated any number of times."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, *tensors: Any) -> Any:
        batch = _batch_size(tensors[1], in_dims[2])
        folded = _fold(info.batch_size, batch, tensors, in_dims[1:], per_sample=True)
        grads = _AttentionSecondGradient.apply(spec, *folded)  # type: ignore[no-untyped-call]
        count = len(grads)
        return _unfold(grads, info.batch_size, batch, tensors[1 : 1 + count], in_dims[2 : 2 + count])


def _unfold(grads: Any, mapped: int, batch: int, tensors: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
    """Take the mapped dimension out of the batch again; sum over samples the gradients of shared tensors."""
    unfolded = []
    for grad, tensor, dim in zip(grads, tensors, dims, strict=True):
        if grad is not None:
            grad = grad.unflatten(0, (mapped, batch))
            if _batch_size(tensor, dim) < batch:
                grad = grad.sum(1, keepdim=True)
        unfolded.append(grad)
    return tuple(unfolded), tuple(None if g is None else 0 for g in unfolded)


def _batch_size(tensor: Tensor, dim: int | None) -> int:
    """The batch dimension of a tensor, not counting the mapped one."""
    return tensor.shape[1 if dim == 0 else 0]


def _fold(
    mapped: int, batch: int, tensors: tuple[Any, ...], dims: tuple[Any, ...], *, per_sample: bool = False
) -> list[Tensor | None]:
    """Fold a mapped dimension into the batch; `per_sample` also expands tensors that the batch shares."""
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is None or (dim is None and tensor.shape[0] == 1 and not per_sample):
            folded.append(tensor)
            continue
        moved = tensor[None] if dim is None else tensor.movedim(dim, 0)
        folded.append(moved.expand(mapped, batch, *moved.shape[2:]).flatten(0, 1))
    return folded
