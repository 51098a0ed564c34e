"""``ultravox data``: what it lists, refuses and adds."""

import json
import types

import numpy as np
import pytest

from ultravox.cli import datasets
from ultravox.cli.main import main
from ultravox.data import bundled
from ultravox.data.manifest import Clip, write_dataset
from ultravox.data.sources import load_clips


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """A folder of two spoken requests in the place of the bundled dataset."""
    import soundfile

    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path))
    folder = tmp_path / "data" / datasets.REQUESTS
    (folder / "audio").mkdir(parents=True)
    clips = []
    for name, text in (("a", "Name a colour."), ("b", "Say hello.")):
        path = folder / "audio" / f"{name}.flac"
        soundfile.write(path, np.zeros(16000, np.float32), 16000)
        clips.append(Clip(name, path, text, 1.0))
    write_dataset(folder, name=datasets.REQUESTS, licence="CC0-1.0", attribution="", splits={"train": clips})
    monkeypatch.setattr(bundled, "fetch_dataset", lambda name, *minutes: folder)
    return folder


def test_list_says_what_is_there(requests, capsys):
    assert main(["data", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not fetched" in lines["asterisk-en"]
    assert "train 2 clips" in lines[datasets.REQUESTS]


def test_the_language_model_answers_once(requests, tiny_models, monkeypatch, capsys):
    words = ["data", "fetch", datasets.REQUESTS, "--language-model", str(tiny_models.llama)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{datasets.REQUESTS}: {requests}\n"
    answers = [clip.answer for clip in load_clips(requests, "train")]
    assert all(answers)
    assert str(tiny_models.llama) in json.loads((requests / "dataset.json").read_text())["answered_by"]

    refuse = types.SimpleNamespace(TextResponder=None)  # the second time nobody is asked
    monkeypatch.setitem(__import__("sys").modules, "ultravox.inference.text", refuse)
    assert main(words) == 0
    assert [clip.answer for clip in load_clips(requests, "train")] == answers


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan", "x"])
def test_minutes_are_checked(minutes, capsys):
    assert main(["data", "fetch", "synthetic-en", f"--minutes={minutes}"]) == 2
    assert capsys.readouterr().err.startswith("ultravox: error: ")
