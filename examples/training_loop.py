"""Train a small language model on the source of Python's standard library, in twenty lines.

Needs the extra `hf`.
"""

import argparse
import math

import torch

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.tasks.text import standard_library, windows


def main(steps: int = 200) -> float:
    torch.manual_seed(0)
    text, generator = standard_library(2_000_000), torch.Generator().manual_seed(0)
    train, held_out = text[:-100_000], windows(text[-100_000:], 8, 128, generator).long()

    config = ImplicitAttentionConfig(vocab_size=256, hidden_size=128, num_hidden_layers=1, num_heads=4)
    model = ImplicitAttentionForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(1, steps + 1):
        tokens = windows(train, 8, 128, generator).long()
        out = model(tokens, labels=tokens)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step:4d}  loss {out.loss:.3f}  solver: {out.solver_stats.steps.max()} sweeps")

    with torch.no_grad():
        bits = model.eval()(held_out, labels=held_out).loss.item() / math.log(2)
    print(f"{bits:.2f} bits per byte on source it has not seen")
    return bits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    main(parser.parse_args().steps)
