"""Runs: what they leave, how they go on, and how they stop."""

import errno
import json
import math
from dataclasses import replace

import pytest
import small_run
import torch
from safetensors.torch import load_file, save_file
from small_run import curve, kept_history, listing, settings, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from implicit_attention import files
from implicit_attention.errors import ConvergenceWarning
from implicit_attention.training import checkpoint, corpus, run, trainer
from implicit_attention.training.faults import RunError
from implicit_attention.training.health import Health

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


class Cut(BaseException):
    """As if the process had been killed."""


class CutAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Cut


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps, uncut."""
    folder = tmp_path_factory.mktemp("finished")
    chosen = settings(folder)
    return chosen, train(chosen)


def test_a_run_leaves_a_model_that_transformers_loads(finished):
    chosen, result = finished
    model = AutoModelForCausalLM.from_pretrained(chosen.directory)
    tokenizer = AutoTokenizer.from_pretrained(chosen.directory)
    assert model.config.use_cache
    assert model.config.solver == "auto"
    assert sum(p.numel() for p in model.parameters()) == result.parameters
    # Held-out bits per byte again, by the definition, from the files alone.
    text = small_run.TEXT[len(small_run.TEXT) - len(small_run.TEXT) // 10 :]
    windows = [text[i : i + 16] for i in range(0, len(text) - 15, 15)]
    tokens = torch.tensor([tokenizer(w.decode())["input_ids"] for w in windows])
    with torch.no_grad():
        logits = model.double()(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    nats = -logits.gather(-1, tokens[:, 1:, None]).mean().item()
    assert result.bits_per_byte == pytest.approx(nats / math.log(2), rel=1e-5)
    assert result.held_out_bytes == 15 * len(windows)


def test_it_learns(finished):
    _, result = finished
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(258), rel=0.1), "nothing is known at the start"
    assert result.bits_per_byte < 0.9 * losses[0] / math.log(2)


def test_figures_are_logged_and_drawn_by_tensorboard(finished):
    chosen, result = finished
    (first, *_) = [entry for entry in result.history if "loss" in entry]
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2))
    assert {
        "tokens_per_second",
        "solver_steps",
        "residual",
        "unconverged",
        "learning_rate",
        "grad_norm",
    } <= first.keys()
    board = EventAccumulator(str(chosen.directory / "tensorboard")).Reload()
    events = board.Scalars("training/bits_per_byte")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert events[0].value == pytest.approx(first["bits_per_byte"])
    assert board.Scalars("held out/bits_per_byte")[0].value == pytest.approx(result.bits_per_byte)
    assert [event.step for event in board.Scalars("held out (sample)/loss")] == [3, 6]


def test_a_run_keeps_the_newest_checkpoints_and_nothing_unfinished(finished):
    chosen, _ = finished
    assert [path.name for path in chosen.directory.iterdir() if path.is_dir() and path.name != "tensorboard"] in (
        ["checkpoint-4", "checkpoint-6"], ["checkpoint-6", "checkpoint-4"],
    )  # fmt: skip
    assert {path.suffix for path in chosen.directory.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".0",
    } | {path.suffix for path in (chosen.directory / "tensorboard").iterdir()}, "no pickle"


@pytest.mark.parametrize("attention", ["implicit", "ordinary"])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_cut_run_goes_on_as_if_it_had_not_been(tmp_path, finished, attention, step):
    chosen = settings(tmp_path, attention=attention)
    whole = (
        finished[1]
        if attention == "implicit"
        else train(settings(tmp_path, attention=attention, out=str(tmp_path / "o")))
    )
    with pytest.raises(Cut):
        train(chosen, callbacks=[CutAfter(step)])
    (chosen.directory / ".unfinished-checkpoint-4-x").mkdir()
    result = train(chosen, resume=True)
    assert curve(result.history) == curve(whole.history)
    assert result.bits_per_byte == whole.bits_per_byte
    assert not list(chosen.directory.glob(".unfinished*"))


@pytest.mark.parametrize("cut", [4, 2], ids=["checkpoint-2", "checkpoint-0"])
def test_resuming_shows_no_step_twice_in_tensorboard(tmp_path, cut):
    chosen = settings(tmp_path)
    with pytest.raises(Cut):
        train(chosen, callbacks=[CutAfter(cut)])  # the step before is logged, the checkpoint is older
    train(chosen, resume=True)
    board = EventAccumulator(str(chosen.directory / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("training/loss")] == [1, 2, 3, 4, 5, 6]


def test_dropout_and_accumulation_go_on_bit_by_bit_too(tmp_path, monkeypatch):
    plain = run.build

    def with_dropout(chosen):
        model = plain(chosen)
        model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: torch.dropout(out, 0.3, model.training))
        return model

    monkeypatch.setattr(run, "build", with_dropout)
    whole = train(settings(tmp_path, accumulate=2, attention="ordinary"))
    chosen = settings(tmp_path, accumulate=2, attention="ordinary", out=str(tmp_path / "cut"))
    with pytest.raises(Cut):
        train(chosen, callbacks=[CutAfter(3)])
    assert curve(train(chosen, resume=True).history) == curve(whole.history)


def test_parts_of_a_batch_give_the_same_losses(tmp_path, finished):
    parts = train(settings(tmp_path, accumulate=4))
    for a, b in zip(curve(parts.history), curve(finished[1].history), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)


def test_a_finished_run_can_be_lengthened_with_another_learning_rate(tmp_path, finished):
    chosen = settings(tmp_path, steps=2)
    train(chosen)
    plan = run.plan({"out": chosen.out, "steps": 3, "learning_rate": 0.05}, {}, resume=True)
    result = run.run(plan)
    rates = [entry["learning_rate"] for entry in result.history if "loss" in entry]
    assert rates == pytest.approx([0, 0.1 / 50, 0.05 * 2 / 50])
    with pytest.raises(RunError, match=r"steps: the run in .* is at step 3 already, beyond 2"):
        run.plan({"out": chosen.out, "steps": 2}, {}, resume=True)


def test_a_lengthened_run_takes_other_intervals(tmp_path):
    chosen = settings(tmp_path, steps=3, save_every=3, eval_every=3, log_every=3, attention="ordinary")
    train(chosen)
    intervals = {"save_every": 4, "eval_every": 5, "log_every": 2, "keep": 9}
    result = run.run(run.plan({"out": chosen.out, "steps": 12, **intervals}, {}, resume=True))
    steps = {int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(chosen.directory)}
    assert steps == {0, 3, 4, 8, 12}
    assert [e["step"] for e in result.history if "eval_loss" in e] == [3, 5, 10, 12]
    assert [e["step"] for e in result.history if "loss" in e] == [3, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("file", "more"),
    [({"heads": 3}, {"embed_dim": 24, "learning_rate": 0.1}), ({"layers": "0-1"}, {"source": "trained"})],
    ids=["heads", "layers"],
)
def test_a_run_is_resumed_with_its_own_settings_in_a_file(tmp_path, monkeypatch, file, more):
    monkeypatch.chdir(tmp_path)
    small_run.make_trained(tmp_path / "trained")
    data = str(small_run.text(tmp_path))
    flags = {"data": data, "out": "run", "length": 16, "batch_size": 4, "steps": 1, "device": "cpu", **more}
    first = run.plan(flags, file, resume=False)
    first.settings.directory.mkdir()
    run.run(first)
    for again in (flags, {"out": "run"}, {"out": "run", "steps": 2}):
        plan = run.plan(again, {**file, "steps": 3}, resume=True)
        assert replace(plan.settings, steps=1) == first.settings
        assert plan.settings.steps == again.get("steps", 3)
    with pytest.raises(RunError, match=r"(heads|layers): 5 contradicts the run"):
        run.plan({"out": "run"}, dict.fromkeys(file, 5), resume=True)
    with pytest.raises(RunError, match="steps: must be an integer"):
        run.plan({"out": "run"}, {"steps": "many"}, resume=True)


def test_an_earlier_run_is_never_overwritten(tmp_path, finished):
    chosen, _ = finished
    with pytest.raises(RunError, match=r"has a run already \(checkpoint-6\): continue it with --resume, or"):
        run.plan({"out": chosen.out}, {}, resume=False)
    with pytest.raises(RunError, match="has no checkpoint to resume from: leave out --resume to start a run"):
        run.plan({"out": str(tmp_path)}, {}, resume=True)


@pytest.mark.parametrize("out", ["run", "runs/tiny"])
def test_a_run_within_its_data_learns_from_no_run(tmp_path, out):
    (tmp_path / "more").write_bytes(b"another text\n" * 40)
    (tmp_path / out).mkdir(parents=True)
    (tmp_path / out / "notes").write_bytes(b"notes on this run\n")
    chosen = settings(tmp_path, steps=2, data=str(tmp_path), out=str(tmp_path / out), attention="ordinary")
    first = train(chosen)
    assert first.training_bytes in (len(small_run.TEXT), 520)
    assert train(replace(chosen, steps=3), resume=True).training_bytes == first.training_bytes
    other = replace(chosen, out=str(tmp_path / "other"))
    assert train(other).training_bytes == first.training_bytes


def test_a_run_in_the_very_directory_of_its_data_is_refused(tmp_path):
    chosen = settings(tmp_path, data=str(tmp_path), out=str(tmp_path))
    with pytest.raises(RunError, match=rf"--out {tmp_path} is the directory of --data, .*: choose another --out"):
        train(chosen)


def test_resuming_refuses_other_data_and_other_sizes(tmp_path):
    chosen = settings(tmp_path, steps=2)
    train(chosen)
    with pytest.raises(RunError, match="embed_dim: 32 contradicts the run that is resumed, which has 16"):
        run.plan({"out": chosen.out, "embed_dim": 32}, {}, resume=True)
    (tmp_path / "text").write_bytes(b"x" * 3000)
    with pytest.raises(RunError, match=r"--data .* has changed since the run in .* started, so it cannot continue"):
        run.run(run.plan({"out": chosen.out, "steps": 3}, {}, resume=True))


@pytest.mark.parametrize(
    "name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.RANDOM, checkpoint.STATE, checkpoint.RUN]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    chosen = settings(tmp_path, steps=2, attention="ordinary")
    train(chosen)
    path = chosen.directory / "checkpoint-2" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    before = listing(chosen.directory)
    with pytest.raises(RunError) as caught:
        run.run(run.plan({"out": chosen.out, "steps": 3}, {}, resume=True))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert damage == "gone" or "is damaged" in str(caught.value)
    left = [entry for entry in listing(chosen.directory) if "events" not in entry]
    assert left == [entry for entry in before if "events" not in entry]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_checkpoint_of_another_shape_is_named(tmp_path, name, change):
    chosen = settings(tmp_path, steps=2, attention="ordinary")
    train(chosen)
    path = chosen.directory / "checkpoint-2" / name
    tensors = load_file(path)
    key = next(key for key, tensor in tensors.items() if tensor.dim() == 2)
    if change == "shape":
        tensors[key] = tensors[key][1:].clone()
    elif change == "missing":
        del tensors[key]
    else:
        tensors[f"more.{key}"] = tensors[key].clone()
    save_file(tensors, path)
    plan = run.plan({"out": chosen.out, "steps": 3}, {}, resume=True)
    with pytest.raises(RunError, match=rf"{path} is of another model: .*{key.partition(':')[0]}"):
        run.run(plan)


def test_a_tokenizer_with_several_templates_is_saved_again_and_again(tmp_path, monkeypatch):
    plain, ending = run.byte_tokenizer, ["one"]

    def with_templates(length):
        tokenizer = plain(length)
        tokenizer.chat_template = {"default": "{{ messages }}", "tools": f"{{{{ tools }}}}{ending[0]}"}
        return tokenizer

    monkeypatch.setattr(run, "byte_tokenizer", with_templates)
    chosen = settings(tmp_path, steps=1, attention="ordinary")
    train(chosen)
    ending[0] = "two"
    train(replace(chosen, steps=2), resume=True)
    template = "additional_chat_templates/tools.jinja"
    assert (chosen.directory / template).read_text() == "{{ tools }}two"
    assert (chosen.directory / "checkpoint-1" / template).read_text() == "{{ tools }}one"
    assert AutoTokenizer.from_pretrained(chosen.directory).chat_template["tools"] == "{{ tools }}two"
    assert not list(chosen.directory.glob(".unfinished*"))


def test_every_file_is_flushed_before_a_directory_appears(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append(path.name))
    with files.whole_directory(tmp_path / "new") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("x")
    assert flushed[:2] == ["file", "inner"]
    with files.whole_files(tmp_path / "new") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("y")
    assert (tmp_path / "new" / "inner" / "file").read_text() == "y"
    assert flushed[-2:] == ["inner", "new"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["weights", "optimizer", "flush", "last"])
def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(tmp_path, monkeypatch, when):
    chosen = settings(tmp_path, attention="ordinary")
    where = {
        "weights": (checkpoint, "_save_model"),
        "optimizer": (checkpoint, "_save_tensors"),
        "flush": (files, "_flush_all"),
        "last": (checkpoint, "save_model"),
    }[when]

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                monkeypatch.setattr(*where, full_disk)

    with pytest.raises(RunError, match=rf"^cannot write to --out {chosen.directory}: No space left on device$"):
        train(chosen, callbacks=[Fill()])
    expected = {"checkpoint-0", "checkpoint-2"} if when != "last" else {"checkpoint-4", "checkpoint-6"}
    assert {path.name for path in chosen.directory.iterdir()} == expected | {"tensorboard"}
    monkeypatch.undo()
    assert train(chosen, resume=True).bits_per_byte < 8


def test_an_error_of_the_safetensors_library_while_saving_is_one_of_writing(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        checkpoint._save_tensors({"a": torch.zeros(1)}, tmp_path / "no" / "file")


class Poison(TrainerCallback):
    """Make the weights so large that the loss is not finite."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            with torch.no_grad():
                model.model.embed_tokens.weight.mul_(float("nan"))


