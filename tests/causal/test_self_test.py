"""The self-test of an engine: what it finds, what it keeps, and what "auto" makes of it."""

import warnings
from dataclasses import replace

import pytest
import torch

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal import engines, self_test
from implicit_attention.causal.forward_substitution import solved_with

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_test, "_LENGTHS", (5,))
    yield
    self_test.verdict.cache_clear()
    engines._warn_once.cache_clear()


class Solve:
    """Solves with torch, whatever is asked for, and adds an error to one result of any other engine."""

    def __init__(self, error=0.0, at=0):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, kernel, function, args, grad):
        self.calls += 1
        found = solved_with("torch", function, args, grad)
        if kernel != "torch":
            found[self.at] = found[self.at] + self.error * found[self.at].abs().max()
        return found


def as_in_a_new_process(solve):
    self_test.verdict.cache_clear()
    return self_test.verdict("triton", CPU, solve)


def test_a_verdict_is_kept():
    solve = Solve()
    assert as_in_a_new_process(solve) is None
    assert solve.calls == 2
    assert as_in_a_new_process(solve) is None
    assert solve.calls == 2
    assert [path.name for path in self_test.path().parent.iterdir()] == ["self_tests.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"triton": ""}', "\x00\xff"])
def test_a_file_that_cannot_be_read_is_written_again(content):
    solve = Solve()
    self_test.path().parent.mkdir()
    self_test.path().write_text(content)
    assert as_in_a_new_process(solve) is None
    assert solve.calls == 2
    assert as_in_a_new_process(solve) is None
    assert solve.calls == 2


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_test_a_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    solve = Solve()
    assert as_in_a_new_process(solve) is None
    assert as_in_a_new_process(solve) is None
    assert solve.calls == 4


@pytest.mark.parametrize(("at", "name"), list(enumerate(["the output", "a decoded token", "weight", "key", "value"])))
@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_an_engine_that_is_wrong_is_found(at, name, error):
    assert f"{name} at 5 tokens is off by" in as_in_a_new_process(Solve(error, at))


def test_only_what_passes_is_kept():
    """Where one process fails, for instance for want of memory, the next tests again."""
    solve = Solve(0.5)
    assert as_in_a_new_process(solve)
    assert not self_test.path().exists()
    solve.error = 0.0
    assert as_in_a_new_process(solve) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    """The dtype that a script has chosen for its own tensors."""
    seen = set()

    def solve(kernel, function, args, grad):
        seen.update(t.dtype for t in (*args, grad))
        return solved_with("torch", function, args, grad)

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert as_in_a_new_process(solve) is None
    finally:
        torch.set_default_dtype(before)
    assert seen == {torch.float32}


def test_an_engine_that_raises_is_found():
    def solve(kernel, function, args, grad):
        if kernel != "torch":
            raise RuntimeError("no kernel image\nis available")
        return solved_with("torch", function, args, grad)

    assert as_in_a_new_process(solve) == "RuntimeError: no kernel image"
    assert not self_test.path().exists()  # it may pass in the next process


def test_an_engine_whose_files_changed_is_tested_again(monkeypatch):
    solve = Solve()
    assert as_in_a_new_process(solve) is None
    solve.error = 0.5
    assert as_in_a_new_process(solve) is None
    monkeypatch.setattr(self_test, "_sources", lambda kernel: "other")
    assert as_in_a_new_process(solve)


@pytest.fixture
def on_a_device(monkeypatch):
    """Let "auto" meet a device that only an engine with a self-test serves: the CPU stands for it."""
    known = replace(engines._ENGINES["triton"], automatic="cpu", hindrance=lambda system: None, missing=lambda: None)
    monkeypatch.setattr(engines, "_ENGINES", {"triton": known})


@pytest.mark.parametrize(("error", "name"), [(0.0, "triton"), (0.5, "torch")])
def test_auto_takes_an_engine_that_passes(monkeypatch, on_a_device, error, name):
    monkeypatch.setattr("implicit_attention.causal.forward_substitution.solved_with", Solve(error))
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(1, 3, 8)
    equation = layer.equation(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert ForwardSubstitution().kernel_for(equation.function, equation.args) == name
    assert len(said) == (name == "torch")
    for one in said:
        assert "fail their self-test on cpu (the output at 5 tokens is off by 5.0e-01" in str(one.message)
        assert "The next process tests them again" in str(one.message)


def test_torch_serves_where_the_self_test_fails(monkeypatch, on_a_device):
    monkeypatch.setattr("implicit_attention.causal.forward_substitution.solved_with", Solve(0.5))
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(1, 3, 8)
    with pytest.warns(RuntimeWarning, match="self-test"):
        out = layer(x)
    layer.solver = ForwardSubstitution(kernel="torch")
    torch.testing.assert_close(out, layer(x))
