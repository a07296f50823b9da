"""The page: made from records alone, with their figures, and the page in the repository is that of its records."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import readme
from studies import campaign, cells, choices, mechanisms, pictures, records, report, sentences, tables, verdicts
from studies.sentences import machines
from tests.studies.simple import TRAINING, table

DOCS = Path(__file__).parents[2] / "docs"
IN_EACH = ", better in 1 of 1 seeds"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(seed, score, *, solved_at=None, steps=4, seconds=2.0, rate=0.01):
    """A record by hand."""
    return {
        "settings": {
            "task": {"name": "Before", "length": 12},
            "sizes": {"embed_dim": 16, "num_heads": 2, "mlp": 64, "loops": 2, "tolerance": 1e-4},
            "training": {
                "steps": 4,
                "batch_size": 4,
                "evaluate_every": 2,
                "held_out": 8,
                "solved": 0.99,
                "rates": [0.001, 0.01],
            },
            "rate": rate,
            "seed": seed,
        },
        "parameters": 1234,
        "flops": 2.5e9,
        "end": "steps",
        "last_step": steps,
        "seconds": seconds,
        "wall_seconds": seconds,
        "step_seconds": seconds / steps,
        "solved_at": solved_at,
        "score": score,
        "scores": {"held_out": {"accuracy": score}} if score is not None else {},
        "path_independence": None,
        "curve": [
            {"step": 2, "loss": 1.0, "seconds": seconds / 2, "score": score and score / 2, "scores": {}},
            {"step": 4, "loss": 1.0, "seconds": seconds, "score": score, "scores": {}},
        ],
    }


def cell(lines, row, column):
    return lines[row][lines[0].index(column)]


def test_figures_are_means_deviations_and_counts():
    lines = cells.cells(table(), {"ordinary": [run(0, 0.5), run(1, 1.0, solved_at=2, seconds=4.0)]})
    assert cell(lines, 1, "accuracy") == "0.750 ± 0.354"
    assert cell(lines, 1, "seeds solved") == "1 of 2"
    assert cell(lines, 1, "steps to solve") == "2"
    assert cell(lines, 1, "learning rate") == "0.01 (largest)"
    assert cell(lines, 1, "parameters") == "1,234"
    assert cell(lines, 1, "GFLOPs a step") == "2.5"
    assert cell(lines, 1, "ms a step") == "500"
    (line,) = cells.cells(table(), {"ordinary": [run(0, 1.0, solved_at=2) | {"step_seconds": None}]})[1:]
    assert line[-1] == "", "it was not timed"
    assert "inf" not in " ".join(line)


def test_a_chosen_rate_at_the_edge_is_marked():
    assert [cells.edge(rate, (1e-3, 1e-2, 1e-1)) for rate in (1e-3, 1e-2, 1e-1)] == [" (smallest)", "", " (largest)"]
    assert cells.edge(1e-2, (1e-2,)) == "", "there was no choice"


def test_a_run_without_a_score_is_counted_and_not_hidden():
    lines = cells.cells(table(), {"ordinary": [run(0, 0.5), run(1, None)]})
    assert cell(lines, 1, "accuracy") == "0.500 (1 without)"
    assert cell(cells.cells(table(), {"ordinary": [run(0, 0.5)], "implicit": [run(0, None)]}), 2, "accuracy") == "none"


def test_rows_come_in_the_order_of_the_table():
    found = {"implicit": [run(0, 1.0)], "ordinary": [run(0, 0.5)]}
    assert list(report.in_order(table(), found)) == ["ordinary", "implicit"]


def test_equal_seconds_are_those_of_the_fastest_row():
    rows = {"ordinary": [run(0, 0.8, seconds=2.0)], "implicit": [run(0, 1.0, seconds=4.0)]}
    assert cells.least(rows, cells.seconds) == 2.0
    assert cells.at_equal(rows["implicit"], 2.0, cells.seconds, 1) == [0.5]
    assert cells.at_equal(rows["implicit"], 1.0, cells.seconds, 1) == [None]
    assert cells.at_equal(rows["implicit"], 2.5e9 * 2, cells.operations, 1) == [0.5]
    endless = replace(table(), training=replace(TRAINING, solved=None))
    assert cell(cells.cells(endless, rows), 2, "at equal seconds") == "0.500"
    untimed = {row: [one | {"step_seconds": None} for one in runs] for row, runs in rows.items()}
    assert cell(cells.cells(endless, untimed), 2, "at equal seconds") == ""


def test_an_arm_is_judged_by_a_baseline_that_is_ahead_of_it_where_the_best_is_not():
    endless = replace(table("ordinary", "ordinary-2", "implicit"), training=replace(TRAINING, solved=None))
    rows = {
        "ordinary": [run(0, 0.9), run(1, 1.5)],  # the best mean, but it varies
        "ordinary-2": [run(0, 1.19), run(1, 1.19)],
        "implicit": [run(0, 1.1), run(1, 1.1)],
    }
    ours = verdicts.strongest(endless, rows, "implicit")
    assert verdicts.strongest(endless, rows, "baseline").name == "ordinary"
    assert verdicts.rival(endless, rows, ours).name == "ordinary-2"
    judged = report.verdict(endless, rows, "implicit")
    assert "(ordinary attention, twice the layers) behind, better in 0 of 2 seeds" in judged.words
    assert not judged.helps
    del rows["ordinary-2"]
    assert "not told apart, better in 1 of 2 seeds" in report.verdict(endless, rows, "implicit").words


def test_a_strict_score_is_shown_for_the_last_kind():
    def scored(seed, late):
        kinds = {"length=4": {"accuracy": 1.0, "last_quarter_accuracy": 1.0},
                 "length=8": {"accuracy": 0.75, "last_quarter_accuracy": late}}  # fmt: skip
        return run(seed, 0.75) | {"scores": kinds}

    lines = cells.cells(table(), {"ordinary": [scored(0, 0.5), scored(1, 0.5)]})
    assert cell(lines, 1, "accuracy, length=8") == "0.750 ± 0.000"
    assert cell(lines, 1, "last quarter accuracy, length=8") == "0.500 ± 0.000"
    assert cells.strict_score({"ordinary": [run(0, 1.0)]}) is None
    assert readme.result(table(), [scored(0, 0.5), scored(1, 0.7)]).startswith("0.600 ± 0.141 (")


def test_without_a_goal_an_arm_helps_if_it_is_ahead_at_equal_steps_and_at_equal_seconds():
    endless = replace(table("ordinary", "implicit"), training=replace(TRAINING, solved=None))
    longer = replace(endless.rows["ordinary"], title="ordinary, longer", lengthened=2.0)
    endless = replace(endless, rows={**endless.rows, "longer": longer})
    more = run(0, 1.1, seconds=2.0)
    more["settings"]["training"]["steps"] *= 2
    rows = {"ordinary": [run(0, 0.8, seconds=2.0)], "implicit": [run(0, 1.0, seconds=4.0)], "longer": [more]}
    behind = verdicts.Verdict(
        f"ahead{IN_EACH}; within equal seconds (ordinary, longer) behind, better in 0 of 1 seeds", helps=False
    )
    assert report.verdict(endless, rows, "implicit") == behind
    assert verdicts.strongest(endless, rows, "baseline").name == "ordinary", "at equal steps"
    rows["implicit"] = [run(0, 1.0, seconds=2.0)]
    everywhere = verdicts.Verdict(f"ahead{IN_EACH}; within equal seconds ahead{IN_EACH}", helps=True)
    assert report.verdict(endless, rows, "implicit") == everywhere
    rows["implicit"] = [run(0, 1.0, seconds=1.0)]
    assert report.verdict(endless, rows, "implicit") == verdicts.Verdict(f"ahead{IN_EACH}", helps=True), (
        "no baseline is as fast"
    )
    rows["implicit"] = [run(0, 1.0) | {"step_seconds": None}]
    assert report.verdict(endless, rows, "implicit") == verdicts.Verdict(f"ahead{IN_EACH}", helps=True), (
        "it was not timed"
    )
    assert report.verdict(endless, rows, "feedback") is None
    lines = cells.cells(endless, rows | {"ordinary": [run(0, 0.8, seconds=1.0)]})
    assert cell(lines, 3, "accuracy") == "1.100"
    assert cell(lines, 3, "at equal seconds") == "", "its learning rate falls later than that of all others"


def test_a_row_is_ahead_by_seeds_solved_or_by_more_than_the_spread():
    solved, close = [run(0, 0.99, solved_at=4), run(1, 0.9)], [run(0, 0.99), run(1, 0.9)]
    assert choices.ahead(solved, close)
    assert not choices.ahead(close, solved)
    better = [run(0, 0.97), run(1, 0.99)]
    assert not choices.ahead(better, close), "0.98 ± 0.014 is not clearly above 0.945 ± 0.064"
    assert choices.ahead(better, [run(0, 0.8), run(1, 0.81)])
    assert choices.ahead(close, [run(0, 0.99), run(1, None)])


def test_where_all_seeds_solved_the_sooner_row_is_ahead_whatever_the_scores():
    sooner = [run(0, 0.990, solved_at=2), run(1, 0.991, solved_at=2)]
    later = [run(0, 0.999, solved_at=4), run(1, 0.998, solved_at=4)]
    assert choices.ahead(sooner, later)
    assert not choices.ahead(later, sooner)
    assert not choices.ahead(sooner, [run(0, 0.999, solved_at=2), run(1, 0.999, solved_at=4)]), "2 and 3 ± 1.4 steps"


def test_a_default_is_the_value_that_is_ahead_most_often():
    choice = choices.Choice("qk_norm", ("one", "two", "three"), {"True": "with", "False": "without"})
    good, bad = [run(0, 1.0, solved_at=2)], [run(0, 0.5)]
    found = {"one": {"with": bad, "without": good}, "two": {"with": bad, "without": good}, "three": {"with": good}}
    assert choices.compared(choice, found) == {"True": (0, 2), "False": (2, 0)}
    assert choices.recommended(choice, found) == "False"
    assert choices.recommended(choice, {"one": {"with": bad, "without": bad}}) == "True", "the first among equals"
    assert choices.recommended(choice, {}) is None
    three = choices.Choice("tolerance", ("one",), {"1e-4": "a", "1e-5": "b", "1e-1": "c"})
    spread_out = {"one": {"a": [run(0, 0.9), run(1, 1.0)], "b": good, "c": bad}}
    assert choices.recommended(three, spread_out) == "1e-5"
    alike = {"one": {"a": good, "b": good, "c": bad}}
    assert choices.recommended(three, alike) == "1e-4", "the first stays where nothing is ahead of it"


def test_every_choice_names_rows_that_there_are():
    shown = tables("cpu")
    for choice in choices.CHOICES:
        assert set(choice.tables) <= shown.keys()
        for name in choice.tables:
            assert set(choice.rows.values()) <= shown[name].rows.keys()


def test_the_overview_sets_the_strongest_baseline_beside_the_implicit_arm():
    shown = replace(table("ordinary", "ordinary-2", "implicit"), group="recall")
    rows = {
        "ordinary": [run(0, 0.5)],
        "ordinary-2": [run(0, 1.0, solved_at=2, seconds=1.0)],
        "implicit": [run(0, 1.0, solved_at=4, seconds=4.0)],
    }
    lines = report.overview([(shown, rows)])
    assert cell(lines, 1, "strongest baseline") == "ordinary attention, twice the layers: 1.000; 1 of 1 seeds, 2 steps"
    assert cell(lines, 1, "implicit") == "implicit: 1.000; 1 of 1 seeds, 4 steps"
    assert cell(lines, 1, "values read outputs") == ""
    assert cell(lines, 1, "verdict") == (
        "implicit: behind; both solve 1 of 1 seeds; 2 times the steps, 8 times the seconds, sooner in 0 of 1 seeds"
    )
    count, line = report.no_help([(shown, rows)])
    assert count.startswith("In all 1 tables that compare arms, no implicit arm is ahead of all baselines")
    assert "Strongest baseline: ordinary attention, twice the layers. Implicit: behind; both solve 1 of 1 seeds" in line
    rows |= {"implicit": [run(0, 1.0, solved_at=2)], "ordinary-2": [run(0, 1.0, solved_at=4)]}
    assert report.no_help([(shown, rows)]) == []
    assert len(report.overview([(replace(shown, group="studies"), rows)])) == 1


@pytest.mark.parametrize(
    ("ours", "baseline", "words", "helps"),
    [
        ([run(0, 1.0, solved_at=2), run(1, 0.5)], [run(0, 0.5), run(1, 0.5)],
         "ahead; solves 1 of 2 seeds, the baseline 0 of 2", True),
        ([run(0, 0.5), run(1, 0.5)], [run(0, 1.0, solved_at=2), run(1, 0.5)],
         "behind; solves 0 of 2 seeds, the baseline 1 of 2", False),
        ([run(0, 0.5)], [run(0, 0.4)], f"neither solves it within 4 steps; ahead{IN_EACH}", True),
        ([run(0, 0.4)], [run(0, 0.5)], "neither solves it within 4 steps; behind, better in 0 of 1 seeds", False),
        ([run(0, 0.4), run(1, 0.6)], [run(0, 0.4), run(1, 0.5)],
         "neither solves it within 4 steps; not told apart, better in 1 of 2 seeds", False),
    ],
)  # fmt: skip
def test_a_verdict_compares_with_the_strongest_baseline(ours, baseline, words, helps):
    made = [verdicts.Contender("a row", "its title", runs) for runs in (ours, baseline)]
    assert verdicts.compare(table(), *made) == verdicts.Verdict(words, helps)


def test_steps_and_operations_to_solve_are_those_at_the_step():
    one = run(0, 1.0, solved_at=2, seconds=4.0)
    assert (verdicts.steps_to_solve(one), verdicts.operations_to_solve(one)) == (2.0, 5e9)
    assert verdicts.steps_to_solve(run(0, 0.5)) is None
    tried = {"tried": {"0.01": [{"solved_at": 2}, {"solved_at": None}], "0.1": [{"solved_at": None}] * 2}}
    lines = cells.cells(table(), {"ordinary": [one | {"choice": tried}]})
    assert cell(lines, 1, "seconds to solve") == "2"
    assert cell(lines, 1, "TFLOPs to solve") == "0.005"
    assert cell(lines, 1, "of all rates") == "1 of 4"
    assert cell(cells.cells(table(), {"ordinary": [run(0, 0.5)]}), 1, "steps to solve") == "not within 4"


def test_a_kind_whose_outputs_overflowed_has_no_solver_figures():
    figures = {"steps": 2.0, "most_steps": 3, "residual": 1e-5, "unconverged": 0.0}
    one = run(0, 0.5)
    one["curve"][-1]["solver"] = {"short": figures, "long": {}}
    assert "| 2.0 | 3 | 1e-05 | 0.00 % |" in cells.solver_table(table("implicit"), {"implicit": [one]})
    one["curve"][-1]["solver"] = {"long": {}}
    assert cells.solver_table(table("implicit"), {"implicit": [one]}) == ""


def test_what_did_not_settle_in_training_is_shown_without_a_mask():
    shown = replace(table("implicit"), task=replace(table().task, is_causal=False))
    one = run(0, 0.5) | {"unsettled": 0.25}
    one["curve"][-1]["solver"] = {"held_out": {"steps": 3.0}}
    assert cells.settled([one]) == "25.0 %"
    assert cells.settled([run(0, 0.5)]) == ""
    one["curve"][-1].pop("solver")
    assert "unsettled, at worst" in cells.cells(shown, {"implicit": [one]})[0]


def test_every_table_that_compares_arms_says_what_should_solve_it():
    compared = [name for name, shown in tables("cpu").items() if shown.group != "studies"]
    assert list(mechanisms.MECHANISMS) == compared
    text = report.page({"one": {"ordinary": [run(0, 0.5)]}}, {"one": replace(table(), name="one", title="A title")})
    assert "should" in sentences.METHOD
    assert report.mechanism("one") == [], text
    shown = report.page({"gaps": {"ordinary": [run(0, 0.5)]}}, {"gaps": replace(table(), name="gaps", title="Gaps")})
    assert f"## Gaps\n\n{mechanisms.MECHANISMS['gaps']}\n\n" in shown


def test_the_page_says_which_runs_are_missing():
    two = replace(table(), name="one", seeds=2)
    rows = {name: [run(0, 0.5), run(1, 0.5)] for name in two.rows}
    assert report.missing({"one": rows}, {"one": two}) == []
    first = next(iter(rows))
    assert report.missing({"one": rows | {first: [run(0, 0.5)]}}, {"one": two}) == [f"one ({first})"]
    assert report.missing({}, {"one": two}) == ["one"]
    assert "Runs are still missing of: one." in report.page({}, {"one": two})
    assert "missing" not in report.page({"one": rows}, {"one": two})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Records of real runs, with gradients compared, and the page of them."""
    directory = tmp_path_factory.mktemp("eval")
    shown = table(training=replace(TRAINING, gradients=False))
    campaign.perform(
        shown, list(shown.rows), [0, 1], directory, workers=1, environment={"processor": "a processor"},
        watch=campaign.Watch(),
    )  # fmt: skip
    looked = replace(
        table("implicit", training=replace(TRAINING, gradients=True)),
        name="gradients",
        title="What gradients are worth",
    )
    campaign.perform(looked, ["implicit"], [0], directory, workers=1, environment={}, watch=campaign.Watch())
    return directory, {"before": shown, "gradients": looked}


