"""All tables, with their tasks, rows and sizes, for each budget."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from implicit_attention.errors import bad_value
from implicit_attention.tasks.byte_text import ByteText
from implicit_attention.tasks.chains import Chains
from implicit_attention.tasks.digit_classes import DigitClasses
from implicit_attention.tasks.digits import Digits
from implicit_attention.tasks.gapped_recall import GappedRecall
from implicit_attention.tasks.group_words import GroupWords
from implicit_attention.tasks.khop import KHop
from implicit_attention.tasks.masked_bytes import MaskedBytes
from implicit_attention.tasks.mqar import MQAR
from implicit_attention.tasks.parity import Parity
from implicit_attention.tasks.task import Task
from studies.arms import ADJOINTS, ARMS, Sizes
from studies.names import known
from studies.run import Run, Training

RATE_SEED = 1000  # seed of the runs that choose a learning rate; no other run has it
BUDGETS = ("smoke", "cpu")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        arm: Name of the arm.
        title: Its name on the page.
        sizes: Sizes of its model.
    """

    arm: str
    title: str
    sizes: Sizes


@dataclass(frozen=True)
class Table:
    """Runs that are compared with each other.

    Attributes:
        name: Its name in commands and files.
        group: Name of the group of tables it belongs to.
        title: Its heading.
        task: The task that is learned.
        rows: Its rows by name.
        training: How they are trained.
        seeds: Number of seeds, from 0 on.
    """

    name: str
    group: str
    title: str
    task: Task
    rows: Mapping[str, Row]
    training: Training
    seeds: int

    def run(self, row: str, seed: int, rate: float) -> Run:
        """Return a run of the table.

        Args:
            row: Name of the row.
            seed: Of the run.
            rate: The learning rate that was chosen.

        Raises:
            ValueError: If there is no such row, or the seed is the one that chooses learning rates.
        """
        if seed == RATE_SEED:
            raise bad_value("seed", f"another than {RATE_SEED}", seed, "That seed chooses the learning rate.")
        return self._run(row, seed, rate, self.training)

    def rate_runs(self, row: str) -> list[Run]:
        """Return the runs that choose the learning rate of a row: whole ones of all seeds, or short ones of another.

        Args:
            row: Name of the row.

        Raises:
            ValueError: If there is no such row.
        """
        rates, short = self.training.rates, self.training.rate_steps
        if not short:
            return [self._run(row, seed, rate, self.training) for rate in rates for seed in range(self.seeds)]
        training = replace(self.training, steps=short, gradients=False)
        return [self._run(row, RATE_SEED, rate, training) for rate in rates]

    def _run(self, row: str, seed: int, rate: float, training: Training) -> Run:
        entry = self.rows[known("arm", row, self.rows)]
        return Run(self.name, row, entry.arm, self.task, entry.sizes, training, rate, seed)


HOPS = ("ordinary", "ordinary-2", "looped", "strict", "implicit", "hopfield", "recurrent", "gru")
LOOKUP = (
    "ordinary", "ordinary-2", "keys-2", "keys-4", "strict", "implicit", "strict-convolved", "feedback", "delta", "gru"
)  # fmt: skip
STATE = (
    "ordinary", "ordinary-2", "convolved", "strict", "feedback", "feedback-plain", "feedback-alone", "delta", "gru"
)  # fmt: skip
TEXT = (
    "ordinary", "ordinary-2", "keys-4", "convolved", "strict", "implicit", "strict-convolved", "feedback",
    "feedback-alone", "delta", "gru",
)  # fmt: skip
BIDIRECTIONAL = ("ordinary", "implicit", "bounded")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def tables(budget: str) -> dict[str, Table]:
    """Return all tables of a budget, by name.

    Args:
        budget: "smoke" (each table in seconds, to check that it works) or "cpu" (hours on two cores).

    Raises:
        ValueError: If there is no such budget.
    """
    known("budget", budget, BUDGETS)
    found = [*_recall(), *_gapped(), *_hops(), *_states(), *_bytes(), *_bidirectional(), *_studies()]
    return {table.name: _sized(table, budget) for table in found}


def chosen(budget: str, name: str) -> list[Table]:
    """Return the table of a name, or the tables of a group.

    Args:
        budget: As in `tables`.
        name: Of a table or a group.

    Raises:
        ValueError: If there is no such table or group.
    """
    every = tables(budget)
    groups = {table.group for table in every.values()}
    known("task", name, [*sorted(groups - every.keys()), *every])
    return [table for table in every.values() if name in (table.name, table.group)]


def _rows(names: tuple[str, ...], sizes: Sizes) -> dict[str, Row]:
    return {name: Row(name, ARMS[name].title, sizes) for name in names}


