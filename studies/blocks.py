"""The model that all arms share: embedding, pre-norm blocks, norm, linear head."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from implicit_attention.attention.map import merge_heads, split_heads
from implicit_attention.equilibrium.solvers import Solution
from studies.mixers import Mixer, Ordinary


class MLP(nn.Module):
    """Two linear maps with a GELU between them, without biases. Its width makes arms equally large."""

    def __init__(self, embed_dim: int, width: int) -> None:
        """Make it, `embed_dim -> width -> embed_dim`."""
        super().__init__()
        self.up = nn.Linear(embed_dim, width, bias=False)
        self.down = nn.Linear(width, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., D]` of `[..., D]`."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module, ABC):
    """Base of the blocks: `h = x + mix(norm(x))`, then `h + mlp(norm(h))`."""

    def __init__(self, embed_dim: int, width: int) -> None:
        """Make what all blocks have.

        Args:
            embed_dim: D.
            width: Of the MLP.
        """
        super().__init__()
        self.norm_mixer, self.norm_mlp = nn.RMSNorm(embed_dim), nn.RMSNorm(embed_dim)
        self.mlp = MLP(embed_dim, width)

    @abstractmethod
    def apply_to(self, x: Tensor, *, gains: bool = False) -> tuple[Tensor, Solution | None]:
        """Return the block's output `[B, N, D]`, and its mixer's solution, if it has one."""

    def finish(self, h: Tensor) -> Tensor:
        """Return `h + mlp(norm(h))`."""
        out: Tensor = h + self.mlp(self.norm_mlp(h))
        return out


class ParallelBlock(Block):
    """A block around a mixer that takes all tokens at once."""

    def __init__(self, mixer: Mixer, embed_dim: int, width: int) -> None:
        """Make the block around `mixer`; the other arguments as in `Block`."""
        super().__init__(embed_dim, width)
        self.mixer = mixer

    def apply_to(self, x: Tensor, *, gains: bool = False) -> tuple[Tensor, Solution | None]:
        """Return the block's output and its mixer's solution."""
        mixed, solution = self.mixer.mix(self.norm_mixer(x), gains=gains)
        return self.finish(x + mixed), solution


class RecurrentBlock(Block):
    """A block whose keys and values come from its own outputs, one row after another.

    Row i, with input `x_i`, attends to keys and values of the block's outputs `y_j`, j < i, and, as its own output
    is not known yet, to those of `x_i` itself. The same weights and norm make keys and values of both.

    Reference:
        The Recurrent Transformer, arXiv 2604.21215, in its plainest form: one row at a time.
    """

    def __init__(self, attention: Ordinary, embed_dim: int, width: int) -> None:
        """Make the block around the weights of ordinary attention; the other arguments as in `Block`."""
        super().__init__(embed_dim, width)
        self.attention = attention

    def apply_to(self, x: Tensor, *, gains: bool = False) -> tuple[Tensor, None]:
        """Return the block's output and None."""
        attention, normed, dim = self.attention, self.norm_mixer(x), self.attention.head_dim
        query = attention.heads(attention.W_Q(normed)) * attention.scale  # [B, H, N, d]
        own = self._columns(normed)
        bias = attention.bias(slice(0, x.shape[1]), slice(0, x.shape[1]))
        own_score = (query * own[..., :dim]).sum(-1) + bias.diagonal(dim1=-2, dim2=-1)  # [B, H, N]
        past, values, outputs = own[:, :, :0], own[..., dim:], []
        # Split once: the gradient of every slice is a tensor as large as the whole.
        rows = zip(
            *(torch.split(t, 1, axis) for t, axis in ((x, 1), (query, 2), (own_score, 2), (values, 2), (bias, 2))),
            strict=True,
        )
        for i, (row, row_query, row_score, row_value, row_bias) in enumerate(rows):
            scores = row_query @ past[..., :dim].mT + row_bias[..., :i]
            weights = torch.cat([scores, row_score[..., None]], -1).softmax(-1)
            seen = weights[..., :i] @ past[..., dim:] + weights[..., i:] * row_value
            outputs.append(self.finish(row + attention.out_proj(merge_heads(seen))))
            past = torch.cat([past, self._columns(self.norm_mixer(outputs[-1]))], 2)
        return torch.cat(outputs, 1), None

    def _columns(self, normed: Tensor) -> Tensor:
        """Keys and values side by side, `[B, H, N, 2 d]`."""
        attention = self.attention
        return torch.cat([attention.keys(normed), split_heads(attention.W_V(normed), attention.num_heads)], -1)


class SequenceModel(nn.Module):
    """Embedding of tokens, or linear map of features; blocks; norm; linear head."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: list[Block],
        embed_dim: int,
        *,
        tokens: bool,
        loops: int = 1,
        precision: torch.dtype | None = None,
    ) -> None:
        """Make the model.

        Args:
            inputs: Different tokens, or features of a position.
            outputs: Numbers that the head gives for each position.
            blocks: The blocks, first to last.
            embed_dim: D.
            tokens: Whether inputs are tokens.
            loops: How often the blocks are applied, with the same weights.
            precision: Dtype of autocast; None for no autocast.
        """
        super().__init__()
        self.embedding: nn.Module = nn.Embedding(inputs, embed_dim) if tokens else nn.Linear(inputs, embed_dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, outputs)
        self.loops = loops
        self.precision = precision

    def autocast(self) -> torch.autocast:
        """Return the context that the model computes in."""
        return torch.autocast(self.head.weight.device.type, self.precision, enabled=self.precision is not None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[B, N, outputs]` for tokens `[B, N]` or features `[B, N, F]`."""
        return self.solve(inputs)[0]

    def solve(self, inputs: Tensor, *, gains: bool = False) -> tuple[Tensor, list[Solution]]:
        """Return `[B, N, outputs]`, and the solution of each equilibrium.

        Args:
            inputs: Tokens `[B, N]`, int64, or features `[B, N, F]`.
            gains: As in `Mixer.mix`.
        """
        solutions = []
        with self.autocast():
            h: Tensor = self.embedding(inputs)
            for _ in range(self.loops):
                for block in self.blocks:
                    assert isinstance(block, Block)
                    h, solution = block.apply_to(h, gains=gains)
                    solutions += [] if solution is None else [solution]
            logits: Tensor = self.head(self.norm(h))
        return logits.to(self.head.weight.dtype), solutions