def test_page_has_every_table_and_picture(made):
    directory, shown = made
    report.write(directory, records.load(directory), shown)
    page = (directory / "results.md").read_text()
    for name, one in shown.items():
        assert f"## {one.title}" in page
        assert f"(images/eval-{name}.png)" in page
        assert (directory / "images" / f"eval-{name}.png").stat().st_size > 10_000
    assert "Trained on a processor" in page
    assert page == report.page(records.load(directory), shown)


def test_a_page_of_the_quick_check_compares_nothing(made):
    directory, shown = made
    page = report.page(records.load(directory), shown, "smoke")
    assert "--budget smoke" in page
    assert "Their figures say nothing" in page
    for absent in ("--budget cpu`:", "## In short", "## Where it does not help", "## Defaults"):
        assert absent not in page


def test_every_arm_has_its_name_on_the_page(made):
    _, shown = made
    lines = report.names([(shown["before"], list(shown["before"].rows))])
    assert ["ordinary attention", "`ordinary`"] in lines


def test_gradients_are_compared_with_the_exact_one(made):
    directory, _ = made
    for record in records.load(directory)["gradients"]["implicit"]:
        for entry in record["curve"]:
            found = entry["gradients"]
            assert found["implicit"] == pytest.approx(1, abs=1e-4)
            assert found["one step"] < found["phantom"] < 1.0001
            assert 0 < found["radius"] < 1


