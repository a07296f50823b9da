"""What every test shares: fixed random states, and derandomised property tests without deadlines."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from implicit_attention.causal import cpu
from implicit_attention.causal.cpu import build

# Triton looks when its kernels are imported: without a device they run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("implicit", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("implicit")


@pytest.fixture(autouse=True)
def _fixed_random_state():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill what `empty` returns with NaN, so that reading memory that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_configure(config):
    """Torch scripts its own forward-mode decompositions when they are first used, and complains about it.

    The unmasked default is the seed's map, and many tests are about that map; what it warns of has tests of its own.
    """
    config.addinivalue_line("filterwarnings", "ignore:.*Said once for this layer:UserWarning")
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what names the C++ kernels where no compiler built them, and what torch.compile compiles with one."""
    try:
        return (yield)
    except Exception as error:
        missing = cpu.problem()
        if missing and missing in str(error):
            pytest.skip(missing)
        if "No working C++ compiler found" in str(error) and not build.find_compilers():
            pytest.skip("torch.compile needs a C++ compiler for a CPU")
        raise


def pytest_collection_modifyitems(items):
    """Do not measure the coverage of Triton's interpreter, which takes three times as long to be watched."""
    for item in items:
        if "brisk_interpreter" in item.fixturenames:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def brisk_interpreter():
    """Let Triton's interpreter prepare the language once; it does so at every call of a function within a kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # for a device the language must be as it is
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    function, call = interpreter.InterpretedFunction, interpreter.InterpretedFunction.__call__
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    function.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    yield
    function.__call__ = call
    scope.restore()
