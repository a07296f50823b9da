"""How the library is built, loaded and called: instruction sets, threads, structs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_without_a_compiler_nothing_is_built(tmp_path, capsys):
    assert build.compile_library(tmp_path, "no-such-compiler") is None
    assert "no C++ compiler (no-such-compiler)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_compiler_says_is_passed_on(tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        build.compile_library(tmp_path, "false")
