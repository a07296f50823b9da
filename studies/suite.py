"""All tables, with their tasks, rows and sizes, for each budget."""

import json
from dataclasses import replace

from implicit_attention.tasks.byte_text import ByteText
from implicit_attention.tasks.digit_classes import DigitClasses
from implicit_attention.tasks.digits import Digits
from implicit_attention.tasks.gapped_recall import GappedRecall
from implicit_attention.tasks.group_words import GroupWords
from implicit_attention.tasks.khop import KHop
from implicit_attention.tasks.masked_bytes import MaskedBytes
from implicit_attention.tasks.mqar import MQAR
from implicit_attention.tasks.parity import Parity
from implicit_attention.tasks.task import Task
from studies import options
from studies.arms import ARMS, Sizes
from studies.names import known
from studies.run import Training
from studies.table import Row, Table, rows_of

BUDGETS = ("smoke", "cpu")


_LOOKUP = (
    "ordinary", "ordinary-2", "keys-2", "keys-4", "convolved", "strict", "implicit", "strict-convolved", "feedback",
    "gru-attention",
)  # fmt: skip
LOOKUP = (*_LOOKUP, "delta", "delta-slow", "gru")
GAPPED = (*LOOKUP, "keys-8", "convolved-2", "looped")  # 8 taps reach from each value to its key
# Keys of two tokens: 9 taps reach from each value to both, and a row that looks a key up has to see both.
GAPPED_KEYS = (
    "ordinary", "ordinary-2", "convolved", "convolved-2", "convolved-9", "strict", "implicit", "strict-convolved",
    "feedback", "delta", "delta-slow", "gru", "gru-attention", "looped",
)  # fmt: skip
STATE = (
    "ordinary", "ordinary-2", "convolved", "strict", "feedback", "feedback-plain", "feedback-alone", "delta", "gru",
    "gru-attention",
)  # fmt: skip
TEXT = (
    "ordinary", "ordinary-2", "keys-4", "convolved", "strict", "implicit", "strict-convolved", "feedback",
    "feedback-alone", "delta", "gru", "gru-attention",
)  # fmt: skip
BIDIRECTIONAL = ("ordinary", "ordinary-2", "looped", "implicit", "bounded")


def tables(budget: str) -> dict[str, Table]:
    """Return all tables of a budget, by name.

    Args:
        budget: "smoke" (each table in seconds, to check that it works) or "cpu" (hours on two cores).

    Raises:
        ValueError: If there is no such budget.
    """
    known("budget", budget, BUDGETS)
    found = [*_recall(), *_gapped(), *_hops(), *_states(), *_bytes(), *_bidirectional(), *options.tables()]
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


_RECALL = Training(steps=1000, batch_size=16, evaluate_every=25, held_out=128)
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
        arms = (*(LOOKUP if length < 256 else _LOOKUP), "shifted")
        arms = (*arms, "looped", "recurrent") if length == 64 else arms
        task = MQAR(length, pairs, vocabulary)
        training = _RECALL_TRAINING[length]
        made.append(Table(name, "recall", title, task, rows_of(arms, _RECALL_SIZES), training, 3))
    return made


def _gapped() -> list[Table]:
    """Tasks that tell content from position: fillers between key and value, keys of two tokens."""
    training = replace(_RECALL, steps=2000, batch_size=32, evaluate_every=50, held_out=64)
    return [
        Table("gaps", "gapped", "Recall: 0 to 6 fillers between key and value", GappedRecall(),
              rows_of(GAPPED, _RECALL_SIZES), training, 3),
        Table("gaps-keys", "gapped", "Recall: 0 to 6 fillers, keys of two tokens", GappedRecall(key_tokens=2),
              rows_of(GAPPED_KEYS, _RECALL_SIZES), training, 3),
    ]  # fmt: skip


def _hops() -> list[Table]:
    rows = rows_of((*LOOKUP, "looped", "recurrent"), replace(_RECALL_SIZES, loops=8))
    training = replace(_RECALL, steps=1600, evaluate_every=100)
    return [Table("khop-48", "khop", "1 to 8 hops in 48 tokens", KHop(48), rows, training, 3)]


