"""The JSON records of runs: one file each, written whole, and checked against the run when read back."""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from implicit_attention.errors import Came, bad_value
from studies.run import Record, Run

CHOICE = "rate.json"  # of a row: how its learning rate was chosen
SECONDS = "seconds.json"  # of a table: what a training step of each row takes


def path(directory: Path, run: Run, *, trial: bool = False) -> Path:
    """Return where the record of a run is kept.

    Args:
        directory: Where records are kept.
        run: The run.
        trial: Whether it is one of those that choose the learning rate.
    """
    rate = f"rate-{run.rate:g}-" if trial else ""
    return directory / run.table / run.row / f"{rate}seed-{run.seed}.json"


def finished(directory: Path, run: Run, *, trial: bool = False) -> Record | None:
    """Return the record of a finished run, None if there is none.

    Args:
        directory: Where records are kept.
        run: The run.
        trial: As in `path`.

    Raises:
        ValueError: If the record has other settings, or the file is not a record.
    """
    file = path(directory, run, trial=trial)
    if not file.exists():
        return None
    record = read(file)
    before, now = record["settings"], json.loads(json.dumps(run.settings()))
    if before != now:
        other = sorted(key for key in now if before.get(key) != now[key])
        raise bad_value(
            "out", "a directory without runs of other settings",
            Came(f"{file}, which differs in {', '.join(other)}"), "Remove that file, or choose another directory.",
        )  # fmt: skip
    return record


def read(file: Path) -> Record:
    """Return the record in a JSON file.

    Args:
        file: The file.

    Raises:
        ValueError: If it is not a record.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise bad_value("out", "a directory of records", Came(f"{file}, which is no JSON ({error})")) from None
    if not isinstance(record, dict) or not ("settings" in record or "chosen" in record):
        raise bad_value("out", "a directory of records", Came(f"{file}, which is no record"))
    return record


def write(file: Path, record: Record) -> None:
    """Write a record under a temporary name, then rename it, so that nobody reads half a file.

    Args:
        file: The file; its directory is made if it is missing.
        record: The record. Numbers that JSON does not have become null.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def best_rates(records: Sequence[Record]) -> list[float]:
    """Return learning rates, best first: most seeds solved; then the soonest if all did; then the best mean score.

    Args:
        records: The runs, one or more for each rate.
    """

    def merit(rate: float) -> tuple[float, float, float, float]:
        runs = [record for record in records if record["settings"]["rate"] == rate]
        solved = [-record["solved_at"] for record in runs if record["solved_at"] is not None]
        scores = [-math.inf if record["score"] is None else record["score"] for record in runs]
        soonest = statistics.median(solved) if len(solved) == len(runs) else -math.inf
        return len(solved), soonest, statistics.mean(scores), -rate

    return sorted({float(record["settings"]["rate"]) for record in records}, key=merit, reverse=True)


def step_seconds(directory: Path, table: str) -> dict[str, float]:
    """Return the seconds of a training step of the rows of a table that were timed together.

    Args:
        directory: Where records are kept.
        table: Name of the table.

    Raises:
        ValueError: If the file of the table is not a record.
    """
    file = directory / table / SECONDS
    return dict(read(file)["seconds"]) if file.exists() else {}


def load(directory: Path) -> dict[str, dict[str, list[Record]]]:
    """Return the records of the seeds, by table, row and seed, each with the choice of its learning rate.

    Each has the seconds of a training step of its row ("step_seconds"), too; None if the row was not timed. The choice
    has the seconds of the runs that were made for it.

    Args:
        directory: Where records are kept.

    Raises:
        ValueError: If a file there is not a record.
    """
    found: dict[str, dict[str, list[Record]]] = {}
    for file in sorted(directory.glob("*/*/seed-*.json")):
        record = read(file)
        choice = file.with_name(CHOICE)
        record["choice"] = read(choice) | {"seconds": _trial_seconds(file.parent)} if choice.exists() else None
        found.setdefault(file.parent.parent.name, {}).setdefault(file.parent.name, []).append(record)
    for table, rows in found.items():
        each = step_seconds(directory, table)
        for row, runs in rows.items():
            runs.sort(key=lambda record: int(record["settings"]["seed"]))
            for record in runs:
                record["step_seconds"] = each.get(row)
    return found


def _trial_seconds(row: Path) -> float:
    """The seconds of the runs that chose the learning rate of a row, those that count among them."""
    return sum(float(read(file)["seconds"]) for file in row.glob("rate-*-seed-*.json"))
