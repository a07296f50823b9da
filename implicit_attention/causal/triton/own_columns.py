"""Own columns in the sweeps of an adjoint, solved exactly."""

from typing import Any

import torch
from torch import Tensor

from implicit_attention.causal.diagonal_adjoint import NEAR_SINGULAR, near_singular
from implicit_attention.causal.own_columns import own_jacobian
from implicit_attention.causal.system import Queries
from implicit_attention.causal.triton.call import AT_ONCE
from implicit_attention.causal.triton.kernels import sweep_adjoint


class OwnColumns:
    """Solves the own columns, of rank one per head, exactly in every sweep; see `diagonal_adjoint._OwnColumns`."""

    def __init__(self, sweeps: Any, rows: slice) -> None:
        """Take the equilibrium of a block.

        Args:
            sweeps: The `AdjointSweeps` of the block, which imports this file.
            rows: The block.
        """
        self.sweeps, self.rows, self.n = sweeps, rows, rows.stop - rows.start
        system, at = sweeps.system, sweeps.at
        batch, heads, dim, n = system.batch, system.heads, system.dim, self.n
        self.y = at["y"][:, rows].to(system.wide).contiguous()
        inverse = at.get("inverse")
        queries = Queries(at["query"][:, rows].to(system.wide), None if inverse is None else inverse[:, rows])
        key = system.key[:, :, rows].to(system.wide) * system.spec.scale
        own = (key * system.per_head(queries.query.transpose(1, 2))).sum(-1)
        _, bias = system.block_bias(rows)
        lse = at["lse"][:, :, rows]
        p = torch.exp((own if bias is None else own + bias) - lse.masked_fill(torch.isneginf(lse), 0.0))
        value = system.per_head(system.value[:, :, rows].to(system.wide)).transpose(1, 2)
        self.u = (p.transpose(1, 2)[..., None] * (value - self.y)).contiguous()
        matrix = self._jacobians(queries, p)
        eye = torch.eye(heads, dtype=system.wide, device=matrix.device)
        self.inverses = torch.linalg.inv_ex(eye - matrix.mT)[0].contiguous()
        # An eigenvalue at distance e from 1 makes the norm of the inverse at least 1 / e.
        self.matrix, self.suspect = matrix, ~(self.inverses.flatten(2).norm(dim=-1) * NEAR_SINGULAR < 1.0)
        self.f = self.u.new_full((2, batch, n, heads, dim), torch.inf)
        self.made = system.key.new_empty(2, batch, n, system.groups * dim)
        self.inside = {"length": n, "where": torch.zeros_like(sweeps.where), "n": n, "batch": batch}
        self.told = {"length": system.length, "where": sweeps.where, "n": n, "batch": batch}

    def _jacobians(self, queries: Queries, p: Tensor) -> Tensor:
        """The own Jacobians, `[B, n, H, H]`, some rows at a time: each row takes a few times `G H d` numbers."""
        system = self.sweeps.system
        few = max(1, AT_ONCE // (system.batch * system.groups * system.heads * system.dim))
        found = []
        for low in range(0, self.n, few):
            at = slice(low, min(low + few, self.n))
            place = slice(self.rows.start + at.start, self.rows.start + at.stop)
            inverse = None if queries.inverse is None else queries.inverse[:, at]
            found.append(
                own_jacobian(system, place, self.y[:, at], Queries(queries.query[:, at], inverse), p[:, :, at])
            )
        return torch.cat(found, 1)

    def solve(self, at: int) -> None:
        """The next cotangents of the outputs: add the part of the own columns, solved exactly."""
        sweeps, system, call = self.sweeps, self.sweeps.system, self.sweeps.call
        sweeps.through_map(sweeps.into["made"], sweeps.grad, self.y, self.f, None, at, True, self.told)
        sweep_adjoint.own_columns[(self.n, system.batch)](
            self.f, self.u, self.inverses, call.key, sweeps.at["query"], sweeps.at.get("inverse"), call.turn,
            self.made, sweeps.found, sweeps.allowed, sweep=at, rtol=sweeps.rtol, scale=system.spec.scale, hp=call.hp,
            wide=sweeps.types["wide"], num_warps=4, **sweeps.key_strides, **sweeps.turned, **self.told, **sweeps.shape,
        )  # fmt: skip
        new = 1 - at % 2
        sweeps.through_map(self.made[new], self.f[new], self.y, sweeps.state, sweeps.narrow, at, False, self.inside)

    def finish(self) -> int:
        """Add the part of the own columns to `made`; return the number of rows with a gain close to 1."""
        sample = torch.arange(self.sweeps.system.batch, device=self.made.device)
        made = self.sweeps.into["made"]
        assert made is not None
        made[:, self.rows] += self.made[(self.sweeps.status % 2).long(), sample]
        return near_singular(self.matrix[self.suspect])
