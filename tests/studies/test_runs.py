"""Runs: the same again, whatever else goes on; resumed and not repeated; recorded whole."""

import json
import math
from dataclasses import replace

import pytest
import torch

from implicit_attention import ImplicitQueryAttention
from studies import ARMS, build, campaign, perform, pool, records, tables, timing
from studies.blocks import SequenceModel
from studies.run import Course, parameter_groups, rate_factor
from studies.suite import chosen
from tests.studies.simple import SIZES, TRAINING, Before, table

NOTHING = campaign.Watch()
TIMES = ("seconds", "wall_seconds", "environment", "step_seconds")
# torch's GRU and Anderson's method load parts of torch that warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def outcome(record):
    """What a run gives again: all but its times."""
    curve = [{key: value for key, value in entry.items() if key != "seconds"} for entry in record["curve"]]
    return {**{key: value for key, value in record.items() if key not in TIMES}, "curve": curve}


@pytest.mark.parametrize("arm", ["implicit", "gru", "recurrent"])
def test_a_run_gives_the_same_bits_again(arm):
    run = table(arm).run(arm, 0, 1e-2)
    first = perform(run)
    torch.manual_seed(123)
    torch.rand(5)
    assert outcome(perform(run)) == outcome(first)
    assert outcome(perform(replace(run, seed=1)))["curve"] != outcome(first)["curve"]


def test_processes_give_the_same_bits():
    runs = [table().run(row, seed, 1e-2) for row in ("ordinary", "implicit") for seed in (0, 1)]
    alone = {(run.row, run.seed): outcome(perform(run)) for run in runs}
    together = {(run.row, run.seed): outcome(record) for run, record in pool.records(runs, 2, lambda run, done: None)}
    assert together == alone


def test_a_run_leaves_threads_and_randomness_as_they_were():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    perform(table().run("implicit", 0, 1e-2))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_says_what_happened():
    record = perform(table().run("implicit", 0, 1e-2))
    assert [entry["step"] for entry in record["curve"]] == [2, 4]
    assert (record["end"], record["solved_at"], record["last_step"]) == ("steps", None, 4)
    assert record["settings"]["task"] == {"name": "Before", "length": 12, "is_causal": True}
    assert record["score"] == record["curve"][-1]["scores"]["held_out"]["accuracy"]
    solver = record["curve"][-1]["solver"]["held_out"]
    assert solver["unconverged"] == 0
    assert 0 < solver["gain"] <= solver["largest_gain"]
    assert record["path_independence"]["same"] == 1


def test_training_ends_when_the_task_is_solved_twice():
    easy = replace(TRAINING, solved=0.0, steps=100, evaluate_every=2)
    record = perform(table(training=easy).run("ordinary", 0, 1e-2))
    assert (record["end"], record["last_step"], record["solved_at"]) == ("solved", 4, 2)


def test_a_run_that_diverges_is_recorded_as_such():
    class Broken(Before):
        def loss(self, logits, batch):
            return super().loss(logits, batch) * math.nan

    record = perform(replace(table().run("ordinary", 0, 1e-2), task=Broken()))
    assert (record["end"], record["score"], record["scores"], record["flops"]) == ("diverged", None, {}, None)


def test_it_learns():
    training = replace(TRAINING, steps=300, batch_size=16, evaluate_every=20)
    assert perform(table(training=training).run("ordinary", 0, 1e-2))["end"] == "solved"


def test_learning_rate_rises_and_falls():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2, rel=1e-2)
    assert max(factors) == factors[4]
    assert factors[-1] == pytest.approx(0.1, abs=1e-2)