def test_pictures_draw_what_there_is(made):
    directory, shown = made
    found = records.load(directory)
    figure = pictures.table(shown["before"], report.in_order(shown["before"], found["before"]))
    assert [axes.get_xlabel() for axes in figure.axes] == ["training step"] * 3
    assert pictures.table(shown["gradients"], found["gradients"]).axes[-1].get_xlabel() == "spectral radius"
    assert len(pictures.table(shown["before"], {"ordinary": found["before"]["ordinary"]}).axes) == 1


def test_machines_are_told_apart():
    one, other = {**run(0, 1.0), "environment": {"processor": "A"}}, {**run(1, 1.0), "environment": {"processor": "B"}}
    *_, mixed, _ = lines = machines({"t": {"r": [one, other, one]}, "other": {"r": [one]}})
    assert len(lines) == 4
    assert mixed == "Runs of more than one processor stand in one table in t."
    hour = run(0, 1.0, seconds=3600.0)
    tried = {"tried": {"0.01": [{"seed": 0}]}, "seconds": 2 * 3600.0}
    assert machines({"t": {"r": [hour | {"choice": tried}]}})[-1].endswith("2.0 hours of one core."), "one counts"
    assert machines({"t": {"r": [hour]}})[-1].endswith("1.0 hours of one core.")


