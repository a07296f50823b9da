"""Old module names of version 0.1.0: `import implicit_attention.solvers` imports the module under its new name."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "implicit_attention"
RENAMED = {
    "adjoints": "equilibrium.adjoints",
    "attention_map": "attention.map",
    "block_kernels": "causal.engines",
    "causal_system": "causal.system",
    "curve": "causal.curve",
    "diagnostics": "inspection.diagnostics",
    "diagonal": "causal.diagonal",
    "fixed_point": "equilibrium.fixed_point",
    "forward_substitution": "causal.forward_substitution",
    "hf.equilibrium": "hf.block",
    "kernels": "attention",
    "kernels.attention": "attention.operation",
    "kernels.flash": "attention.flash_cpu",
    "kernels.residual": "equilibrium.residual",
    "kernels.triton": "causal.triton.kernels",
    "kernels.triton.residual": "equilibrium.residual_kernel",
    "linear": "equilibrium.linear",
    "maps": "equilibrium.maps",
    "masks": "attention.masks",
    "operator": "causal.operator",
    "plots": "inspection.plots",
    "positions": "attention.positions",
    "preparation": "equation",
    "row_problem": "causal.row_problem",
    "rows": "causal.rows",
    "solvers": "equilibrium.solvers",
    "training.files": "files",
    "triton_blocks": "causal.triton",
}


class _Renamed(MetaPathFinder, Loader):
    """Finds a module by its old name and loads it under its new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = _new_name(fullname)
        return None if name is None else ModuleSpec(fullname, self, origin=name, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        module = import_module(spec.origin)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own `__spec__`, which the import system has replaced."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state


def _new_name(fullname: str) -> str | None:
    """The new name of a module of 0.1.0, by the longest renamed part of its old name; None if it has none."""
    if not fullname.startswith(f"{PACKAGE}."):
        return None
    parts = fullname.split(".")[1:]
    for count in range(len(parts), 0, -1):
        new = RENAMED.get(".".join(parts[:count]))
        if new is not None:
            return ".".join([PACKAGE, new, *parts[count:]])
    return None


def install() -> None:
    """Make the old names importable. None of them is the name of a module today."""
    if any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Renamed())
    for old, new in RENAMED.items():
        module = sys.modules.get(f"{PACKAGE}.{new}")
        if module is None:
            continue
        # An import would bind the attribute `implicit_attention.fixed_point`, a function, to the module of that name.
        sys.modules.setdefault(f"{PACKAGE}.{old}", module)
        parent, _, name = f"{PACKAGE}.{old}".rpartition(".")
        if not hasattr(sys.modules[parent], name):
            setattr(sys.modules[parent], name, module)