@pytest.mark.parametrize("attention", ["implicit", "ordinary"])
def test_a_loss_that_is_no_number_stops_the_run_at_the_last_good_checkpoint(tmp_path, attention):
    chosen = settings(tmp_path, attention=attention)
    with pytest.raises(RunError) as caught:
        train(chosen, callbacks=[Poison()])
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert f"{chosen.directory}/checkpoint-2 is the last good checkpoint: continue with --resume and a" in sentence
    assert "--learning-rate below 0.1" in sentence
    assert {path.name for path in chosen.directory.glob("checkpoint*")} == {"checkpoint-0", "checkpoint-2"}
    assert all(t.isfinite().all() for t in load_file(chosen.directory / "checkpoint-2" / checkpoint.WEIGHTS).values())


def test_unmet_tolerances_and_gains_near_one_are_said_once_with_what_to_do():
    health = Health()
    assert health.warnings({}, 1) == []
    assert health.warnings({"unconverged": 0.0, "residual": 1e-7, "gain": 0.94}, 1) == []
    (missed,) = health.warnings({"unconverged": 0.0156, "residual": 3e-4, "gain": 0.5}, 7)
    assert missed.startswith(
        "step 7: up to 1.56% of a layer's rows missed the solver's tolerance (largest residual 3.0e-04)"
    )
    assert "lower --learning-rate" in missed
    (gain,) = health.warnings({"unconverged": 0.5, "residual": 1.0, "gain": 0.97}, 8)
    assert gain.startswith("step 8: the largest gain of a row's equation is 0.970")
    assert health.warnings({"unconverged": 0.5, "residual": 1.0, "gain": 2.0}, 9) == []
    (nan,) = Health().warnings({"gain": math.nan}, 9)
    assert "nan" in nan


