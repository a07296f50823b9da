"""Norm of keys and own scores in few passes over memory: the same numbers as plain operations, twice differentiable."""

import pytest
import torch

from implicit_attention.attention.map import rms_norm
from implicit_attention.equation.key_norm import normed_by_head
from implicit_attention.equation.own_scores import own_scores

B, H, N, D = 2, 4, 5, 3
SCALE = 0.7


def random(*shape, dtype=torch.float64, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def plainly_normed(key, temperature):
    return rms_norm(key) * temperature[:, None, None]


def plainly_scored(key, made, normalize):
    query = made.unflatten(-1, (-1, D)).transpose(1, 2)
    query = rms_norm(query) if normalize else query
    return SCALE * (key * query.repeat_interleave(H // query.shape[1], 1)).sum(-1)


def scored(normalize):
    return lambda key, made: own_scores(key, made, SCALE, normalize=normalize)


CASES = {
    "norm": (normed_by_head, plainly_normed, ((B, H, N, D), (H,))),
    "score": (scored(False), lambda k, m: plainly_scored(k, m, False), ((B, H, N, D), (B, N, H * D))),
    "score-norm": (scored(True), lambda k, m: plainly_scored(k, m, True), ((B, H, N, D), (B, N, H * D))),
    "score-norm-groups": (scored(True), lambda k, m: plainly_scored(k, m, True), ((B, H, N, D), (B, N, 2 * D))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_operations(name):
    ours, plain, shapes = CASES[name]
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    found, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    cotangent = random(*expected.shape, seed=9).detach()
    pairs = zip(
        torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gradients_can_be_differentiated(name):
    ours, _, shapes = CASES[name]
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("name", CASES)
def test_one_input_alone_may_want_a_gradient(name):
    ours, _, shapes = CASES[name]
    for wanted in range(2):
        inputs = [random(*shape, seed=i).requires_grad_(i == wanted) for i, shape in enumerate(shapes)]
        (first,) = torch.autograd.grad(ours(*inputs).square().sum(), inputs[wanted], create_graph=True)
        (second,) = torch.autograd.grad(ours(*inputs).square().sum(), inputs[wanted])
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", CASES)
def test_half_types_are_summed_in_float32(name):
    ours, plain, shapes = CASES[name]
    inputs = [random(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(shapes)]
    found = ours(*inputs)
    assert found.dtype == torch.bfloat16
    exact = plain(*(t.detach().double() for t in inputs))
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.double(), exact, rtol=2 * unit, atol=unit * float(exact.abs().max()))
    for gradient, given in zip(torch.autograd.grad(found.sum(), inputs), inputs, strict=True):
        assert gradient.dtype == given.dtype