def test_every_parameter_is_trained_once():
    for arm in ARMS.values():
        model = build(arm, Before(is_causal=not arm.free_only), SIZES, 0)
        grouped = [id(p) for group in parameter_groups(model, 1e-2, 10.0) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_what_is_done_is_not_done_again(tmp_path):
    shown, done = table(), []
    watch = campaign.Watch(done=lambda run, record: done.append((run.seed, run.rate)))
    settings = {"workers": 1, "environment": {}, "watch": watch}
    campaign.perform(shown, ["ordinary"], [0], tmp_path, **settings)
    assert done[:2] == [(0, 1e-3), (0, 1e-2)]
    assert len(done) == 4
    campaign.perform(shown, ["ordinary"], [0, 1, 2], tmp_path, **settings)
    assert [seed for seed, _ in done[4:]] == [2]
    choice = json.loads((tmp_path / "before" / "ordinary" / "rate.json").read_text())
    assert choice["chosen"] == done[-1][1]
    assert set(choice["tried"]) == {"0.001", "0.01"}


def test_a_row_can_train_for_more_steps():
    shown = table("ordinary")
    row = replace(shown.rows["ordinary"], lengthened=1.5)
    longer = replace(shown, rows={"ordinary": row})
    assert [each.run("ordinary", 0, 1e-3).training.steps for each in (shown, longer)] == [4, 6]


def test_a_step_of_each_row_is_timed_in_turns_with_all_others(tmp_path):
    shown, told = table(), []
    watch = campaign.Watch(timing=lambda table, done: told.append(done))
    settings = {"workers": 1, "environment": {}, "watch": watch}
    campaign.perform(shown, ["ordinary"], [0], tmp_path, **settings)
    file = tmp_path / "before" / "seconds.json"
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert records.read(file)["seconds"].keys() == {"ordinary"}
    before = file.read_text()
    campaign.perform(shown, ["ordinary"], [1], tmp_path, **settings)
    assert file.read_text() == before, "it is timed already"
    campaign.perform(shown, ["implicit"], [0], tmp_path, **settings)
    seconds = records.read(file)["seconds"]
    assert seconds.keys() == {"ordinary", "implicit"}, "again, since only then are they comparable"
    found = records.load(tmp_path)["before"]
    assert {row: run["step_seconds"] for row, (run, *_) in found.items()} == seconds
    assert min(seconds.values()) > 0


def test_a_row_that_diverges_is_not_timed_further(monkeypatch):
    shown = table()
    steps = []

    def step(course):
        steps.append(course.run.row)
        return math.nan if course.run.row == "implicit" else 1.0

    monkeypatch.setattr(Course, "step", step)
    runs = [shown.run(row, 0, 1e-3) for row in shown.rows]
    assert timing.measure(runs, 3, lambda done: None).keys() == {"ordinary", "implicit"}
    assert steps == ["ordinary", "implicit", "ordinary", "ordinary"]


def test_a_seed_that_is_asked_for_later_is_trained_at_the_chosen_rate(tmp_path):
    shown, done, totals = table(), [], []
    watch = campaign.Watch(
        total=lambda table, runs, before: totals.append((runs, before)),
        done=lambda run, record: done.append((run.seed, run.rate)),
    )
    settings = {"workers": 1, "environment": {}, "watch": watch}
    campaign.perform(shown, ["ordinary"], [0, 1], tmp_path, **settings)
    assert sorted(done) == [(0, 1e-3), (0, 1e-2), (1, 1e-3), (1, 1e-2)]
    campaign.perform(shown, ["ordinary"], [0, 1, 2], tmp_path, **settings)
    assert [seed for seed, _ in done[4:]] == [2]
    assert totals == [(4, 0), (5, 4)]
    found = records.load(tmp_path)["before"]["ordinary"]
    assert [run["settings"]["seed"] for run in found] == [0, 1, 2]
    assert len({run["settings"]["rate"] for run in found}) == 1
    outcomes = found[0]["choice"]["tried"]
    assert {rate: [run["seed"] for run in runs] for rate, runs in outcomes.items()} == {"0.001": [0, 1], "0.01": [0, 1]}


def test_all_seeds_try_the_rates_that_were_best_for_the_first(tmp_path):
    training = replace(TRAINING, rates=(1e-4, 1e-3, 1e-2))
    shown, done, totals = replace(table(training=training), seeds=3, finalists=2), [], []
    watch = campaign.Watch(
        total=lambda table, runs, before: totals.append((runs, before)),
        done=lambda run, record: done.append((run.seed, run.rate)),
    )
    settings = {"workers": 1, "environment": {}, "watch": watch}
    campaign.perform(shown, ["ordinary"], [0, 1, 2], tmp_path, **settings)
    assert done[:3] == [(0, 1e-4), (0, 1e-3), (0, 1e-2)]
    tried = [records.read(tmp_path / "before" / "ordinary" / f"rate-{rate:g}-seed-0.json") for _, rate in done[:3]]
    best = records.best_rates(tried)[:2]
    assert sorted(done[3:]) == sorted((seed, rate) for seed in (1, 2) for rate in best)
    choice = json.loads((tmp_path / "before" / "ordinary" / "rate.json").read_text())
    assert choice["chosen"] in best
    assert {float(rate): len(runs) for rate, runs in choice["tried"].items()} == {
        rate: 3 if rate in best else 1 for rate in training.rates
    }
    campaign.perform(shown, ["ordinary"], [0, 1, 2], tmp_path, **settings)
    assert totals == [(7, 0), (7, 7)]
    assert len(done) == 7


def test_records_of_other_settings_are_refused(tmp_path):
    campaign.perform(table(), ["ordinary"], [0], tmp_path, workers=1, environment={}, watch=NOTHING)
    other = table(training=replace(TRAINING, batch_size=5))
    with pytest.raises(ValueError, match=r"differs in training. Remove that file"):
        campaign.perform(other, ["ordinary"], [0], tmp_path, workers=1, environment={}, watch=NOTHING)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    file = records.path(tmp_path, table().run("ordinary", 0, 1e-2))
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match="`out` must be a directory of records"):
        records.load(tmp_path)


