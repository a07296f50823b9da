"""The tables that compare values of one option of the layer. Short runs on one seed chose their learning rates."""

import json
from dataclasses import replace

from implicit_attention.tasks.byte_text import ByteText
from implicit_attention.tasks.digit_classes import DigitClasses
from implicit_attention.tasks.mqar import MQAR
from studies.arms import ADJOINTS, ARMS, CONTRACTIONS, Sizes
from studies.run import Training
from studies.table import Row, Table, rows_of

_RECALL = Training(steps=500, rate_steps=250, batch_size=16, evaluate_every=25)
_BYTES = Training(steps=500, rate_steps=200, batch_size=8, evaluate_every=50, held_out=128, solved=None)
_RECALL_SIZES = Sizes(num_heads=2, mlp=256, max_distance=64)
_BYTES_SIZES = Sizes(num_heads=4, mlp=256, loops=2)


def tables() -> list[Table]:
    """Return them."""
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
    contractions = rows_of(
        tuple(f"bounded-{rtol:.0e}" for rtol in CONTRACTIONS),
        Sizes(num_heads=4, mlp=256, qk_norm=False, tolerance=1e-3),
    )
    digits = Training(steps=600, batch_size=16, evaluate_every=50, held_out=360, solved=None, rates=(3e-3,))
    fixed = replace(_RECALL, rates=(1e-2,))
    looked_at = replace(fixed, gradients=True)
    return [
        Table("qk-norm", "studies", "Norms of queries and keys", task, norms, _RECALL, 3),
        Table("positions", "studies", "Positions: recall", task, positions, _RECALL, 3),
        Table("positions-bytes", "studies", "Positions: bytes", ByteText(), of_bytes, _BYTES, 3),
        Table("adjoint", "studies", "Gradients to learn with", task, adjoints, _RECALL, 3),
        Table("tolerance", "studies", "Tolerance against accuracy", task, tolerances, fixed, 3),
        Table(
            "contraction", "studies", "Tolerance without a mask: which digit", DigitClasses(), contractions, digits, 5
        ),
        Table("precision", "studies", "Precision: recall under autocast", task, precisions, fixed, 5),
        Table("gradients", "studies", "What gradients are worth", task, gradients, looked_at, 3),
    ]
