"""Triton kernels of the causal engine: diagonal blocks, their adjoint, the merge by log-sum-exp, one new token.

The kernels take tensors only. The modules of `causal.triton` call them for a causal map. This package does not import
triton; its modules do, and are imported where they are used.

Arguments have the same names in all kernels, and a kernel documents only the others:

- Sizes: `batch` B, `length` N, `heads` H, `groups` G, `dim` d (a power of two in sweeps). `dp` and `hp` are d and H
  padded to a power of two, at least 16; `samples_` is B padded to a power of two. `n` counts the rows of the block.
- The first row of the block: `first`, or `where`, a number on the device, so that one CUDA graph serves all blocks.
- Strides: `key_b`, `value_g`, ... are the strides of a tensor over samples (b), heads (h), groups (g), rows (n) or
  outputs (o), 0 if all share the tensor. `turn_half` is the distance from cosines to sines. Last dimensions are
  contiguous.
- Tiles: `rows_` and `columns_` of a program.
- Residuals and tolerances of sweeps: `found` as in `sweep.settled`, `allowed` as in `solved.solved`.
- Numbers: `scale` of the scores, `rtol` and `atol`, `eps` of the norm, `normed` (whether queries are normed).
- `sweep` counts sweeps from 0. `slot` counts the elements of a program's scratch `work`.
- Types: sums are in `wide`. Tensors enter products in `operand`. `precision` is that of products of float32 tensors.
- An argument that is None stands for a tensor that the map does not have.

The kernels with one program per sample hand arguments on in groups (`tiles.Constants`, `tiles.Columns`, ...). Their
pointers are those of the program's sample, and rows count from the block's first. `s` is the first of the 16 rows that
are in work, and `m` counts those of them that the block has.
"""
