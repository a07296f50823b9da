"""The sentences of the page of results; its figures come from the records."""

from collections.abc import Mapping, Sequence

from studies.choices import Choice
from studies.run import Record
from studies.table import Table

INTRODUCTION = """What one implicit layer learns, next to other layers of the same size, and what it does not learn.
`implicit-attention eval --all --budget cpu` makes this page from the records in `docs/data/eval/`, and makes the
records that are not there. [How arms are compared](#how-arms-are-compared) says what stands behind the figures, and
the [glossary](faq.md#glossary) explains words such as *arm* and *tap*."""

METHOD = """\
- All arms of a table have the same embedding, head and optimiser, and parameter counts within 2 %. An arm whose mixer
  has more weights has narrower MLPs. Attention has a learned relative bias, unless a row names other positions. So
  ordinary attention gives SDPA a mask of N x N in each step, which is slower than its `is_causal`. GRU and Gated
  DeltaNet know the order of tokens without a bias.
- The optimiser is AdamW. Gradients are clipped to a norm of 1. The learning rate rises over the first twentieth of the
  steps, then falls along a cosine to a tenth. Relative biases have ten times that rate and no weight decay.
  Convolutions begin as the identity and learn at the common rate; with ten times that they learn recall sooner.
- Implicit layers have `query_input=True` (their queries read the input, too), `out_proj=True` and, with a causal mask,
  `qk_norm=True`, unless a row says otherwise. So do those of the README's table. The README's quickstart has other
  options: no `query_input`, and `positions="rope"`, with which recall takes about twice the steps.
- Each arm has its own learning rate in each table, the best of those that the table names, by seeds solved, then by
  steps if all seeds solved the task, else by the mean score of its whole runs. *Of all rates* counts the solved runs
  at every rate. A chosen rate that is the smallest or the largest of those tried is marked: a better one may lie
  beyond. Four tables of options (tolerance, gradients, precision, contraction) have one fixed rate.
- The held-out sequences choose rates, stop training and give the scores: no others are kept back. So scores flatter,
  and most those arms whose runs differ most from seed to seed.
- Training stops early when the hardest kind of held-out sequences is solved at two evaluations in a row. So scores of
  seeds that solved a task say no more than that; compare their steps, which are medians over those seeds.
- Each table says first what should solve its task and what should not, by how the arms work. The figures below it may
  say otherwise.
- Scores are mean ± standard deviation over seeds, at the last evaluation. Accuracy on parity and S3 is over all
  prefixes of a sequence, those as short as in training included: an arm that is right up to 40 bits and guesses beyond
  has 0.625 at 160. Accuracy on hops counts those that lead to no earlier token. So these tables have a stricter score
  as well, over the last quarter of the prefixes, or over hops that lead to a token; the README shows that one.
- FLOPs are counted by formula (`studies/flops.py`), for a forward and backward pass with the solver's steps of the last
  training step.
- *Ms a step* is processor time of one thread, a median. All arms of a table take their steps in turns in one process,
  so that they meet the same conditions. All other seconds follow from it, but those behind a table's command: they are
  wall time, with other work beside it. Timed again, the seconds of an arm have moved by up to 8 % next to those of
  ordinary attention. Under a causal mask the first steps of training are timed, else the whole training, since solvers
  take more steps as weights grow. Gated DeltaNet and the row-by-row arm are loops in Python; the GRU and the implicit
  layers have kernels in C++.
- The same seed gives the same scores again on the same kind of processor with the same commit. Another processor rounds
  otherwise. Most scores then move within their spread; parity beyond the trained length moves more
  ([both](choosing.md#values-that-read-outputs))."""