def test_a_record_has_no_numbers_that_json_lacks(tmp_path):
    records.write(tmp_path / "a.json", {"settings": {"x": [math.nan, {"y": -math.inf}, 1.5]}})
    assert records.read(tmp_path / "a.json") == {"settings": {"x": [None, {"y": None}, 1.5]}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_best_rate_solves_soonest_then_scores_highest():
    def record(rate, score, solved_at=None):
        return {"settings": {"rate": rate}, "score": score, "solved_at": solved_at}

    assert records.best_rates([record(1, 0.5), record(2, 0.7), record(3, None)]) == [2, 1, 3]
    assert records.best_rates([record(1, 0.99, 300), record(2, 0.99, 200), record(3, 1.0)]) == [2, 1, 3]
    assert records.best_rates([record(1, 0.5), record(2, 0.5)]) == [1, 2]
    both, fast = [record(1, 1.0, 400), record(1, 0.99, 400)], [record(2, 1.0, 100), record(2, 0.9)]
    assert records.best_rates(both + fast) == [1, 2], "more seeds solved comes first"
    soon, late = [record(1, 1.0, 100), record(1, 0.5)], [record(2, 1.0, 400), record(2, 0.9)]
    assert records.best_rates(soon + late) == [2, 1], "where not all seeds solved it, the score decides"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_run_says_which(workers):
    run = replace(table().run("ordinary", 0, 1e-2), arm="nothing")
    with pytest.raises(RuntimeError, match=r"before, ordinary, seed 0 failed:"):
        list(pool.records([run, run], workers, lambda run, done: None))


def test_names_stand_for_tables_and_groups():
    assert [found.name for found in chosen("cpu", "recall")] == ["recall-64", "recall-128", "recall-256"]
    assert [found.name for found in chosen("cpu", "pixels")] == ["pixels"]
    with pytest.raises(ValueError, match="Did you mean 'parity'"):
        chosen("cpu", "parrity")
    with pytest.raises(ValueError, match="`budget` must be one of smoke, cpu,"):
        tables("tpu")


SMOKE = [pytest.param(found, row, id=f"{found.name}-{row}") for found in tables("smoke").values() for row in found.rows]


@pytest.mark.parametrize(("found", "row"), SMOKE)
def test_every_row_of_every_table_runs(found, row):
    record = perform(found.run(row, 0, found.training.rates[0]))
    assert record["end"] == "steps"
    assert record["score"] is not None


def test_weights_that_overflow_in_a_layer_are_recorded_as_diverged(monkeypatch):
    """Without the norm, values that read outputs may grow beyond all bounds."""
    run = table("feedback-plain").run("feedback-plain", 0, 1e-2)
    monkeypatch.setattr("studies.run.judge", lambda *_: pytest.fail("a run that diverged is judged"))
    steps = []

    def grow(model, inputs):
        steps.append(inputs)
        (layer,) = (m for m in model.modules() if isinstance(m, ImplicitQueryAttention))
        layer.Psi_V.weight.data.fill_(1e30)
        return solve(model, inputs)

    solve = SequenceModel.solve
    monkeypatch.setattr(SequenceModel, "solve", grow)
    record = perform(run)
    assert (record["end"], record["score"], len(steps)) == ("diverged", None, 1)
