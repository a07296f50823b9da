"""Text from a model: the right bytes, as they come, and nothing but data in the directory."""

import io
import json
import pickle
from dataclasses import replace

import pytest
import torch
from small_run import settings, train
from test_training_run import Cut, CutAfter

from implicit_attention.training import generation
from implicit_attention.training.faults import RunError
from implicit_attention.training.generation import Choice, byte_writer, load, terminal_writer, write_on
from implicit_attention.training.tokenizer import END

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module", params=["implicit", "ordinary"])
def directory(request, tmp_path_factory):
    chosen = settings(tmp_path_factory.mktemp("run"), steps=3, attention=request.param)
    train(chosen)
    return chosen.directory


def test_greedy_text_is_the_likeliest_byte_each_time_and_comes_byte_by_byte(directory):
    model, prompt, came = load(directory), b"line\xff", []
    made = write_on(model, prompt, 8, Choice(greedy=True), came.append)
    assert came == [prompt, *(bytes([b]) for b in made), b""]
    expected = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([expected])).logits[0, -1]
        logits[END:] = -torch.inf
        expected.append(int(logits.argmax()))
    assert prompt + made == bytes(expected)


def test_the_seed_decides_the_choice_and_the_settings_narrow_it(directory):
    model = load(directory)

    def text(**choice):
        return write_on(model, b"\n", 14, Choice(**choice), lambda content: None)

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    greedy = text(greedy=True)
    assert text(top_k=1, seed=3) == greedy
    assert text(top_p=1e-6, seed=3) == greedy
    assert text(temperature=1e-4, seed=3) == greedy
    assert text(temperature=2.0, seed=1) != text(temperature=0.3, seed=1)


def test_text_fills_the_sequence_and_never_exceeds_it(directory):
    model = load(directory)
    assert len(write_on(model, b"abc", None, Choice(), lambda content: None)) == 16 - 3
    for prompt, count, sentence in [
        (
            b"a" * 10,
            7,
            "--prompt has 10 bytes and 7 more do not fit: the model's sequences have 16; use --max-new-tokens 6",
        ),
        (
            b"a" * 16,
            None,
            "--prompt has 16 bytes and 1 more do not fit: the model's sequences have 16; shorten the prompt",
        ),
        (b"", 3, "--prompt is empty: give it at least one byte"),
    ]:
        with pytest.raises(RunError) as caught:
            write_on(model, prompt, count, Choice(), lambda content: None)
        assert str(caught.value).startswith(sentence)


def test_contradicting_choices_are_named():
    with pytest.raises(RunError, match="--greedy makes --top-k useless: leave out one of them"):
        Choice(greedy=True, top_k=3)


def test_an_unfinished_run_gives_its_newest_checkpoint(tmp_path):
    chosen = settings(tmp_path, steps=4)
    train(chosen)
    (chosen.directory / "config.json").unlink()
    weights = load(chosen.directory).state_dict()
    newest = load(chosen.directory / "checkpoint-4").state_dict()
    assert all(torch.equal(weights[name], newest[name]) for name in weights)


def test_a_run_that_was_lengthened_and_cut_gives_its_newest_checkpoint(tmp_path):
    chosen = settings(tmp_path, steps=2, attention="ordinary")
    train(chosen)
    first = load(chosen.directory).state_dict()
    with pytest.raises(Cut):
        train(replace(chosen, steps=6), resume=True, callbacks=[CutAfter(3)])
    assert all(torch.equal(first[name], tensor) for name, tensor in load(chosen.directory).state_dict().items())
    with pytest.raises(Cut):
        train(replace(chosen, steps=6), resume=True, callbacks=[CutAfter(5)])
    newest = load(chosen.directory / "checkpoint-4").state_dict()
    assert all(torch.equal(newest[name], tensor) for name, tensor in load(chosen.directory).state_dict().items())
    (chosen.directory / "run.json").unlink()  # as runs of before left it
    assert all(torch.equal(first[name], tensor) for name, tensor in load(chosen.directory).state_dict().items())


