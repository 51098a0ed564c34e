"""Whether what a batch hears is what its rows' recordings give, by the extractor that came with the encoder."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.waveform import change_speed
from ultravox.data.collate import pad_frames
from ultravox.diagnosis.workbench import Workbench
from ultravox.errors import AudioError
from ultravox.training.batches import SpeechBatch
from ultravox.training.rows import load_within

SAME_FEATURES = 0.02
"""Norm of a difference by the norm of what varies, which rounding and edges stay below by far."""
SAME_FRAMES = 0.1
"""The same of encoder frames, which a cache keeps in 16 bits."""
EDGE_STEPS = 3
"""At the end, where extractors pad differently."""


@dataclass(slots=True)
class Hearing:
    """What came of listening again."""

    num_rows: int = 0
    """Recordings that were heard again."""
    unlike: list[str] = field(default_factory=list)
    """Rows whose features are not those of the encoder's own extractor."""
    swapped: list[tuple[str, str]] = field(default_factory=list)
    """Rows whose batch holds something else, and the row whose recording that is, if it is among them."""
    worst_features: float = 0.0
    worst_frames: float = 0.0

    @property
    def said(self) -> str:
        if not self.num_rows:
            return "no recording could be heard again"
        return (
            f"the audio of {self.num_rows} is that of their recordings, to {self.worst_frames:.1%}, with the features "
            f"of the encoder's own extractor, to {self.worst_features:.2%}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "heard": self.num_rows,
            "feature_difference": self.worst_features,
            "frame_difference": self.worst_frames,
            "swapped": [list(pair) for pair in self.swapped],
        }


def hear_rows(bench: Workbench, batch: SpeechBatch) -> Hearing:
    """Decode the recordings of a batch's rows, which are those of `bench.read` at their first speed, once more."""
    hearing = Hearing()
    task, features = bench.tune, bench.task.features
    limits = bench.data.min_audio_seconds, bench.data.max_audio_seconds
    examples = {example.uid: example for example in bench.read}
    in_batch: dict[int, np.ndarray] = {}
    expected: dict[int, np.ndarray] = {}
    window = 0
    for index, (uid, count) in enumerate(zip(batch.uids, batch.num_windows, strict=True)):
        here = window
        window += count
        example = examples[uid]
        if count != 1 or len(example.recordings) != 1:
            continue
        try:
            waveform = change_speed(load_within(example.recordings[0], *limits), example.versions[0].speed)
        except AudioError:
            continue
        (heard,) = features.heard(waveform)
        hearing.num_rows += 1
        unlike = difference(heard, reference_features(bench.processor.audio_processor, waveform))
        hearing.worst_features = max(hearing.worst_features, unlike)
        if unlike > SAME_FEATURES:
            hearing.unlike.append(example.id)
        in_batch[index] = batch.values[here, : int(batch.lengths[here])].numpy()
        expected[index] = encode(task.model, heard) if batch.encoded else heard
    for index, found in in_batch.items():
        unlike = difference(found, expected[index])
        if unlike > SAME_FRAMES:
            others = {other: difference(found, value) for other, value in expected.items() if other != index}
            nearest = min(others, key=lambda other: others[other], default=None)
            is_other = nearest is not None and others[nearest] <= SAME_FRAMES
            hearing.swapped.append((batch.ids[index], batch.ids[nearest] if is_other and nearest is not None else ""))
        hearing.worst_frames = max(hearing.worst_frames, unlike)
    return hearing


def reference_features(extractor: Any, waveform: np.ndarray) -> np.ndarray:
    """What the Hugging Face extractor of the encoder's folder makes of a waveform, [step, channel]."""
    options: dict[str, Any] = {"sampling_rate": SAMPLE_RATE, "return_tensors": "np"}
    if type(extractor).__name__ == "WhisperFeatureExtractor":
        options |= {"padding": "longest", "pad_to_multiple_of": extractor.hop_length, "truncation": False}
    made = extractor(waveform, **options)
    values = made["input_features"] if "input_features" in made else made["input_values"]
    array = np.asarray(values)[0]
    if array.ndim == 1:
        return array[:, None]
    return array.T if type(extractor).__name__ == "WhisperFeatureExtractor" else array


def encode(model: Any, heard: np.ndarray) -> np.ndarray:
    """Encoder frames of one window by itself, [frame, hidden]."""
    values, lengths = pad_frames([heard])
    with torch.inference_mode():
        frames, frame_lengths = model.encode_audio(values.transpose(1, 2), lengths)
    return frames[0, : int(frame_lengths[0])].float().numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference by the norm of what varies in `expected`; infinite where the shapes cannot be compared."""
    steps = min(len(found), len(expected))
    if found.shape[1:] != expected.shape[1:] or abs(len(found) - len(expected)) > EDGE_STEPS:
        return float("inf")
    kept = max(1, steps - EDGE_STEPS)
    found, expected = found[:kept].astype(np.float64), expected[:kept].astype(np.float64)
    scale = np.linalg.norm(expected - expected.mean())
    return float(np.linalg.norm(found - expected) / scale) if scale else float(np.abs(found).max(initial=0.0))
