"""Where the settings of a run come from.

A setting comes from the first of these that has it: the flag, the YAML file, the run that is resumed, the preset, the
default.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from implicit_attention.training.faults import RunError, SettingError, reason, unreadable
from implicit_attention.training.settings import (
    FIELDS,
    FLAGS,
    OF_A_NEW_MODEL,
    OF_A_TRAINED_MODEL,
    PRESETS,
    UPTRAINING,
    Settings,
    check,
    known,
)


def resolve(
    flags: Mapping[str, Any], file: Mapping[str, Any] | None = None, run: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings of a run.

    Args:
        flags: Settings of the command line.
        file: Settings of the YAML file.
        run: Settings of the run that is resumed, if there is one.

    Returns:
        The settings.

    Raises:
        RunError: If a setting is unknown or invalid, or contradicts the run that is resumed.
    """
    said = {**(file or {}), **flags}
    for name, value in said.items():
        known(name)
        said[name] = check(name, value)
    for name in ("data", "source"):
        if said.get(name, "default") not in ("default", None):
            said[name] = os.path.abspath(said[name])  # a run may be resumed from another directory
    if run is not None:
        _check_agreement(said, run)
    kept = {name: check(name, value) for name, value in (run or {}).items() if name in FIELDS}
    layers = {**kept, **said}
    preset = check("preset", layers.get("preset", FIELDS["preset"].default))
    base = PRESETS[preset] if layers.get("source") is None else UPTRAINING
    settings = Settings(**{**base, **layers})
    if "warmup" not in layers and settings.steps <= settings.warmup:  # the learning rate would never be reached
        return dataclasses.replace(settings, warmup=settings.steps // 10)
    return settings


def check_effect(said: Mapping[str, Any], settings: Settings) -> None:
    """Refuse settings that have no effect on what is trained.

    Args:
        said: Settings that the user gave.
        settings: All settings.

    Raises:
        SettingError: If there is one.
    """
    _check_kind(said, settings.source)
    if settings.source is None:
        return
    useless = {
        "learning_rate": (settings.train == "query-map", "with --train query-map all that learns has --map-rate"),
        "lora_weights": (settings.train != "lora", "only acts with --train lora"),
        "map_rate": (settings.layers == "none", "only acts where layers are implicit, and --layers is none"),
    }
    for name, (ignored, why) in useless.items():
        if ignored and said.get(name) is not None:
            raise SettingError(name, f"{why}: leave it out.")


def _check_kind(said: Mapping[str, Any], source: str | None) -> None:
    """Refuse settings without effect on a new model, or on one that is trained already."""
    useless = OF_A_TRAINED_MODEL if source is None else OF_A_NEW_MODEL
    for name in useless:
        if said.get(name, FIELDS[name].default) != FIELDS[name].default:
            end = "only acts with --from DIR" if source is None else "comes from the model of --from"
            raise SettingError(name, f"{end}: leave it out.")


def _check_agreement(said: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for name, value in said.items():
        if FIELDS[name].metadata["fixed"] and name in run and run[name] != value:
            raise SettingError(
                FIELDS[name].metadata["flag"] or name,
                f"{value} contradicts the run that is resumed, which has "
                f"{run[name]}: leave it out, or choose another --out for a new run.",
            )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file. Tags that build objects are refused.

    Args:
        path: A file with a mapping of settings, such as `learning_rate: 0.001`. `-` and `_` mean the same in a name.

    Returns:
        The settings in the file.

    Raises:
        RunError: If the file cannot be read, has another content, or names an unknown setting.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise unreadable("--config", path, error) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: invalid UTF-8, invalid dates
        raise RunError(f"--config {path} is not a YAML file of settings: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RunError(
            f"--config {path} must hold a mapping from settings to values, but holds {type(content).__name__}."
        )
    try:
        spelled = {name.replace("-", "_"): value for name, value in content.items()}
        settings = {FLAGS.get(name, name): value for name, value in spelled.items()}
        return {known(name): check(name, value) for name, value in settings.items()}
    except RunError as fault:
        raise RunError(f"--config {path}: {reason(fault)}") from None
