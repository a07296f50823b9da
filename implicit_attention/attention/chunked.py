"""Attention in chunks of rows, each computed by `reference`: every option, any device, every derivative.

Memory is a few blocks of scores, `[B, H, r, M]` for r rows at a time. The whole matrix never exists.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from implicit_attention.attention import reference
from implicit_attention.attention.spec import AttentionSpec, Inputs


def forward(spec: AttentionSpec, seeds: Tensor | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return output `[B, H, N, d_v]` and log-sum-exp `[B, H, N]`.

    Args:
        spec: The call.
        seeds: `[B]` or None; see `AttentionSpec.keep`.
        inputs: Query, key, value, self score or None, and the terms' tensors; shapes as in `attention`.
    """
    outs, lses = zip(*(_attend(spec, seeds, inputs, *chunk) for chunk in _chunks(spec, inputs)), strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -1)


def backward(spec: AttentionSpec, seeds: Tensor | None, grad: Tensor, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input for the cotangent `grad` of the output."""
    total: list[Tensor | None] = [None] * len(inputs)
    for chunk in _chunks(spec, inputs):
        with torch.enable_grad():
            leaves = _leaves(inputs)
            out, _ = _attend(spec, seeds, leaves, *chunk)
            grads = _gradients([out], leaves, [grad[..., chunk[0], :]])
        total = [_add(a, b) for a, b in zip(total, grads, strict=True)]
    return tuple(total)


def partial_backward(
    spec: AttentionSpec,
    seeds: Tensor | None,
    grad: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    *,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and terms for a part of a softmax.

    `out` and `lse` belong to the whole softmax, over more columns than `inputs` hold. The gradients of the terms are
    None unless `bias_grad`.
    """
    query, key, value, _, *tensors = inputs
    wide = lse.dtype
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=wide) for t in (query, key, value))
    d_terms: list[Tensor | None] = [None] * len(tensors)
    for rows, cols in _chunks(spec, inputs):
        q, g = query[..., rows, :].to(wide), grad[..., rows, :].to(wide)
        k, v = key[..., cols, :].to(wide), value[..., cols, :].to(wide)
        scores = spec.scale * (q @ k.mT)
        bias = _bias(spec, tensors, rows, cols, lse)
        seen = lse[..., rows, None].masked_fill(torch.isneginf(lse[..., rows, None]), 0.0)
        p = torch.exp((scores if bias is None else scores + bias) - seen)
        slope = g @ v.mT
        keep = spec.keep(seeds, query.shape[1], rows, cols, lse)
        slope, kept = (slope, p) if keep is None else (slope * keep, p * keep)
        slope = p * (slope - (g * out[..., rows, :]).sum(-1, keepdim=True))
        d_query[..., rows, :] += spec.scale * (slope @ k)
        d_key[..., cols, :] += spec.scale * (slope.mT @ q)
        d_value[..., cols, :] += kept.mT @ g
        if bias_grad:
            found = spec.bias_gradient(tuple(tensors), rows, cols, slope)
            d_terms = [_add(a, b) for a, b in zip(d_terms, found, strict=True)]
    return d_query, d_key, d_value, *d_terms


