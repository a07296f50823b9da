"""Compile a Triton kernel for a device that need not be there; run as a process of its own, without the interpreter.

python tests/causal/triton/compile_triton.py KERNEL TYPE [OPTION ...]
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from implicit_attention.causal.triton import sweeps
from implicit_attention.causal.triton.kernels import (
    adjoint,
    forward,
    merge,
    own_rows,
    solved,
    sweep,
    sweep_adjoint,
    token,
)
from implicit_attention.equilibrium import residual_kernel as residual

KERNELS = {
    "forward": forward.settle_block, "adjoint": adjoint.solve_block, "merge": merge.merge_rows,
    "token": token.settle_token, "token-keys": token.prepare_keys, "token-ends": token.prepare_ends,
    "residual": residual.largest_in_rows, "compare-roots": own_rows.compare_roots,
}  # fmt: skip
SWEEPS = {
    "begin": sweep.begin_rows, "queries": sweep.make_queries, "attend": sweep.attend_rows, "judge": sweep.judge_rows,
    "hand-over": sweep.hand_over_rows, "begin-adjoint": sweep_adjoint.begin_adjoint,
    "pull-queries": sweep_adjoint.pull_queries,
    "through-map": sweep_adjoint.through_map,
    "own-columns": sweep_adjoint.own_columns,
    "judge-adjoint": solved.judge_adjoint, "pull-values": sweep_adjoint.pull_values,
    "pull-keys": sweep_adjoint.pull_keys,
    "list-rows": own_rows.list_rows, "own-equations": own_rows.own_equations,
}  # fmt: skip
KERNELS |= SWEEPS
NARROW_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
OPTIONAL = {"constant": "bias", "inverse": "norm"} | {
    name: name for name in ("bias", "start", "added", "turn", "given", "strict")
}
NARROW = {
    "key", "value", "weight", "constant", "added", "given", "query", "grad", "out", "source", "bias", "narrow", "made",
}  # fmt: skip
FLOATS = {"rtol", "atol", "far", "same_root", "slow_ratio", "too_far"}
CONSTANTS = {
    "scale": 0.25,
    "eps": 1e-6,
    "near_singular": 1e-3,
    "same": 1e-2,
    "heads": 4,
    "dim": 24,
    "dp": 32,
    "hp": 16,
    "rows_": 32,
    "span": 4096,
}
OF_SWEEPS = {
    "dim": 64, "samples_": 8, "strictly": False, "raises": True, "hp": 16,
    "checked": True, "least": 1e-7,
}  # fmt: skip
TENSORS = {
    *NARROW, "turn", "strict", "y", "lse", "inverse", "residual", "size", "before_y", "before_lse", "work", "later",
    "allowed", "lam", "d_made", "d_key", "d_value", "own", "gain", "out_lse", "p", "moved", "f", "grams", "start",
    "before", "state", "new_lse", "delta", "us", "inverses", "fixed", "a", "ends", "temperature", "scaled", "judged",
    "largest", "latest", "held", "keys", "sums", "weights", "roots",
}  # fmt: skip
STRIDES = {"_b", "_h", "_g", "_n", "_o"}
INTEGERS = {
    "forward": {"sweeps": "*i64", "status": "*i64"},
    "adjoint": dict.fromkeys(("sweeps", "status", "suspect"), "*i32"),
    "hand-over": {"sweeps": "*i64"},
    "attend": {"far": "*i32"},
    "judge": {"far": "*i32", "counts": "*i32"},
    "list-rows": dict.fromkeys(("far", "counts", "listed"), "*i32"),
    "own-equations": {"listed": "*i32", "ends": "*fp32"},
    "compare-roots": {"outcome": "*i32"},
}


def main(name: str, kind: str, *options: str) -> None:
    constants = {
        **CONSTANTS, "groups": 4 if "ungrouped" in options else 2, "normed": "norm" in options,
        "operand": TYPES[kind], "narrow": TYPES[kind],
        "precision": "tf32x3" if kind in ("bf16", "fp16") else "ieee",
    }  # fmt: skip
    launch = {"num_warps": 4, "num_stages": 1}
    if name in SWEEPS:
        sizes, launch = tiles(name, kind, constants["groups"], plain="strict" not in options)
        constants |= OF_SWEEPS | sizes | {"wide": tl.float32}
        del constants["narrow"]
    elif name == "token-ends":
        constants["wide"] = tl.float64 if kind == "fp64" else tl.float32
    narrow = {"token": {"made", "fixed", "a", "value", "query", "held", "y"}, "token-ends": {"a", "value", "ends"}}.get(
        name, NARROW | {"temperature"} if name == "token-keys" else NARROW
    )  # fmt: skip
    wide = "fp64" if kind == "fp64" else "fp32"
    integers = {p.name: p for p in KERNELS[name].params}
    assert "batch" not in integers or integers["batch"].do_not_specialize, "a batch of 1 would be no tensor"
    signature, known = {}, {}
    for argument in KERNELS[name].arg_names:
        if argument in constants or OPTIONAL.get(argument, "") not in ("", *options):
            signature[argument], known[argument] = "constexpr", constants.get(argument)
        elif argument in TENSORS and argument not in INTEGERS.get(name, {}):
            signature[argument] = f"*{kind}" if argument in narrow else f"*{wide}"
        else:
            other = "fp32" if argument in FLOATS else "i32"
            bits = {"found": "*i64" if kind == "fp64" else "*i32", "status": "*i32", "where": "*i32"}
            signature[argument] = (bits | INTEGERS.get(name, {})).get(argument, other)
    # Addresses and strides are multiples of 16, as those of most tensors are.
    even = [i for i, a in enumerate(KERNELS[name].arg_names) if signature[a][0] == "*" or a[-2:] in STRIDES]
    source = ASTSource(KERNELS[name], signature, known, {(i,): [["tt.divisibility", 16]] for i in even})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    print(
        name,
        kind,
        *options,
        f"{made.metadata.shared} bytes of shared memory",
        f"{len(made.asm['cubin'])} of code",
        "wgmma" if "wgmma" in made.asm["ptx"] else "",
        "async" if "cp.async" in made.asm["ptx"] else "",
        *assembled(made.asm["ptx"]),
    )


def tiles(name: str, kind: str, groups: int, *, plain: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What `sweeps` has for a kernel on Hopper: sizes, and launch options."""
    hopper = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    torch.cuda.get_device_properties = lambda _: hopper  # of a process that ends with this kernel
    system: Any = SimpleNamespace(
        narrow=NARROW_TYPES[kind], wide=torch.float32, dim=OF_SWEEPS["dim"], heads=CONSTANTS["heads"], groups=groups,
        key=torch.empty(0), spec=SimpleNamespace(plain=plain),
    )  # fmt: skip
    of = sweeps.tiles_for(system)
    assert of is not None
    if name in ("queries", "through-map"):
        return {"rows_": of.rows, "depth": of.depth, "span": of.width // system.dim}, of.queries
    launch = of.attends if name == "attend" else of.pulls if name.startswith("pull") else {"num_warps": 4}
    return {"rows_": of.attended, "columns_": of.against}, launch


def assembled(ptx: str) -> list[str]:
    """What the assembler says of registers, and of bytes that a thread spills from them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"\d+ registers|\d+ bytes spill stores", said)


main(*sys.argv[1:])
