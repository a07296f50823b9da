"""Sizes of tiles, whether they fit a device, and launch options of programs that sweep over blocks of many rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_attention.causal.system import CausalSystem
from implicit_attention.equilibrium.triton_available import interpreted

_NARROW_DIM = 64  # largest head with room for three stages and four programs on a multiprocessor
_SPARE = 10 * 1024  # bytes of shared memory that a program takes beside its tiles, at most
_SPARE_OF_ONE = 1024  # the same of a program that takes a whole block
_LEAST = 16  # smallest tile dimension of `tl.dot`


@dataclass(frozen=True)
class Tiles:
    """Sizes of the kernels' tiles.

    Attributes:
        rows: Rows of a program that multiplies by Omega_Q.
        width: Outputs of such a program, at least one head.
        depth: Inputs that one product of such a program takes.
        queries: Launch options of such a program.
        attended: Rows of an attention program; its columns if a program computes columns.
        against: Columns (or rows) of one tile of such a program; divides `attended`.
        attends: Launch options of such a program.
        pulls: Launch options of an attention program of the adjoint.
    """

    rows: int
    width: int
    depth: int
    queries: dict[str, int]
    attended: int
    against: int
    attends: dict[str, int]
    pulls: dict[str, int]


def padded(size: int) -> int:
    """Return the power of two to which a tile pads a size."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def too_large(key: Tensor, heads: int, dim: int, *, maps: bool) -> str | None:
    """Return why a program's tiles do not fit the shared memory of a multiprocessor, in words; None if they do.

    Args:
        key: Tells the dtype and the device.
        heads: H.
        dim: d.
        maps: Whether the program applies Omega_Q, of which it holds the tile of a head.
    """
    if interpreted() or key.device.type != "cuda":
        return None
    wide = torch.promote_types(key.dtype, torch.float32).itemsize
    needed = 2 * wide * padded(heads) * padded(dim)  # of a row equation: keys, and how the queries follow p
    if maps:
        needed = max(needed, key.dtype.itemsize * padded(dim) * (padded(dim) + 32))  # rows stand beside the tile
    device: Any = torch.cuda.get_device_properties(key.device)
    room = device.shared_memory_per_block_optin
    if needed + _SPARE_OF_ONE <= room:
        return None
    return f"{heads} heads of {dim} in {key.dtype} need {needed} bytes of shared memory, and the device has {room}"


def tiles_for(system: CausalSystem) -> Tiles | None:
    """Return the tiles for a map, None if the shared memory of a multiprocessor does not hold them.

    Args:
        system: The map.

    Returns:
        The tiles.
    """
    if interpreted():
        one = {"num_warps": 1, "num_stages": 1}
        return Tiles(rows=16, width=32, depth=16, queries=one, attended=32, against=16, attends=one, pulls=one)
    half, dim, size = system.narrow != system.wide, system.dim, system.narrow.itemsize
    rows, depth, tile = (128, 64, 64) if half else (64, 32, 32)
    width = max(rows, dim)
    device: Any = torch.cuda.get_device_properties(system.key.device)
    room = device.shared_memory_per_block_optin - _SPARE
    by_map = min(3 if half else 2, room // ((rows + width) * depth * size))
    # A program holds two tiles, and two more per stage with their biases. Heads above `_NARROW_DIM` get one stage less,
    # so that two programs share a multiprocessor: that is worth more than a stage.
    tiles, biases = 2 * tile * dim * size, 0 if system.spec.plain else tile * tile * system.wide.itemsize
    by_tile = min((3 if dim <= _NARROW_DIM else 2) if half else 1, (room - tiles) // (tiles + biases))
    if min(by_map, by_tile) < 1:
        return None
    queries = {"num_warps": 8 if half else 4, "num_stages": by_map}
    attends = {"num_warps": 4 if dim <= 128 else 8, "num_stages": by_tile}
    pulls = dict(attends)
    # Registers of a thread limit the programs on a multiprocessor, which has 65536; README.md has the table.
    if half and width <= rows:  # two programs
        queries["maxnreg"] = 128
    if half and dim <= _NARROW_DIM:  # four programs
        attends["maxnreg"] = 128
    if half and dim <= _NARROW_DIM and system.groups == system.heads:  # three programs
        pulls["maxnreg"] = 168
    return Tiles(
        rows=rows, width=width, depth=depth, queries=queries, attended=tile, against=tile, attends=attends, pulls=pulls
    )
