"""Text from a trained model: loaded from a directory, and nothing but data in it; streamed byte by byte."""

import codecs
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from implicit_attention.hf import ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.training import checkpoint as storage
from implicit_attention.training.faults import RunError
from implicit_attention.training.tokenizer import END, VOCABULARY

Writer = Callable[[bytes], None]


@dataclass(frozen=True)
class Choice:
    """How the next byte is chosen.

    Attributes:
        temperature: Divides the logits; 1 if None.
        top_k: Likeliest bytes to choose among; all if None.
        top_p: Probability that the bytes to choose among have together; 1 if None.
        seed: Of the choice.
        greedy: Always the likeliest.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        """Raise a `RunError` where the settings contradict each other."""
        useless = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if self.greedy and useless:
            raise RunError(
                f"--greedy leaves nothing to choose: leave out --{useless[0].replace('_', '-')}, or --greedy"
            )


def load(directory: Path, *, device: str = "auto") -> ImplicitAttentionForCausalLM:
    """Load a model that `train` has made. Nothing is downloaded, unpickled or executed.

    Args:
        directory: Of a run, whose newest checkpoint is taken until it is finished, or of a checkpoint.
        device: "auto", "cpu" or "cuda".

    Returns:
        The model, in eval mode.

    Raises:
        RunError: If there is none, or it is damaged, or of another kind.
    """
    path = _find(directory)
    kind = storage.load_json(path / "config.json").get("model_type")
    if kind != ImplicitAttentionConfig.model_type:
        raise RunError(f"--model {path} is no model of this program: its config.json says model_type {kind!r}")
    disable_progress_bar()
    try:
        model: ImplicitAttentionForCausalLM = ImplicitAttentionForCausalLM.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise storage.damaged(path / storage.WEIGHTS, error) from None
    if model.config.vocab_size != VOCABULARY:
        raise RunError(
            f"--model {path} does not work on bytes: it has {model.config.vocab_size} tokens, not {VOCABULARY}"
        )
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RunError(f"--device {device} is not here: use auto or cpu")
    model.eval()
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return nn.Module.to(model, place)  # of transformers' own `to`, the types are lost


def _find(directory: Path) -> Path:
    if not directory.is_dir():
        raise RunError(f"--model {directory} is not a directory: name one that `implicit-attention train` has written")
    candidates = [directory, *reversed(storage.checkpoints(directory))]
    for path in candidates:
        if (path / "config.json").is_file() and (path / storage.WEIGHTS).is_file():
            return path
    raise RunError(f"--model {directory} holds no model: config.json and {storage.WEIGHTS} are missing")


def write_on(
    model: ImplicitAttentionForCausalLM, prompt: bytes, count: int | None, choice: Choice, write: Writer
) -> bytes:
    """Go on from a prompt.

    Args:
        model: The model.
        prompt: What to go on from, at least one byte.
        count: Bytes to make; as many as fit into the model's sequences if None.
        choice: How they are chosen.
        write: Is given the prompt, then each byte as soon as it is there.

    Returns:
        The new bytes.

    Raises:
        RunError: If there is no prompt, or it all is longer than the model's sequences.
    """
    longest = model.config.max_position_embeddings
    if not prompt:
        raise RunError("--prompt is empty: give it at least one byte")
    room = longest - len(prompt)
    if room < (count or 1):
        raise RunError(
            f"--prompt has {len(prompt)} bytes and {count or 1} more do not fit: the model's sequences have {longest}; "
            + (f"ask for --max-new-tokens {room} at most" if room > 0 else "shorten the prompt")
        )
    tokens = torch.tensor([list(prompt)], device=model.device)
    options = {"do_sample": False} if choice.greedy else {
        "do_sample": True,
        "temperature": choice.temperature or 1.0,
        "top_k": choice.top_k or 0,
        "top_p": choice.top_p or 1.0,
    }  # fmt: skip
    torch.manual_seed(choice.seed)
    with torch.no_grad():
        made = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count or room,
            suppress_tokens=list(range(END, VOCABULARY)),  # training never uses them
            streamer=_Bytes(write),
            **options,
        )
    return bytes(made[0, len(prompt) :].tolist())


class _Bytes(BaseStreamer):
    """Hands tokens on as the bytes they are."""

    def __init__(self, write: Writer) -> None:
        self.write = write

    def put(self, value: Tensor) -> None:
        """Take the prompt `[1, N]`, or new tokens `[1]`."""
        self.write(bytes(value.flatten().tolist()))

    def end(self) -> None:
        """Tell that nothing follows."""
        self.write(b"")


def byte_writer(file: TextIO) -> Writer:
    """Return a writer that puts bytes into a file as they are.

    Args:
        file: The file, opened for text.
    """

    def write(content: bytes) -> None:
        file.flush()
        file.buffer.write(content)
        file.buffer.flush()

    return write


def terminal_writer(file: TextIO) -> Writer:
    """Return a writer for people: text as soon as a character is whole, and nothing that controls the terminal.

    Args:
        file: The terminal. An empty write ends the text with a line's end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(content: bytes) -> None:
        text = decoder.decode(content, final=not content)
        file.write("".join(map(_visible, text)) + ("" if content else "\n"))
        file.flush()

    return write


def _visible(character: str) -> str:
    """A character, or a symbol for one that controls the terminal or the direction of writing."""
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\ufffd"
