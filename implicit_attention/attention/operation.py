"""The attention operation: which implementation serves a call, and all its derivatives."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from implicit_attention.attention import chunked, flash_cpu, flash_cuda
from implicit_attention.attention.spec import AttentionSpec


def stock(query: Tensor, value: Tensor, spec: AttentionSpec, self_score: Tensor | None = None) -> ModuleType | None:
    """Return the module that computes a call with one of PyTorch's flash kernels, None if none of them can.

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

    Differentiable twice in every float tensor but `seeds`, in forward mode once, and under
    `torch.func` transforms. The stock flash kernels serve what they can (see `stock`); dropout, learned biases'
    gradients, and on CUDA devices float32, float64 and biases take the chunked implementation.

    Args:
        query: `[B, H, N, d]`; row i of the output belongs to it.
        key: `[B, H, M, d]`, same dtype.
        value: `[B, H, M, d_v]`, same dtype.
        spec: Scale, causality, bias terms and dropout.
        self_score: `[B, H, N]`, replaces `scale q_i . k_i` on the diagonal.
        seeds: `[B]` int64, one per sample: what the dropout masks are hashed from.
        terms: The tensors of `spec.terms`, each with leading dimension 1 or B.

    Returns:
        Output `[B, H, N, d_v]`, zero in rows that see nothing, and log-sum-exp `[B, H, N]` in float32 or
        wider, not differentiable.
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
    """Return the gradients of a **part** of a softmax, given the whole's output and log-sum-exp.

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
        bias_grad: Whether to return the terms' gradients too, which the stock kernel does not know.

    Returns:
        Gradients of query, key, value and each term (None unless `bias_grad`).
    """
    kernel = None if bias_grad else stock(query, value, spec)
    if kernel is not None:
        narrow = query.dtype
        found = kernel.backward(spec, grad.to(narrow), query, key, value, None, out.to(narrow), lse, terms)
        return *found[:3], *(None for _ in terms)
    return chunked.partial_backward(spec, seeds, grad, (query, key, value, None, *terms), out, lse, bias_grad=bias_grad)


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
        _, lse = attention(query, key, key, spec, terms=terms)
        ctx.spec = spec
        ctx.save_for_backward(lse, query, key, *terms)
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`d lse = sum_j P_ij d S_ij`: the backward pass of an attention over values 1 / d whose output is 0."""
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
        query, key, value, self_score, *terms = inputs
        kernel = stock(query, value, spec, self_score)
        if kernel is None:
            return chunked.forward(spec, seeds, inputs)
        out, lse = kernel.forward(spec, query, key, value, self_score, tuple(terms))
        return out, lse

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
    """The backward pass of `_Attention`, as an operation of its own so that it has a backward pass too."""

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
        query, key, value, self_score, *terms = inputs
        kernel = None if bias_grad else stock(query, value, spec, self_score)
        if kernel is None:
            return chunked.backward(spec, seeds, grad, inputs)
        grads = kernel.backward(spec, grad, query, key, value, self_score, out, lse, tuple(terms))
        return (*grads, *(None for _ in terms))

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
    """The backward pass of `_AttentionGradient`: takes its (grad, *inputs) and a cotangent for each input."""

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
        raise NotImplementedError("attention is differentiable twice; a third derivative was asked for")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: AttentionSpec, *tensors: Any) -> Any:
        batch = _batch_size(tensors[1], in_dims[2])
        folded = _fold(info.batch_size, batch, tensors, in_dims[1:], per_sample=True)
        grads = _AttentionSecondGradient.apply(spec, *folded)  # type: ignore[no-untyped-call]
        count = len(grads)
        return _unfold(grads, info.batch_size, batch, tensors[1 : 1 + count], in_dims[2 : 2 + count])


def _unfold(grads: Any, mapped: int, batch: int, tensors: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
    """Take the mapped dimension out of the batch again, summing over samples for what they share."""
    unfolded = []
    for grad, tensor, dim in zip(grads, tensors, dims, strict=True):
        if grad is not None:
            grad = grad.unflatten(0, (mapped, batch))
            if _batch_size(tensor, dim) < batch:
                grad = grad.sum(1, keepdim=True)
        unfolded.append(grad)
    return tuple(unfolded), tuple(None if g is None else 0 for g in unfolded)


def _batch_size(tensor: Tensor, dim: int | None) -> int:
    """The leading dimension of a tensor beneath the dimension that is mapped over."""
    return tensor.shape[1 if dim == 0 else 0]


def _fold(
    mapped: int, batch: int, tensors: tuple[Any, ...], dims: tuple[Any, ...], *, per_sample: bool = False
) -> list[Tensor | None]:
    """Fold a mapped dimension into the batch; `per_sample` expands even what is shared by the batch."""
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is None or (dim is None and tensor.shape[0] == 1 and not per_sample):
            folded.append(tensor)
            continue
        moved = tensor[None] if dim is None else tensor.movedim(dim, 0)
        folded.append(moved.expand(mapped, batch, *moved.shape[2:]).flatten(0, 1))
    return folded
