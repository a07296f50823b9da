"""Reading a model whole: weights that its files lack or have in excess are an error, and not a warning."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.utils import logging

from implicit_attention.errors import counted
from implicit_attention.hf.conversion.architecture import ConversionError

_Model = TypeVar("_Model", bound=PreTrainedModel)
_FAULTS = {
    "missing_keys": "lacks",
    "unexpected_keys": "has no place for",
    "mismatched_keys": "has another shape for",
}


def load_whole(cls: type[_Model], folder: str, *, name: str, **options: Any) -> _Model:
    """Return a model of transformers, whose every weight comes from its files.

    Args:
        cls: Its class.
        folder: Its directory.
        name: What messages call it.
        **options: Of `from_pretrained`.

    Returns:
        A model of `cls`, in eval mode.

    Raises:
        ConversionError: If a weight is missing, unknown, or of another shape.
    """
    with _without_report():
        loaded: Any = cls.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
        )
    found: _Model = loaded[0]
    _check(loaded[1], name)
    found.eval()
    return found


def _check(report: Mapping[str, Any], name: str) -> None:
    # A weight of another shape comes with its shapes.
    odd = {kind: sorted(key if isinstance(key, str) else key[0] for key in report.get(kind) or ()) for kind in _FAULTS}
    if any(".lora_" in key for key in odd["unexpected_keys"]):
        run = shlex.quote(str(Path(name).parent))
        raise ConversionError(
            f"{name} keeps low-rank changes apart from the weights, and a run merges them when it ends: finish it with "
            f"`implicit-attention train --resume --out {run}`, then use {run}."
        )
    for kind, words in _FAULTS.items():
        if keys := odd[kind]:
            raise ConversionError(f"{name} {words} {counted(len(keys), 'weight')}, such as {keys[0]}.")


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from logging what `_check` says."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
