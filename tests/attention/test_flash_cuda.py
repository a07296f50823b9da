"""The calls of the stock CUDA kernels, as far as they can be checked without a device: schemas, shapes, dispatch."""

import pytest
import torch

from implicit_attention.attention import AttentionSpec, flash_cpu, flash_cuda
from implicit_attention.attention.masks import AdditiveMask
from implicit_attention.attention.operation import stock


class OnDevice:
    """What dispatch looks at of a tensor on a CUDA device."""

    device = torch.device("cuda")

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size(shape), dtype

    def numel(self):
        return self.shape.numel()


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.parametrize("dim", [64, 20], ids=lambda d: f"d{d}")
@pytest.mark.parametrize(("n", "m", "causal"), [(40, 50, False), (40, 40, True)], ids=["below", "causal"])
def test_calls_fit_the_operators(n, m, causal, dim):
    """On the meta device, which knows the operators' arguments and the shapes of their results."""
    spec = AttentionSpec(0.3, is_causal=causal)
    query = torch.empty(2, 3, n, dim, dtype=torch.bfloat16, device="meta")
    key, value = (torch.empty(2, 3, m, dim, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, lse = flash_cuda.forward(spec, (query, key, value, None))
    assert out.shape == query.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == (2, 3, n)
    assert lse.dtype == torch.float32
    *grads, own = flash_cuda.backward(spec, out, (query, key, value, None), out, lse)
    assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]
    assert own is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_types_on_a_device_take_the_flash_kernel(dtype, ampere):
    query, value = OnDevice(2, 4, 100, 64, dtype=dtype), OnDevice(2, 4, 30, 64, dtype=dtype)
    assert stock(query, value, AttentionSpec(0.1)) is flash_cuda
    assert stock(query, query, AttentionSpec(0.1, is_causal=True)) is flash_cuda


@pytest.mark.parametrize(
    ("query", "value", "spec", "own"),
    [
        (OnDevice(1, 1, 9, 64, dtype=torch.float32), OnDevice(1, 1, 9, 64), AttentionSpec(0.1), None),
        (OnDevice(1, 1, 9, 264), OnDevice(1, 1, 9, 264), AttentionSpec(0.1), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 9, 32), AttentionSpec(0.1), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 8, 64), AttentionSpec(0.1, is_causal=True), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 9, 64), AttentionSpec(0.1, dropout=0.1), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 9, 64), AttentionSpec(0.1, terms=(AdditiveMask(),)), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 9, 64), AttentionSpec(0.1, window=4), None),
        (OnDevice(1, 1, 9, 64), OnDevice(1, 1, 9, 64), AttentionSpec(0.1, is_causal=True), torch.zeros(1, 1, 9)),
        (OnDevice(1, 1, 0, 64), OnDevice(1, 1, 9, 64), AttentionSpec(0.1), None),
    ],
    ids=["float32", "wide", "uneven", "corner", "dropout", "bias", "window", "own", "empty"],
)
def test_what_it_cannot_compute_is_left_to_chunks(query, value, spec, own, ampere):
    assert stock(query, value, spec, own) is None


def test_older_devices_are_left_to_chunks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    query = OnDevice(1, 1, 9, 64)
    assert stock(query, query, AttentionSpec(0.1)) is None


def test_the_cpu_keeps_its_own():
    query = torch.randn(1, 1, 9, 64, dtype=torch.bfloat16)
    assert stock(query, query, AttentionSpec(0.1)) is flash_cpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 20], ids=lambda d: f"d{d}")
def test_a_part_of_a_softmax_on_a_device(dim):
    """Forward and backward of half of the columns under the whole output and log-sum-exp."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 48, dim, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    spec, half = AttentionSpec(0.2), slice(0, 24)
    out, lse = flash_cuda.forward(spec, (q, k, v, None))
    found = flash_cuda.backward(spec, grad, (q, k[:, :, half], v[:, :, half], None), out, lse)
    wide = [t.double() for t in (q, k, v, grad)]
    p = (0.2 * wide[0] @ wide[1].mT).softmax(-1)
    whole = p @ wide[2]
    slope = p * (wide[3] @ wide[2].mT - (wide[3] * whole).sum(-1, keepdim=True))
    wanted = (
        0.2 * slope[..., half] @ wide[1][:, :, half],
        0.2 * slope[..., half].mT @ wide[0],
        p[..., half].mT @ wide[3],
    )
    torch.testing.assert_close(out.double(), whole, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(found, wanted, strict=False):
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-2, atol=5e-2)
