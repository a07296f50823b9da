"""What calls the Triton kernels that sweep over blocks of many rows, and when a block is left to others.

A block is swept while its sweeps contract. One that does not settle, or that has a row whose own weight is far from
where it started, so that it may be at another root than is wanted, is left as it was.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from implicit_attention.causal_system import CausalSystem
from implicit_attention.diagonal import FAR, SAME_ROOT
from implicit_attention.kernels.triton import interpreted, sweep, sweep_adjoint
from implicit_attention.triton_blocks.call import TYPES, Call, contiguous
from implicit_attention.triton_blocks.token import solve_token

MOST_SWEEPS = 24
WIDEST = ((8192, 512), (0, 256))  # rows of the widest blocks, by the least length that has them
_LEAST_DIM, _MOST_DIM = 16, 256
_GRID = 65536  # programs in the third dimension of a launch
_FIRST, _MORE = 4, 2  # sweeps that are launched before the first look at the device, if nothing is known, and before others


@dataclass(frozen=True)
class _Tiles:
    """Sizes of the tiles of the kernels.

    Attributes:
        rows: Rows of a program that multiplies by Omega_Q.
        width: Outputs of such a program, at least a head's.
        depth: What such a program multiplies together.
        queries: Launch options of such a program.
        attended: Rows and columns of a tile of attention.
        attends: Launch options of its program.
    """

    rows: int
    width: int
    depth: int
    queries: dict[str, int]
    attended: int
    attends: dict[str, int]


def _tiles(system: CausalSystem) -> _Tiles:
    if interpreted():
        one = {"num_warps": 1, "num_stages": 1}
        return _Tiles(rows=16, width=32, depth=16, queries=one, attended=16, attends=one)
    if system.narrow == system.wide:
        return _Tiles(
            rows=64, width=64, depth=32, queries={"num_warps": 4, "num_stages": 2},
            attended=32, attends={"num_warps": 4, "num_stages": 1},
        )  # fmt: skip
    return _Tiles(
        rows=128, width=128, depth=64, queries={"num_warps": 8, "num_stages": 3},
        attended=64, attends={"num_warps": 4, "num_stages": 2},
    )  # fmt: skip


def serves(system: CausalSystem) -> bool:
    """Return whether the kernels can sweep over blocks of a map that Triton's other kernels serve."""
    dim = system.dim
    whole = _LEAST_DIM <= dim <= _MOST_DIM and dim & (dim - 1) == 0
    return whole and system.batch < _GRID and (interpreted() or system.wide == torch.float32)


def widest(length: int) -> int:
    """Return the rows of the blocks that are swept first, of a sequence of so many: a longer one has more to hide in.

    Args:
        length: N.
    """
    return next(rows for least, rows in WIDEST if length >= least)


