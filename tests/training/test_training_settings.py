"""Settings: where each comes from, and what is said about one that cannot be."""

import dataclasses

import pytest

from implicit_attention.training import model
from implicit_attention.training.faults import RunError
from implicit_attention.training.resolving import read_yaml, resolve
from implicit_attention.training.settings import FIELDS, PRESETS, Settings


def test_flags_win_over_the_file_the_run_the_preset_and_the_default():
    run = {**dataclasses.asdict(Settings()), "steps": 3, "eval_every": 4, "log_every": 5}
    file = {"steps": 30, "eval_every": 40}
    assert resolve({"steps": 300}, file, run) == Settings(steps=300, eval_every=40, log_every=5)
    small = resolve({"preset": "small", "heads": 8}, {"length": 99})
    assert (small.heads, small.length, small.embed_dim) == (8, 99, PRESETS["small"]["embed_dim"])
    assert small.weight_decay == Settings().weight_decay


def test_few_steps_shorten_the_warm_up_unless_it_is_named():
    """With 50 steps and 100 to warm up in, the learning rate would end at half of what was asked for."""
    assert resolve({"steps": 101}).warmup == 100
    assert [resolve({"steps": steps}).warmup for steps in (100, 50, 9, 1)] == [10, 5, 0, 0]
    assert resolve({"steps": 200, "preset": "small"}).warmup == 20
    assert resolve({"steps": 50, "warmup": 100}).warmup == 100
    assert resolve({"steps": 50}, {"warmup": 70}).warmup == 70
    begun = dataclasses.asdict(resolve({"steps": 50}))
    assert resolve({"steps": 500}, None, begun).warmup == 5, "a run that is resumed keeps its schedule"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be(preset):
    assert resolve({"preset": preset}).preset == preset


def test_the_text_is_found_again_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = dataclasses.asdict(resolve({"data": "text"}))
    assert run["data"] == str(tmp_path / "text")
    assert resolve({"data": "./text"}, None, run).data == run["data"]
    assert resolve({"data": "default"}).data == "default"


def test_two_runs_do_not_share_a_directory_by_default():
    names = {str(resolve({"attention": a, "seed": s}).directory) for a in ("implicit", "ordinary") for s in (0, 1)}
    assert len(names) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"steps": 0}, "steps: must be an integer of at least 1, but is 0."),
        ({"steps": 1.5}, "steps: must be an integer, but is 1.5."),
        ({"steps": True}, "steps: must be an integer, but is True."),
        ({"seed": 2**32}, "seed: must be an integer between 0 and 4294967295, but is 4294967296."),
        ({"learning_rate": float("nan")}, "learning_rate: must be a number of at least 0, but is nan."),
        ({"learning_rate": float("inf")}, "learning_rate: must be a number of at least 0, but is inf."),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, but is 'fast'."),
        ({"bf16": 1}, "bf16: must be true or false, but is 1."),
        ({"attention": "odd"}, "attention: must be one of implicit, ordinary, but is 'odd'."),
        ({"preset": "huge"}, "preset: must be one of tiny, small, base, but is 'huge'."),
        ({"leaning_rate": 1.0}, "unknown setting 'leaning_rate': did you mean 'learning_rate'?"),
        ({"heads": 3}, "heads: must divide embed_dim into parts of even size, but embed_dim is 128 and heads 3."),
        ({"accumulate": 5}, "accumulate: must divide batch_size, but batch_size is 12 and accumulate 5."),
    ],
)
def test_a_setting_that_cannot_be_is_named(flags, sentence):
    with pytest.raises(RunError) as caught:
        resolve(flags)
    assert str(caught.value) == sentence


def test_the_old_name_of_a_kernel_is_understood_and_not_offered():
    assert resolve({"kernel": "numba"}).kernel == "cpp"
    assert resolve({}, None, {**dataclasses.asdict(Settings()), "kernel": "numba"}).kernel == "cpp"
    with pytest.raises(RunError, match="kernel: must be one of auto, torch, cpp, but is 'odd'"):
        resolve({"kernel": "odd"})


def test_resuming_keeps_what_the_data_order_and_the_model_depend_on():
    run = dataclasses.asdict(Settings())
    for name in (
        "data",
        "preset",
        "attention",
        "self_query",
        "values",
        "length",
        "embed_dim",
        "layers",
        "heads",
        "seed",
        "batch_size",
    ):
        assert FIELDS[name].metadata["fixed"]
    assert resolve({"length": 128, "learning_rate": 1e-4}, None, run).learning_rate == 1e-4
    with pytest.raises(RunError, match="length: 64 contradicts the run that is resumed, which has 128: leave it out"):
        resolve({"length": 64}, None, run)


def test_values_that_read_outputs():
    built = model.build(Settings(values="feedback", layers=2, embed_dim=16, heads=2))
    assert [block.attention.settings.values for block in built.model.layers] == ["feedback"] * 2
    with pytest.raises(RunError, match="values: feedback needs self_query input"):
        Settings(values="feedback", self_query="output")


def test_yaml_is_data_with_the_names_of_the_flags(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("learning-rate: 3e-3\nsteps: 7\nbf16: true\nattention: ordinary\nweight_decay: 0\n")
    found = read_yaml(path)
    assert found == {
        "learning_rate": 3e-3, "steps": 7, "bf16": True, "attention": "ordinary", "weight_decay": 0.0,
    }  # fmt: skip
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"stepz: 3", "unknown setting 'stepz': did you mean 'steps'?"),
        (b"steps: many", "steps: must be an integer, but is 'many'."),
        (b"steps:", "steps: must be an integer, but is None."),
        (b"- steps", "must hold a mapping from settings to values, but holds list."),
        (b"1: 2", "must hold a mapping from settings to values, but holds dict."),
        (b"steps: [", "is not a YAML file of settings: "),
        (
            b"steps: !!python/object/apply:os.getpid []",
            "is not a YAML file of settings: could not determine a constructor",
        ),
        (b"\xff\xfe\xfd", "is not a YAML file of settings: "),
        (b"steps: 2024-13-45", "is not a YAML file of settings: "),
    ],
    ids=["unknown", "type", "none", "list", "keys", "syntax", "code", "bytes", "date"],
)
def test_yaml_that_is_something_else_is_refused_in_one_line(tmp_path, content, sentence):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"--config {path}")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match=r"cannot read --config .*: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RunError, match=r"cannot read --config .*: Is a directory"):
        read_yaml(tmp_path)
