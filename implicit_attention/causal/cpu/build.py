"""Compiles the library of kernels: `python build.py [FOLDER] [--sanitize[=SET]]`. It needs a C++17 compiler, not torch.

SET is one of `CAPABILITIES`, or "native": this processor's.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
NAME = "libimplicit_attention_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
    "-fno-math-errno", "-fno-trapping-math",  # neither changes what NaN and Inf mean
)  # fmt: skip
# Watched by sanitizers: one set of instructions, compiled in less time.
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1",
    "-DONE_CAPABILITY",
)  # fmt: skip
CAPABILITIES: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    CAPABILITIES = {
        "baseline": ("-march=x86-64-v2",),
        "avx2": ("-march=x86-64-v3",),
        "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    }


def find_compiler(compiler: str | None = None) -> str | None:
    """Return the compiler to use: the one given, that of the variable CXX, or the first of `COMPILERS` on the PATH."""
    wanted = (compiler,) if compiler else (os.environ.get("CXX"), *COMPILERS)
    return next((found for name in wanted if name and (found := shutil.which(name))), None)


def compile_library(out_dir: Path, compiler: str | None = None, *, sanitize: str | None = None) -> Path | None:
    """Compile the kernels, once for each instruction set, and link them into one library.

    Args:
        out_dir: Where the library goes.
        compiler: Name or path; `find_compiler` chooses if None.
        sanitize: The one set of instructions over which AddressSanitizer and UBSan watch; the process that loads the
            library must have their runtime. None for all sets, unwatched.

    Returns:
        The library; None without a compiler, after a line that says so.

    Raises:
        RuntimeError: If the compiler fails; the message holds what it said.
    """
    found = find_compiler(compiler)
    if found is None:
        names = compiler or ", ".join(COMPILERS)
        print(
            f"implicit-attention: no C++ compiler ({names}) on the PATH; the CPU kernels are left out.", file=sys.stderr
        )
        return None
    extra: tuple[str, ...] = ()
    capabilities = CAPABILITIES
    if sanitize is not None:
        extra, capabilities = SANITIZERS, {"baseline": (CAPABILITIES | {"native": ("-march=native",)})[sanitize]}
    units: dict[str, tuple[str, tuple[str, ...]]] = {  # source and flags, by name of the object
        f"kernels_{name}": ("kernels.cpp", (*flags, f"-DCAPABILITY={name}")) for name, flags in capabilities.items()
    }
    units |= {name: (f"{name}.cpp", capabilities["baseline"]) for name in ("library", "row_solver", "row_curve")}
    out = out_dir / NAME
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compile_unit(name: str) -> str:
            source, flags = units[name]
            made = str(Path(folder) / f"{name}.o")
            _run(found, *FLAGS, *extra, *flags, "-c", str(SOURCES / source), "-o", made)
            return made

        objects = list(pool.map(compile_unit, units))
        linked = Path(folder) / NAME
        _run(found, "-shared", *extra, *objects, "-o", str(linked))
        shutil.copyfile(linked, out.with_suffix(".part"))
        out.with_suffix(".part").replace(out)  # at once: a process that has the old one loaded keeps it
    return out


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    sets = [argument.partition("=")[2] or "native" for argument in sys.argv[1:] if argument.startswith("--sanitize")]
    print(compile_library(folders[0] if folders else Path(__file__).parent, sanitize=sets[0] if sets else None))
