"""A minimal model around one attention layer, and an ordinary layer to compare the implicit one with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from implicit_attention.equilibrium.solvers import Solution
from implicit_attention.errors import bad_value, check_positive
from implicit_attention.layer import ImplicitQueryAttention


class Convolution(nn.Module):
    """`x` plus a causal convolution over its last tokens, feature by feature, zero at the start.

    Reference:
        So, Manke, Liu, Dai, Shazeer and Le 2021, "Primer", arXiv 2109.08668; Allen-Zhu, "Canon layers", arXiv
        2512.17351.
    """

    def __init__(self, embed_dim: int, taps: int) -> None:
        """Make it over the last `taps` tokens of size `embed_dim`."""
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(embed_dim, 1, taps))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, N, D]` of `[B, N, D]`."""
        dim, _, taps = self.taps.shape
        return x + F.conv1d(F.pad(x.mT, (taps - 1, 0)), self.taps, groups=dim).mT


class OrdinaryAttention(nn.Module):
    """Softmax self-attention with exactly the parameters of `ImplicitQueryAttention`.

    `y = softmax(W_Q x (W_K x)^T * scale) W_V x`: queries are made from the input, once, instead of from the
    output. `W_Q` takes the place of `Omega_Q`, `W_V` that of `Omega_V`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 1, *, is_causal: bool = False, qk_norm: bool = False, taps: int = 0
    ) -> None:
        """Make the layer.

        Args:
            embed_dim: Size D of a token, a multiple of `num_heads`.
            num_heads: H.
            is_causal: Token i sees tokens j <= i.
            qk_norm: RMS norm of keys and queries over the head dimension, with a learned temperature per head.
            taps: Tokens of a causal convolution on the keys; 0 for none.

        Raises:
            TypeError: If a size is no integer.
            ValueError: If it does not fit.
        """
        super().__init__()
        check_positive("embed_dim", embed_dim, integer=True)
        check_positive("num_heads", num_heads, integer=True)
        check_positive("taps", taps, integer=True, zero=True)
        if embed_dim % num_heads:
            raise bad_value("num_heads", f"a divisor of embed_dim={embed_dim}", num_heads)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.is_causal, self.scale = is_causal, (embed_dim // num_heads) ** -0.5
        self.W_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_V = nn.Linear(embed_dim, embed_dim, bias=False)
        self.temperature = nn.Parameter(torch.ones(num_heads)) if qk_norm else None
        self.convolution = Convolution(embed_dim, taps) if taps else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output.

        Args:
            x: `[B, N, D]`.

        Returns:
            `[B, N, D]`.
        """
        projected = self.W_Q(x), self.convolution(self.W_K(x)), self.W_V(x)
        query, key, value = (split_heads(t, self.num_heads) for t in projected)
        if self.temperature is not None:
            query, key = rms_norm(query), rms_norm(key) * self.temperature[:, None, None]
        return merge_heads(
            F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal, scale=self.scale)
        )

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        shown = f"{self.embed_dim}, num_heads={self.num_heads}, is_causal={self.is_causal}"
        shown += f", qk_norm={self.temperature is not None}"
        taps = getattr(self.convolution, "taps", None)
        return shown if taps is None else f"{shown}, taps={taps.shape[-1]}"


class TokenModel(nn.Module):
    """Token embedding with learned positions, one attention layer, and a linear head."""

    def __init__(self, vocabulary: int, length: int, attention: nn.Module, *, residual: bool = False) -> None:
        """Make the model around a layer.

        Args:
            vocabulary: Number of different tokens.
            length: Longest sequence.
            attention: Layer `[B, N, D] -> [B, N, D]` with an attribute `embed_dim`.
            residual: Whether the layer's input is added to its output.

        Raises:
            TypeError: If a size is no integer.
            ValueError: If it is not positive.
        """
        super().__init__()
        check_positive("vocabulary", vocabulary, integer=True)
        check_positive("length", length, integer=True)
        embed_dim = int(attention.embed_dim)  # type: ignore[arg-type]
        self.residual = residual
        self.embedding = nn.Embedding(vocabulary, embed_dim)
        self.positions = nn.Parameter(torch.randn(length, embed_dim))
        self.attention = attention
        self.head = nn.Linear(embed_dim, vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input of the attention layer, `[B, N, D]`, for tokens `[B, N]`."""
        embedded: Tensor = self.embedding(tokens)
        return embedded + self.positions[: tokens.shape[-1]]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits.

        Args:
            tokens: `[B, N]`, int64.

        Returns:
            `[B, N, vocabulary]`.
        """
        return self.solve(tokens)[0]

    def solve(self, tokens: Tensor) -> tuple[Tensor, Solution | None]:
        """Return logits and the solution of the equilibrium.

        Args:
            tokens: `[B, N]`, int64.

        Returns:
            Logits `[B, N, vocabulary]`, and the solution, None if the layer has no equilibrium.
        """
        x = self.embed(tokens)
        solution = None
        if isinstance(self.attention, ImplicitQueryAttention):
            solution = self.attention.solve(x)
            project = self.attention.out_proj
            y = solution.value if project is None else project(solution.value)
        else:
            y = self.attention(x)
        logits: Tensor = self.head(x + y if self.residual else y)
        return logits, solution
