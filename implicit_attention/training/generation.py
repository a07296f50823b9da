"""Text from a trained model, byte by byte. Only data is read from its directory; nothing in it is executed."""

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

from implicit_attention.errors import counted
from implicit_attention.hf import ConversionError, ImplicitAttentionConfig, ImplicitAttentionForCausalLM
from implicit_attention.hf.conversion.loading import load_whole
from implicit_attention.training import checkpoint as storage
from implicit_attention.training.faults import RunError
from implicit_attention.training.tokenizer import END, VOCABULARY

Writer = Callable[[bytes], None]
_COLDEST = 1e-6  # temperature: logits that it divides stay finite


@dataclass(frozen=True)
class Choice:
    """How the next byte is chosen.

    Attributes:
        temperature: Divides the logits; 1 if None.
        top_k: Choose among this many most likely bytes; all if None.
        top_p: Choose among the fewest bytes whose probabilities sum to this; 1 if None.
        seed: Seed of the random choices.
        greedy: Always take the most likely byte.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        """Raise a `RunError` if the settings contradict each other, or the temperature is too low."""
        useless = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if self.greedy and useless:
            raise RunError(f"--greedy makes --{useless[0].replace('_', '-')} useless: leave out one of them")
        if self.temperature is not None and not self.temperature >= _COLDEST:
            raise RunError(
                f"--temperature {self.temperature:g} must be at least {_COLDEST:g}: for the most likely byte, use "
                "--greedy"
            )


def load(directory: Path, *, device: str = "auto") -> ImplicitAttentionForCausalLM:
    """Load a model that `train` has made. Nothing is downloaded, unpickled or executed.

    Args:
        directory: Directory of a run or of a checkpoint. Of a run that is unfinished, also of one that goes on
            after its end, the newest checkpoint is loaded.
        device: "auto", "cpu" or "cuda".

    Returns:
        The model, in eval mode.

    Raises:
        RunError: If there is no model, it is damaged, or it is of another kind.
    """
    path = _find(directory)
    kind = storage.load_json(path / "config.json").get("model_type")
    if kind != ImplicitAttentionConfig.model_type:
        raise RunError(f"--model {path} is not a model of this program: its config.json has model_type {kind!r}")
    disable_progress_bar()
    try:
        model = load_whole(
            ImplicitAttentionForCausalLM, str(path), name=str(path), local_files_only=True, use_safetensors=True
        )
    except ConversionError as error:
        raise RunError(f"--model {error}") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise storage.damaged(path / storage.WEIGHTS, error) from None
    if model.config.vocab_size != VOCABULARY:
        raise RunError(
            f"--model {path} is not a byte-level model: it has {model.config.vocab_size} tokens, not {VOCABULARY}"
        )
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RunError(f"--device {device} was not found: use auto or cpu")
    model.eval()
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return nn.Module.to(model, place)  # transformers' own `to` has no types


def _find(directory: Path) -> Path:
    if not directory.is_dir():
        raise RunError(
            f"--model {directory} is not a directory: name a directory that `implicit-attention train` has written"
        )
    if (path := storage.newest_model(directory)) is not None:
        return path
    raise RunError(f"--model {directory} has no model: config.json or {storage.WEIGHTS} is missing")


def write_on(
    model: ImplicitAttentionForCausalLM, prompt: bytes, count: int | None, choice: Choice, write: Writer
) -> bytes:
    """Continue a prompt.

    Args:
        model: The model.
        prompt: The text to continue, at least one byte.
        count: Bytes to make; as many as fit the model's length if None.
        choice: How bytes are chosen.
        write: Is called with the prompt, then with each new byte.

    Returns:
        The new bytes.

    Raises:
        RunError: If the prompt is empty, or prompt and new bytes are longer than the model's sequences.
    """
    longest = model.config.max_position_embeddings
    if not prompt:
        raise RunError("--prompt is empty: give it at least one byte")
    room = longest - len(prompt)
    if room < (count or 1):
        raise RunError(
            f"--prompt has {counted(len(prompt), 'byte')} and {count or 1} more do not fit: "
            f"the model's sequences have {longest}; "
            + (f"use --max-new-tokens {room} at most" if room > 0 else "shorten the prompt")
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
    """Passes tokens on as bytes."""

    def __init__(self, write: Writer) -> None:
        self.write = write

    def put(self, value: Tensor) -> None:
        """Take the prompt `[1, N]`, or new tokens `[1]`."""
        self.write(bytes(value.flatten().tolist()))

    def end(self) -> None:
        """Write the empty bytes that mark the end."""
        self.write(b"")


def byte_writer(file: TextIO) -> Writer:
    """Return a writer that writes bytes to a file unchanged.

    Args:
        file: The file, opened for text.
    """

    def write(content: bytes) -> None:
        file.flush()
        file.buffer.write(content)
        file.buffer.flush()

    return write


def terminal_writer(file: TextIO) -> Writer:
    """Return a writer for a terminal: whole characters only, and symbols in place of control characters.

    Args:
        file: The terminal. Empty bytes end the text with a newline.
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