OVERVIEW = """The deciding score of each table, mean ± standard deviation over seeds; where a task can be solved, the
seeds that solved it and their median steps. Each cell shows the best arm of its kind: most seeds solved, then fewest
steps if all did, else the best mean. Without a mask, *implicit* is the layer with `max_gain=0.9`. *Ahead* and *behind*
mean by more than the sum of both deviations; all else is *not told apart*. An arm is *behind* if any baseline is ahead
of it; a baseline in brackets is another than the strongest. *Within equal seconds* baselines are those whose whole
training takes at most 1.1 times as long as the implicit arm's; ordinary attention with 1.2 to 1.7 times the steps is
among them. All arms see the same data with the same seed, so the seeds are compared, too: *better in 2 of 3 seeds*."""

DEFAULTS = """What the tables below recommend for the options of `ImplicitQueryAttention`. One of two rows is *ahead* if
more of its seeds solved the task. If all seeds of both did, it is ahead if it took fewer steps; else if its mean score
is better. Steps and scores must differ by more than the sum of the two deviations. The recommended value is the first
that is never behind, in the order shown. `implicit_attention/recommended.py` says why a model has another default.
Where positions are compared, relative biases learn at the same rate as all other weights, as with an optimiser that
gets a model's parameters. In all other rows they learn at ten times that rate, and do better."""

ARMS = "What `--arm` and the folders of records call them:"

SMOKE = "Made with `--budget smoke`: two steps of tiny models, to see that everything runs. Their figures say nothing."

SOLVER = """How the solver did at the last evaluation, and whether a second start leads to the same equilibrium,
within 100 tolerances. That is left out where 100 tolerances are more than 1 % of the largest output, and for layers
with `max_gain`, which have one equilibrium. Layers with `self_query="input"` compute each row from earlier ones: they
take one step, and their residual is zero by construction, not measured:"""

GRADIENTS = """Cosine between each gradient and the exact one (float64, equilibrium and adjoint to 1e-10), over all
weights, at the evaluations of the runs above. Rows are grouped by the spectral radius at that time:"""


def choice(option: Choice, value: str, tally: Mapping[str, tuple[int, int]], tables: Sequence[str]) -> str:
    """Return the recommended value of an option, and the tables that recommend it.

    Args:
        option: The option.
        value: The recommended value.
        tally: From `choices.compared`.
        tables: Names of the tables that were compared.
    """
    if not any(won for won, _ in tally.values()):
        listed = ", ".join(f"`{name}`" for name in tally)
        return f"- **`{option.option}`: no difference beyond the spread.** By {', '.join(tables)}, of {listed}."
    listed = "; ".join(f"`{name}` {won} ahead, {lost} behind" for name, (won, lost) in tally.items())
    return f"- **`{option.option}`: `{value}`.** By {', '.join(tables)}: {listed}."


def no_help(count: int, of: int) -> str:
    """Return in how many tables no implicit arm is ahead of all baselines.

    Args:
        count: Of such tables.
        of: All tables that compare arms.
    """
    tables = f"all {of}" if count == of else f"{count} of {of}"
    return (
        f"In {tables} tables that compare arms, no implicit arm is ahead of all baselines, both at equal steps and "
        "within equal seconds:"
    )


def missing(lacking: Sequence[str]) -> str:
    """Return the sentence about runs that are missing.

    Args:
        lacking: From `report.missing`.
    """
    return f"**Not complete.** Runs are still missing of: {', '.join(lacking)}."


