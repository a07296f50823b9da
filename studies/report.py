"""The page of results. Every figure on it comes from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from studies import choices, sentences, verdicts
from studies.cells import cells, gradient_table, kinds_of, markdown, solved, solver_table, spread
from studies.mechanisms import MECHANISMS
from studies.run import Record
from studies.table import Table

Records = Mapping[str, Mapping[str, Sequence[Record]]]
IMAGE = "eval-{}.png"


def page(found: Records, tables: Mapping[str, Table], budget: str = "cpu") -> str:
    """Return the page.

    Args:
        found: Records by table, row and seed, as `records.load` gives them.
        tables: The tables by name. Those without records are left out.
        budget: Whose tables these are. Those of "smoke" compare nothing.

    Returns:
        Markdown.
    """
    shown = [(table, found[name]) for name, table in tables.items() if name in found]
    parts = ["# Results", sentences.INTRODUCTION]
    if lacking := missing(found, tables):
        parts.append(sentences.missing(lacking))
    if budget == "smoke":
        parts.append(sentences.SMOKE)
    elif len(summary := overview(shown)) > 1:
        parts += ["## In short", sentences.OVERVIEW, markdown(summary)]
        parts += ["## Where it does not help", *no_help(shown)]
    if budget != "smoke" and (chosen := recommendation(found)):
        parts += ["## Defaults", sentences.DEFAULTS, *chosen]
    parts += ["## How arms are compared", sentences.METHOD, *sentences.machines(found)]
    for table, rows in shown:
        ordered = in_order(table, rows)
        parts += [f"## {table.title}", *mechanism(table.name), *sentences.settings(table, ordered, budget)]
        parts.append(f"![{table.title}: score against steps](images/{IMAGE.format(table.name)})")
        parts.append(markdown(cells(table, ordered)))
        if solver := solver_table(table, ordered):
            parts += [
                sentences.SOLVER,
                solver,
            ]
        if gradients := gradient_table(table, ordered):
            parts += [sentences.GRADIENTS, gradients]
    listed = [(table, list(in_order(table, rows))) for table, rows in shown]
    parts += ["## Names of arms", sentences.ARMS, markdown(names(listed))]
    return "\n\n".join(parts) + "\n"


def mechanism(name: str) -> list[str]:
    """Return what should solve a table's task, if there is something to say."""
    return [MECHANISMS[name]] if name in MECHANISMS else []


def missing(found: Records, tables: Mapping[str, Table]) -> list[str]:
    """Return the tables that lack runs, with the rows that lack them unless all do.

    Args:
        found: As in `page`.
        tables: As in `page`.
    """
    lacking = []
    for name, table in tables.items():
        rows = found.get(name, {})
        open_rows = [row for row in table.rows if len(rows.get(row, [])) < table.seeds]
        if open_rows:
            lacking.append(name if len(open_rows) == len(table.rows) else f"{name} ({', '.join(open_rows)})")
    return lacking


def names(listed: Sequence[tuple[Table, Sequence[str]]]) -> list[list[str]]:
    """Return a line for each arm: its title, and its names.

    Args:
        listed: Tables, and the rows of each.
    """
    found: dict[str, list[str]] = {}
    for table, rows in listed:
        for name in rows:
            called = found.setdefault(table.rows[name].title if name in table.rows else name, [])
            called += [] if f"`{name}`" in called else [f"`{name}`"]
    return [["arm", "name"], *([title, ", ".join(called)] for title, called in found.items())]


def overview(shown: Sequence[tuple[Table, Mapping[str, Sequence[Record]]]]) -> list[list[str]]:
    """Return a line for each table that compares arms: the strongest baseline, the best implicit arms, the verdict.

    Args:
        shown: Tables and their records.
    """
    lines = [["task", "score", "strongest baseline", "implicit", "values read outputs", "verdict"]]
    for table, rows in shown:
        found = {kind: verdicts.strongest(table, rows, kind) for kind in ("baseline", "implicit", "feedback")}
        if table.group == "studies" or found["baseline"] is None:
            continue
        score = table.task.score
        worst = ", worst kind" if len(kinds_of(rows)) > 1 else ""
        lines.append([
            table.title, score.lstrip("-").replace("_", " ") + worst,
            *(contender(table, found[kind]) for kind in ("baseline", "implicit", "feedback")),
            "; ".join(
                f"{label}: {judged.words}"
                for kind, label in (("implicit", "implicit"), ("feedback", "values"))
                if (judged := verdict(table, rows, kind))
            ),
        ])  # fmt: skip
    return lines