_RECALL = Training(steps=1000, batch_size=16, evaluate_every=25, held_out=128, rates=RATES)
_RECALL_TRAINING = {
    64: _RECALL,
    128: _RECALL,
    256: replace(_RECALL, steps=2000, batch_size=8, evaluate_every=100),
}
_RECALL_SIZES = Sizes(num_heads=2, mlp=256, max_distance=64)


def _recall() -> list[Table]:
    made = []
    for length, pairs, vocabulary in ((64, 4, 128), (128, 8, 256), (256, 16, 512)):
        name, title = f"recall-{length}", f"Recall: {pairs} pairs in {length} tokens"
        arms = LOOKUP if length < 256 else LOOKUP[:-2]
        arms = (*arms, "looped", "recurrent") if length == 64 else arms
        task = MQAR(length, pairs, vocabulary)
        training = _RECALL_TRAINING[length]
        made.append(Table(name, "recall", title, task, _rows(arms, _RECALL_SIZES), training, 3))
    return made


def _gapped() -> list[Table]:
    """Tasks that tell content from position: fillers between key and value, keys of two tokens, chains."""
    training = replace(_RECALL, batch_size=32, evaluate_every=50, held_out=64)
    chained = replace(_RECALL, steps=1500, evaluate_every=50)
    return [
        Table("gaps", "gaps", "Recall: 0 to 6 fillers between key and value", GappedRecall(),
              _rows((*LOOKUP, "looped"), _RECALL_SIZES), training, 3),
        Table("gaps-keys", "gaps", "Recall: the same with keys of two tokens", GappedRecall(key_tokens=2),
              _rows((*LOOKUP, "looped"), _RECALL_SIZES), training, 3),
        Table("chains", "chains", "Chains of assignments, 1 to 16 steps", Chains(),
              _rows((*LOOKUP, "looped"), replace(_RECALL_SIZES, loops=8)), chained, 3),
    ]  # fmt: skip


def _hops() -> list[Table]:
    sizes = Sizes(num_heads=2, mlp=256, max_distance=64, loops=8)
    training = Training(steps=800, rate_steps=400, batch_size=16, evaluate_every=100, held_out=128)
    return [
        Table(f"khop-{n}", "khop", f"1 to 8 hops in {n} tokens", KHop(n), _rows(HOPS, sizes), training, 3)
        for n in (48, 100)
    ]


def _states() -> list[Table]:
    sizes = Sizes(num_heads=2, mlp=256, max_distance=64, loops=8)
    training = Training(steps=800, batch_size=16, evaluate_every=50, held_out=128, rates=RATES)
    rows = _rows((*STATE, "recurrent"), sizes)
    for positions in (None, "alibi", "rope"):
        title = f"{ARMS['feedback'].title}, `positions={json.dumps(positions) if positions else None}`"
        rows[f"feedback-{positions or 'none'}"] = Row("feedback", title, replace(sizes, positions=positions))
    short = replace(training, rates=(1e-3, 3e-3, 1e-2), rate_steps=400)
    return [
        Table("parity", "parity", "Parity: learned at 40 bits, judged at up to 160", Parity(judged=(40, 80, 160)),
              rows, training, 3),
        Table("words-s3", "words", "Word problem of S3: learned at 32, judged at up to 128", GroupWords(group="S3"),
              _rows(STATE, sizes), replace(training, steps=2400, evaluate_every=100), 3),
        Table("words-a5", "words", "Word problem of A5: learned at 32, judged at up to 128", GroupWords(group="A5"),
              _rows(HOPS, sizes), short, 3),
    ]  # fmt: skip


_BYTES = Training(
    steps=1000, batch_size=16, evaluate_every=50, held_out=128, solved=None, rates=RATES
)  # fmt: skip
_BYTES_SIZES = Sizes(num_heads=4, mlp=256, loops=2)


def _bytes() -> list[Table]:
    short = replace(_BYTES, steps=500, batch_size=8, rates=(1e-3, 3e-3, 1e-2), rate_steps=200)
    made = [
        Table(f"bytes-{blocks}", "bytes", f"Bytes of Python's library: {blocks} block{'s' * (blocks > 1)}",
              ByteText(), _rows(TEXT, replace(_BYTES_SIZES, blocks=blocks)), _BYTES, 3)
        for blocks in (1, 2)
    ]  # fmt: skip
    return [
        *made,
        Table("bytes-4", "bytes", "Bytes of Python's library: 4 blocks", ByteText(),
              _rows(HOPS, replace(_BYTES_SIZES, blocks=4)), short, 3),
    ]  # fmt: skip


