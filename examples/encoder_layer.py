"""Put the layer in the place of `nn.MultiheadAttention` inside `nn.TransformerEncoderLayer`, and learn recall with it.

One encoder layer reads pairs of a key and its value, then the keys again, and predicts the value of each key. A value
comes one token after its key and does not know which. Ordinary attention needs two layers for that, or a convolution on
its keys; this layer needs one.

Needs no extra.
"""

import argparse

import torch
from torch import Tensor, nn

from implicit_attention import ImplicitQueryAttention
from implicit_attention.tasks.recall import Recall


class SelfAttention(nn.Module):
    """`ImplicitQueryAttention` under the signature that `nn.TransformerEncoderLayer` calls.

    Masks mean the same in both (True = hidden), and causality is the layer's own: its mask is not passed on.
    """

    batch_first = False  # what the encoder layer looks at before it takes its fast path around this module

    def __init__(self, attention: ImplicitQueryAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query is not key or query is not value:
            raise ValueError("This module attends from a sequence to itself: query, key and value must be one tensor.")
        mask = None if is_causal and self.attention.is_causal else attn_mask
        out = self.attention(query, attn_mask=mask, key_padding_mask=key_padding_mask, need_weights=need_weights)
        return out if need_weights else (out, None)


class Reader(nn.Module):
    """Embedding with learned positions, one encoder layer, a head."""

    def __init__(self, task: Recall, size: int = 64, heads: int = 4, *, implicit: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, size)
        self.positions = nn.Parameter(torch.randn(task.length, size))
        self.layer = nn.TransformerEncoderLayer(size, heads, 2 * size, dropout=0.0, batch_first=True, norm_first=True)
        if implicit:
            attention = ImplicitQueryAttention.for_causal_lm(size, heads, positions=None)
            self.layer.self_attn = SelfAttention(attention)
        self.head = nn.Linear(size, task.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        return self.head(self.layer(x, src_mask=mask, is_causal=True))


def train(model: Reader, task: Recall, steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, targets = task.batch(64, generator)
        loss = task.loss(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, targets = task.batch(256, generator)
        return task.accuracy(model.eval()(tokens), targets)


def main(steps: int = 300) -> float:
    task = Recall()
    reached = {}
    for name, implicit in (("nn.MultiheadAttention", False), ("ImplicitQueryAttention", True)):
        torch.manual_seed(0)
        reached[name] = train(Reader(task, implicit=implicit), task, steps)
        print(f"{name}: {reached[name]:.1%} of the values recalled after {steps} steps")
    return reached["ImplicitQueryAttention"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
    main(parser.parse_args().steps)
