"""Hidden states and attention matrices of a call, by transformers' `capture_outputs`, without hooks on the blocks.

`capture_outputs` hangs functions on the blocks when it is first asked for something. Such a model cannot be pickled,
and a block that is put in later shows nothing. So the model hands over what its blocks give.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, _active_collector, capture_outputs

_FLAGS = ("output_hidden_states", "output_attentions")


def register(cls: type, recorded: dict[str, Any]) -> None:
    """Tell transformers what a class of models can show.

    transformers does so when a model is made. That leaves out models that were unpickled, and those whose class was
    replaced since, as FSDP does.

    Args:
        cls: The class of models.
        recorded: Its `_can_record_outputs`.
    """
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), recorded)


def captured(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward whose output has the hidden states and attentions that `Shown` was given.

    Args:
        forward: The method. A flag that is None is the configuration's.
    """
    capturing = capture_outputs(forward)

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {k: v for k, v in kwargs.items() if v is not None or k not in _FLAGS}
        return capturing(self, *args, **given | {"return_dict": True})  # tuples are made once, around all of this

    return call


class Shown:
    """What the call that runs is to show, `hidden_states` and `attentions`; each None if it was not asked for.

    Make it before the first block is called, and hand it what every block gives.
    """

    def __init__(self) -> None:
        """Look at what the call was asked for."""
        asked: dict[str, Any] = _active_collector.get() or {}
        self._states: list[Tensor | None] | None = asked.get("hidden_states")
        self._weights: list[Tensor | None] | None = asked.get("attentions")
        self._chosen: set[int] | None = asked.get("_hidden_states_layers")
        self._count = 0

    @property
    def attentions_wanted(self) -> bool:
        """Whether blocks are to return their attention matrices."""
        return self._weights is not None

    @property
    def hidden_states(self) -> tuple[Tensor | None, ...] | None:
        """What was shown of the hidden states; None in the place of those that were not chosen."""
        return None if self._states is None else tuple(self._states)

    @property
    def attentions(self) -> tuple[Tensor | None, ...] | None:
        """The attention matrices, `[B, H, n, P + n]` each."""
        return None if self._weights is None else tuple(self._weights)

    def add(self, state: Tensor, weights: Tensor | None = None) -> None:
        """Take the next hidden state, and the attention matrix of the block it comes from.

        A model around this one may have hung transformers' hooks on the blocks: what they took is replaced.

        Args:
            state: `[B, n, D]`. The first one is the embedding, the last one the normed output.
            weights: `[B, H, n, P + n]`; None for the embedding.
        """
        if self._states is not None:
            self._states[self._count :] = [state if self._chosen is None or self._count in self._chosen else None]
        if self._weights is not None and weights is not None:
            self._weights[self._count - 1 :] = [weights]
        self._count += 1
