"""What holds the package together: which room may use which, what an import costs, metadata that agree."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import implicit_attention
from implicit_attention.causal import cpu
from implicit_attention.causal.cpu import build

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "implicit_attention"

# From the ground up: a room uses rooms that stand before it, never one that stands after it.
# "__init__" is the public face, `from implicit_attention import ImplicitQueryAttention`.
ORDER = [
    "errors",
    "files",
    "settings",
    "recommended",
    "equilibrium",
    "attention",
    "cache",
    "documents",
    "inputs",
    "causal",
    "equation",
    "decoding",
    "solving",
    "layer",
    "seed",
    "inspection",
    "renamed",
    "__init__",
    "hf",
    "tasks",
    "training",
    "cli",
]
# The same within the causal engine. What computes diagonal blocks stands between their oracle and the recursion.
CAUSAL = [
    "row_problem",
    "curve",
    "rows",
    "system",
    "own_columns",
    "diagonal_block",
    "own_roots",
    "diagonal",
    "diagonal_adjoint",
    "feedback_rows",
    "cpu",
    "triton",
    "self_test",
    "engines",
    "feedback",
    "backward_substitution",
    "forward_substitution",
    "operator",
    "__init__",
]
LAZY = ["triton", "transformers", "matplotlib", "bokeh", "pandas", "typer", "rich", "accelerate", "tensorboard", "yaml"]


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


@pytest.mark.parametrize("name", [name for name in FILES if room(name) == "causal"])
def test_imports_point_downwards_in_the_causal_engine(name):
    def floor(module):
        return CAUSAL.index(module.split(".")[1] if "." in module else "__init__")

    above = sorted(used for used in imports(name) if room(used) == "causal" and floor(used) > floor(name))
    assert not above, f"{name} may not import {above}: these modules stand above it"


def test_engines_do_not_import_each_other():
    for own, others in {"cpu": ["triton"], "triton": ["cpu"]}.items():
        for name in FILES:
            if name.startswith(f"causal.{own}"):
                assert not [used for used in imports(name) if used.startswith(tuple(f"causal.{o}" for o in others))]


def test_triton_kernels_know_tensors_alone():
    for name in FILES:
        if name.startswith("causal.triton.kernels."):
            known = ("causal.triton.kernels", "equilibrium.residual_kernel")
            assert all(used.startswith(known) for used in imports(name))


def test_the_package_needs_nothing_of_the_checkout():
    outside = {"studies", "benchmarks", "examples", "tests"}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not outside & {dotted.split(".")[0] for dotted in names}, name


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


def test_constraints_install_on_the_first_python_that_the_project_names():
    """A pin that needs a later patch release, such as 3.11.5, does not install on Debian's 3.11.2."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    for name in pins:
        with suppress(metadata.PackageNotFoundError):
            needed = metadata.metadata(name).get("Requires-Python") or ""
            assert SpecifierSet(needed).contains("3.11.0"), f"{name} {pins[name]} needs Python {needed}"


def test_the_kernels_are_built_where_a_compiler_is():
    if build.find_compilers():
        assert cpu.problem() is None
