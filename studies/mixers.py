"""The mixers of the arms: several kinds of attention and a GRU, under one interface.

A mixer maps `[B, N, D]` to `[B, N, D]` and says, where it solves for an equilibrium, how that went.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.attention.positions import RelativeBias
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.layer import ImplicitQueryAttention
from implicit_attention.tasks.models import Convolution

Mixed = tuple[Tensor, Solution | None]


class Mixer(nn.Module, ABC):
    """Base of the mixers."""

    @abstractmethod
    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return the mixed tokens and the solution of the equilibrium.

        Args:
            x: `[B, N, D]`.
            gains: Whether the solution has gains, where they exist.

        Returns:
            `[B, N, D]`, and the solution, None where nothing is solved.
        """


class Shift(nn.Module):
    """Hands the features of each token to the next: a convolution without anything to learn."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, D]`; the first token gets zeros."""
        return F.pad(x, (0, 0, 1, 0))[:, :-1]


class Ordinary(Mixer):
    """Softmax self-attention with queries, keys and values of its input, and a learned relative bias."""

    def __init__(
        self, embed_dim: int, num_heads: int, *, is_causal: bool, qk_norm: bool, positions: RelativeBias, taps: int = 0,
        shifted: bool = False,
    ) -> None:  # fmt: skip
        """Make the layer.

        Args:
            embed_dim: D.
            num_heads: H.
            is_causal: Token i sees tokens j <= i.
            qk_norm: RMS norm of queries and keys, one learned temperature per head.
            positions: The bias on the scores.
            taps: Tokens of a causal convolution on the keys; 0 for none.
            shifted: Whether each token has the key of the token before instead.
        """
        super().__init__()
        self.num_heads, self.head_dim, self.is_causal = num_heads, embed_dim // num_heads, is_causal
        self.scale = self.head_dim**-0.5
        self.W_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_V = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(num_heads)) if qk_norm else None
        self.positions = positions
        self.convolution = Convolution(embed_dim, taps) if taps else Shift() if shifted else nn.Identity()

    def heads(self, projected: Tensor) -> Tensor:
        """Return `[B, H, N, d]` of `[B, N, D]`, normed where the layer norms; values go through `split_heads`."""
        split = split_heads(projected, self.num_heads)
        return split if self.temperature is None else rms_norm(split)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys, `[B, H, N, d]`, with the temperature in them."""
        keys = self.heads(self.convolution(self.W_K(x)))
        return keys if self.temperature is None else keys * self.temperature[:, None, None]

    def bias(self, rows: slice, cols: slice) -> Tensor:
        """Return the relative bias of a block of scores, `[1, H, r, c]`."""
        term, table = self.positions(self.W_K.weight)
        block: Tensor = term.block(table, rows, cols)
        return block

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return the attention's output, and None."""
        everything = slice(0, x.shape[1])
        bias = self.bias(everything, everything)
        if self.is_causal:
            later = torch.ones(bias.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        query, value = self.heads(self.W_Q(x)), split_heads(self.W_V(x), self.num_heads)
        mixed = F.scaled_dot_product_attention(query, self.keys(x), value, attn_mask=bias, scale=self.scale)
        return self.out_proj(merge_heads(mixed)), None


class Implicit(Mixer):
    """The library's layer. Its `out_proj` is applied here, so that the solution is returned too."""

    def __init__(self, layer: ImplicitQueryAttention) -> None:
        """Take a layer that has an `out_proj`."""
        super().__init__()
        self.layer = layer

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return the projected equilibrium and its solution."""
        solution = self.layer.solve(x, gains=gains and self.layer.triangular)
        assert self.layer.out_proj is not None
        return self.layer.out_proj(solution.value), solution


class Behind(Mixer):
    """Another mixer behind a map of its input, such as a convolution."""

    def __init__(self, front: nn.Module, mixer: Mixer) -> None:
        """Put `front`, a map of `[B, N, D]`, before `mixer`."""
        super().__init__()
        self.mixer, self.front = mixer, front

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return what the mixer makes of what the front makes of x."""
        return self.mixer.mix(self.front(x), gains=gains)


class WithStates(nn.Module):
    """Each token plus the state of a gated recurrent unit that has read the tokens up to it."""

    def __init__(self, embed_dim: int) -> None:
        """Make it for tokens of size `embed_dim`."""
        super().__init__()
        self.cells = nn.GRU(embed_dim, embed_dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums, `[B, N, D]`."""
        states: Tensor = self.cells(x)[0]
        return x + states


class GRU(Mixer):
    """A gated recurrent unit as wide as a token, and an output projection."""

    def __init__(self, embed_dim: int) -> None:
        """Make it for tokens of size `embed_dim`."""
        super().__init__()
        self.cells = nn.GRU(embed_dim, embed_dim, batch_first=True)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return the projected states, and None."""
        return self.out_proj(self.cells(x)[0]), None


class GatedDeltaNet(Mixer):
    """A matrix of keys and values that decays, and from which each token takes back what its key had.

    With the state `S`, `[d, d]` per head: `S <- a S + b k (v - k^T a S)^T`, `o = q^T S`, where `a` in (0, 1) and `b` in
    (0, 2) come from the token. Above `b = 1` the state's transition has a negative eigenvalue. Keys and queries have
    length 1; they and the values pass a convolution and SiLU; the output is normed, gated and projected. Decays are
    drawn as its authors draw them, and `b` starts at 1/2, where theirs does without negative eigenvalues.

    Reference:
        Yang, Kautz and Hatamizadeh 2024, "Gated delta networks", arXiv 2412.06464; negative eigenvalues: Grazzi et al.
        2024, "Unlocking state-tracking in linear RNNs", arXiv 2411.12537. Its plain recurrence, token by token.
    """

    def __init__(self, embed_dim: int, num_heads: int, taps: int = 4, speed: float | None = None) -> None:
        """Make it.

        Args:
            embed_dim: D.
            num_heads: H.
            taps: Tokens of the convolutions.
            speed: Of the decay at the start, `a` between `exp(-speed / 10)` and `exp(-speed / 1000)`; drawn from
                (0, 16) per head if None.
        """
        super().__init__()
        self.num_heads = num_heads
        self.projections = nn.ModuleList(nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(3))  # q, k, v
        self.convolutions = nn.ModuleList(Convolution(embed_dim, taps) for _ in range(3))
        self.write, self.decay = nn.Linear(embed_dim, num_heads), nn.Linear(embed_dim, num_heads)
        drawn = torch.empty(num_heads).uniform_(1e-3, 16.0)
        self.log_speed = nn.Parameter((drawn if speed is None else drawn.fill_(speed)).log())
        at_start = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.decay.bias.copy_(at_start.expm1().log())  # softplus gives `at_start`
            self.write.bias.fill_(-math.log(3.0))
        self.gate = nn.Linear(embed_dim, embed_dim, bias=False)
        self.norm = nn.RMSNorm(embed_dim // num_heads)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return the mixed tokens, and None."""
        query, key, value = (
            split_heads(F.silu(convolution(projection(x))), self.num_heads).flatten(0, 1)  # [B H, N, d]
            for projection, convolution in zip(self.projections, self.convolutions, strict=True)
        )
        write = 2 * self.write(x).sigmoid().mT.flatten(0, 1)[..., None, None]  # [B H, N, 1, 1]
        keep = (-self.log_speed.exp() * F.softplus(self.decay(x))).exp().mT.flatten(0, 1)[..., None, None]
        read = _delta_rule(F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, write, keep)
        mixed = self.norm(read).unflatten(0, (len(x), self.num_heads))
        return self.out_proj(merge_heads(mixed) * F.silu(self.gate(x))), None


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, write: Tensor, keep: Tensor) -> Tensor:
    """What each token reads from the state, `[B H, N, d]`."""
    state = key.new_zeros(len(key), key.shape[-1], value.shape[-1])
    read = []
    # Split once: the gradient of every slice is a tensor as large as the whole.
    rows = zip(
        *(t.unbind(1) for t in (query[:, :, None], key[:, :, None], value[:, :, None], write, keep)), strict=True
    )
    for q, k, v, b, a in rows:
        state = a * state
        state = torch.baddbmm(state, k.mT, b * (v - k @ state))
        read.append(q @ state)
    return torch.cat(read, 1)
