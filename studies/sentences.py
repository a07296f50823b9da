"""What the page of results says in words, with the figures of the records."""

from collections.abc import Mapping, Sequence

from studies.choices import Choice
from studies.run import Record
from studies.suite import RATE_SEED, Table

INTRODUCTION = f"""What one implicit layer learns that other layers of the same size do not, and what it does not learn.
`implicit-attention eval --all --budget cpu` makes this page anew from the JSON in `docs/data/eval/`, and that from
nothing.

All arms of a table have the same embedding, the same learned relative bias, head and optimiser (AdamW, gradients
clipped to a norm of 1, the learning rate up over the first twentieth of the steps, then down along a cosine to a
tenth; relative biases at ten times the rate of all else, without weight decay), and parameter counts within 2 %: MLPs
are narrower where the mixer has more weights. Each arm's learning rate is chosen from the same values on seed
{RATE_SEED}, which counts for nothing else. Training ends early once the worst kind of
held-out sequences has been solved at two evaluations in a row. Scores are mean ± standard deviation over seeds of
the last evaluation. FLOPs are counted by formula (`studies/flops.py`): a forward and backward pass, the solver's
steps included. The same seed gives the same figures again on the same machine; times are processor time of one thread,
next to as many runs as there were cores."""

OVERVIEW = """The score that decides, mean ± standard deviation over seeds. The best arm is that with the most seeds
solved, then the highest mean; it need not be ahead by more than the spread."""

DEFAULTS = """What the tables below say about the options of `ImplicitQueryAttention`. Of two rows one is *ahead* if
more of its seeds solved the task, or, with as many, if the means differ by more than the two deviations together.
Recommended is the first value that is never behind; the library's own stands first. Relative biases count here as they
learn at one rate with all else, which is what an optimiser does that is given a model's parameters; at ten times that
rate, as in all other rows, they are worth more."""

SOLVER = "How equilibria were solved, at the last evaluation, and whether another start leads to the same:"

GRADIENTS = """Cosine of each gradient, over all weights, to the exact one (float64, equilibrium and adjoint to 1e-10),
at the evaluations of the runs above, by the spectral radius of the equilibria at that time:"""


def choice(option: Choice, value: str, tally: Mapping[str, tuple[int, int]], tables: Sequence[str]) -> str:
    """Return what speaks for the value of an option.

    Args:
        option: The option.
        value: The value that is recommended.
        tally: From `choices.compared`.
        tables: Names of the tables that say so.
    """
    listed = "; ".join(f"`{name}` {won} ahead, {lost} behind" for name, (won, lost) in tally.items())
    return f"- **`{option.option}`: `{value}`.** By {', '.join(tables)}: {listed}."


def missing(lacking: Sequence[str]) -> str:
    """Return what the page still lacks.

    Args:
        lacking: From `report.missing`.
    """
    return f"**Not complete.** Runs are still missing of: {', '.join(lacking)}."


def machines(found: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[str]:
    """Return on what the runs were made, one line for each kind of machine and versions."""
    seen: dict[str, float] = {}
    for rows in found.values():
        for run in (run for runs in rows.values() for run in runs):
            environment = run.get("environment") or {}
            versions = environment.get("versions", {})
            line = f"{environment.get('processor', 'an unknown processor')}, PyTorch {versions.get('torch', 'unknown')}"
            line += f", implicit-attention {versions.get('implicit-attention', 'unknown')}"
            seen[line] = seen.get(line, 0.0) + run["seconds"]
    return [
        f"Trained on {line}: {seconds / 3600:.1f} hours of one core, without the runs that chose learning rates."
        for line, seconds in seen.items()
    ]


def settings(table: Table, rows: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return the settings that all runs of a table share, from their records."""
    every = [run["settings"] for runs in rows.values() for run in runs]
    settings = every[0]
    tolerances = {run["sizes"]["tolerance"] for run in every}
    task, sizes, training = (dict(settings[part]) for part in ("task", "sizes", "training"))
    name = task.pop("name")
    sentences = [
        f"`{name}({', '.join(f'{key}={value!r}' for key, value in task.items())})`.",
        f"Embed {sizes['embed_dim']}, {sizes['num_heads']} heads, MLP {sizes['mlp']} in the reference, "
        f"looped {sizes['loops']} times" + (f", tolerance {tolerances.pop():g}." if len(tolerances) == 1 else "."),
        f"At most {training['steps']} steps of {training['batch_size']} sequences, judged every "
        f"{training['evaluate_every']} steps on {training['held_out']} held-out sequences of each kind.",
    ]
    if training["solved"] is not None:
        sentences.append(f"Solved: {training['solved']:g} or more in every kind.")
    if table.group == "bytes":
        sentences.append(
            "*At equal seconds* is the score at the last evaluation within the training time of the fastest arm; the "
            "other scores are at equal steps and parameters."
        )
    return [" ".join(sentences)]
