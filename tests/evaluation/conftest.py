"""A small dataset of recognisable sounds, and a fake model that knows which sound is which text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ultravox.audio.waveform import load_waveform
from ultravox.data.manifest import Clip, write_dataset
from ultravox.data.sources import load_clips
from ultravox.evaluation.system import System
from ultravox.evaluation.token_view import TokenView

ATTACK = '<script>alert(1)</script> & "quoted"'
TEXTS = [
    "please hold the line",
    "press one for sales",
    "it's the wrong password",
    "goodbye",
    "the number is not in service",
    ATTACK,
    "your account is locked",
    "thank you for calling",
]


def _tone(index: int, seconds: float) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    return (0.2 * np.sin(2 * math.pi * (200 + 50 * index) * time)).astype(np.float32)


def _dataset(folder: Path, texts: list[str], answers: list[str] | None = None) -> Path:
    import soundfile

    (folder / "audio").mkdir(parents=True)
    clips = []
    for index, text in enumerate(texts):
        waveform = _tone(index, 1.0 + 0.1 * index)
        path = folder / "audio" / f"clip{index}.flac"
        soundfile.write(path, waveform, 16000)
        answer = answers[index] if answers else None
        clips.append(Clip(f"clip{index}", path, text, len(waveform) / 16000, "one", "CC-BY-SA-3.0", answer))
    write_dataset(
        folder, name="tones", licence="CC-BY-SA-3.0", attribution="Recorded by <Nobody>", splits={"heldout": clips}
    )
    return folder


@pytest.fixture
def dataset(tmp_path) -> Path:
    return _dataset(tmp_path / "tones", TEXTS)


@pytest.fixture
def questions(tmp_path) -> Path:
    texts = ["what is the capital of france", "who wrote hamlet", "how many legs has a spider", "name a red fruit"]
    answers = ["The capital of France is Paris.", "William Shakespeare wrote Hamlet.", "Eight.", "A cherry is red."]
    return _dataset(tmp_path / "questions", texts, answers)


@pytest.fixture
def run_folder(tmp_path, dataset) -> Path:
    run = tmp_path / "runs" / "tiny"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    (run / "config.yaml").write_text(f"version: 1\nevaluation: {{source: '{dataset}', split: heldout}}\n# {ATTACK}\n")
    (run / "train.json").write_text(json.dumps({"train_seconds": 12.5, "peak_memory_bytes": 123456789}))
    rows = [{"stage": "align", "step": s, "loss": 5 / s, "elapsed_seconds": s / 2} for s in range(1, 20)]
    rows += [{"stage": "align", "step": 19, "wer": 0.6}]
    rows += [{"stage": "tune", "step": s, "loss": 3 / s, "elapsed_seconds": 4.0 * s} for s in range(1, 9)]
    rows += [{"stage": "tune", "step": 8, "wer": 0.3}]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "tu')
    return run


class Listener:
    """Recognises the sounds of datasets by their samples; what it does not know, it hears as nothing."""

    def __init__(self, *folders: Path):
        self.clips: dict[bytes, Clip] = {}
        for folder in folders:
            for clip in load_clips(folder, "heldout"):
                self.clips[self._key(load_waveform(clip.audio)) + folder.name.encode()] = clip
        self.folders = [folder.name.encode() for folder in folders]

    @staticmethod
    def _key(waveform: np.ndarray) -> bytes:
        return waveform[:2000].tobytes()

    def clip(self, waveform: np.ndarray, folder: int = 0) -> Clip | None:
        return self.clips.get(self._key(waveform) + self.folders[folder])


@pytest.fixture
def listening_system(dataset, questions) -> System:
    """A model that hears everything but gets every "the" wrong, and answers questions as it should."""
    listener = Listener(dataset, questions)

    def transcribe(waveforms):
        clips = [listener.clip(waveform) for waveform in waveforms]
        return ["" if clip is None else clip.text.replace("the", "a") for clip in clips]

    def answer(waveforms):
        clips = [listener.clip(waveform, 1) for waveform in waveforms]
        return ["" if clip is None else clip.answer or "" for clip in clips]

    return System(
        transcribe=transcribe,
        transcribe_one=transcribe,
        answer=answer,
        transcribe_text=lambda texts: list(texts),
        answer_text=lambda texts: [f"{text}, you ask" for text in texts],
        recognise=lambda waveforms: [(listener.clip(w) or Clip("", Path(), "", 0)).text for w in waveforms],
        view_tokens=lambda waveform: TokenView([" please", "<b>bold</b>", "\n"], [0.9, 0.1, -0.2], 0.1),
        prompt="<|audio|>Transcribe",
        transcript_limit={"extra_tokens": 4, "tokens_per_second": 6.0},
    )


@pytest.fixture
def deaf_system() -> System:
    """A model that says the same whatever it hears."""
    return System(transcribe=lambda waveforms: ["please hold the line"] * len(waveforms))