def test_health_keeps_the_worst_since_it_was_asked():
    class Stats:
        gain = None

        def __init__(self, *figures):
            self.steps, self.residual, self.unconverged = map(torch.tensor, figures)

    class Output:
        solver_stats = None

    health = Health()
    health.add(Output())
    assert health.figures() == {}
    for figures in (([3, 9], [1e-3, 1e-4], [0.0, 0.0]), ([4, 2], [0.0, 0.0], [0.5, 0.0])):
        Output.solver_stats = Stats(*figures)
        health.add(Output())
    assert health.figures() == pytest.approx({"solver_steps": 9, "residual": 1e-3, "unconverged": 0.5})
    assert health.figures() == {}


def test_the_user_is_told_of_missed_tolerances_by_the_watch_and_not_by_warnings(tmp_path, monkeypatch, recwarn):
    plain = run.build

    def impatient(chosen):
        model = plain(chosen)
        model.config.solver = {"name": "picard", "max_steps": 1}
        return type(model)(model.config)

    monkeypatch.setattr(run, "build", impatient)
    said = []
    train(settings(tmp_path, steps=2), say=said.append)
    assert [sentence[:12] for sentence in said if "tolerance" in sentence] == ["step 1: up t"]
    assert not [w for w in recwarn if issubclass(w.category, ConvergenceWarning)]


