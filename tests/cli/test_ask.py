"""ask, transcribe and chat, as they are called in a terminal."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ultravox.audio.waveform import write_waveform
from ultravox.cli.chat import Chat
from ultravox.cli.main import main
from ultravox.errors import DataError
from ultravox.inference.api import load
from ultravox.inference.generate import Decoding


@pytest.fixture
def clips(tmp_path):
    """Two short files."""
    paths = []
    for index in range(2):
        path = tmp_path / f"clip{index}.flac"
        write_waveform(path, (0.3 * np.sin(np.arange(8000) * (0.02 + 0.1 * index))).astype(np.float32))
        paths.append(str(path))
    return paths


def test_ask(tiny_checkpoint, clips, capsys):
    words = ["ask", str(tiny_checkpoint), "--audio", *clips, "--prompt", "What?", "--max-new-tokens", "5"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.endswith("\n")
    assert main(words) == 0
    assert capsys.readouterr().out == first


def test_transcribe_text_and_json(tiny_checkpoint, clips, capsys):
    words = ["transcribe", str(tiny_checkpoint), *clips, "--max-new-tokens", "5"]
    assert main(words) == 0
    lines = capsys.readouterr().out
    assert all(path in lines for path in clips)
    assert main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == clips
    assert rows[0].keys() == {"version", "file", "seconds", "text"}
    assert rows[0]["seconds"] == 0.5


def test_chat(tiny_checkpoint, clips, capsys, monkeypatch):
    script = f"/help\nHello\n/audio {clips[0]}\nWhat was that?\n/reset\n/audio {clips[1]}\n\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    assert main(["chat", str(tiny_checkpoint), "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "/audio FILE" in captured.out
    assert f"{clips[0]}: 0.5 s" in captured.err


def test_a_recording_outlives_a_message_that_is_refused(tiny_checkpoint, clips):
    conversation = load(tiny_checkpoint).conversation(decoding=Decoding(2))
    chat = Chat(conversation)
    chat.handle(f"/audio {clips[0]}")
    with pytest.raises(DataError, match=r"2 <\|audio\|> placeholders"):
        chat.handle("<|audio|> and <|audio|>")
    assert len(chat.waveforms) == 1
    chat.handle("What was that?")
    assert chat.waveforms == []
    assert conversation.messages[0]["content"].startswith("<|audio|>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "CHECKPOINT", "--audio", "missing.wav"], "missing.wav does not exist"),
        (["ask", "CHECKPOINT"], "nothing to ask"),
        (
            ["ask", "CHECKPOINT", "--audio", "CLIP", "--prompt", "<|audio|><|audio|>"],
            "2 <|audio|> placeholders, 1 audio",
        ),
        (["ask", "nowhere", "--audio", "CLIP"], "no checkpoint nowhere"),
        (["transcribe", "CHECKPOINT", "TEXT"], "is not audio"),
        (["transcribe", "CHECKPOINT", "BLIP"], "lasts 0.050 s: expected speech of at least 0.1 s"),
        (["ask", "CHECKPOINT", "--audio", "BLIP"], "lasts 0.050 s: expected speech of at least 0.1 s"),
        (["transcribe", "CHECKPOINT", "CLIP", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_errors_are_one_line_and_code_2(tiny_checkpoint, clips, capsys, tmp_path, words, message):
    (tmp_path / "text.wav").write_text("not audio at all " * 50)
    write_waveform(tmp_path / "blip.wav", np.full(800, 0.1, np.float32))
    files = {"TEXT": str(tmp_path / "text.wav"), "BLIP": str(tmp_path / "blip.wav")}
    names = {"CHECKPOINT": str(tiny_checkpoint), "CLIP": clips[0], **files}
    assert main([names.get(word, word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ultravox: error: ")
    assert message in captured.err


def test_transcribe_keeps_the_others_when_a_file_cannot_be_used(tiny_checkpoint, clips, capsys, tmp_path):
    missing = str(tmp_path / "missing.wav")
    words = ["transcribe", str(tiny_checkpoint), clips[0], missing, clips[1], "--max-new-tokens", "5"]
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["file"] for row in rows] == [clips[0], missing, clips[1]]
    assert ["text" in row for row in rows] == [True, False, True]
    assert "missing.wav does not exist" in rows[1]["error"]
    assert "missing.wav does not exist" in captured.err
    assert "1 of 3 files could not be used" in captured.err
    assert main(words) == 2
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [clips[0], clips[1]]


def test_a_file_name_that_is_no_text_costs_nothing(tiny_checkpoint, clips, tmp_path):
    odd = os.fsencode(tmp_path) + b"/x\xff.flac"
    shutil.copy(clips[0], odd)
    words = [
        sys.executable,
        "-m",
        "ultravox",
        "transcribe",
        str(tiny_checkpoint),
        odd,
        clips[1],
        "--max-new-tokens",
        "2",
    ]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 2
    assert b"x\\udcff.flac: " in done.stdout


@pytest.mark.parametrize("words", [["ask", "--audio", "x.wav"], ["transcribe", "x.wav"], ["chat"], ["evaluate"]])
def test_a_wrong_checkpoint_is_told_before_anything_heavy_is_loaded(words):
    code = f"""
import sys
from ultravox.cli.main import main
assert main([{words[0]!r}, "nowhere", *{words[1:]!r}]) == 2
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ultravox: error: no checkpoint nowhere")


@pytest.mark.parametrize("line", ["/audio missing.wav", "/unknown"])
def test_chat_scripts_stop_at_an_error(tiny_checkpoint, capsys, monkeypatch, line):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n"))
    assert main(["chat", str(tiny_checkpoint)]) == 2
    assert "ultravox: error: " in capsys.readouterr().err