def test_a_damaged_model_of_a_run_costs_no_checkpoint(tmp_path):
    chosen = settings(tmp_path, steps=2, attention="ordinary", out=str(tmp_path / "a run"))
    train(chosen)
    whole = load(chosen.directory).state_dict()
    (chosen.directory / "config.json").write_text("{")
    again = f"use one of its checkpoints, or write it again: implicit-attention train --resume --out '{chosen.out}'"
    with pytest.raises(RunError, match=rf"config.json is damaged \(.*\): {again}$"):
        load(chosen.directory)
    load(chosen.directory / "checkpoint-2")
    train(chosen, resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in load(chosen.directory).state_dict().items())
    (chosen.directory / "checkpoint-2" / "config.json").write_text("{")
    with pytest.raises(RunError, match=f": remove {chosen.directory}/checkpoint-2 to continue from the checkpoint"):
        load(chosen.directory / "checkpoint-2")


def test_a_damaged_model_without_a_run_is_to_be_copied_again(tmp_path, directory):
    broken = copy(directory, tmp_path / "model")
    (broken / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"is damaged .*: copy the model again$"):
        load(broken)


def copy(directory, target):
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((directory / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "has no model: config.json or model.safetensors is missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 50), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda d: change(d, model_type="llama"),
            "is not a model of this program: its config.json has model_type 'llama'",
        ),
        (lambda d: change(d, model_type=None), "its config.json has model_type None"),
        (lambda d: change(d, hidden_size=32), "has another shape for .* weights, such as model.embed_tokens.weight"),
        (lambda d: change(d, vocab_size=300), "has another shape for 1 weight, such as model.embed_tokens.weight"),
    ],
)
def test_a_directory_without_a_sound_model_is_named_in_one_line(tmp_path, directory, damage, sentence):
    broken = copy(directory, tmp_path / "model")
    damage(broken)
    with pytest.raises(RunError, match=sentence) as caught:
        load(broken)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


def change(directory, **entries):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_only_local_directories_are_looked_at(tmp_path):
    with pytest.raises(RunError, match="--model gpt2 is not a directory"):
        load(tmp_path.relative_to(tmp_path) / "gpt2")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_no_pickle_is_opened_and_no_code_is_run(tmp_path, directory):
    model = copy(directory, tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb()))
    (model / "modeling.py").write_text("raise SystemExit('code was run')")
    change(model, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    load(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(RunError, match="has no model"):
        load(model)


def test_devices_that_are_not_here_are_named(directory, monkeypatch):
    monkeypatch.setattr(generation.torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "tpu"):
        with pytest.raises(RunError, match=f"--device {device} was not found: use auto or cpu"):
            load(directory, device=device)


def test_a_file_gets_all_bytes_as_they_are():
    file = io.TextIOWrapper(io.BytesIO())
    write = byte_writer(file)
    for content in (b"a\xff\x00", b"\x1b[2J", b""):
        write(content)
    assert file.buffer.getvalue() == b"a\xff\x00\x1b[2J"


def test_a_terminal_gets_whole_characters_and_cannot_be_controlled():
    screen = io.StringIO()
    write = terminal_writer(screen)
    shown = []
    for byte in "é☃\n\t".encode() + b"\xff\x1b[2J\x7f\xc2\x9b" + "\u202e".encode() + b"\xe2":
        write(bytes([byte]))
        shown.append(screen.getvalue())
    assert shown[:5] == ["", "é", "é", "é", "é☃"]
    write(b"")
    assert screen.getvalue() == "é☃\n\t\ufffd␛[2J␡\ufffd\ufffd\ufffd\n"


def test_the_cache_changes_no_byte(directory):
    model = load(directory)
    model.config.max_position_embeddings = 100  # more than a block of rows
    texts = []
    for cached in (True, False):
        model.generation_config.use_cache = cached
        texts.append(write_on(model, b"line 12", 80, Choice(greedy=True), lambda content: None))
    assert texts[0] == texts[1]
