"""The tables that compare values of one option of the layer."""

import json
from dataclasses import replace

from implicit_attention.tasks.byte_text import ByteText
from implicit_attention.tasks.digit_classes import DigitClasses
from implicit_attention.tasks.mqar import MQAR
from studies.arms import ADJOINTS, ARMS, CONTRACTIONS, Sizes
from studies.run import Training
from studies.table import Row, Table, rows_of

_RECALL = Training(steps=500, batch_size=16, evaluate_every=25)
_BYTES = Training(
    steps=500, batch_size=8, evaluate_every=50, held_out=128, solved=None, rates=(3e-3, 1e-2, 3e-2, 1e-1)
)  # fmt: skip
_RECALL_SIZES = Sizes(num_heads=2, mlp=256, max_distance=64)
_BYTES_SIZES = Sizes(num_heads=4, mlp=256, loops=2)


_FIXED = replace(_RECALL, rates=(1e-2,))
_TITLE = ARMS["implicit"].title


def tables() -> list[Table]:
    """Return them."""
    task, looked_at = MQAR(64, 4, 128), replace(_FIXED, gradients=True)
    digits = Training(steps=600, batch_size=16, evaluate_every=50, held_out=360, solved=None, rates=(3e-3,))
    return [
        Table("qk-norm", "studies", "Norms of queries and keys", task, _norms(), _RECALL, 3),
        Table("positions", "studies", "Positions: recall", task, _positions(_RECALL_SIZES), _RECALL, 3),
        Table("positions-bytes", "studies", "Positions: bytes", ByteText(), _positions(_BYTES_SIZES), _BYTES, 3),
        Table("adjoint", "studies", "Gradients to learn with", task, _adjoints(), _RECALL, 3),
        Table("tolerance", "studies", "Tolerance against accuracy", task, _tolerances(), _FIXED, 3),
        Table("contraction", "studies", "Tolerance without a mask: which digit", DigitClasses(), _contractions(),
              digits, 5),
        Table("precision", "studies", "Precision: recall under autocast", task, _precisions(), _FIXED, 5),
        Table("gradients", "studies", "What gradients are worth", task, _gradients(), looked_at, 3),
    ]  # fmt: skip


def _norms() -> dict[str, Row]:
    return {
        f"{arm}{'' if norm else '-no-norm'}": Row(
            arm, f"{ARMS[arm].title}, `qk_norm={norm}`", replace(_RECALL_SIZES, qk_norm=norm)
        )
        for arm in ("strict", "implicit")
        for norm in (True, False)
    }


def _tolerances() -> dict[str, Row]:
    return {
        f"implicit-{tolerance:.0e}": Row(
            "implicit", f"{_TITLE}, tolerance {tolerance:g}", replace(_RECALL_SIZES, tolerance=tolerance)
        )
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    }


def _precisions() -> dict[str, Row]:
    """Each at the default tolerance of its dtype; float32 at a larger one."""
    return {
        f"implicit-{precision}": Row(
            "implicit",
            f"{_TITLE}, {precision}, tolerance {tolerance:g}",
            replace(_RECALL_SIZES, precision=precision, tolerance=tolerance),
        )
        for precision, tolerance in (("float32", 1e-4), ("float16", 4e-3), ("bfloat16", 3e-2))
    }


def _gradients() -> dict[str, Row]:
    return {
        "implicit": Row("implicit", _TITLE, _RECALL_SIZES),
        "implicit-no-norm": Row("implicit", f"{_TITLE}, `qk_norm=False`", replace(_RECALL_SIZES, qk_norm=False)),
    }


def _positions(sizes: Sizes) -> dict[str, Row]:
    found = {
        f"implicit-{name or 'none'}": Row(
            "implicit", f"{_TITLE}, `positions={json.dumps(name) if name else None}`", replace(sizes, positions=name)
        )
        for name in (None, "alibi", "rope", "relative")
    }
    title = f'{_TITLE}, `positions="relative"` at one rate with all else'
    return found | {"implicit-relative-one-rate": Row("implicit", title, replace(sizes, bias_rate=1.0))}


def _adjoints() -> dict[str, Row]:
    return {
        f"implicit-{name.replace(' ', '-')}": Row(
            "implicit", f"{_TITLE}, trained by the {name} gradient", replace(_RECALL_SIZES, adjoint=name)
        )
        for name in ADJOINTS
    }


def _contractions() -> dict[str, Row]:
    names = tuple(f"bounded-{rtol:.0e}" for rtol in CONTRACTIONS)
    return rows_of(names, Sizes(num_heads=4, mlp=256, qk_norm=False, tolerance=1e-3))