@pytest.mark.parametrize(
    ("changes", "world", "sentence"),
    [
        ({"batch_size": 5}, "2", "batch_size: must be a multiple of accumulate x processes = 1 x 2, but is 5."),
        ({"fsdp": True}, "1", "fsdp: needs several processes: use torchrun --nproc-per-node 2"),
        ({"device": "cuda"}, "1", "device: no CUDA device was found: use --device cpu."),
    ],
)
def test_settings_that_do_not_fit_the_machine_are_named(tmp_path, monkeypatch, changes, world, sentence):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError) as caught:
        run.arguments(settings(tmp_path, **changes))
    assert str(caught.value).startswith(sentence)


def test_out_of_memory_is_one_line_with_what_to_do(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(trainer.TextTrainer, "evaluate", no_memory)
    with pytest.raises(
        RunError, match=r"^out of memory \(CUDA out of memory. Tried\): raise --accumulate, or use --bf16"
    ):
        train(settings(tmp_path, steps=3, attention="ordinary"))


def test_evaluation_is_the_same_for_any_size_of_batch(tmp_path):
    losses = []
    for batch_size in (1, 5, 64):
        chosen = settings(tmp_path, batch_size=batch_size, steps=1, out=str(tmp_path / str(batch_size)))
        text = corpus.read(chosen.data)
        made = run.make_trainer(chosen, text)
        losses.append(made.evaluate()["eval_loss"])
        assert json.dumps(made.evaluate()["eval_bytes"]) == str(15 * len(made.eval_dataset))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_history_is_in_the_checkpoint(finished):
    chosen, result = finished
    assert curve(kept_history(chosen.directory)) == curve(result.history)[:-1], "all but the last evaluation"


def test_recomputed_blocks_give_the_same_losses(tmp_path, finished):
    again = train(settings(tmp_path, checkpointing=True))
    for a, b in zip(curve(again.history), curve(finished[1].history), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-6)


def test_bfloat16_comes_close_and_keeps_its_weights_in_float32(tmp_path, finished):
    chosen = settings(tmp_path, bf16=True)
    near = train(chosen)
    losses, others = ([e["loss"] for e in h if "loss" in e] for h in (near.history, finished[1].history))
    assert losses == pytest.approx(others, rel=0.02)
    assert losses != others
    assert {t.dtype for t in load_file(chosen.directory / checkpoint.WEIGHTS).values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_losses_and_checkpoints(tmp_path, finished):
    chosen = settings(tmp_path, compile=True)
    compiled = train(chosen)
    for a, b in zip(curve(compiled.history), curve(finished[1].history), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)
    assert (
        load_file(chosen.directory / checkpoint.WEIGHTS).keys()
        == load_file(finished[0].directory / checkpoint.WEIGHTS).keys()
    )


def test_accelerate_launch_with_fsdp_means_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert run.plan({"out": str(tmp_path)}, {}, resume=False).settings.fsdp
    assert not run.plan({"out": str(tmp_path)}, {}, resume=False).settings.fsdp, "accelerate must not see it again"


def test_means_over_several_steps_do_not_show_where_a_run_was_cut(tmp_path):
    whole = train(settings(tmp_path, log_every=4, attention="ordinary", out=str(tmp_path / "whole")))
    chosen = settings(tmp_path, log_every=4, attention="ordinary")
    with pytest.raises(Cut):
        train(chosen, callbacks=[CutAfter(3)])
    assert curve(train(chosen, resume=True).history) == curve(whole.history)
