"""Compiles the library of kernels: `python build.py [FOLDER] [--sanitize[=SET]]`. It needs a C++17 compiler, not torch.

SET is one of `CAPABILITIES`, or "native": this processor's.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
REASON = Path(__file__).parent / "not_built.txt"  # why an installation has no library
NAME = "libimplicit_attention_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra",
    "-fno-fast-math",  # the default of some compilers, and wrong: sums in another order, no NaN, no Inf
    "-fno-math-errno", "-fno-trapping-math",  # neither changes what NaN and Inf mean
)  # fmt: skip
# Watched by sanitizers: one set of instructions, compiled in less time.
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1",
    "-DONE_CAPABILITY",
)  # fmt: skip
CAPABILITIES: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    # By name, and no more than `csrc/library.cpp` looks for: levels such as x86-64-v3 are known from GCC 11 on.
    CAPABILITIES = {
        "baseline": ("-msse4.2", "-mpopcnt"),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": (
            "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
        ),
    }  # fmt: skip


def fingerprint() -> str | None:
    """Return what tells one state of the sources from another; None where they are not here."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] if files else None


def find_compilers(compiler: str | None = None) -> list[list[str]]:
    """Return the compilers to try, as commands.

    Args:
        compiler: The one to use. If None, that of the variable CXX; without it those of `COMPILERS` on the PATH.

    Raises:
        RuntimeError: If the one to use is not there.
    """
    asked = compiler or os.environ.get("CXX")
    if not asked:
        return [[found] for name in COMPILERS if (found := shutil.which(name))]
    command = shlex.split(asked)
    if not shutil.which(command[0]):
        raise RuntimeError(f"The C++ compiler {asked}, which was asked for (CXX), is not on the PATH.")
    return [command]


def compile_library(out_dir: Path, compiler: str | None = None, *, sanitize: str | None = None) -> Path | None:
    """Compile the kernels, once for each instruction set, and link them into one library.

    Args:
        out_dir: Where the library goes.
        compiler: As in `find_compilers`, whose first that succeeds is used.
        sanitize: The one set of instructions over which AddressSanitizer and UBSan watch; the process that loads the
            library must have their runtime. None for all sets, unwatched.

    Returns:
        The library; None without a compiler, after a line that says so.

    Raises:
        RuntimeError: If all compilers fail; the message holds what they said.
    """
    said = []
    if sys.platform == "win32":  # there are no kernels for Windows yet, whatever compiler there is
        return None
    for command in find_compilers(compiler):
        try:
            return _compile(command, out_dir, sanitize)
        except RuntimeError as error:
            said.append(str(error))
    if said:
        raise RuntimeError("\n".join(said))
    print(f"implicit-attention: no C++ compiler ({', '.join(COMPILERS)}) on the PATH; the CPU kernels are left out.",
          file=sys.stderr)  # fmt: skip
    return None


def _compile(compiler: list[str], out_dir: Path, sanitize: str | None) -> Path:
    """Compile and link with one compiler; arguments as in `compile_library`."""
    extra: tuple[str, ...] = ()
    capabilities = CAPABILITIES
    if sanitize is not None:
        extra, capabilities = SANITIZERS, {"baseline": (CAPABILITIES | {"native": ("-march=native",)})[sanitize]}
    units: dict[str, tuple[str, tuple[str, ...]]] = {  # source and flags, by name of the object
        f"kernels_{name}": ("kernels.cpp", (*flags, f"-DCAPABILITY={name}")) for name, flags in capabilities.items()
    }
    units |= {name: (f"{name}.cpp", capabilities["baseline"]) for name in ("library", "row_solver", "row_curve")}
    extra += (f'-DSOURCES="{fingerprint()}"',)
    out = out_dir / NAME
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compile_unit(name: str) -> str:
            source, flags = units[name]
            made = str(Path(folder) / f"{name}.o")
            _run(*compiler, *FLAGS, *extra, *flags, "-c", str(SOURCES / source), "-o", made)
            return made

        objects = list(pool.map(compile_unit, units))
        linked = Path(folder) / NAME
        _run(*compiler, "-shared", *extra, *objects, "-o", str(linked))
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".") as beside:
            shutil.copyfile(linked, Path(beside) / NAME)
            (Path(beside) / NAME).replace(out)  # at once: a process that has the old one loaded keeps it
    return out


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    sets = [argument.partition("=")[2] or "native" for argument in sys.argv[1:] if argument.startswith("--sanitize")]
    print(compile_library(folders[0] if folders else Path(__file__).parent, sanitize=sets[0] if sets else None))
