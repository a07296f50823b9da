"""The rows of a block of a map whose values read outputs, one after the other in torch; the oracle of the kernels.

`causal.feedback` says what the tensors of a state hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from implicit_attention.attention.map import NORM_EPS
from implicit_attention.causal.diagonal_block import DiagonalBlock
from implicit_attention.causal.system import CausalSystem, Queries, finite, merge

State = dict[str, Tensor]


class Values:
    """The values that later rows see, made from outputs, in the layout of a `CausalSystem`."""

    def __init__(self, system: CausalSystem) -> None:
        """Take the tensors of the value map.

        Args:
            system: A map with a `value_map`.
        """
        assert system.value_map is not None
        self.system, self.normalize = system, system.value_map.normalize
        self.weight, self.bias = system.tensors["feedback"], system.tensors.get("feedback_bias")

    def made(self, y: Tensor, rows: slice) -> Tensor:
        """Return the values `[B, n, G, d]` of some rows for their outputs `[B, n, H, d]`, in the narrow dtype."""
        system = self.system
        added = F.linear(self._read(y)[0].to(system.narrow), self.weight, self.bias)
        return system.value[:, :, rows].transpose(1, 2) + added.view(*y.shape[:2], system.groups, system.dim)

    def pull(self, d_value: Tensor, y: Tensor) -> Tensor:
        """Return the cotangent of outputs `[B, n, H, d]` from that of their values `[B, n, G, d]`."""
        d_read = (d_value.flatten(-2).to(self.system.narrow) @ self.weight).to(y.dtype)
        read, inverse = self._read(y)
        if inverse is not None:
            along = (d_read * read).mean(-1, keepdim=True)
            d_read = torch.addcmul(d_read, read, along, value=-1.0).mul_(inverse)
        return d_read.view(y.shape)

    def gradients(self, d_value: Tensor, y: Tensor) -> State:
        """Return the gradients of the map's tensors, from those of all values and all outputs."""
        made = d_value.flatten(-2).flatten(0, 1)
        read = self._read(y)[0].flatten(0, 1)
        return {"feedback": made.mT @ read.to(made.dtype), "feedback_bias": made.sum(0)}

    def _read(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `Psi_V` reads, `[B, n, D]`, and the norm's factor `[B, n, 1]`."""
        flat = y.flatten(-2)
        if not self.normalize:
            return flat, None
        inverse = (flat * flat).mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()
        return flat * inverse, inverse


class TorchForward:
    """In torch's operations."""

    def __init__(self, system: CausalSystem, state: State) -> None:
        """Take the tensors.

        Args:
            system: The map.
            state: As `Forward.state`.
        """
        self.system, self.state, self.values = system, state, Values(system)

    def settle(self, rows: slice) -> None:
        """Solve the rows of a block, one after the other."""
        system, state, block = self.system, self.state, DiagonalBlock(self.system, rows)
        assert block.given_own is not None
        lse, y = state["lse"][:, :, rows], state["y"][:, rows].transpose(1, 2)
        query, value = (state[name][:, rows].transpose(1, 2) for name in ("query", "value"))
        merge(y, lse, block.own_value, block.given_own)
        strict, groups = block.strict.expand(*block.shape, block.n), (system.batch, system.groups, -1)
        for i in range(block.n):
            if i:
                key = block.key[:, :, i].reshape(*groups, system.dim)
                scores = (key @ query[:, :, :i].to(key.dtype).mT).view(*block.shape[:2], i) + strict[:, :, i, :i]
                inner = scores.logsumexp(-1)
                weights = (scores - finite(inner)[..., None]).exp_()
                weights = weights if block.keep is None else weights * block.keep[:, :, i, :i]
                out = weights.view(*groups, i) @ value[:, :, :i].to(key.dtype)
                merge(y[:, :, i], lse[:, :, i], out.view(*block.shape[:2], system.dim), inner)
            at = slice(rows.start + i, rows.start + i + 1)
            made = system.phi(state["y"][:, at], at)
            state["query"][:, at], state["value"][:, at] = made.query, self.values.made(state["y"][:, at], at)
            if made.inverse is not None:
                state["inverse"][:, at] = made.inverse


class TorchAdjoint:
    """In torch's operations."""

    def __init__(self, system: CausalSystem, state: State, slopes: bool) -> None:
        """Take the tensors.

        Args:
            system: The map.
            state: As `Backward.state`.
            slopes: Whether the cotangents of all scores are wanted.
        """
        self.system, self.state, self.slopes, self.values = system, state, slopes, Values(system)

    def solve(self, rows: slice) -> Tensor | None:
        """Solve the rows of a block, the last first; return the cotangents of their scores if they are wanted."""
        system, state, block = self.system, self.state, DiagonalBlock(self.system, rows)
        y, lam = state["y"][:, rows].transpose(1, 2), state["lam"][:, rows].transpose(1, 2)
        query, value = (state[name][:, rows].to(system.wide) for name in ("query", "value"))
        weights, own = self._weights(block, query, state["lse"][:, :, rows])
        kept = weights if block.keep is None else weights * block.keep
        slope, own_slope = torch.zeros_like(weights), torch.zeros_like(own)
        groups = (system.batch, system.groups, -1)
        for j in reversed(range(block.n)):
            at = slice(rows.start + j, rows.start + j + 1)
            d_query, d_value = state["d_query"][:, rows.start + j], state["d_value"][:, rows.start + j]
            later = slice(j + 1, block.n)
            d_query += self._gathered(slope[:, :, later, j], block.key[:, :, later])
            d_value += self._gathered(kept[:, :, later, j], lam[:, :, later])
            lam[:, :, j] = self._pulled(at, d_query[:, None], d_value[:, None])[:, 0]
            along = (lam[:, :, j] * y[:, :, j]).sum(-1)
            own_slope[:, :, j] = own[:, :, j] * ((lam[:, :, j] * block.own_value[:, :, j]).sum(-1) - along)
            if j:
                seen = lam[:, :, j].reshape(*groups, system.dim) @ value[:, :j].permute(0, 2, 3, 1)
                seen = seen.view(*block.shape[:2], j)
                seen = seen if block.keep is None else seen * block.keep[:, :, j, :j]
                slope[:, :, j, :j] = weights[:, :, j, :j] * (seen - along[..., None])
        columns = system.per_head(query.transpose(1, 2))
        state["d_key"][:, :, rows] += (slope @ columns).mul_(system.spec.scale)
        own_share = own if block.keep is None else own * block.keep.diagonal(dim1=-2, dim2=-1)
        own_value = (own_share[..., None] * lam).view(*groups, block.n, system.dim).sum(2)
        state["d_own_value"][:, :, rows] = own_value
        state["own_slope"][:, :, rows] = own_slope
        return slope + torch.diag_embed(own_slope) if self.slopes else None

    def _weights(self, block: DiagonalBlock, query: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of rows on earlier rows of the block, `[B, H, n, n]`, and on their own columns `[B, H, n]`."""
        assert block.given_own is not None
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        weights = (block.scores(query) + block.strict).sub_(seen[..., None]).exp_()
        return weights, (block.given_own - seen).exp_()

    def _gathered(self, shares: Tensor, rows: Tensor) -> Tensor:
        """The sum of rows `[B, H, m, d]` with their shares `[B, H, m]`, over the heads of a group, `[B, G, d]`."""
        found = (shares[:, :, None] @ rows)[:, :, 0]
        return found.view(len(found), self.system.groups, -1, self.system.dim).sum(2)

    def _pulled(self, at: slice, d_query: Tensor, d_value: Tensor) -> Tensor:
        """The cotangent of one row's output, `[B, 1, H, d]`, from those of its query and value `[B, 1, G, d]`."""
        system, state = self.system, self.state
        y = state["y"][:, at]
        lam = state["grad"][:, at].to(system.wide) + self.values.pull(d_value, y)
        inverse = state["inverse"][:, at] if state["inverse"].numel() else None
        normed = None if system.norm_weight is None else system.phi(y, at).normed
        made = system.before_map(d_query, Queries(state["query"][:, at].to(system.wide), inverse, normed), at)
        state["d_made"][:, at] = made
        return lam + system.through_map(made) if system.reads_output else lam
