"""What the compiled kernels are made of: raw pointers, register tiles, exp, and the threads that torch already has."""

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

_ONE_AT_A_TIME = threading.Lock()
_SIGNATURE = types.void(types.CPointer(types.int64))
LANES = 64 if llvm.get_host_cpu_features().get("avx512f") else 32  # bytes of a vector register


def compiled(fastmath: Any) -> Any:
    """Decorate a function to be compiled into the kernels that call it."""
    # Division by zero gives infinity: an exception cannot leave a C callback, which would stop half-way in silence.
    return njit(fastmath=fastmath, error_model="numpy")


def kernel(function: Any) -> Any:
    """Decorate a function to be compiled as `void f(int64_t *)` when it is first needed, and kept on disk.

    Numba looks whether the function's own file has changed, not those of the functions that it calls: let it be a
    closure over `STAMP`, which is part of what numba looks it up by.

    A process that compiles calls other copies of the functions that are not inlined than those that load what it kept,
    so its sums would differ in the last digits. Hence another process compiles, and this one loads as all later ones.

    Returns:
        A function that returns the compiled one; the module has it under the name of `function`.
    """

    @cache
    def compile_it() -> Any:
        with _ONE_AT_A_TIME, _telling():
            if _needs_no_compiler(function):
                return compile_here(function)
            said = _compile_elsewhere(function)
            made = compile_here(function)
            if not made.cache_hits:
                logging.getLogger("implicit_attention").warning(
                    "A kernel was compiled by the process that uses it, as another one could not (%s). Its last digits "
                    "may differ from those of later processes: start again if they matter.", said,
                )  # fmt: skip
            return made

    compile_it.function = function  # for the process that compiles it
    return compile_it


def compile_here(function: Any) -> Any:
    """Return a function as numba kept it; else compile it in this process and keep it, if there is where to."""
    try:
        return cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder that can be written to
        return cfunc(_SIGNATURE, error_model="numpy")(function)


def _needs_no_compiler(function: Any) -> bool:
    """Whether numba has kept a function, or has nowhere to keep it, so that every process has to compile."""
    try:
        return FunctionCache(function).load_overload(_SIGNATURE, cpu_target.target_context) is not None
    except RuntimeError:
        return True


def _compile_elsewhere(function: Any) -> str:
    """Let another process compile and keep a function; return what that one said."""
    if not sys.executable or getattr(sys, "frozen", False):
        return "there is no Python to start"
    # It has to find this library, and what this process finds; relative entries may mean another folder by now.
    root, module, name = str(Path(__file__).parents[3]), function.__module__, function.__name__
    folders = [folder for folder in sys.path if isinstance(folder, str) and os.path.isabs(folder)]
    code = (
        f"import sys; sys.path[:] = {folders if root in folders else [root, *folders]!r}; "
        f"from {__name__} import compile_here; from {module} import {name}; compile_here({name}.function)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        return str(error)
    return done.stderr.strip().rpartition("\n")[-1] or f"it ended with status {done.returncode}"


@contextmanager
def _telling() -> Iterator[None]:
    """Log what is going on where it takes long."""
    text = "Compiling a kernel of kernel='numba' for this processor: once, for up to a minute; then it is kept."
    timer = threading.Timer(5.0, logging.getLogger("implicit_attention").warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


STAMP = _digest()
exact = compiled(False)
fast = compiled({"reassoc", "contract", "nsz", "arcp"})  # sums in any order; NaN and Inf mean what they mean


@intrinsic
def float32_at(_: Any, address: Any) -> Any:
    """The pointer to float32 at an address."""
    return types.CPointer(types.float32)(address), _to_pointer


@intrinsic
def float64_at(_: Any, address: Any) -> Any:
    """The pointer to float64 at an address."""
    return types.CPointer(types.float64)(address), _to_pointer


@intrinsic
def pointer_like(_: Any, like: Any, address: Any) -> Any:
    """The pointer of a kind at an address."""
    return like(like, address), _to_pointer


def _to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[-1], context.get_value_type(signature.return_type))


@intrinsic
def shifted(_: Any, pointer: Any, offset: Any) -> Any:
    """The pointer `offset` elements on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), build


@intrinsic
def call(_: Any, address: Any) -> Any:
    """Call the C function `int f(void)` at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), [])

    return types.int32(types.int64), build


@intrinsic
def _power_of_two(_: Any, number: Any) -> Any:
    """`2^n` for a number `n + 1.5 * 2^m` whose last bits are those of n (m: the bits of the mantissa)."""
    wide = number == types.float64
    size, bits, bias = (64, 52, 1023) if wide else (32, 23, 127)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(size)
        raised = builder.add(builder.bitcast(args[0], whole), ir.Constant(whole, bias))
        return builder.bitcast(builder.shl(raised, ir.Constant(whole, bits)), args[0].type)

    return number(number), build


@intrinsic
def bits(_: Any, number: Any) -> Any:
    """The bits of a number as an integer: those of moduli are in their order, NaN above all."""
    whole = types.int64 if number == types.float64 else types.int32

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(whole))

    return whole(number), build


@intrinsic
def number_of(_: Any, whole: Any) -> Any:
    """The number with these bits."""
    number = types.float64 if whole == types.int64 else types.float32

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(number))

    return number(whole), build


