"""Solvers, gradients and positions as plain JSON values: a name, or a name with its settings."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar

from torch import Tensor

from implicit_attention import (
    ALiBi,
    Anderson,
    Broyden,
    Contraction,
    ForwardSubstitution,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    RelativeBias,
    Rotary,
    Unrolled,
)
from implicit_attention.attention.positions import Positions
from implicit_attention.equilibrium.adjoints import Adjoint
from implicit_attention.equilibrium.solvers import Method
from implicit_attention.errors import Came, bad_type, bad_value, did_you_mean
from implicit_attention.hf.rotary import ScaledRotary

T = TypeVar("T")
Setting = str | Mapping[str, Any]

_SOLVERS: dict[str, type[Method]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "contraction": Contraction,
    "forward_substitution": ForwardSubstitution,
    "newton_krylov": NewtonKrylov,
    "picard": Picard,
}
_ADJOINTS: dict[str, type[Adjoint]] = {"implicit": Implicit, "phantom": Phantom, "unrolled": Unrolled}
_POSITIONS: dict[str, type[Positions]] = {
    "alibi": ALiBi,
    "relative": RelativeBias,
    "rope": Rotary,
    "scaled_rope": ScaledRotary,
}
ROTATING = frozenset({"rope", "scaled_rope"})


def make_solver(setting: Setting) -> str | Method:
    """Return the solver that a setting describes.

    Args:
        setting: "auto", a solver's name, or a mapping with `name` and that solver's own settings, such as
            `{"name": "anderson", "max_steps": 30}`. A solver inside a solver is such a setting too.

    Returns:
        "auto", or the solver.

    Raises:
        TypeError: If it is of another type.
        ValueError: If a name or a setting is unknown or out of range.
    """
    return setting if setting == "auto" else _make("solver", setting, _SOLVERS, also=("auto",))


def make_adjoint(setting: Setting) -> Adjoint:
    """Return the gradient method that a setting describes.

    Args:
        setting: "implicit", "phantom", "unrolled", or a mapping with `name` and that method's own settings, such
            as `{"name": "implicit", "solver": {"name": "anderson"}}`.

    Raises:
        TypeError: If it is of another type.
        ValueError: If a name or a setting is unknown or out of range.
    """
    return _make("adjoint", setting, _ADJOINTS)


def make_positions(setting: Setting | None, num_heads: int, head_dim: int, longest: int) -> Positions | None:
    """Return the position encoding that a setting describes, a new one with weights of its own.

    Args:
        setting: None, "alibi", "relative", "rope", "scaled_rope", or a mapping with `name` and that encoding's own
            settings, such as `{"name": "rope", "base": 500000.0}`.
        num_heads: Heads of the layer.
        head_dim: Size of a head.
        longest: The model's `max_position_embeddings`, for settings that do not name their own.

    Raises:
        TypeError: If it is of another type.
        ValueError: If a name or a setting is unknown or out of range.
    """
    if setting is None:
        return None
    given = {"alibi": {"num_heads": num_heads}, "relative": {"num_heads": num_heads}}
    given |= {name: {"head_dim": head_dim} for name in ROTATING}
    named = {"name": setting} if isinstance(setting, str) else setting
    if isinstance(named, Mapping) and named.get("name") == "scaled_rope":
        setting = {"max_position_embeddings": longest, **named}
    return _make("positions", setting, _POSITIONS, given)


def positions_setting(positions: Positions | None) -> dict[str, Any] | None:
    """Return the setting that describes an encoding: what `make_positions` makes it from.

    Args:
        positions: The encoding.

    Returns:
        A mapping; None for no encoding, and for one of another class.
    """
    for name, known in _POSITIONS.items():
        # A class made from a known one, as FSDP does, is that one unless it computes something else.
        if isinstance(positions, known) and all(
            getattr(type(positions), method) is getattr(known, method) for method in ("rotation", "bias", "forward")
        ):
            return {"name": name} | {field: getattr(positions, held) for field, held in _FIELDS[name].items()}
    return None


_FIELDS: dict[str, dict[str, str]] = {  # settings, and the attributes that hold them
    "alibi": {},
    "relative": {"max_distance": "max_distance"},
    "rope": {"base": "base"},
    "scaled_rope": {"max_position_embeddings": "max_position_embeddings", "parameters": "rope_parameters"},
}


def setting_kind(setting: Setting | None) -> str | None:
    """Return what a model has to know of the positions that a setting describes.

    Args:
        setting: As in `make_positions`.

    Returns:
        "turning"; "dynamic", if the angles change with the length of the text; "distance"; None for no positions.
    """
    named: Mapping[str, Any] = setting if isinstance(setting, Mapping) else {"name": setting}
    if named.get("name") not in ROTATING:
        return None if setting is None else "distance"
    parameters = named.get("parameters")
    dynamic = isinstance(parameters, Mapping) and parameters.get("rope_type") == "dynamic"
    return "dynamic" if dynamic else "turning"


def positions_kind(positions: Positions | None, like: Tensor) -> str | None:
    """Return what a model has to know of an encoding, as `setting_kind` does.

    Args:
        positions: The encoding.
        like: Tensor for which an encoding of another class is asked what it does.
    """
    if positions is None:
        return None
    if isinstance(positions, (Rotary, ScaledRotary)):
        return "dynamic" if isinstance(positions, ScaledRotary) and positions.kind == "dynamic" else "turning"
    if isinstance(positions, (ALiBi, RelativeBias)) or positions.bias() is not None:
        return "distance"
    return None if positions.rotation(1, like) is None else "turning"


def _make(
    argument: str,
    setting: object,
    known: Mapping[str, Callable[..., T]],
    given: Mapping[str, Mapping[str, Any]] | None = None,
    also: tuple[str, ...] = (),
) -> T:
    choices = f"one of {', '.join(map(repr, [*also, *known]))}, or a mapping with such a `name` and its settings"
    named = {"name": setting} if isinstance(setting, str) else setting
    if not isinstance(named, Mapping):
        raise bad_type(argument, choices, setting)
    name = named.get("name")
    options = {key: value for key, value in named.items() if key != "name"}
    if not isinstance(name, str) or name not in known:
        remedy = f"{name!r} has no settings: write it alone." if name in also else did_you_mean(name, known)
        raise bad_value(argument, choices, setting, remedy.strip())
    fixed = (given or {}).get(name, {})
    allowed = sorted(_settings_of(known[name]) - set(fixed))
    for key, value in options.items():
        if key not in allowed:
            has = f"Its settings are {', '.join(f'`{one}`' for one in allowed)}." if allowed else "It has none."
            raise bad_value(
                argument, f"made of settings that {name!r} has", Came(f"`{key}`, which it has not"),
                did_you_mean(key, allowed) + has,
            )  # fmt: skip
        if key in ("solver", "fallback") and value is not None:
            options[key] = _make(f"{argument}.{key}", value, _SOLVERS)
    missing = sorted(_needed_by(known[name]) - set(fixed) - set(options))
    if missing:
        raise bad_value(
            argument, f"a mapping with the settings of {name!r}: {', '.join(map(repr, allowed))}",
            Came(f"none for {', '.join(map(repr, missing))}"),
        )  # fmt: skip
    return known[name](**fixed, **options)


def _settings_of(thing: Callable[..., object]) -> set[str]:
    if is_dataclass(thing):
        return {field.name for field in fields(thing) if field.init}
    return set(signature(thing).parameters)


def _needed_by(thing: Callable[..., object]) -> set[str]:
    return {name for name, setting in signature(thing).parameters.items() if setting.default is setting.empty}
