"""``ultravox.load(path)``: a model in three lines of Python."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

import numpy as np

from ultravox.audio.waveform import load_speech, require_speech
from ultravox.data.prompts import user_message
from ultravox.errors import AudioError
from ultravox.inference.conversation import Conversation
from ultravox.inference.end_of_speech import score_speech_end
from ultravox.inference.generate import Decoding, stream_answer, transcribe
from ultravox.model.factory import load_model
from ultravox.model.modeling import UltravoxModel
from ultravox.model.processing import UltravoxProcessor
from ultravox.objectives.end_of_audio import StopHead

Audio = str | Path | bytes | BinaryIO | np.ndarray
"""A file, its content, or a waveform [sample] at 16 kHz: floats in [-1, 1], or integers of any width."""


class Ultravox:
    """A loaded model with its processor."""

    def __init__(self, model: UltravoxModel, processor: UltravoxProcessor):
        self.model, self.processor = model, processor

    @overload
    def ask(
        self,
        audio: Audio | Sequence[Audio] | None,
        prompt: str | None = ...,
        *,
        stream: Literal[False] = ...,
        **_: float,
    ) -> str: ...
    @overload
    def ask(
        self, audio: Audio | Sequence[Audio] | None, prompt: str | None = ..., *, stream: Literal[True], **_: float
    ) -> Iterator[str]: ...
    def ask(self, audio, prompt=None, *, stream=False, max_new_tokens=256, temperature=0.0, top_p=1.0, seed=None):
        """Ask about recordings.

        Args:
            audio: one recording or several; None for none.
            prompt: text after them; without it the model answers what was said.
            stream: give pieces as they come instead of the whole answer.
            max_new_tokens, temperature, top_p, seed: see `Decoding`.

        Raises:
            AudioError: a recording that cannot be used; DataError: more ``<|audio|>`` in the prompt than recordings.
        """
        waveforms = load_waveforms(audio)
        decoding = Decoding(max_new_tokens, temperature, top_p, seed)
        message = user_message(prompt or "", len(waveforms))
        pieces = stream_answer(self.model, self.processor, [message], waveforms, decoding)
        return pieces if stream else "".join(pieces).strip()

    def transcribe(
        self,
        files: Audio | Sequence[Audio],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Write down what is said in each recording, in their order; `on_progress` hears how many are done."""
        waveforms = load_waveforms(files)
        return transcribe(
            self.model,
            self.processor,
            waveforms,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            on_progress=on_progress,
        )

    def score_speech_end(self, audio: Audio, head: StopHead) -> np.ndarray:
        """Probability [position] that the speaker has finished, by a head that `load_stop_head` gives."""
        (waveform,) = load_waveforms(audio)
        return score_speech_end(self.model, self.processor, head, waveform)

    def conversation(self, *, system: str | None = None, decoding: Decoding | None = None) -> Conversation:
        """Begin a dialogue of several turns."""
        return Conversation(self.model, self.processor, system=system, decoding=decoding)


def load(checkpoint: str | Path) -> Ultravox:
    """Load a run folder, its ``model/`` or any saved model folder.

    Raises:
        CheckpointError: missing or damaged; ModelError: a base model that is not to be had.
    """
    return Ultravox(*load_model(checkpoint))


def load_waveforms(audio: Audio | Sequence[Audio] | None) -> list[np.ndarray]:
    """Waveforms float32 [sample] of one recording or several; integers are scaled to [-1, 1]."""
    if audio is None:
        return []
    many: list[Any] = list(audio) if isinstance(audio, list | tuple) else [audio]
    return [_as_float(one) if isinstance(one, np.ndarray) else load_speech(one) for one in many]


def _as_float(samples: np.ndarray) -> np.ndarray:
    if samples.ndim != 1:
        raise AudioError(f"a waveform array must have one axis, [sample] at 16 kHz, but this one is {samples.shape}")
    if samples.dtype.kind not in "if":  # signed integer, float
        raise AudioError(f"a waveform array must hold floats or signed integers, but this one holds {samples.dtype}")
    require_speech(samples, "the waveform array")
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32, copy=False)