def _make_tile(rows: int, vectors: int) -> Any:
    """Make a product of matrices that keeps all of its result in registers.

    Args:
        rows: Of the result.
        vectors: How many registers wide it is.

    Returns:
        `tile(c, ldc, a, lda, step, b, ldb, depth)`: `C[m, :] = sum_k A[m, k] B[k, :]`, `A[m, k]` at
        `a[m lda + k step]`; the sum runs in the order of k.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, ldc, a, lda, step, b, ldb, depth = args
        scalar = c.type.pointee
        align = 8 if isinstance(scalar, ir.DoubleType) else 4
        lanes = LANES // align
        vector = ir.VectorType(scalar, lanes)
        index, lane, flags = ir.IntType(64), ir.IntType(32), ["contract"]

        def place(base: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        def number(n: int) -> Any:
            return ir.Constant(index, n)

        before = builder.block
        loop, done = builder.append_basic_block("depth"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(number(0), before)
        zero = ir.Constant(vector, [0.0] * lanes)
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        for row in sums:
            for one in row:
                one.add_incoming(zero, before)
        at = builder.mul(k, ldb)
        loaded = [builder.load(place(b, builder.add(at, number(v * lanes))), align=align) for v in range(vectors)]
        splat = ir.Constant(ir.VectorType(lane, lanes), [0] * lanes)
        column = builder.mul(k, step)
        new = []
        for m, row in enumerate(sums):
            factor = builder.load(builder.gep(a, [builder.add(builder.mul(lda, number(m)), column)]))
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.Constant(lane, 0))
            spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), splat)
            new.append(
                [
                    builder.fadd(one, builder.fmul(spread, part, flags=flags), flags=flags)
                    for one, part in zip(row, loaded, strict=True)
                ]
            )
        following = builder.add(k, number(1))
        end = builder.block
        k.add_incoming(following, end)
        for row, sums_after in zip(sums, new, strict=True):
            for one, after in zip(row, sums_after, strict=True):
                one.add_incoming(after, end)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
        builder.position_at_end(done)
        for m, sums_after in enumerate(new):
            for v, after in enumerate(sums_after):
                offset = builder.add(builder.mul(ldc, number(m)), number(v * lanes))
                builder.store(after, place(c, offset), align=align)
        return context.get_dummy_value()

    @intrinsic
    def tile(_: Any, c: Any, ldc: Any, a: Any, lda: Any, step: Any, b: Any, ldb: Any, depth: Any) -> Any:
        i = types.intp
        return types.void(c, i, c, i, i, c, i, i), build

    return tile


tile1 = _make_tile(1, 2)
tile1_wide = _make_tile(1, 4)
tile4 = _make_tile(4, 2)
tile4_wide = _make_tile(4, 4)
tile8 = _make_tile(8, 2)


@compiled({"contract"})
def exp32(x: Any) -> Any:
    """`exp(x)` for x <= 0 in float32, in operations that vectorise; 0 below -87, NaN for NaN."""
    f = types.float32
    low = f(-87.0)
    t = low if x < low else x
    shift = f(12582912.0)
    n = t * f(1.4426950408889634) + shift
    whole = n - shift
    r = t - whole * f(0.693145751953125)
    r = r - whole * f(1.42860682030941723e-6)
    s = f(1.0 / 5040.0)
    s = s * r + f(1.0 / 720.0)
    s = s * r + f(1.0 / 120.0)
    s = s * r + f(1.0 / 24.0)
    s = s * r + f(1.0 / 6.0)
    s = s * r + f(0.5)
    s = s * r + f(1.0)
    s = s * r + f(1.0)
    return f(0.0) if x < low else s * _power_of_two(n)


@compiled({"contract"})
def exp64(x: Any) -> Any:
    """`exp(x)` for x <= 0 in float64; 0 below -708, NaN for NaN."""
    low = -708.0
    t = low if x < low else x
    shift = 6755399441055744.0
    n = t * 1.4426950408889634 + shift
    whole = n - shift
    r = t - whole * 0.693147180369123816490
    r = r - whole * 1.90821492927058770002e-10
    s = 1.0 / 6227020800.0
    s = s * r + 1.0 / 479001600.0
    s = s * r + 1.0 / 39916800.0
    s = s * r + 1.0 / 3628800.0
    s = s * r + 1.0 / 362880.0
    s = s * r + 1.0 / 40320.0
    s = s * r + 1.0 / 5040.0
    s = s * r + 1.0 / 720.0
    s = s * r + 1.0 / 120.0
    s = s * r + 1.0 / 24.0
    s = s * r + 1.0 / 6.0
    s = s * r + 0.5
    s = s * r + 1.0
    s = s * r + 1.0
    return 0.0 if x < low else s * _power_of_two(n)


def exp_of(x: Any) -> Any:
    """`exp(x)` for x <= 0, in compiled code."""
    raise NotImplementedError


@overload(exp_of, inline="always")
def _exp_of(x):
    if x == types.float32:
        return lambda x: exp32(x)
    return lambda x: exp64(x)


class Threads:
    """The OpenMP threads that torch itself works with; a second pool beside it would fight it for the cores."""

    def __init__(self) -> None:
        """Find the runtime that torch is linked with."""
        self.parallel: Any = None
        self.barrier = self.number = 0
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        if path.exists():
            library = ctypes.CDLL(str(path))
            if all(hasattr(library, name) for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num")):
                self.parallel = library.GOMP_parallel
                self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                self.parallel.restype = None
                self.barrier, self.number = (_address(library[n]) for n in ("GOMP_barrier", "omp_get_thread_num"))

    @property
    def count(self) -> int:
        """How many there are; 1 where torch has another kind."""
        return 1 if self.parallel is None else torch.get_num_threads()

    def run(self, kernel: Any, data: int, count: int) -> None:
        """Run a compiled `void kernel(int64 *data)` on `count` threads."""
        if count == 1:
            kernel.ctypes(ctypes.cast(data, kernel.ctypes.argtypes[0]))
        else:
            self.parallel(kernel.address, data, count, 0)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def threads() -> Threads:
    """Return the threads of this process."""
    return Threads()
