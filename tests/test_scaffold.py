"""What holds the package together: which room may use which, what an import costs, metadata that agree."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import implicit_attention

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "implicit_attention"

# From the ground up: a room uses rooms that stand before it, never one that stands after it.
# "__init__" is the public face, `from implicit_attention import ImplicitQueryAttention`.
ORDER = [
    "errors",
    "maps",
    "linear",
    "kernels",
    "solvers",
    "adjoints",
    "fixed_point",
    "masks",
    "positions",
    "attention_map",
    "cache",
    "row_problem",
    "curve",
    "rows",
    "causal_system",
    "diagonal",
    "native",
    "triton_blocks",
    "block_kernels",
    "forward_substitution",
    "operator",
    "inputs",
    "seed",
    "preparation",
    "decoding",
    "layer",
    "diagnostics",
    "plots",
    "__init__",
    "hf",
    "tasks",
    "experiments",
    "training",
    "cli",
]
LAZY = ["triton", "numba", "transformers", "matplotlib", "typer", "rich", "accelerate", "tensorboard", "yaml"]


def module_name(path: Path) -> str:
    """`implicit_attention/solvers/base.py` -> `solvers.base`; a package's `__init__.py` -> the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports anywhere, lazily or for types too."""
    path = FILES[name]
    here = ["implicit_attention", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    own = {dotted.partition(".")[2] for dotted in found if dotted.split(".")[0] == "implicit_attention"}
    return {nearest_module(dotted) for dotted in own} - {name}


def nearest_module(dotted: str) -> str:
    """`solvers.base.Solver` -> `solvers.base`; what no module defines comes from the public face."""
    while dotted and dotted not in FILES:
        dotted = dotted.rpartition(".")[0]
    return dotted or "__init__"


def room(name: str) -> str:
    return name.split(".")[0]


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name):
    assert room(name) in ORDER, f"give the room {room(name)!r} a place in ORDER"
    height = ORDER.index(room(name))
    above = sorted(used for used in imports(name) if ORDER.index(room(used)) > height)
    assert not above, f"{name} may not import {above}: these rooms stand above it"


def test_no_import_cycles():
    try:
        graphlib.TopologicalSorter({name: imports(name) for name in FILES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_implementations_of_a_block_do_not_import_each_other():
    compiled = {"native": [], "triton_blocks": [], "kernels.triton": []}
    for name in FILES:
        for own, used in compiled.items():
            if f"{name}.".startswith(f"{own}."):
                used.extend(imports(name))
    assert not [used for used in compiled["native"] if used.startswith(("triton_blocks", "kernels.triton"))]
    assert not [used for used in compiled["triton_blocks"] if used.startswith("native")]
    assert {used.split(".")[0] for used in compiled["kernels.triton"]} == {"kernels"}


def test_import_leaves_optional_packages_alone():
    loaded = run_python("import sys, implicit_attention; print(*sys.modules)").split()
    assert "torch" in loaded
    assert not set(LAZY) & set(loaded)


def test_a_command_loads_what_it_needs_alone():
    loaded = run_python("import sys, implicit_attention.cli.app; print(*sys.modules)").split()
    assert "typer" in loaded
    assert not {"transformers", "accelerate", "tensorboard", "yaml"} & set(loaded)


def test_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert implicit_attention.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_every_dependency_exactly():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {line.split(">=")[0] for line in wanted if not line.startswith("implicit-attention[")}
    assert names <= set(pins)
    assert not [pin for pin in pins.values() if "+" in pin], "local versions exist on one machine only"
