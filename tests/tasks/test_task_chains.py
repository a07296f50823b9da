"""Chains of assignments, run as a program, line by line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from implicit_attention.tasks import Chains
from implicit_attention.tasks.task import IGNORED
from tests.tasks.by_hand import check_randomness, check_refusals, check_shapes, generator, perfect


def check_batch(task, batch, depth=None):
    asked = 0
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        known = {}  # name -> value and depth
        for line, (source, name) in enumerate(zip(tokens[::2], tokens[1::2], strict=True)):
            assert (source < task.values) == (line < task.chains)
            assert name not in known
            value, before = (source, 0) if source < task.values else known.pop(source)  # the newest of its chain
            known[name] = value, before + 1
            wanted = depth is None or before + 1 == depth
            assert targets[2 * line : 2 * line + 2] == [IGNORED, value if wanted else IGNORED]
            asked += wanted
        assert len(known) == task.chains
    return asked


@given(st.integers(1, 4), st.integers(0, 12), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_any_sizes(chains, more, values, seed):
    task = Chains(chains + more, chains, (1, more + 1), values)
    batch = task.batch(5, generator(seed))
    check_shapes(task, batch, 5, task.length)
    check_batch(task, batch)


def test_every_depth_is_judged_alone():
    task = Chains()
    found = task.held_out(64, 0)
    assert list(found) == [f"depth={d}" for d in (1, 2, 4, 8, 16)]
    counts = [check_batch(task, batch, int(kind.partition("=")[2])) for kind, batch in found.items()]
    assert counts[0] == 64 * 4
    assert counts[-1] > 20, "long chains are common"


def test_scores():
    task = Chains()
    batch = task.batch(20, generator())
    assert task.scores(perfect(batch, task.outputs), batch) == {"accuracy": 1.0}


def test_randomness_and_refusals():
    check_randomness(Chains())
    check_refusals(Chains())
    with pytest.raises(ValueError, match="`lines` must be at least chains=4"):
        Chains(lines=3)
    with pytest.raises(ValueError, match=r"`judged` must be depths from 1 to lines - chains \+ 1 = 29"):
        Chains(judged=(30,))
