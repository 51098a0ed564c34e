"""Places where nothing can be made: one line and exit code 2 from every command that writes, before it works."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.cli.main import main
from ultravox.errors import UltravoxError
from ultravox.files import make_folder, making, require_place

CONFIG = """
run_dir: /proc/nothing/run
model: {{language_model: {llama}, audio_encoder: {whisper}, stack_factor: 3, projector_hidden_size: 48,
  chat_template: chatml.jinja}}
data: {{sources: [{{name: {folder}/train.jsonl}}]}}
stages: [{{name: align, objective: align, max_steps: 1, optim: {{warmup_steps: 0}}}}]
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a file system that makes no folder")


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_models):
    """A working folder with a manifest of one clip, texts and a config."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) * 0.1) * 0.3, 16000)
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "a", "audio": "a.wav", "text": "one"}) + "\n")
    (tmp_path / "lines.txt").write_text("Please press five.\n")
    values = {"llama": tiny_models.llama, "whisper": tiny_models.whisper, "folder": tmp_path}
    (tmp_path / "run.yaml").write_text(CONFIG.format(**values))
    return tmp_path


def fails_in_one_line(words, capsys) -> str:
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ultravox: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@needs_proc
@pytest.mark.parametrize("where", ["/proc/nothing", "/proc/nothing/below/it", "/proc/self/nothing"])
@pytest.mark.parametrize(
    "words",
    [
        ["data", "prepare", "train.jsonl", "--workers", "1", "--output"],
        ["data", "synthesize", "lines.txt", "--output"],
        ["data", "inspect", "train.jsonl", "--html"],
        ["evaluate", "CHECKPOINT", "--data", "train.jsonl", "--split", "train", "--output"],
        ["train", "run.yaml", "--run_dir"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_place_that_cannot_be_made(words, where, place, tiny_checkpoint, capsys, monkeypatch):
    def nothing_is_decoded(*args, **kwargs):
        raise AssertionError("it worked before it looked at the place")

    monkeypatch.setattr("ultravox.evaluation.inspection.load_waveform", nothing_is_decoded)
    monkeypatch.setattr("ultravox.evaluation.loading.load_system", nothing_is_decoded)
    words = [tiny_checkpoint if word == "CHECKPOINT" else word for word in words]
    error = fails_in_one_line([*words, where], capsys)
    assert "error: /proc" in error
    assert "nothing can be made there (No such file or directory); choose another place" in error


@needs_proc
@pytest.mark.parametrize(
    "words",
    [["models", "fetch", "whisper-tiny.en"], ["data", "fetch", "asterisk-en"]],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_home_that_cannot_be_made(words, capsys, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", "/proc/nothing")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert main(words) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "ULTRAVOX_HOME is /proc/nothing, which is not there yet: models and data are fetched into it"
    assert last.startswith("ultravox: error: /proc/nothing/")
    assert "nothing can be made there" in last


def test_a_page_is_no_folder(place, capsys):
    assert "name the file to write" in fails_in_one_line(["data", "inspect", "train.jsonl", "--html", place], capsys)


@pytest.mark.parametrize("code", [errno.ELOOP, errno.EIO, errno.ESTALE])
def test_a_fault_of_the_disk_is_one_line_wherever_it_comes_up(code, place, capsys, monkeypatch):
    def read(*args, **kwargs):
        raise OSError(code, os.strerror(code), "train.jsonl")

    monkeypatch.setattr("ultravox.data.sources.read_rows", read)
    assert "train.jsonl: " in fails_in_one_line(["data", "inspect", "train.jsonl"], capsys)


def test_our_own_missing_file_keeps_its_traceback(place, monkeypatch):
    def read(*args, **kwargs):
        return open("a file that we forgot to write")

    monkeypatch.setattr("ultravox.data.sources.read_rows", read)
    with pytest.raises(FileNotFoundError):
        main(["data", "inspect", "train.jsonl"])


def test_links_in_a_circle(place, capsys):
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    error = fails_in_one_line(["data", "prepare", "train.jsonl", "--workers", "1", "--output", "a/out"], capsys)
    assert "links lead in a circle" in error


def test_a_name_that_no_file_can_have(place):
    with pytest.raises(UltravoxError, match="cannot be the name of a file"):
        make_folder("a\0b")
    with pytest.raises(UltravoxError, match="cannot be the name of a file"):
        require_place("a\0b")


def test_looking_at_a_place_leaves_nothing(tmp_path):
    require_place(tmp_path / "new" / "er")
    require_place(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="too long"):
        require_place(tmp_path / "new" / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_inside_may_fail_for_its_own_reasons():
    with pytest.raises(ZeroDivisionError), making("somewhere"):
        raise ZeroDivisionError