class _Sweeps:
    """What both directions need to know of a map."""

    def __init__(self, system: CausalSystem, rows: int) -> None:
        self.system, self.call, self.tiles = system, Call(system), _tiles(system)
        self.weight = self.call.weight
        if self.weight is None:  # one head whose key has absorbed Omega_Q
            self.weight = torch.eye(system.dim, dtype=system.narrow, device=system.key.device)
        self.span = max(1, self.tiles.width // system.dim)
        size = system.batch * rows * system.heads * system.dim
        self.state = system.key.new_empty(2 * size, dtype=system.wide)
        self.status = torch.empty(system.batch, dtype=torch.int32, device=system.key.device)
        self.bits = torch.int64 if system.wide == torch.float64 else torch.int32
        self.samples = int(triton.next_power_of_2(system.batch))
        self.guess = _FIRST
        strides = self.call.strides()
        self.key_value = {name: at for name, at in strides.items() if name[:4] in ("key_", "valu")}
        self.turned = {name: strides[name] for name in ("turn_b", "turn_half")}
        self.key_strides = {name: at for name, at in strides.items() if name[:4] == "key_"}
        self.shape = {"heads": system.heads, "groups": system.groups, "dim": system.dim}
        self.types = {
            "wide": TYPES[system.wide], "operand": self.call.operand, "precision": self.call.precision,
        }  # fmt: skip

    def by_map(self, n: int, out: int) -> tuple[int, int, int]:
        """Programs that multiply by Omega_Q, for so many heads' worth of outputs."""
        return triton.cdiv(n, self.tiles.rows), triton.cdiv(out, self.span), self.system.batch

    def by_tile(self, n: int, heads: int) -> tuple[int, int, int]:
        """Programs that attend."""
        return triton.cdiv(n, self.tiles.attended), heads, self.system.batch


class ForwardSweeps(_Sweeps):
    """Settles blocks in place."""

    def __init__(self, system: CausalSystem, into: dict[str, Tensor], rows: int, rtol: float, atol: float) -> None:
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            into: As for `engine.ForwardKernel`.
            rows: The most rows of a block.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        super().__init__(system, rows)
        self.into, self.rtol, self.atol = into, rtol, atol
        batch, new = system.batch, system.key.new_empty
        self.narrow = new(batch * rows * system.heads * system.dim)
        self.lse = new(batch * system.heads * rows, dtype=system.wide)
        self.found = new(MOST_SWEEPS * 2 * batch * rows, dtype=self.bits)
        self.far = new(MOST_SWEEPS * batch * rows, dtype=torch.int32)
        self.bias, self.added = contiguous(system.bias), contiguous(system.added)
        query_map = system.function.query_map
        self.normed = {"eps": query_map.eps, "normed": query_map.normalize}
        self.inverse = into["inverse"] if query_map.normalize else None
        self.start: Tensor | None = None
        if system.self_score is None:
            self.start = new(batch, system.heads, system.length, dtype=system.wide)
            self._make_queries(self.call.value, self.call.value.stride()[:3], self.start, 0, system.length, 0)

    def settle(self, rows: slice) -> bool:
        """Settle a block; return whether that has been done. If not, it is as it was.

        Args:
            rows: The block.
        """
        system, into, n = self.system, self.into, rows.stop - rows.start
        strict, strict_b, strict_h = system.compiled_bias(rows) or (None, 0, 0)
        told = {"length": system.length, "first": rows.start, "n": n}
        judged = {"batch": system.batch, "rtol": self.rtol, "atol": self.atol}
        found = self.found[: MOST_SWEEPS * 2 * system.batch * n].zero_()
        far = self.far[: MOST_SWEEPS * system.batch * n].zero_()
        attends, tile = self.tiles.attends, self.tiles.attended
        grid = self.by_tile(n, system.heads)
        sweep.begin_rows[grid](
            into["y"], into["lse"], self.call.value, self.state, self.narrow, *self.call.value.stride()[:3],
            rows_=tile, **told, **self.shape,
        )  # fmt: skip
        done, most = 0, self.guess
        while done < MOST_SWEEPS:
            for at in range(done, most):
                self._make_queries(self.narrow, (0, 0, 0), None, rows.start, n, at)
                sweep.attend_rows[grid](
                    self.call.key, self.call.value, into["query"], self.call.given, strict, self.start,
                    into["y"], into["lse"], self.state, self.narrow, self.lse, found, far,
                    strict_b=strict_b, strict_h=strict_h, sweep=at, too_far=FAR, rows_=tile, columns_=tile,
                    scale=system.spec.scale, **self.key_value, **told, **judged, **self.shape, **self.types, **attends,
                )  # fmt: skip
            sweep.judge_rows[(system.batch,)](
                found, far, self.status, n=n, sweeps=most, wide=self.types["wide"], **judged
            )
            states = self._hand_over(rows)
            if min(states) < -1:
                checked = self._check_roots(rows, strict, states, most)
                if checked is None:
                    return False
                states = self._hand_over(rows) if checked else [-1]
            if min(states) >= 0:
                self.guess = max(states) + 1
                return True
            done, most = most, min(most + _MORE, MOST_SWEEPS)
        return False

    def _hand_over(self, rows: slice) -> list[int]:
        """Hand over what has settled, if all has; return the samples' states."""
        system, into, n = self.system, self.into, rows.stop - rows.start
        sweep.hand_over_rows[self.by_tile(n, system.heads)](
            self.status, self.state, self.lse, self.found, into["y"], into["lse"], into["residual"], into["size"],
            into["sweeps"], batch=system.batch, length=system.length, first=rows.start, n=n, heads=system.heads,
            dim=system.dim, rows_=self.tiles.attended, samples_=self.samples, wide=self.types["wide"],
        )  # fmt: skip
        states: list[int] = self.status.tolist()
        return states

    def _check_roots(self, rows: slice, strict: Tensor | None, states: list[int], most: int) -> bool | None:
        """Solve the own equations of rows that are far from where they started, in samples that have settled.

        Args:
            rows: The block.
            strict: Its biases.
            states: As `sweep.judge_rows` leaves them.
            most: Sweeps that were launched.

        Returns:
            True if these samples are at the roots that are wanted; False if some rows were not, which have been taken
            there, so that their samples have to be swept on; None if an equation was not solved.
        """
        system, n, device = self.system, rows.stop - rows.start, self.state.device
        batch, heads, dim = system.batch, system.heads, system.dim
        sample = torch.arange(batch, device=device)
        at = torch.tensor([-2 - state if state < -1 else 0 for state in states], device=device)
        checked = torch.tensor([state < -1 for state in states], device=device)
        far = self.far[: MOST_SWEEPS * batch * n].view(MOST_SWEEPS, batch, n)[at, sample] > 0
        samples, positions = (far & checked[:, None]).nonzero(as_tuple=True)
        state = self.state[: 2 * batch * n * heads * dim].view(2, batch, n, heads, dim)
        f = state[1 - at % 2, sample]  # F of the iterates, [B, n, H, d]
        lse = self.lse[: batch * heads * n].view(batch, heads, n)[samples, :, positions]  # [R, H]
        row = system.row(samples, rows.start + positions, None)
        key = system.key[samples, :, rows.start + positions].to(system.wide) * system.spec.scale
        query = system.per_head(self.into["query"][samples, rows.start + positions].to(system.wide))
        bias = lse.new_zeros(())
        if strict is not None:
            diagonal = strict.diagonal(dim1=-2, dim2=-1).expand(batch, heads, n)
            bias = diagonal[samples, :, positions]
        p = torch.exp((key * query).sum(-1) + bias - lse)
        others = (1.0 - p).clamp_min(torch.finfo(p.dtype).tiny)
        a = (f[samples, positions] - p[..., None] * row.value) / others[..., None]
        made = self._made(a, row.value - a, row.constant)
        eps = self.normed["eps"] if self.normed["normed"] else None
        root, moved, _ = solve_token(row.key, made, lse + others.log() - bias, eps)
        off = (root - p).abs().amax(-1)
        lost, elsewhere = torch.stack([~torch.isfinite(moved).all(), (off > SAME_ROOT).any()]).tolist()
        if lost:
            return None
        if not elsewhere:
            self.status.copy_(torch.where(checked, at, self.status))
            return True
        f = f.clone()
        f[samples, positions] = torch.lerp(a, row.value, root[..., None])
        state[:, checked] = f[checked]
        self.narrow[: f.numel()].view(f.shape)[checked] = f[checked].to(system.narrow)
        # Their samples have settled at no sweep so far.
        residuals = self.found[: MOST_SWEEPS * 2 * batch * n].view(MOST_SWEEPS, 2, batch, n)
        endless = f.new_full((), torch.inf).view(self.bits)
        residuals[:most, 0, samples[off > SAME_ROOT], positions[off > SAME_ROOT]] = endless
        return False

    def _made(self, a: Tensor, step: Tensor, constant: Tensor | None) -> Tensor:
        """The queries of rows before the norm as linear maps of `(1, p)`, `[R, G, 1 + H, d]`, for ends `[R, H, d]`."""
        made = self.system.contributions(a.to(self.system.narrow).to(a.dtype)).sum(2)
        made = made if constant is None else made + constant
        ways = self.system.contributions(step.to(self.system.narrow).to(a.dtype))
        return torch.cat([made[:, :, None], ways], 2)

    def _make_queries(
        self, source: Tensor, strides: tuple[int, ...], start: Tensor | None, first: int, n: int, at: int
    ) -> None:
        system, tiles = self.system, self.tiles
        sweep.make_queries[self.by_map(n, system.groups)](
            source, self.weight, self.bias, self.added, self.call.turn, self.call.key, self.into["query"],
            self.inverse, start, self.found, *strides, weight_o=self.weight.stride(0), batch=system.batch,
            length=system.length, first=first, n=n, sweep=at, rtol=self.rtol, atol=self.atol,
            scale=system.spec.scale, span=self.span, rows_=tiles.rows, depth=tiles.depth,
            **self.key_strides, **self.turned, **self.normed, **self.shape, **self.types, **tiles.queries,
        )  # fmt: skip


class AdjointSweeps(_Sweeps):
    """Solves the adjoint of blocks in place."""

    def __init__(
        self, system: CausalSystem, at: dict[str, Tensor], grad: Tensor, into: dict[str, Tensor], allowed: Tensor,
        rows: int,
    ) -> None:  # fmt: skip
        """Prepare what is the same for all blocks.

        Args:
            system: The map.
            at: The equilibrium, as for `engine.AdjointKernel`.
            grad: Cotangent, `[B, N, H, d]`.
            into: The tensors of the recursion by name: later `[B, N, G, d]`, the cotangents of the queries from rows
                after the block; lam `[B, N, H, d]`, whose storage may be that of `later`; d_key and d_value, which are
                added to; made `[B, N, G d]`; and own `[B, H, N]` where own scores are given.
            allowed: Tolerance per sample, `[B]`.
            rows: The most rows of a block.
        """
        super().__init__(system, rows)
        self.at = {name: t.detach().contiguous() for name, t in at.items() if t.numel()}
        self.grad, self.into, self.allowed = grad.detach().contiguous(), into, allowed.to(system.wide).contiguous()
        size = system.batch * rows * system.heads * system.dim
        self.narrow = system.key.new_empty(2 * size)
        self.found = system.key.new_empty(MOST_SWEEPS, system.batch, dtype=self.bits)
        self.residual = system.key.new_empty(system.batch, dtype=system.wide)

    def solve(self, rows: slice) -> int:
        """Solve a block; return the sweeps that it took, 0 if it is not solved and left as it was.

        Args:
            rows: The block.
        """
        system, call, at, into, n = self.system, self.call, self.at, self.into, rows.stop - rows.start
        strict, strict_b, strict_h = system.compiled_bias(rows) or (None, 0, 0)
        told = {"length": system.length, "first": rows.start, "n": n}
        tiles, tile = self.tiles, self.tiles.attended
        biased = {"strict_b": strict_b, "strict_h": strict_h, "scale": system.spec.scale}
        attends = {"batch": system.batch, "rows_": tile, "columns_": tile, **biased, **self.key_value, **told,
                   **self.shape, **self.types, **tiles.attends}  # fmt: skip
        known = (call.given, strict, at["y"], at["lse"])
        self.found.zero_()
        sweep_adjoint.begin_adjoint[self.by_tile(n, system.heads)](
            self.grad, self.state, self.narrow, heads=system.heads, dim=system.dim, rows_=tile, **told
        )
        done, most = 0, self.guess
        while done < MOST_SWEEPS:
            for i in range(done, most):
                sweep_adjoint.pull_queries[self.by_tile(n, system.groups)](
                    call.key, call.value, at["query"], at.get("inverse"), call.turn, *known, self.narrow,
                    into["later"], into["made"], self.found, self.allowed, sweep=i, **self.turned, **attends,
                )  # fmt: skip
                sweep_adjoint.through_map[self.by_map(n, system.heads)](
                    into["made"], self.weight, self.grad, self.state, self.narrow, self.found, self.allowed,
                    weight_o=self.weight.stride(0), batch=system.batch, sweep=i, span=self.span, rows_=tiles.rows,
                    depth=tiles.depth, **told, **self.shape, **self.types, **tiles.queries,
                )  # fmt: skip
            sweep_adjoint.judge_adjoint[(system.batch,)](
                self.found, self.allowed, self.status, self.residual, system.batch, most, self.types["wide"]
            )
            sweep_adjoint.pull_values[self.by_tile(n, system.groups)](
                call.key, call.value, at["query"], *known, self.narrow, into["d_value"], into.get("own"),
                self.status, samples_=self.samples, **attends,
            )  # fmt: skip
            sweep_adjoint.pull_keys[self.by_tile(n, system.heads)](
                call.key, call.value, at["query"], *known, self.state, self.narrow, into["d_key"], into["lam"],
                self.status, samples_=self.samples, **attends,
            )  # fmt: skip
            states: list[int] = self.status.tolist()
            if min(states) >= 0:
                self.guess = max(states) + 1
                return self.guess
            done, most = most, min(most + _MORE, MOST_SWEEPS)
        return 0
