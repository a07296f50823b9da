"""The row problem of a decoded token in one Triton launch, against the solver: same root, same cache."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from implicit_attention import ForwardSubstitution
from implicit_attention.attention import flash_cpu
from implicit_attention.causal import engines, self_test
from implicit_attention.causal.forward_substitution import solved_with
from implicit_attention.causal.triton import token
from tests.bridge import decoded
from tests.test_decoding import EXACT, LAYERS, cached, case

pytestmark = pytest.mark.usefixtures("brisk_interpreter")
IN_ONE = ForwardSubstitution(rtol=1e-12, atol=1e-12, kernel="triton")
if torch.cuda.is_available():
    pytest.skip("these layers are on the CPU, which the interpreter serves", allow_module_level=True)


def step(layer, x, cache):
    """Decode the last token with the Triton kernel; what came before was found by torch's."""
    layer.solver = IN_ONE
    try:
        return decoded(layer, x[:, -1:], cache)
    finally:
        layer.solver = EXACT


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("input-")])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_decoded_is_what_the_solver_finds(name, padded, poisoned):
    layer, x = case(name, n=5)
    padding = None
    if padded:
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, :2], padding[2] = True, True
    short, long = cached(layer, x[:, :-1], padding), cached(layer, x[:, :-1], padding)
    found, expected = step(layer, x, short), layer.solve(x[:, -1:], cache=long, gains=True)
    assert found is not None
    assert float(found.residual.max()) <= 1e-12
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-11)
    for held, wanted in zip(short.past(), long.past(), strict=True):
        torch.testing.assert_close(held, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gain", [10.0, 30.0, 100.0])
@torch.no_grad()
def test_hard_tokens_are_solved_or_left_to_the_solver(gain):
    for seed in range(3):
        layer, x = case("qk_norm-rope", batch=1, n=5, seed=seed)
        layer.Omega_Q.weight.mul_(gain)
        layer.temperature.mul_(gain)
        short, long = cached(layer, x[:, :-1]), cached(layer, x[:, :-1])
        found, expected = step(layer, x, short), layer.solve(x[:, -1:], cache=long, gains=True)
        if found is None:
            assert short.used == 5, "nothing is added to the cache then"
        else:
            torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-8)


@torch.no_grad()
def test_same_bits_alone_and_in_a_batch():
    layer, x = case("qk_norm-rope", n=5)
    past = cached(layer, x[:, :-1])
    whole = step(layer, x, past)
    alone = step(layer, x[1:2], cached(layer, x[1:2, :-1]))
    torch.testing.assert_close(alone.value, whole.value[1:2], rtol=1e-13, atol=1e-13)  # the attention is the CPU's


@torch.no_grad()
def test_the_device_is_looked_at_once(monkeypatch):
    layer, x = case("qk_norm-rope", n=5)
    cache = cached(layer, x[:, :-1])
    looks, read = [], torch.Tensor.tolist
    monkeypatch.setattr(flash_cpu, "_all_plain", lambda lse: True)  # attention on a CPU reads a number of its own
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(self.shape) or read(self))
    assert step(layer, x, cache) is not None
    assert looks == [torch.Size([3])]


@pytest.mark.parametrize("fails", ["within", "looking"])
@torch.no_grad()
def test_a_token_that_is_not_within_tolerance_is_not_taken(fails, monkeypatch):
    """It is written where it belongs before the device is looked at, and counts only then."""
    layer, x = case("qk_norm-rope", n=5)
    cache = cached(layer, x[:, :-1])
    held = [t.clone() for t in (cache.past().column, cache.past().value)]
    within = torch.tensor([1.0, 0.0, 1.0]) if fails == "within" else None
    solve = token.solve_token

    def spoilt(*args):
        y, column, judged = solve(*args)
        return token.Token(y, column, torch.stack([*judged[:2], within]) if fails == "within" else judged)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(token, "solve_token", spoilt)
    if fails == "within":
        assert step(layer, x, cache) is None
    else:
        monkeypatch.setattr(torch.Tensor, "tolist", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(layer, x, cache)
    for now, then in zip((cache.past().column, cache.past().value), held, strict=True):
        assert torch.equal(now, then)


@pytest.fixture
def on_a_device(monkeypatch, tmp_path):
    """Let "auto" meet a device that Triton serves: the CPU, with the interpreter, stands for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_test, "_LENGTHS", (5,))
    known = replace(engines._ENGINES["triton"], automatic="cpu")
    monkeypatch.setattr(engines, "_ENGINES", {"triton": known})
    yield
    self_test.verdict.cache_clear()
    engines._warn_once.cache_clear()


@torch.no_grad()
def test_auto_decodes_by_kernels_that_pass_their_self_test(on_a_device):
    layer, x = case("qk_norm-rope", n=5)
    layer.solver = ForwardSubstitution(rtol=1e-12, atol=1e-12)
    cache = cached(layer, x[:, :-1])
    assert engines.token_kernels("auto", x, 2, solved_with) is token
    found = decoded(layer, x[:, -1:], cache)
    assert found is not None
    torch.testing.assert_close(found.value, layer.solve(x).value[:, -1:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_token_kernels_that_are_wrong_are_not_taken(on_a_device, monkeypatch):
    solve = token.solve_token
    monkeypatch.setattr(token, "solve_token", lambda *args: (found := solve(*args))._replace(y=1.5 * found.y))
    with pytest.warns(RuntimeWarning, match="a decoded token at 5 tokens is off by"):
        assert engines.token_kernels("auto", torch.zeros(1), 1, solved_with) is None


@torch.no_grad()
def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    layer, x = case("qk_norm-rope", n=5)
    cache = cached(layer, x[:, :-1])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"`kernel` must be .* where the tensors are on cpu"):
        step(layer, x, cache)