def test_without_a_mask_the_implicit_arm_is_the_one_that_is_recommended():
    free = tables("cpu")["digits-1"]
    rows = {"implicit": [run(0, 1.0)], "bounded": [run(0, 0.5)], "ordinary": [run(0, 0.7)]}
    assert verdicts.strongest(free, rows, "implicit").name == "bounded"
    assert verdicts.strongest(free, rows, "baseline").name == "ordinary"


def test_the_strongest_of_all_may_train_for_as_many_seconds_as_the_slowest_implicit_arm():
    shown = table("ordinary", "implicit")
    longer = replace(shown.rows["ordinary"], title="ordinary, longer", lengthened=2.0)
    shown = replace(shown, rows={**shown.rows, "longer": longer})
    more = run(0, 1.1, seconds=2.0)
    more["settings"]["training"]["steps"] *= 2
    rows = {"ordinary": [run(0, 0.8)], "longer": [more]}
    slow, fast, untimed = (run(0, 1.0, seconds=seconds) for seconds in (4.0, 2.0, float("inf")))
    assert verdicts.strongest_of_all(shown, rows, [[fast], [slow]]).name == "longer"
    assert verdicts.strongest_of_all(shown, rows, [[fast]]).name == "ordinary"
    assert verdicts.strongest_of_all(shown, rows, [[untimed]]).name == "ordinary"


def test_page_of_the_repository_is_that_of_its_records():
    found = records.load(DOCS / "data" / "eval")
    if not found:
        pytest.skip("no records are kept yet")
    assert (DOCS / "results.md").read_text(encoding="utf-8") == report.page(found, tables("cpu"))


def test_arms_that_do_not_solve_a_task_are_compared_within_equal_seconds():
    shown = replace(table("ordinary", "ordinary-2", "implicit"), group="recall")
    rows = {
        "ordinary": [run(0, 0.4, seconds=1.0)],
        "ordinary-2": [run(0, 0.9, seconds=4.0)],
        "implicit": [run(0, 0.5, seconds=1.0)],
    }
    found = report.verdict(shown, rows, "implicit")
    assert found.words == (
        "neither solves it within 4 steps; behind, better in 0 of 1 seeds; "
        "within equal seconds (ordinary attention) ahead, better in 1 of 1 seeds"
    )
    assert not found.helps
    rows["implicit"] = [run(0, 1.0, solved_at=4, seconds=1.0)]
    assert "equal seconds" not in report.verdict(shown, rows, "implicit").words