def _bidirectional() -> list[Table]:
    """Tasks without a mask. Their arms have no qk_norm: with it, solvers mostly find no equilibrium."""
    training = Training(steps=600, batch_size=16, evaluate_every=50, held_out=256, solved=None, rates=RATES)
    sizes = Sizes(num_heads=4, mlp=256, qk_norm=False, tolerance=1e-3)
    made = [
        Table(f"digits-{blocks}", "digits", f"Digits: which one, {blocks} block{'s' * (blocks > 1)}", DigitClasses(),
              _rows(BIDIRECTIONAL, replace(sizes, blocks=blocks)), replace(training, held_out=360), 5)
        for blocks in (1, 2)
    ]  # fmt: skip
    return [
        *made,
        Table("pixels", "digits", "Digits: half of the pixels from the other half", Digits(),
              _rows(BIDIRECTIONAL, sizes), training, 5),
        Table("masked-bytes", "digits", "Hidden bytes of Python's library, 2 blocks", MaskedBytes(),
              _rows(BIDIRECTIONAL, replace(sizes, blocks=2)), replace(training, steps=1000), 3),
    ]  # fmt: skip


# Rates of these tables were chosen by short runs on one seed: they compare values of one option.
_OPTIONS = Training(steps=500, rate_steps=250, batch_size=16, evaluate_every=25)
_OPTIONS_BYTES = Training(steps=500, rate_steps=200, batch_size=8, evaluate_every=50, held_out=128, solved=None)


def _studies() -> list[Table]:
    task, title = MQAR(64, 4, 128), ARMS["implicit"].title
    norms = {
        f"{arm}{'' if norm else '-no-norm'}": Row(
            arm, f"{ARMS[arm].title}, `qk_norm={norm}`", replace(_RECALL_SIZES, qk_norm=norm)
        )
        for arm in ("strict", "implicit")
        for norm in (True, False)
    }
    tolerances = {
        f"implicit-{tolerance:.0e}": Row(
            "implicit", f"{title}, tolerance {tolerance:g}", replace(_RECALL_SIZES, tolerance=tolerance)
        )
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    }
    precisions = {  # each at the default tolerance of its dtype; float32 at a larger one
        f"implicit-{precision}": Row(
            "implicit",
            f"{title}, {precision}, tolerance {tolerance:g}",
            replace(_RECALL_SIZES, precision=precision, tolerance=tolerance),
        )
        for precision, tolerance in (("float32", 1e-4), ("float16", 4e-3), ("bfloat16", 3e-2))
    }
    gradients = {
        "implicit": Row("implicit", title, _RECALL_SIZES),
        "implicit-no-norm": Row("implicit", f"{title}, `qk_norm=False`", replace(_RECALL_SIZES, qk_norm=False)),
    }
    positions = {
        f"implicit-{name or 'none'}": Row(
            "implicit",
            f"{title}, `positions={json.dumps(name) if name else None}`",
            replace(_RECALL_SIZES, positions=name),
        )
        for name in (None, "alibi", "rope", "relative")
    }
    positions["implicit-relative-one-rate"] = Row(
        "implicit", f'{title}, `positions="relative"` at one rate with all else', replace(_RECALL_SIZES, bias_rate=1.0)
    )
    of_bytes = {
        name: replace(row, sizes=replace(_BYTES_SIZES, positions=row.sizes.positions, bias_rate=row.sizes.bias_rate))
        for name, row in positions.items()
    }
    adjoints = {
        f"implicit-{name.replace(' ', '-')}": Row(
            "implicit", f"{title}, trained by the {name} gradient", replace(_RECALL_SIZES, adjoint=name)
        )
        for name in ADJOINTS
    }
    fixed = replace(_OPTIONS, rates=(1e-2,))
    looked_at = replace(fixed, gradients=True)
    return [
        Table("qk-norm", "studies", "Norms of queries and keys", task, norms, _OPTIONS, 3),
        Table("positions", "studies", "Positions: recall", task, positions, _OPTIONS, 3),
        Table("positions-bytes", "studies", "Positions: bytes", ByteText(), of_bytes, _OPTIONS_BYTES, 3),
        Table("adjoint", "studies", "Gradients to learn with", task, adjoints, _OPTIONS, 3),
        Table("tolerance", "studies", "Tolerance against accuracy", task, tolerances, fixed, 3),
        Table("precision", "studies", "Precision: recall under autocast", task, precisions, fixed, 5),
        Table("gradients", "studies", "What gradients are worth", task, gradients, looked_at, 3),
    ]


def _sized(table: Table, budget: str) -> Table:
    """A table for another budget; tables are written down for "cpu"."""
    if budget == "cpu":
        return table
    training = table.training
    tiny = replace(training, steps=2, rate_steps=1, batch_size=2, evaluate_every=1, held_out=2, rates=(3e-3,))
    rows = {name: replace(row, sizes=_small(row.sizes)) for name, row in table.rows.items()}
    return replace(table, training=tiny, rows=rows, seeds=1)


def _small(sizes: Sizes) -> Sizes:
    return replace(sizes, embed_dim=16, mlp=48 + 16 * sizes.blocks, kernel="torch", loops=2)
