"""The table and the curves of `studies.uptraining`, from its records."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import records
from studies.cells import edge, markdown

Record = Mapping[str, Any]
Records = Mapping[str, Sequence[Record]]


def load(directory: Path) -> dict[str, list[Record]]:
    """Return the records of each arm at its best learning rate, by seed, each with the rates that were "tried".

    Args:
        directory: Where records are kept.

    Raises:
        ValueError: If a file there is not a record.
    """
    found: dict[str, list[Record]] = {}
    for folder in sorted(path for path in directory.glob("*") if path.is_dir()):
        runs = [records.read(file) for file in sorted(folder.glob("rate-*.json"))]
        if runs:
            first = min(run["settings"]["seed"] for run in runs)
            best = min((run for run in runs if run["settings"]["seed"] == first), key=lambda run: run["curve"][-1][1])
            tried = sorted({float(run["settings"]["rate"]) for run in runs})
            kept = [run | {"tried": tried} for run in runs if run["settings"]["rate"] == best["settings"]["rate"]]
            found[folder.name] = sorted(kept, key=lambda run: int(run["settings"]["seed"]))
    return found


def table(found: Records) -> str:
    """Return the table in Markdown: the change of the held-out loss, mean and standard deviation over seeds.

    Args:
        found: The records of each arm.
    """
    head = ["what learns", "weights", "rate", "loss before", "change", "seeds"]
    recalls = all(record["recall"] for runs in found.values() for record in runs)
    places = ("near", "far") if recalls else ()
    rows = [
        [
            f"`{arm}`", f"{runs[0]['trained']:,}", _rate(runs[0]),
            f"{statistics.mean(r['curve'][0][1] for r in runs):.4f}", _spread([change(r) for r in runs]),
            str(len(runs)), *(_recall(runs, place) for place in places),
        ]
        for arm, runs in sorted(found.items(), key=lambda item: statistics.mean(map(change, item[1])))
    ]  # fmt: skip
    return markdown([[*head, *(f"recall, {place}" for place in places)], *rows])


def by_tokens(found: Records) -> str:
    """Return the change of the held-out loss by tokens in Markdown, means over seeds.

    Args:
        found: As in `table`.
    """
    first = next(iter(found.values()))[0]
    head = ["tokens", *(f"{step * first['tokens']:,}" for step, _ in first["curve"])]
    return markdown([head, *([f"`{arm}`", *(f"{x:+.4f}" for x in _curve(runs))] for arm, runs in found.items())])


def change(record: Record) -> float:
    """Return how far a run moved the held-out loss.

    Args:
        record: Its record.
    """
    return float(record["curve"][-1][1] - record["curve"][0][1])


def figure(models: Mapping[str, Records]) -> Any:
    """Return the curves: change of the held-out loss against tokens, means over seeds, a panel for each model.

    Args:
        models: The records of each model's arms, by its title.
    """
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(arm for found in models.values() for arm in found))
    made = Figure(figsize=(0.8 + 5.2 * len(models), 4.0), dpi=120, layout="constrained")
    for axes, (title, found) in zip(made.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for arm, runs in found.items():
            tokens = [step * runs[0]["tokens"] for step, _ in runs[0]["curve"]]
            style = {
                "color": f"C{arms.index(arm)}",
                "linestyle": "--" if runs[0]["settings"]["layers"] == "none" else "-",
            }
            axes.plot(tokens, _curve(runs), label=arm, **style)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="tokens", ylabel="change of the held-out loss, nats per token", title=title)
        axes.legend(frameon=False, fontsize=8)
    return made


def _curve(runs: Sequence[Record]) -> list[float]:
    """Changes of the loss by evaluation, means over seeds."""
    return [
        statistics.mean(run["curve"][i][1] - run["curve"][0][1] for run in runs) for i in range(len(runs[0]["curve"]))
    ]


def _rate(record: Record) -> str:
    rate = float(record["settings"]["rate"])
    return f"{rate:g}{edge(rate, record['tried'])}"


def _spread(figures: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(figures):.4f}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):+.4f}{spread}"


def _recall(runs: Sequence[Record], place: str) -> str:
    before, after = (statistics.mean(run["recall"][when][place] for run in runs) for when in ("before", "after"))
    return f"{before:.2f} to {after:.2f}"
