"""Runs that start from a trained model: what learns, what they leave, how they go on, what is refused."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from small_run import curve, make_trained, text
from small_run import settings as new_run
from small_run import train as train_new
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_run import Cut, CutAfter

from implicit_attention import ImplicitQueryAttention
from implicit_attention.hf import (
    ConversionError,
    ImplicitAttentionForCausalLM,
    ImplicitAttentionForSequenceClassification,
    convert,
)
from implicit_attention.hf.conversion import files
from implicit_attention.training import checkpoint, corpus, generation, run, uptraining
from implicit_attention.training.faults import RunError
from implicit_attention.training.packed import Packed, _bytes_per_token, pack
from implicit_attention.training.settings import Settings
from implicit_attention.training.tokenizer import byte_tokenizer
from implicit_attention.training.windows import HeldOutWindows
from tests.hf import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
SETTINGS = {
    "length": 16, "batch_size": 4, "steps": 6, "warmup": 50, "log_every": 1,
    "eval_every": 3, "save_every": 2, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("models") / "trained")


def train(folder, source, *, resume=False, callbacks=(), **changes):
    """Do what the command does: plan, make the directory, run."""
    if resume:
        flags = {"out": str(folder / "run"), **changes}
    else:
        rates = {"map_rate": 0.5} if changes.get("layers") != "none" else {}
        named = {"source": str(source), "data": str(text(folder)), "out": str(folder / "run")}
        flags = {**named, **SETTINGS, **rates, **changes}
    plan = run.plan(flags, {}, resume=resume)
    plan.settings.directory.mkdir(parents=True, exist_ok=True)
    return run.run(plan, say=lambda sentence: None, callbacks=callbacks)


def weights(folder):
    return load_file(folder / checkpoint.WEIGHTS)


def moved(folder):
    """Names of the weights that a run changed."""
    before = ImplicitAttentionForCausalLM.from_pretrained(folder / "converted").state_dict()
    return {name for name, tensor in weights(folder / "run").items() if not torch.equal(tensor, before[name])}


def converted(folder, source, **options):
    model = convert(source, **options)
    files.write(model, source, folder / "converted")
    return folder / "converted"


def test_the_query_map_alone_learns(trained, tmp_path):
    converted(tmp_path, trained, layers=[0, 2])
    result = train(tmp_path, trained, layers="0,2")
    assert moved(tmp_path) == {f"model.layers.{i}.attention.Omega_Q.weight" for i in (0, 2)}
    first, *_, last = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert last < first
    assert {"residual", "solver_steps", "unconverged"} <= result.history[1].keys()
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.block_types == ["implicit", "full_attention", "implicit"]
    tokens = tf.AutoTokenizer.from_pretrained(tmp_path / "run")("line", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3).shape == (1, 7)


def test_the_first_figure_is_that_of_the_trained_model(trained, tmp_path):
    result = train(tmp_path, trained, steps=1)
    windows = HeldOutWindows(pack(corpus.read(str(text(tmp_path))), byte_tokenizer(64), 258)[1], 16, limit=512)
    tokens = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    with torch.no_grad():
        logits = tf.AutoModelForCausalLM.from_pretrained(trained)(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert result.history[0]["step"] == 0
    assert result.history[0]["eval_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_all_weights_learn(trained, tmp_path):
    converted(tmp_path, trained)
    train(tmp_path, trained, train="all", learning_rate=0.01, warmup=0)
    assert moved(tmp_path) == set(weights(tmp_path / "run"))


@pytest.mark.parametrize("layers", ["none", "1"])
def test_low_rank_changes_are_merged_in_what_is_left(trained, tmp_path, layers):
    converted(tmp_path, trained, layers=layers)
    result = train(tmp_path, trained, train="lora", layers=layers, learning_rate=0.3, lora_weights=1)
    maps = ("W_Q", "W_K", "W_V", "Omega_V", "out_proj", "Omega_Q")
    assert {name.split(".")[4] for name in moved(tmp_path)} <= set(maps)
    assert len(moved(tmp_path)) == 12 + (layers == "1")
    windows = HeldOutWindows(pack(corpus.read(str(text(tmp_path))), byte_tokenizer(64), 258)[1], 16, limit=512)
    tokens = torch.stack([windows[i]["input_ids"] for i in range(len(windows))])
    with torch.no_grad():
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert float(model(tokens, labels=tokens).loss) == pytest.approx(result.history[-1]["final_loss"], rel=1e-4)


def test_a_checkpoint_with_low_rank_changes_is_no_model(trained, tmp_path):
    train(tmp_path, trained, train="lora", layers="none", learning_rate=0.3)
    directory, newest = tmp_path / "run", tmp_path / "run" / "checkpoint-6"
    remedy = f"checkpoint-6 keeps low-rank changes apart .* `implicit-attention train --resume --out {directory}`, then"
    with pytest.raises(RunError, match=rf"--model .*{remedy}"):
        generation.load(newest)
    with pytest.raises(ConversionError, match=remedy):
        convert(newest, layers=[0])
    (tmp_path / "next").mkdir()
    with pytest.raises(RunError, match=rf"from: .*{remedy}"):
        train(tmp_path / "next", newest)
    generation.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(RunError, match=rf"--model .*{remedy}"):
        generation.load(directory)


@pytest.mark.parametrize("change", ["lacks", "has no place for"])
def test_a_model_whose_weights_do_not_fit_is_refused(trained, tmp_path, change):
    source = converted(tmp_path, trained, layers=[1])
    tensors = weights(source)
    if change == "lacks":
        del tensors["model.layers.1.attention.W_K.weight"]
    else:
        tensors["model.layers.1.attention.more"] = torch.zeros(2)
    save_file(tensors, source / checkpoint.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunError, match=rf"from: .* {change} 1 weight, such as model.layers.1.attention"):
        train(tmp_path, source)
    with pytest.raises(RunError, match=rf"--model .* {change} 1 weight, such as model.layers.1.attention"):
        generation.load(source)


def test_low_rank_changes_have_about_as_many_weights_as_are_asked_for(trained, tmp_path):
    for wanted, rank in ((0, 2), (1, 1), (4000, 6)):  # 3 layers x 32 x 16 weights of query maps; a rank has 3 x 224
        settings = run.plan(
            {"source": str(trained), "layers": "none", "train": "lora", "lora_weights": wanted, **SETTINGS}, {},
            resume=False,
        ).settings  # fmt: skip
        assert uptraining.learning(uptraining.start(settings, None).model) == rank * 3 * 224


def test_values_that_read_outputs_learn_too(trained, tmp_path):
    converted(tmp_path, trained, values="feedback")
    train(tmp_path, trained, values="feedback")
    assert {name.split(".")[4] for name in moved(tmp_path)} == {"Omega_Q", "Psi_V"}
    assert len(moved(tmp_path)) == 6


def test_the_query_map_has_its_own_learning_rate(trained, tmp_path):
    settings = run.plan(
        {
            "source": str(trained),
            "data": str(text(tmp_path)),
            "train": "all",
            "learning_rate": 0.1,
            "map_rate": 0.5,
            **SETTINGS,
        },
        {},
        resume=False,
    ).settings
    made = run.make_trainer(settings, corpus.read(settings.data))
    names = {parameter: name for name, parameter in made.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in made.create_optimizer().param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    assert {rate for name, rate in rates.items() if "Omega_Q" in name} == {0.5}
    assert {rate for name, rate in rates.items() if "Omega_Q" not in name} == {0.1}


def test_matrices_decay_and_nothing_else(tmp_path):
    settings = run.plan({"data": str(text(tmp_path)), **SETTINGS}, {}, resume=False).settings
    made = run.make_trainer(settings, corpus.read(settings.data))
    names = {parameter: name for name, parameter in made.model.named_parameters()}
    groups = made.create_optimizer().param_groups
    decaying = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {name for name in names.values() if name.endswith(("Omega_Q.weight", "gate.weight"))} <= decaying
    assert all("norm" in name or name.endswith("temperature") for name in set(names.values()) - decaying)
    other = tiny.make(positions="relative")
    free = {name for name, _ in other.named_parameters()} - set(made.get_decay_parameter_names(other))
    assert {name for name in free if "norm" not in name} == {
        f"model.layers.{i}.attention.{name}" for i in (0, 1) for name in ("temperature", "positions.table")
    }


@pytest.mark.parametrize("options", [{}, {"train": "lora", "learning_rate": 0.1}], ids=["query-map", "lora"])
def test_a_cut_run_goes_on_as_if_it_had_not_been_without_its_source(trained, tmp_path, options):
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", trained, **options)
    source = shutil.copytree(trained, tmp_path / "source")
    with pytest.raises(Cut):
        train(tmp_path, source, callbacks=[CutAfter(3)], **options)
    shutil.rmtree(source)
    again = train(tmp_path, source, resume=True)
    assert curve(again.history) == curve(whole.history)
    assert again.bits_per_byte == whole.bits_per_byte


def test_the_figure_before_the_first_step_is_in_tensorboard_once(trained, tmp_path):
    with pytest.raises(Cut):
        train(tmp_path, trained, callbacks=[CutAfter(2)])
    train(tmp_path, trained, resume=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("held out (sample)/loss")] == [0, 3, 6]


def test_a_converted_directory_learns_on_with_gains_watched(trained, tmp_path):
    source = converted(tmp_path, trained, layers=[1], self_query="output")
    result = train(tmp_path, source, checkpointing=True)
    assert moved(tmp_path) == {"model.layers.1.attention.Omega_Q.weight"}
    assert all("gain" in entry for entry in result.history if "loss" in entry)
    assert not tf.AutoConfig.from_pretrained(tmp_path / "run").output_gains


def test_a_model_that_train_has_made_is_converted_and_learns_on(tmp_path):
    flags = {
        "attention": "ordinary", "data": str(text(tmp_path)), "out": str(tmp_path / "base"), "length": 16,
        "embed_dim": 16, "heads": 2, "layers": 2, "batch_size": 4, "steps": 2, "device": "cpu",
    }  # fmt: skip
    plan = run.plan(flags, {}, resume=False)
    plan.settings.directory.mkdir()
    base = run.run(plan, say=lambda sentence: None)
    result = train(tmp_path, tmp_path / "base", layers=1)
    assert result.history[0]["eval_bits_per_byte"] == pytest.approx(base.history[-1]["final_bits_per_byte"], rel=0.01)
    assert tf.AutoConfig.from_pretrained(tmp_path / "run").block_types == ["full_attention", "implicit"]


def test_a_run_that_was_lengthened_and_cut_gives_its_newest_model(tmp_path):
    base = new_run(tmp_path, steps=2, attention="ordinary", out=str(tmp_path / "base"))
    train_new(base)
    with pytest.raises(Cut):
        train_new(replace(base, steps=6), resume=True, callbacks=[CutAfter(5)])

    def first(name, source):
        (tmp_path / name).mkdir()
        return train(tmp_path / name, source, layers="all").history[0]["eval_bits_per_byte"]

    newest = first("newest", base.directory / "checkpoint-4")
    shutil.copytree(base.directory, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert first("run", base.directory) == newest != first("older", tmp_path / "old")


def test_a_length_that_is_not_named_fits_the_model(trained, tmp_path):
    def planned(**named):
        return run.plan({"source": str(trained), "out": str(tmp_path / "run"), **named}, {}, resume=False).settings

    assert planned().length == 64, "the model's, which is less than 512"
    assert planned(length=16).length == 16
    with pytest.raises(RunError, match="--length 512 is more than the model's 64: use --length 64"):
        planned(length=512)


def refuse(trained, tmp_path, message, **changes):
    with pytest.raises(RunError, match=message) as caught:
        run.plan({"source": str(trained), "out": str(tmp_path / "run"), **SETTINGS, **changes}, {}, resume=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(trained, tmp_path, monkeypatch):
    refuse(tmp_path, tmp_path, "has no config.json")
    refuse("org/name", tmp_path, "org/name does not exist, and models of the hub are not downloaded")
    refuse(trained, tmp_path, "the model has layers 0 to 2, but 3 was asked for", layers=3)
    refuse(trained, tmp_path, "no layer is implicit, so there is no query map to learn", layers="none")
    refuse(trained, tmp_path, "--length 65 is more than the model's 64: use --length 64", length=65)
    refuse(trained, tmp_path, "embed_dim: comes from the model of --from: leave it out", embed_dim=64)
    refuse(trained, tmp_path, 'needs `self_query="input"`|values: feedback needs self_query input', values="feedback",
           self_query="output")  # fmt: skip
    with pytest.raises(RunError, match="train: only acts with --from DIR: leave it out"):
        run.plan({"train": "lora"}, {}, resume=False)
    with pytest.raises(RunError, match="layers: must be an integer of at least 1 without --from, but is 'all'"):
        run.plan({"layers": "all"}, {}, resume=False)
    source = converted(tmp_path, trained)
    refuse(source, tmp_path, "has implicit layers already: leave it out", layers="1")
    refuse(source, tmp_path, "values: the model of --from has linear, which training cannot change", values="feedback")
    (tmp_path / "second").mkdir()
    second = converted(tmp_path / "second", trained, values="feedback")
    refuse(second, tmp_path, "has feedback, which training cannot change", values="linear")
    monkeypatch.setitem(sys.modules, "peft", None)
    refuse(
        trained, tmp_path, "train: lora needs the package peft: pip install 'implicit-attention.lora.'", train="lora"
    )


def test_a_model_is_never_written_over(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    for source in (trained, None):
        flags = {"out": str(trained), **SETTINGS} | ({} if source is None else {"source": str(source)})
        with pytest.raises(RunError, match=r"has a model already \(config.json\), which would be lost"):
            run.plan(flags, {}, resume=False)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_low_rank_changes_have_no_more_than_full_rank(trained, tmp_path):
    with pytest.raises(RunError, match=r"lora_weights: must be at most [\d,]+, the weights of a change of rank"):
        train(tmp_path, trained, train="lora", layers="none", lora_weights=999_999_999)


def test_rates_and_weights_without_effect_are_refused(trained, tmp_path):
    refuse(trained, tmp_path, "learning_rate: with --train query-map all that learns has --map-rate", learning_rate=0.1)
    refuse(trained, tmp_path, "lora_weights: only acts with --train lora", lora_weights=100)
    refuse(trained, tmp_path, "map_rate: only acts where layers are implicit", layers="none", train="all", map_rate=0.1)


def test_rates_without_effect_are_refused_on_resuming_too(trained, tmp_path):
    train(tmp_path, trained, steps=1)
    with pytest.raises(RunError, match="learning_rate: with --train query-map all that learns has --map-rate"):
        run.plan({"out": str(tmp_path / "run"), "learning_rate": 0.1}, {}, resume=True)
    assert run.plan({"out": str(tmp_path / "run"), "map_rate": 0.1}, {}, resume=True).settings.map_rate == 0.1


def test_a_model_of_another_kind_is_refused(trained, tmp_path):
    model = ImplicitAttentionForSequenceClassification.from_pretrained(converted(tmp_path, trained))
    model.save_pretrained(tmp_path / "classifier")
    refuse(tmp_path / "classifier", tmp_path, "is no causal language model")


def test_a_resumed_run_takes_another_kernel_and_its_own_flags_again(trained, tmp_path):
    with pytest.raises(Cut):
        train(tmp_path, trained, layers="0,2", callbacks=[CutAfter(3)])
    plan = run.plan({"out": str(tmp_path / "run"), "layers": "0,2", "kernel": "torch"}, {}, resume=True)
    made = run.make_trainer(plan.settings, corpus.read(plan.settings.data), resumed=plan.resumed, done=plan.done)
    layers = [m for m in made.model.modules() if isinstance(m, ImplicitQueryAttention)]
    assert {layer.solver.kernel for layer in layers} == {"torch"}
    assert len(layers) == 2


def test_runs_of_models_with_points_in_their_names_have_folders_of_their_own():
    names = {Settings(source=f"models/{name}").directory.name for name in ("Llama-3.1-8B", "Llama-3.2-1B", "a.gguf")}
    assert names == {"Llama-3.1-8B-query-map-seed0", "Llama-3.2-1B-query-map-seed0", "a-query-map-seed0"}


def test_bytes_of_a_token_are_those_of_tokens_that_are_predicted():
    documents = [torch.tensor([1, 7, 8]), torch.tensor([5, 6])]
    assert _bytes_per_token(documents, [10, 4], begin=1) == (10 + 4 * 1 / 2) / 3
    assert _bytes_per_token(documents, [9, 4], begin=None) == (9 * 2 / 3 + 2) / 3
    assert _bytes_per_token([torch.tensor([1])], [3], begin=None) == 1.0


def test_a_model_without_a_tokenizer_is_refused(trained, tmp_path):
    source = shutil.copytree(trained, tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    refuse(source, tmp_path, "has no tokenizer that transformers can read")


def test_documents_of_one_token_are_refused(trained, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(300):
        (tmp_path / "texts" / f"{i}").write_bytes(b"a")
    with pytest.raises(RunError, match="--data has no held-out token to predict"):
        train(tmp_path, trained, data=str(tmp_path / "texts"))


def test_documents_are_packed_and_kept_apart(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}").write_bytes(b"ab\xff" + b"x" * i)
    read = corpus.read(str(tmp_path / "texts"))
    training, held_out = pack(read, byte_tokenizer(64), 258)
    assert len(training.starts) + len(held_out.starts) == 30
    assert len(training) == len(read.training) + 2 * len(training.starts), "what is no UTF-8 became three bytes"
    lengths = torch.cat([training.starts, torch.tensor([len(training)])]).diff().double()
    predicted = ((lengths - 2) * (lengths - 1) / lengths).sum() / (lengths - 1).sum()
    assert training.bytes_per_token == pytest.approx(float(predicted))
    assert all(training.ids[start] == ord("a") for start in training.starts)
    with pytest.raises(RunError, match=r"makes token .*, but the model has 100 tokens"):
        pack(read, byte_tokenizer(64), 100)


def test_a_window_of_packed_documents():
    window = Packed(torch.arange(9, dtype=torch.int32), torch.tensor([0, 4, 5]), 1.0).window(2, 6)
    assert window["input_ids"].tolist() == [2, 3, 4, 5, 6, 7]
    assert window["position_ids"].tolist() == [0, 1, 0, 0, 1, 2]
    assert window["labels"].tolist() == [-100, 3, -100, -100, 6, 7]
