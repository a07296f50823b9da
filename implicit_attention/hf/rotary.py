"""Rotary positions as transformers' models compute them, scaled ones too."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from implicit_attention.attention.positions import Positions
from implicit_attention.equilibrium.maps import makes_plain_tensors
from implicit_attention.errors import bad_type, bad_value, check_positive

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class ScaledRotary(Positions):
    """Rotary positions with the frequencies of transformers' `rope_parameters`.

    The frequencies are transformers' own, and the angles are float32 as there; in a float64 model their cosines are
    float64, so that a rotation keeps lengths. A factor on cosines and sines, which
    "yarn" has, belongs to the scores: multiply the layer's `scale` by the square of `attention_scaling`.

    With "dynamic", frequencies depend on the largest position of a call. They are computed from that position alone;
    transformers' models also remember the largest position of earlier calls.

    Reference:
        Peng et al., "YaRN", arXiv 2309.00071 (2023).
    """

    def __init__(self, head_dim: int, max_position_embeddings: int, parameters: Mapping[str, Any]) -> None:
        """Make the encoding.

        Args:
            head_dim: Size d of a head, even.
            max_position_embeddings: As in the configuration of the model.
            parameters: Its `rope_parameters`, such as `{"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}`.

        Raises:
            TypeError: If `parameters` is no mapping.
            ValueError: If a value does not fit.
        """
        super().__init__()
        check_positive("max_position_embeddings", max_position_embeddings, integer=True)
        if not isinstance(parameters, Mapping):
            raise bad_type("positions.parameters", "transformers' `rope_parameters`", parameters)
        self.head_dim, self.max_position_embeddings = head_dim, max_position_embeddings
        self.rope_parameters = dict(parameters)  # nn.Module has another `parameters`
        self.kind = self.rope_parameters.get("rope_type", "default")
        if self.kind not in ROPE_TYPES:
            raise bad_value("rope_type", f"one of {', '.join(map(repr, ROPE_TYPES))}", self.kind)
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0 or head_dim % 2:
            raise bad_value("positions", "such as turn all features of a head", dict(parameters))
        self.frequencies, self.attention_scaling = self._computed()

    def _computed(self, length: int | None = None) -> tuple[tuple[float, ...], float]:
        """Frequencies, and the factor on cosines and sines. Numbers: a buffer would be lost on the meta device."""
        config = LlamaConfig(
            hidden_size=self.head_dim, num_attention_heads=1, head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings, rope_parameters=dict(self.rope_parameters),
        )  # fmt: skip
        with torch.device("cpu"):
            ends: Any = None if length is None else torch.tensor(length)  # as there: a number rounds another way
            if self.kind == "default":
                found, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
            else:
                found, factor = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"), seq_len=ends)
        return tuple(found.tolist()), float(factor)

    def rotation(self, length: int, like: Tensor, first: int | Tensor = 0) -> Tensor:
        """Return cosines and sines, `[2, length, d / 2]` or `[2, B, 1, length, d / 2]`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if isinstance(first, int) and makes_plain_tensors(like):
            return _rotation(self._frequencies(first + length), first, length, like.device, dtype)
        place = torch.arange(length, device=like.device)
        if isinstance(first, Tensor) and first.dim():
            place = first[:, None] if first.dim() == 2 else first[:, None, None] + place
        else:
            place = place + first
        stop = int(place.max()) + 1 if self.kind == "dynamic" else 0
        return _turned(self._frequencies(stop), place, dtype)

    def _frequencies(self, stop: int) -> tuple[float, ...]:
        """The frequencies of a call whose positions end before `stop`."""
        grows = self.kind == "dynamic" and stop > self.max_position_embeddings
        return self._computed(stop)[0] if grows else self.frequencies

    def bias(self) -> None:
        """Return None: scores get no bias."""

    def extra_repr(self) -> str:
        """Return the settings, for `print`."""
        return f"head_dim={self.head_dim}, {self.max_position_embeddings}, {self.rope_parameters}"


@lru_cache(maxsize=4)
def _rotation(
    frequencies: tuple[float, ...], first: int, length: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The rotation of tokens from `first` on, `[2, length, d / 2]`: the blocks of a model share it."""
    with torch.inference_mode(False), torch.no_grad():  # for any mode
        return _turned(frequencies, torch.arange(first, first + length, device=device), dtype)


def _turned(frequencies: tuple[float, ...], place: Tensor, dtype: torch.dtype) -> Tensor:
    angles = place[..., None].float() * torch.tensor(frequencies, dtype=torch.float32, device=place.device)
    angles = angles.to(dtype)
    return torch.stack([angles.cos(), angles.sin()])
