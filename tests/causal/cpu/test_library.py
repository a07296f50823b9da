"""How the library is built, loaded and called: instruction sets, threads, structs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from implicit_attention import ForwardSubstitution, ImplicitQueryAttention
from implicit_attention.causal import cpu
from implicit_attention.causal.cpu import build, library
from tests.causal.cpu.cases import inputs, run

ROOT = Path(__file__).parents[3]
OPTIONS = {"heads": 4, "qk_norm": True, "embed": 512}

CODE = """
import torch
from implicit_attention.causal.cpu import library
from tests.causal.cpu.cases import assert_same, inputs, run
if {threads}:
    torch.set_num_threads({threads})
assert_same(inputs(1, 7, 32), 1e-14, 1e-12, embed=32, heads=4, qk_norm=True)
assert_same(inputs(3, 70, 256), 1e-14, 1e-11, embed=256, heads=4, qk_norm=True)  # large enough to share
print(library.capability())
"""


def started(threads=0, code=CODE, **environment):
    """Run the comparison with torch in a process of its own; return what it printed."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code.replace("{threads}", str(threads))], env=env, capture_output=True,
        text=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr, done.returncode


def cpu_flags():
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.exists() else set()


@pytest.mark.parametrize("name", build.CAPABILITIES)
def test_each_instruction_set_solves_the_same_equations(name):
    said, error, status = started(IMPLICIT_ATTENTION_CPU_CAPABILITY=name)
    if name == "avx512" and not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= cpu_flags():
        assert status != 0
        assert "IMPLICIT_ATTENTION_CPU_CAPABILITY=avx512: the processor does not have it" in error
        return
    assert (said, status) == (name, 0), error


def test_an_unknown_instruction_set_is_refused():
    _, error, status = started(IMPLICIT_ATTENTION_CPU_CAPABILITY="avx1024")
    assert status != 0
    assert "avx1024" in error


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"},
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2"},
        {"OMP_DYNAMIC": "true"},
    ],
    ids=str,
)
def test_fewer_threads_than_asked_for(environment):
    """OpenMP may give any number of them."""
    _, error, status = started(4, **environment)
    assert status == 0, error


def test_same_bits_for_any_batch_and_threads():
    """One thread, more threads than samples, samples that do not divide; other threads in the backward pass."""
    x, threads, found = inputs(3, 130, 512, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for forward, backward in ((1, 1), (2, 2), (4, 4), (4, 1)):
            torch.set_num_threads(forward)
            found.append(run("cpp", x, 1e-4, between=lambda n=backward: torch.set_num_threads(n), **OPTIONS))
            alone, _ = run("cpp", x[1:2], 1e-4, **OPTIONS)
            assert torch.equal(alone.value[0], found[-1][0].value[1])
    finally:
        torch.set_num_threads(threads)
    # Gradients by equilibrium and cotangent alone: those of weights are sums of torch's over all rows.
    for solution, grads in found[1:]:
        assert torch.equal(solution.value, found[0][0].value)
        for memo, first in zip(solution.memo, found[0][0].memo, strict=True):
            assert torch.equal(memo, first)
        for mine, first in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-5, atol=1e-5 * float(first.abs().max()))


def test_nested_parallelism():
    """Called from several Python threads at once."""
    code = """
import threading, torch
from tests.causal.cpu.cases import inputs, run
x = inputs(2, 100, 32)
wanted = run("cpp", x, 1e-8, embed=32, heads=4)
found = []
def work():
    for _ in range(5):
        found.append(run("cpp", x, 1e-8, embed=32, heads=4)[0].value)
team = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in team]; [t.join() for t in team]
"""
    _, error, status = started(code=code)
    assert status == 0, error


FEEDBACK = """
import torch
from implicit_attention.causal.cpu import library
from tests.causal.test_feedback import close, found, make
for options in (
    {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    {"feedback_norm": False, "positions": "relative"},
):
    each = {}
    for kernel, threads in (("torch", 1), ("cpp", 1), ("cpp", 3)):
        torch.set_num_threads(threads)
        each[kernel, threads] = found(*make(options, 70, size=24, batch=5, kernel=kernel))
    close(each["cpp", 1], each["torch", 1], 1e-12)
    assert torch.equal(each["cpp", 1]["y"], each["cpp", 3]["y"])
print(library.capability())
"""


@pytest.mark.parametrize("name", [name for name in build.CAPABILITIES if name != "avx512"])
def test_each_instruction_set_and_any_threads_solve_rows_that_read_values_of_outputs(name):
    said, error, status = started(code=FEEDBACK, IMPLICIT_ATTENTION_CPU_CAPABILITY=name)
    assert (said, status) == (name, 0), error


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ForwardArguments", "arguments.h"),
        ("AdjointArguments", "arguments.h"),
        ("FeedbackForwardArguments", "feedback_arguments.h"),
        ("FeedbackAdjointArguments", "feedback_arguments.h"),
    ],
)
def test_structs_are_those_of_the_header(name, file):
    header = (build.SOURCES / file).read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", header, re.S).group(1)
    wanted = []
    for line in re.sub(r"//.*", "", body).split(";"):
        declared = re.match(r"\s*(?:const )?(T|int64_t|double)(\*?)\s+(.*)", line, re.S)
        if declared:
            kind = "pointer" if declared[2] else declared[1]
            wanted += [(field.strip(), kind) for field in declared[3].split(",")]
    kinds = {"c_void_p": "pointer", "c_long": "int64_t", "c_longlong": "int64_t", "c_double": "double"}
    assert [(field, kinds[kind.__name__]) for field, kind in getattr(library, name)._fields_] == wanted