def verdict(table: Table, rows: Mapping[str, Sequence[Record]], kind: str) -> verdicts.Verdict | None:
    """Return how the best implicit arm compares with the strongest baseline; where no seed solves it, in seconds too.

    Args:
        table: The table.
        rows: Its records.
        kind: "implicit" or "feedback".

    Returns:
        The comparison, None if one of the two has no records. Where neither solves the task, or it has no goal, an arm
        helps only if it is ahead both at equal steps and within equal seconds.
    """
    ours, strongest = (verdicts.strongest(table, rows, which) for which in (kind, "baseline"))
    if ours is None or strongest is None or (rival := verdicts.rival(table, rows, ours)) is None:
        return None
    found = verdicts.compare(table, ours, rival)
    words = f"{_other(rival, strongest)}{found.words}"
    reached = any(run["solved_at"] is not None for run in (*ours.runs, *rival.runs))
    if reached or (as_fast := verdicts.rival_in_time(table, rows, ours)) is None:
        return verdicts.Verdict(words, found.helps)
    in_time = verdicts.by_score(ours.runs, as_fast.runs)
    return verdicts.Verdict(
        f"{words}; within equal seconds {_other(as_fast, strongest)}{in_time.words}", found.helps and in_time.helps
    )


def _other(rival: verdicts.Contender, strongest: verdicts.Contender) -> str:
    """Whom an arm is judged by, if it is not the strongest baseline."""
    return "" if rival.name == strongest.name else f"({rival.title}) "


def contender(table: Table, found: verdicts.Contender | None) -> str:
    """Return a row of a table in a cell: its name, score, and when it solved the task."""
    if found is None:
        return ""
    sign = -1 if table.task.score.startswith("-") else 1
    cell = f"{found.title}: {worst_score(found.runs, sign)}"
    if table.training.solved is None:
        return cell
    seeds, steps = solved(found.runs)[:2]
    return f"{cell}; {seeds} seeds, {steps}{' steps' * steps.isdigit()}"


def worst_score(runs: Sequence[Record], sign: int) -> str:
    """Return mean and deviation over seeds of the deciding score, that of the hardest kind."""
    return spread(None if run["score"] is None else sign * run["score"] for run in runs)


def no_help(shown: Sequence[tuple[Table, Mapping[str, Sequence[Record]]]]) -> list[str]:
    """Return how many tables have no implicit arm that is ahead of all baselines, then a paragraph for each of them.

    Args:
        shown: Tables and their records.
    """
    lines, compared = [], 0
    for table, rows in shown:
        baseline = verdicts.strongest(table, rows, "baseline")
        found = {
            ours.title: judged
            for kind in ("implicit", "feedback")
            if (ours := verdicts.strongest(table, rows, kind)) and (judged := verdict(table, rows, kind))
        }
        if table.group == "studies" or baseline is None or not found:
            continue
        compared += 1
        if not any(judged.helps for judged in found.values()):
            words = "; ".join(f"{title}: {judged.words}" for title, judged in found.items())
            lines.append(f"- **{table.title}.** Strongest baseline: {baseline.title}. {words[0].upper()}{words[1:]}.")
    return [sentences.no_help(len(lines), compared), "\n".join(lines)] if lines else []


def recommendation(found: Records) -> list[str]:
    """Return a paragraph for each option that the records compare."""
    return [
        sentences.choice(choice, value, choices.compared(choice, found), _with_rivals(choice, found))
        for choice in choices.CHOICES
        if (value := choices.recommended(choice, found)) is not None
    ]


def in_order(table: Table, rows: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    """Return the rows that have records, in the table's order; unknown rows come last."""
    known = {name: rows[name] for name in table.rows if rows.get(name)}
    return known | {name: runs for name, runs in rows.items() if name not in known and runs}


def write(directory: Path, found: Records, tables: Mapping[str, Table], budget: str = "cpu") -> None:
    """Write the page and its pictures.

    Args:
        directory: Where the page goes; pictures go to `images/` in it.
        found: As in `page`.
        tables: As in `page`.
        budget: As in `page`.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from studies import pictures

    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    for table in tables.values():
        if table.name in found:
            figure = pictures.table(table, in_order(table, found[table.name]))
            figure.savefig(images / IMAGE.format(table.name))
    (directory / "results.md").write_text(page(found, tables, budget), encoding="utf-8")


def _with_rivals(choice: choices.Choice, found: Records) -> list[str]:
    """The tables that have two candidates of an option or more."""
    candidates = set(choice.rows.values())
    return [table for table in choice.tables if len(candidates & found.get(table, {}).keys()) > 1]
