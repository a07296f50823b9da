"""The mixers of the arms: several kinds of attention and a GRU, under one interface.

A mixer maps `[B, N, D]` to `[B, N, D]` and says, where it solves for an equilibrium, how that went.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.attention.positions import RelativeBias
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.layer import ImplicitQueryAttention

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


class Ordinary(Mixer):
    """Softmax self-attention with queries, keys and values of its input, and a learned relative bias."""

    def __init__(
        self, embed_dim: int, num_heads: int, *, is_causal: bool, qk_norm: bool, positions: RelativeBias
    ) -> None:
        """Make the layer.

        Args:
            embed_dim: D.
            num_heads: H.
            is_causal: Token i sees tokens j <= i.
            qk_norm: RMS norm of queries and keys, one learned temperature per head.
            positions: The bias on the scores.
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

    def heads(self, x: Tensor, weight: nn.Linear) -> Tensor:
        """Return `[B, H, N, d]` of `[B, N, D]`, normed where the layer norms; values go through `split_heads`."""
        projected = split_heads(weight(x), self.num_heads)
        return projected if self.temperature is None else rms_norm(projected)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys, `[B, H, N, d]`, with the temperature in them."""
        keys = self.heads(x, self.W_K)
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
        query, value = self.heads(x, self.W_Q), split_heads(self.W_V(x), self.num_heads)
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


class Convolved(Mixer):
    """Another mixer behind a causal convolution over some tokens, feature by feature, zero at the start.

    Reference:
        So, Manke, Liu, Dai, Shazeer and Le, "Primer", arXiv 2109.08668, convolve queries, keys and values so.
    """

    def __init__(self, mixer: Mixer, embed_dim: int, taps: int = 4) -> None:
        """Put it before `mixer`, over the last `taps` tokens of size `embed_dim`."""
        super().__init__()
        self.mixer = mixer
        self.taps = nn.Parameter(torch.zeros(embed_dim, 1, taps))

    def mix(self, x: Tensor, *, gains: bool = False) -> Mixed:
        """Return what the mixer makes of x and its convolution."""
        dim, _, taps = self.taps.shape
        before = F.pad(x.mT, (taps - 1, 0))
        return self.mixer.mix(x + F.conv1d(before, self.taps, groups=dim).mT, gains=gains)


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