def test_a_struct_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="build it again"):
        library.call("forward32", library.ForwardArguments(bytes=8))


def test_without_a_compiler_nothing_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.compile_library(tmp_path) is None
    assert "no C++ compiler (c++, g++, clang++)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_was_asked_for_is_the_one(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no-such-compiler, which was asked for"):
        build.compile_library(tmp_path, "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match="no-such-compiler -O1, which was asked for"):
        build.find_compilers()
    monkeypatch.setenv("CXX", f"{sys.executable} -c pass")
    assert build.find_compilers() == [[sys.executable, "-c", "pass"]]


def test_what_the_compiler_says_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        build.compile_library(tmp_path, "false")


def test_the_next_compiler_is_tried(tmp_path, monkeypatch):
    """An old one may come first on the PATH."""
    made = []

    def compiled(command, out_dir, sanitize):
        made.append(command)
        if len(made) == 1:
            raise RuntimeError("the first knows no C++17")
        return out_dir

    monkeypatch.setattr(build, "find_compilers", lambda compiler: [["first"], ["second"]])
    monkeypatch.setattr(build, "_compile", compiled)
    assert build.compile_library(tmp_path) == tmp_path
    assert made == [["first"], ["second"]]


def test_fast_math_is_switched_off():
    """Some compilers have it on. Sums in another order give wrong solutions that count as converged."""
    for command in build.find_compilers():
        asked = [*command, "-ffast-math", *build.FLAGS, "-x", "c++", "-dM", "-E", "-"]
        said = subprocess.run(asked, input="", capture_output=True, text=True, check=True).stdout
        assert "__FAST_MATH__" not in said


@pytest.fixture
def loaded_anew():
    library.load.cache_clear()
    cpu.problem.cache_clear()
    yield
    library.load.cache_clear()
    cpu.problem.cache_clear()


def test_a_library_of_other_sources_is_not_used(monkeypatch, loaded_anew):
    """As after a pull into an editable installation."""
    monkeypatch.setattr(library, "fingerprint", lambda: "other")
    assert "was built from other sources than those beside it). Build them again" in cpu.problem()
    monkeypatch.setattr(library, "fingerprint", lambda: None)  # where the sources are not shipped
    library.load.cache_clear()
    cpu.problem.cache_clear()
    assert cpu.problem() is None


def test_an_older_library_is_not_used(tmp_path, monkeypatch, loaded_anew):
    """It does not say what it was built from, and lacks kernels."""
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" void implicit_attention_use_threads(void*) {}')
    subprocess.run([*build.find_compilers()[0], "-shared", "-fPIC", source, "-o", tmp_path / "old.so"], check=True)
    monkeypatch.setattr(library, "PATH", tmp_path / "old.so")
    assert "was built from other sources" in cpu.problem()
    monkeypatch.setattr(library, "fingerprint", lambda: None)
    library.load.cache_clear()
    cpu.problem.cache_clear()
    assert "undefined symbol" in cpu.problem() or "symbol not found" in cpu.problem()


def test_what_kept_it_from_being_built_is_said(tmp_path, monkeypatch, loaded_anew):
    monkeypatch.setattr(library, "PATH", tmp_path / "missing.so")
    monkeypatch.setattr(cpu, "REASON", tmp_path / "not_built.txt")
    assert "Install g++" in cpu.problem() or "Xcode" in cpu.problem()
    (tmp_path / "not_built.txt").write_text("g++ failed: unrecognized command-line option")
    cpu.problem.cache_clear()
    assert "unrecognized command-line option" in cpu.problem()
    monkeypatch.setattr(sys, "platform", "win32")
    cpu.problem.cache_clear()
    assert "there are no C++ kernels for" in cpu.problem()
    assert build.compile_library(tmp_path) is None


class Copied(torch.Tensor):
    """A tensor that is made of another, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, args)
        return function(*args, **(kwargs or {}))


def test_tensors_without_memory_of_their_own_are_left_to_torch():
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True), torch.randn(1, 5, 8)
    function, args, _ = layer.equation(x)
    wrapped = tuple(Copied(t) if t.dim() == 2 else t for t in args)
    assert ForwardSubstitution().kernel_for(function, args) == "cpp"
    assert ForwardSubstitution().kernel_for(function, wrapped) == "torch"
    with pytest.raises(ValueError, match="where a tensor is made of other tensors"):
        ForwardSubstitution(kernel="cpp").kernel_for(function, wrapped)


@pytest.mark.parametrize("lazy", ["zero", "negated"])
def test_cotangents_that_torch_has_not_written_down(lazy):
    layer, x = ImplicitQueryAttention(8, 2, is_causal=True, qk_norm=True), torch.randn(1, 5, 8, requires_grad=True)
    y = layer(x)
    grad = torch._efficientzerotensor(y.shape) if lazy == "zero" else torch._neg_view(torch.randn_like(y))
    found = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
    plain = torch.zeros_like(y) if lazy == "zero" else grad.resolve_neg()
    torch.testing.assert_close(found, torch.autograd.grad(y, x, plain)[0], rtol=0, atol=0)


def test_tensors_without_numbers_are_refused():
    """As estimators of memory make them: null pointers would end the process."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"a FakeTensor has none\. Trace the layer with"):
        ImplicitQueryAttention(8, 2, is_causal=True)(torch.randn(1, 5, 8))
