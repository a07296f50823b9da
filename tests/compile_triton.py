"""Compile a Triton kernel for a device that need not be there; run as a process of its own, without the interpreter.

python tests/compile_triton.py KERNEL TYPE [OPTION ...]
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from implicit_attention.kernels.triton import adjoint, forward, merge, residual, token

KERNELS = {
    "forward": forward.settle_block.fn, "adjoint": adjoint.solve_block.fn, "merge": merge.merge_rows,
    "token": token.settle_token, "residual": residual.largest_in_rows,
}  # fmt: skip
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
OPTIONAL = {"constant": "bias", "inverse": "norm", **{name: name for name in ("added", "turn", "given", "strict")}}
NARROW = {"key", "value", "weight", "constant", "added", "given", "query", "grad", "out"}
FLOATS = {"rtol", "atol", "far", "same_root", "slow_ratio"}
CONSTANTS = {
    "scale": 0.25, "eps": 1e-6, "near_singular": 1e-3, "heads": 4, "groups": 2, "dim": 24, "dp": 32, "hp": 16,
    "rows_": 32, "span": 4096,
}  # fmt: skip
TENSORS = {
    *NARROW, "turn", "strict", "y", "lse", "inverse", "residual", "size", "before_y", "before_lse", "work", "later",
    "allowed", "lam", "d_made", "d_key", "d_value", "own", "gain", "out_lse", "a", "step", "p", "moved", "fixed",
    "f",
}  # fmt: skip
INTEGERS = {
    "forward": {"sweeps": "*i64", "status": "*i64"},
    "adjoint": dict.fromkeys(("sweeps", "status", "suspect"), "*i32"),
}


def main(name: str, kind: str, *options: str) -> None:
    constants = {
        **CONSTANTS, "normed": "norm" in options, "operand": TYPES[kind], "narrow": TYPES[kind],
        "precision": "tf32x3" if kind in ("bf16", "fp16") else "ieee",
    }  # fmt: skip
    narrow = {"weight", "fixed"} if name == "token" else NARROW
    wide = "fp64" if kind == "fp64" else "fp32"
    signature, known = {}, {}
    for argument in KERNELS[name].arg_names:
        if argument in constants or OPTIONAL.get(argument, "") not in ("", *options):
            signature[argument], known[argument] = "constexpr", constants.get(argument)
        elif argument in TENSORS:
            signature[argument] = f"*{kind}" if argument in narrow else f"*{wide}"
        else:
            other = "fp32" if argument in FLOATS else "i32"
            bits = {"found": "*i64" if kind == "fp64" else "*i32"}
            signature[argument] = (bits | INTEGERS.get(name, {})).get(argument, other)
    source = ASTSource(KERNELS[name], signature, known)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 1})
    print(name, kind, *options, f"{made.metadata.shared} bytes of shared memory", f"{len(made.asm['cubin'])} of code")


main(*sys.argv[1:])
