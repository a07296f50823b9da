"""Handwritten digits with a small vision transformer: 2 x 2 patches, no causal mask, the mean over patches read out.

Without a mask a layer has to be told what sets its tokens apart, or all of them settle on the same mean: here
`query_input=True` (what a configuration without a mask has by default), and positions added to the patches.

Needs the extra `hf`, and scikit-learn (`pip install scikit-learn`, or the extra `dev`).
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionModel


class DigitTransformer(nn.Module):
    """Patches `[B, 16, 4]` of 8 x 8 pixels -> scores of the ten digits."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        config = ImplicitAttentionConfig(
            vocab_size=1,  # images come as embeddings
            hidden_size=size,
            num_hidden_layers=2,
            num_heads=4,
            is_causal=False,
            positions=None,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
        self.embed = nn.Linear(4, size)
        self.positions = nn.Parameter(0.5 * torch.randn(16, size))
        self.encoder = ImplicitAttentionModel(config)
        self.head = nn.Linear(size, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)  # [B, 16, 4]
        out = self.encoder(inputs_embeds=self.embed(patches) + self.positions)
        return self.head(out.last_hidden_state.mean(1)), out.solver_stats.steps


def main(steps: int = 150) -> float:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 8, 8) / 16, labels, test_size=0.25, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    train_y, test_y = (torch.tensor(part) for part in parts[2:])
    model = DigitTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(train_x), (64,))
        scores, solver_steps = model(train_x[chosen])
        loss = nn.functional.cross_entropy(scores, train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 30 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss:.3f}  solver: {solver_steps.max()} steps")
    with torch.no_grad():
        accuracy = (model.eval()(test_x)[0].argmax(-1) == test_y).float().mean().item()
    print(f"{accuracy:.1%} of {len(test_y)} unseen digits right")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    main(parser.parse_args().steps)
