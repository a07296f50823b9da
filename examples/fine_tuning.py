"""Fine-tune a language model to tell prose from code: docstrings of the standard library from lines of its source.

Needs the extra `hf`.
"""

import argparse
import ast
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.tasks.text import standard_library, windows

LENGTH, PADDING = 48, 256


def snippets(count: int) -> tuple[list[bytes], list[int]]:
    """Return first lines of docstrings (label 1) and statements (label 0), of modules in the order of their names."""
    texts: list[bytes] = []
    labels: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (prose := ast.get_docstring(node)):
                code = ast.get_source_segment(source, node.body[-1]) or ""
                texts += [prose.splitlines()[0].encode(), code.splitlines()[0].encode()]
                labels += [1, 0]
        if len(texts) >= count:
            break
    return texts[:count], labels[:count]


def batch(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, `[B, LENGTH]`, padded on the right."""
    tokens = torch.full((len(texts), LENGTH), PADDING)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text[:LENGTH]))[:LENGTH]
    return tokens, (tokens != PADDING).long()


def pretrained(steps: int, folder: str) -> None:
    """Train a language model on the standard library's source, and save it."""
    config = ImplicitAttentionConfig(
        vocab_size=257, hidden_size=64, num_hidden_layers=2, num_heads=4, pad_token_id=PADDING
    )
    model = ImplicitAttentionForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, generator = standard_library(1_000_000), torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = windows(text, 16, LENGTH, generator).long()
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"pretrained for {steps} steps: loss {loss:.2f}")
    model.save_pretrained(folder)


def main(steps: int = 60) -> float:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        pretrained(steps, folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    texts, labels = snippets(1200)
    order = torch.randperm(len(texts)).tolist()
    train, test = order[:1000], order[1000:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        chosen = [train[(16 * step + i) % len(train)] for i in range(16)]
        tokens, mask = batch([texts[i] for i in chosen])
        loss = model(tokens, mask, labels=torch.tensor([labels[i] for i in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, mask = batch([texts[i] for i in test])
        found = model.eval()(tokens, mask).logits.argmax(-1)
    accuracy = (found == torch.tensor([labels[i] for i in test])).float().mean().item()
    print(f"fine-tuned for {steps} steps: {accuracy:.1%} of {len(test)} unseen snippets right")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of pretraining, and of fine-tuning")
    main(parser.parse_args().steps)