def double_backward(
    spec: AttentionSpec,
    seeds: Tensor | None,
    grad: Tensor,
    inputs: Inputs,
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Differentiate `backward`: the gradients of `grad` and of each input.

    Args:
        spec: The call.
        seeds: `[B]` or None.
        grad: `[B, H, N, d_v]`, what `backward` was given.
        inputs: What `backward` was given.
        cotangents: One for each output of `backward`, None where nothing depends on it.

    Returns:
        First the gradient of `grad`, then those of the inputs.
    """
    total: list[Tensor | None] = [None] * (1 + len(inputs))
    for chunk in _chunks(spec, inputs):
        with torch.enable_grad():
            lam, *leaves = _leaves((grad, *inputs))
            out, _ = _attend(spec, seeds, tuple(leaves), *chunk)
            first = _gradients([out], leaves, [lam[..., chunk[0], :]], create_graph=True)
            used = [(a, b) for a, b in zip(first, cotangents, strict=True) if a is not None and b is not None]
            second = _gradients([a for a, _ in used], [lam, *leaves], [b for _, b in used])
        total = [_add(a, b) for a, b in zip(total, second, strict=True)]
    return tuple(total)


def jvp(spec: AttentionSpec, seeds: Tensor | None, inputs: Inputs, tangents: Sequence[Tensor | None]) -> Tensor:
    """Return the derivative of the output along `tangents`, `[B, H, N, d_v]`; a None tangent is zero."""
    query, key, value, self_score, *tensors = inputs
    dq, dk, dv, d_self, *d_tensors = tangents
    outs = []
    for rows, cols in _chunks(spec, inputs):
        q, k, v = query[..., rows, :], key[..., cols, :], value[..., cols, :]
        p, _ = reference.weights(
            q,
            k,
            scale=spec.scale,
            bias=_bias(spec, tensors, rows, cols, query),
            self_score=None if self_score is None else self_score[..., rows],
            first_row=rows.start + spec.ahead - cols.start,
        )
        slope = torch.zeros_like(p)
        if dq is not None:
            slope = slope + spec.scale * (dq[..., rows, :] @ k.mT)
        if dk is not None:
            slope = slope + spec.scale * (q @ dk[..., cols, :].mT)
        if self_score is not None:
            own = torch.zeros_like(slope[..., 0]) if d_self is None else d_self[..., rows].to(slope.dtype)
            slope = torch.diagonal_scatter(slope, own, rows.start + spec.ahead - cols.start, dim1=-2, dim2=-1)
        for term, tangent in zip(spec.terms, d_tensors, strict=True):
            if tangent is not None:
                slope = slope + term.block(tangent, rows, cols).to(slope.dtype)
        keep = spec.keep(seeds, query.shape[1], rows, cols, p)
        dp = p * (slope - (p * slope).sum(-1, keepdim=True))
        out = (dp if keep is None else dp * keep).to(v.dtype) @ v
        if dv is not None:
            out = out + (p if keep is None else p * keep).to(v.dtype) @ dv[..., cols, :]
        outs.append(out)
    return torch.cat(outs, -2)


def with_own_values(spec: AttentionSpec, seeds: Tensor | None, inputs: Inputs, self_value: Tensor) -> Tensor:
    """Return the output where row i takes `self_value` `[B, H, N, d_v]` for the value of its diagonal column.

    It is made of plain operations: differentiable any number of times, in memory for all scores if autograd is on.
    """
    outs = []
    for rows, cols in _chunks(spec, inputs):
        outs.append(_attend(spec, seeds, inputs, rows, cols, self_value[..., rows, :])[0])
    return torch.cat(outs, -2)


def weights(spec: AttentionSpec, inputs: Inputs) -> Tensor:
    """Return the whole attention matrix `[B, H, N, M]` before dropout, for diagnostics."""
    query, key, _, self_score, *tensors = inputs
    rows, cols = slice(0, query.shape[-2]), slice(0, key.shape[-2])
    bias = _bias(spec, tensors, rows, cols, query)
    return reference.weights(query, key, scale=spec.scale, bias=bias, self_score=self_score, first_row=spec.ahead)[0]


def _attend(
    spec: AttentionSpec, seeds: Tensor | None, inputs: Inputs, rows: slice, cols: slice,
    self_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    query, key, value, self_score, *tensors = inputs
    return reference.attend(
        query[..., rows, :],
        key[..., cols, :],
        value[..., cols, :],
        scale=spec.scale,
        bias=_bias(spec, tensors, rows, cols, query),
        self_score=None if self_score is None else self_score[..., rows],
        self_value=self_value,
        keep=spec.keep(seeds, query.shape[1], rows, cols, query),
        first_row=rows.start + spec.ahead - cols.start,
    )


def _bias(spec: AttentionSpec, tensors: Sequence[Tensor], rows: slice, cols: slice, query: Tensor) -> Tensor | None:
    return spec.bias(tuple(tensors), rows, cols, query)


def _chunks(spec: AttentionSpec, inputs: Inputs) -> Iterator[tuple[slice, slice]]:
    return iter(spec.chunks(*inputs[:2]))


def _leaves(inputs: Inputs) -> Inputs:
    return tuple(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs)


def _gradients(
    outputs: list[Tensor], leaves: Sequence[Tensor | None], grads: list[Tensor], *, create_graph: bool = False
) -> list[Tensor | None]:
    """Return one gradient per leaf, None for a leaf that is not float or that the outputs do not depend on."""
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not outputs:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