def _states() -> list[Table]:
    sizes = Sizes(num_heads=2, mlp=256, max_distance=64, loops=8)
    training = Training(steps=800, batch_size=16, evaluate_every=50, held_out=128)
    rows = rows_of((*STATE, "recurrent"), sizes)
    for positions in (None, "alibi", "rope"):
        title = f"{ARMS['feedback'].title}, `positions={json.dumps(positions) if positions else None}`"
        rows[f"feedback-{positions or 'none'}"] = Row("feedback", title, replace(sizes, positions=positions))
    return [
        Table("parity", "parity", "Parity: learned at 40 bits, judged at up to 160", Parity(judged=(40, 80, 160)),
              rows, training, 8),  # where an arm learns it with some seeds, three say little
        Table("words-s3", "words", "Word problem of S3: learned at 32, judged at up to 128", GroupWords(group="S3"),
              rows_of(STATE, sizes), replace(training, steps=2400, evaluate_every=100), 3),
    ]  # fmt: skip


_BYTES = Training(
    steps=1000, batch_size=16, evaluate_every=50, held_out=128, solved=None, rates=(3e-3, 1e-2, 3e-2, 1e-1)
)  # fmt: skip
_BYTES_SIZES = Sizes(num_heads=4, mlp=256, loops=2)


def _longer(sizes: Sizes, lengthened: float) -> dict[str, Row]:
    """A row of ordinary attention that trains for about as many seconds as implicit layers do."""
    title = f"ordinary attention, {lengthened:g} times the steps"
    return {"ordinary-longer": Row("ordinary", title, sizes, lengthened)}


def _bytes() -> list[Table]:
    # Gated DeltaNet is behind all of these at 1 and 2 blocks, and takes 2.5 times their seconds.
    deep = ("ordinary", "convolved", "strict", "strict-one", "strict-half", "feedback", "feedback-one", "gru")
    deepest = ("ordinary", "convolved", "strict-half", "feedback-half", "feedback-one", "gru")
    made = []
    for blocks, names, lengthened in ((1, TEXT, 1.4), (2, TEXT, 1.4), (4, deep, 1.4), (8, deepest, 1.2)):
        sizes, title = replace(_BYTES_SIZES, blocks=blocks), f"{blocks} block{'s' * (blocks > 1)}"
        rows = rows_of(names, sizes) | _longer(sizes, lengthened)
        made.append(
            Table(f"bytes-{blocks}", "bytes", f"Bytes of Python's library: {title}", ByteText(), rows, _BYTES, 3)
        )
    return made


def _bidirectional() -> list[Table]:
    """Tasks without a mask. Their arms have no qk_norm: with it, solvers mostly find no equilibrium."""
    training = Training(
        steps=600, batch_size=16, evaluate_every=50, held_out=256, solved=None, rates=(3e-4, 1e-3, 3e-3, 1e-2)
    )
    digits, text = replace(training, held_out=360), replace(training, steps=1000, rates=_RECALL.rates)
    return [
        _free("digits-1", "Digits: which one, 1 block", DigitClasses(), 1, 1.6, digits, 5),
        _free("digits-2", "Digits: which one, 2 blocks", DigitClasses(), 2, 1.7, digits, 5),
        _free("pixels", "Digits: half of the pixels from the other half", Digits(), 1, 1.7, training, 5),
        _free("masked-bytes", "Hidden bytes of Python's library, 2 blocks", MaskedBytes(), 2, 1.7, text, 3),
    ]


def _free(name: str, title: str, task: Task, blocks: int, lengthened: float, training: Training, seeds: int) -> Table:
    sizes = Sizes(num_heads=4, mlp=256, qk_norm=False, tolerance=1e-3, blocks=blocks)
    rows = rows_of(BIDIRECTIONAL, sizes) | _longer(sizes, lengthened)
    return Table(name, "digits", title, task, rows, training, seeds)


def _sized(table: Table, budget: str) -> Table:
    """A table for another budget; tables are written down for "cpu"."""
    if budget == "cpu":
        return table
    training = table.training
    tiny = replace(training, steps=2, batch_size=2, evaluate_every=1, held_out=2, rates=(3e-3,))
    rows = {name: replace(row, sizes=_small(row.sizes)) for name, row in table.rows.items()}
    return replace(table, training=tiny, rows=rows, seeds=1)


def _small(sizes: Sizes) -> Sizes:
    return replace(sizes, embed_dim=16, mlp=48 + 16 * sizes.blocks, kernel="torch", loops=2)