def machines(found: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[str]:
    """Return one line for each kind of machine and versions that the runs were made on."""
    seen: dict[str, float] = {}
    for rows in found.values():
        for run in (run for runs in rows.values() for run in runs):
            environment = run.get("environment") or {}
            versions = environment.get("versions", {})
            line = f"{environment.get('processor', 'an unknown processor')}, Python {versions.get('python', 'unknown')}"
            line += f", PyTorch {versions.get('torch', 'unknown')}"
            line += f", implicit-attention {versions.get('implicit-attention', 'unknown')}"
            seen[line] = seen.get(line, 0.0) + run["seconds"]
    lines = [f"Trained on {line}: {seconds / 3600:.1f} hours of one core." for line, seconds in seen.items()]
    if mixed := [name for name, rows in found.items() if len(_processors(rows)) > 1]:
        lines.append(f"Runs of more than one processor stand in one table in {', '.join(mixed)}.")
    return [*lines, f"With the runs that chose learning rates: {_all_seconds(found) / 3600:.1f} hours of one core."]


def _processors(rows: Mapping[str, Sequence[Record]]) -> set[str]:
    return {(run.get("environment") or {}).get("processor", "") for runs in rows.values() for run in runs}


def _all_seconds(found: Mapping[str, Mapping[str, Sequence[Record]]]) -> float:
    """The seconds of all runs, those that chose learning rates included."""
    total = 0.0
    for runs in (runs for rows in found.values() for runs in rows.values()):
        choice = runs[0].get("choice") or {}
        tried = choice.get("tried", {}).get(f"{runs[0]['settings']['rate']:g}", [])
        counted_there = {outcome["seed"] for outcome in tried}
        total += choice.get("seconds", 0.0)
        total += sum(run["seconds"] for run in runs if run["settings"]["seed"] not in counted_there)
    return total


def settings(table: Table, rows: Mapping[str, Sequence[Record]], budget: str) -> list[str]:
    """Return the settings that all runs of a table share."""
    every = [run["settings"] for runs in rows.values() for run in runs]
    settings = every[0]
    tolerances = {run["sizes"]["tolerance"] for run in every if not run.get("arm", "").startswith("bounded")}
    task, sizes, training = (dict(settings[part]) for part in ("task", "sizes", "training"))
    name = task.pop("name")
    sentences = [
        f"`{name}({', '.join(f'{key}={value!r}' for key, value in task.items())})`.",
        f"Embed {sizes['embed_dim']}, {sizes['num_heads']} heads, MLP {sizes['mlp']} in the reference"
        + (f", the looped arm {sizes['loops']} times" if any(run.get("arm") == "looped" for run in every) else "")
        + (f", tolerance {tolerances.pop():g}." if len(tolerances) == 1 else "."),
        f"At most {training['steps']} steps of {training['batch_size']} sequences, evaluated every "
        f"{training['evaluate_every']} steps on {training['held_out']} held-out sequences of each kind.",
    ]
    sentences += rates(table)
    if training["solved"] is not None:
        sentences.append(f"Solved: {training['solved']:g} or more in every kind.")
    if table.training.solved is None:
        sentences.append(
            "*At equal seconds* is the score at the last evaluation within the training time of the fastest arm, *at "
            "equal FLOPs* within the operations of the cheapest; learning rates of slower arms had not fallen yet. "
            "The other scores are those of whole runs."
        )
    if not table.task.is_causal:
        sentences.append(
            "*Unsettled, at worst* is the largest share of samples above tolerance in any step of training."
        )
    return [" ".join(sentences), origin(table, rows, budget)]


def rates(table: Table) -> list[str]:
    """Return the sentence that says which learning rates were tried, and by which runs; none if there is one rate."""
    tried = ", ".join(f"{rate:g}" for rate in table.training.rates)
    if len(table.training.rates) == 1:
        return []
    return [f"Learning rates: {tried} for the first seed, the best {table.finalists} of these for all seeds."]


def origin(table: Table, rows: Mapping[str, Sequence[Record]], budget: str) -> str:
    """Return the command that makes a table again, the commits that made it, and the seconds it took."""
    every = [run for runs in rows.values() for run in runs]
    commits = sorted({commit[:7] for run in every if (commit := (run.get("environment") or {}).get("commit"))})
    seconds = sum(run["wall_seconds"] for run in every)
    made = f" Made by commit {', '.join(commits)}." if commits else " The records name no commit."
    return f"`implicit-attention eval {table.name} --budget {budget}`: {seconds:,.0f} s for the runs that count.{made}"
