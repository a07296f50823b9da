"""Builds the C++ kernels into the wheel where there is a compiler; where there is none, the wheel is pure Python."""

import os
import sys
import sysconfig
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOM = Path("implicit_attention") / "causal" / "cpu"
REQUIRED = "IMPLICIT_ATTENTION_REQUIRE_KERNELS"  # set it to 1 where a wheel without kernels must not be made


class CustomBuildHook(BuildHookInterface[Any]):
    """Compiles `implicit_attention/causal/cpu/csrc`, beside the sources, so that an editable install has it too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library and tell hatch to ship it."""
        if self.target_name != "wheel":
            return
        room = Path(self.root) / ROOM
        script, why = _build_script(room), ""
        with suppress(OSError):  # there may be none, from an earlier try
            script.REASON.unlink()
        try:
            library = script.compile_library(room)
        except (RuntimeError, OSError) as error:
            library, why = None, str(error)
        if library is None:
            if os.environ.get(REQUIRED) == "1":
                raise RuntimeError(f"{REQUIRED}=1, and {why or 'there is no C++ compiler on the PATH'}")
            if why:
                print(f"implicit-attention: the C++ kernels do not build and are left out.\n{why}", file=sys.stderr)
                with suppress(OSError):  # a checkout that cannot be written to
                    script.REASON.write_text(why, encoding="utf-8")
                    build_data["artifacts"].append((ROOM / script.REASON.name).as_posix())
            return
        build_data["pure_python"] = False
        # The library knows neither Python nor torch's headers: one wheel serves every version of both.
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append((ROOM / library.name).as_posix())


def _build_script(room: Path) -> ModuleType:
    """`build.py`, without the package around it, which imports torch."""
    spec = spec_from_file_location("build_cpu_kernels", room / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
