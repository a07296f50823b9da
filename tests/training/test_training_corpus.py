"""Text: bytes as they are, split by names, cut into windows that only the seed decides."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from implicit_attention.tasks import standard_library, standard_library_files
from implicit_attention.training import corpus
from implicit_attention.training.faults import RunError
from implicit_attention.training.windows import HeldOutWindows, RandomWindows


def content(tensor: torch.Tensor) -> bytes:
    return bytes(tensor[:].tolist())


def test_default_text_is_the_standard_library_split_by_file_names():
    text = corpus.read("default")
    root, files = standard_library_files()
    assert len(text.training) + len(text.held_out) == len(standard_library())
    assert 0.03 < len(text.held_out) / len(text.training) < 0.3
    names = [path.relative_to(root).as_posix() for path in files]
    first = next(n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0)
    assert content(text.held_out[:100]) == (root / first).read_bytes()[:100]
    assert corpus.read("default").fingerprint == text.fingerprint


def test_a_directory_is_every_file_in_it_but_hidden_ones(tmp_path):
    parts = {f"{i:02}/part.bin": bytes([i]) * (i + 1) for i in range(40)}
    for name, part in parts.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(part)
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"no")
    text = corpus.read(str(tmp_path))
    held_out = {n for n in parts if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 10 == 0}
    assert 0 < len(held_out) < 20
    assert content(text.held_out) == b"".join(parts[n] for n in sorted(held_out))
    assert content(text.training) == b"".join(parts[n] for n in sorted(parts.keys() - held_out))


def test_few_files_still_give_two_parts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 5)
    text = corpus.read(str(tmp_path))
    assert {content(text.training), content(text.held_out)} == {b"aaaaa", b"bbbbb"}


@pytest.mark.parametrize("in_directory", [False, True], ids=["file", "directory of one"])
def test_of_one_file_the_last_tenth_is_held_out_whatever_its_bytes(tmp_path, in_directory):
    every = bytes(range(256)) * 2
    path = tmp_path / "noise.bin"
    path.write_bytes(every)
    text = corpus.read(str(tmp_path if in_directory else path))
    assert content(text.training) + content(text.held_out) == every
    assert len(text.held_out) == 51


def test_fingerprint_sees_a_changed_byte_and_a_changed_name(tmp_path):
    path = tmp_path / "one"
    seen = set()
    for last in (b"a", b"b"):
        path.write_bytes(b"x" * 1000 + last)
        seen.add(corpus.read(str(path)).fingerprint)
    (tmp_path / "two").write_bytes(b"y")
    seen.add(corpus.read(str(tmp_path)).fingerprint)
    (tmp_path / "two").rename(tmp_path / "three")
    seen.add(corpus.read(str(tmp_path)).fingerprint)
    assert len(seen) == 4


def test_fingerprint_of_a_large_file_looks_everywhere_but_not_at_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_SAMPLE", 10)
    monkeypatch.setattr(corpus, "_SAMPLES", 4)
    path = tmp_path / "large"
    prints = []
    for place in (5, 255, 505, 755, 100):
        data = bytearray(1000)
        data[place] = 1
        path.write_bytes(data)
        prints.append(corpus.read(str(path)).fingerprint)
    assert len(set(prints)) == 5
    path.write_bytes(bytes(1000))
    assert corpus.read(str(path)).fingerprint == prints[-1], "100 lies between the samples"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "cannot read --data {path}: No such file or directory"),
        (lambda path: path.write_bytes(b""), "--data {path} is empty: there is nothing to learn from"),
        (lambda path: path.mkdir(), "--data {path} has no file to learn from (hidden files and runs are left out)"),
        (os.mkfifo, "cannot read --data {path}: it is neither a file nor a directory"),
    ],
    ids=["missing", "empty", "empty directory", "pipe"],
)
def test_data_that_is_no_text_is_named(tmp_path, make, sentence):
    path = tmp_path / "data"
    make(path)
    with pytest.raises(RunError) as caught:
        corpus.read(str(path))
    assert str(caught.value) == sentence.format(path=path)


def test_an_unreadable_file_or_folder_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "c").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match=rf"cannot read --data {tmp_path}/c: No such file"):
        corpus.read(str(tmp_path))
    (tmp_path / "c").unlink()

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RunError, match=rf"cannot read --data {tmp_path}/a: Permission denied"):
        corpus.read(str(tmp_path))
    monkeypatch.setattr(Path, "open", lambda *_: refuse(None))
    with pytest.raises(RunError, match="Permission denied"):
        corpus.read(str(tmp_path / "a"))

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "locked")))
        return []

    monkeypatch.setattr(corpus.os, "walk", walk)
    with pytest.raises(RunError, match=rf"cannot read --data {tmp_path}/locked: Permission denied"):
        corpus.read(str(tmp_path))


def test_a_python_without_its_source_is_told(monkeypatch):
    def absent():
        raise FileNotFoundError("no source of the standard library in /x: this Python was installed without it")

    monkeypatch.setattr(corpus, "standard_library_files", absent)
    with pytest.raises(RunError, match=r"installed without it\. Name a text of your own with --data\."):
        corpus.read("default")


@pytest.mark.parametrize("length", [2, 7, 64])
def test_random_windows_depend_on_the_seed_and_their_number_alone(length):
    text = torch.arange(256).repeat(3).to(torch.uint8)
    windows = RandomWindows(text, length, count=50, seed=3)
    assert len(windows) == 50
    again = RandomWindows(text, length, count=9, seed=3)
    other = RandomWindows(text, length, count=50, seed=4)
    for i in (8, 0, 3):
        assert torch.equal(windows[i]["input_ids"], again[i]["input_ids"])
        assert torch.equal(windows[i]["labels"], windows[i]["input_ids"])
        assert (windows[i]["input_ids"].diff() % 256 == 1).all(), "a window is a piece of the text"
        assert windows[i]["input_ids"].shape == (length,)
    assert len({int(windows[i]["input_ids"][0]) for i in range(50)}) > 20
    assert any(not torch.equal(windows[i]["input_ids"], other[i]["input_ids"]) for i in range(50))


def test_random_windows_reach_both_ends():
    text = torch.arange(5).to(torch.uint8)
    starts = {int(RandomWindows(text, 3, count=99, seed=0)[i]["input_ids"][0]) for i in range(99)}
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("size", [16, 17, 30, 31, 46, 100])
def test_held_out_windows_predict_each_byte_once_but_those_after_the_last_window(size):
    text = torch.arange(size).to(torch.uint8)
    windows = HeldOutWindows(text, 16, limit=1000)
    predicted = torch.cat([windows[i]["labels"][1:] for i in range(len(windows))])
    assert predicted.tolist() == list(range(1, 1 + (size - 1) // 15 * 15))


def test_held_out_windows_are_thinned_evenly():
    windows = HeldOutWindows(torch.zeros(1501, dtype=torch.uint8), 16, limit=4)
    assert windows.starts == [0, 375, 750, 1125]


@pytest.mark.parametrize(
    ("make", "purpose"),
    [
        (lambda text: RandomWindows(text, 6, count=1, seed=0), "learn from"),
        (lambda text: HeldOutWindows(text, 6, limit=1), "hold out"),
    ],
)
def test_a_text_shorter_than_a_sequence_is_refused(make, purpose):
    with pytest.raises(RunError, match=f"too little text: 5 bytes to {purpose}, but a sequence has 6: give it more"):
        make(torch.zeros(5, dtype=torch.uint8))


@pytest.mark.parametrize("left", [0, 60, 4000])
def test_a_file_that_is_cut_short_meanwhile_ends_in_a_sentence(tmp_path, left):
    """What is mapped into memory would end the process with a bus error."""
    path = tmp_path / "text"
    path.write_bytes(bytes(i % 251 for i in range(20_000)))
    text = corpus.read(str(path))
    windows = RandomWindows(text.training, 50, count=100, seed=0)
    before = windows[0]["input_ids"]
    with path.open("r+b") as file:
        file.truncate(left)
    with pytest.raises(RunError, match=r"--data .*text has been cut short since the run began.*--resume"):
        [windows[i] for i in range(100)]
    path.write_bytes(bytes(i % 251 for i in range(20_000)))
    assert torch.equal(windows[0]["input_ids"], before)
    path.unlink()
    with pytest.raises(RunError, match="cannot read --data"):
        windows[0]
