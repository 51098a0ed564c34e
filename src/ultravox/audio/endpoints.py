"""Where speech ends and pauses in a waveform, by its level; and clips that are cut short to learn where it ends."""

from dataclasses import dataclass

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE

FRAME_SAMPLES = SAMPLE_RATE // 50  # 20 ms
QUIET_DB = -35.0  # below the loudest frame
MIN_PAUSE_FRAMES = 6  # 120 ms: stops of consonants are shorter
MIN_KEPT_SAMPLES = SAMPLE_RATE // 5  # of a clip that is cut
MIN_CUT_SAMPLES = SAMPLE_RATE // 10  # of its speech


def loud_frames(waveform: np.ndarray) -> np.ndarray:
    """Which frames of 20 ms are speech rather than quiet, bool [frame]; the last frame may be shorter."""
    starts = np.arange(0, max(1, len(waveform)), FRAME_SAMPLES)
    power = np.add.reduceat(np.square(waveform, dtype=np.float64), starts) if len(waveform) else np.zeros(1)
    power /= np.minimum(FRAME_SAMPLES, np.maximum(1, len(waveform) - starts))
    return power > max(power.max() * 10 ** (QUIET_DB / 10), 1e-12)


def speech_end(waveform: np.ndarray) -> int:
    """Samples up to the end of the last frame that is not quiet."""
    loud = np.flatnonzero(loud_frames(waveform))
    return min(len(waveform), int(loud[-1] + 1) * FRAME_SAMPLES) if len(loud) else 0


def pauses(waveform: np.ndarray) -> list[tuple[int, int]]:
    """Quiet stretches between speech of 120 ms or more: their first samples and the ones behind their last."""
    loud = np.flatnonzero(loud_frames(waveform))
    gaps = np.flatnonzero(np.diff(loud) > MIN_PAUSE_FRAMES)
    return [(int(loud[gap] + 1) * FRAME_SAMPLES, int(loud[gap + 1]) * FRAME_SAMPLES) for gap in gaps]


@dataclass(frozen=True, slots=True)
class ClipCutter:
    """Cuts a share of the clips short: some of them in a pause, where they have one, the others within a word."""

    cut_share: float
    pause_share: float

    def __call__(self, waveform: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
        """The clip or its beginning, and whether it is whole. What is too short to be cut stays whole.

        Always as many numbers are drawn, so that one share does not change the other's choices.
        """
        cut, pause, where = generator.random(3).tolist()
        if cut >= self.cut_share:
            return waveform, True
        places = self._in_pauses(waveform) if pause < self.pause_share else []
        places = places or self._in_words(waveform)
        if not places:
            return waveform, True
        return waveform[: places[int(where * len(places))]], False

    def _in_pauses(self, waveform: np.ndarray) -> list[int]:
        return [(start + end) // 2 for start, end in pauses(waveform) if start >= MIN_KEPT_SAMPLES]

    def _in_words(self, waveform: np.ndarray) -> list[int]:
        """Every end of a loud frame that leaves some speech on both sides."""
        ends = (np.flatnonzero(loud_frames(waveform)) + 1) * FRAME_SAMPLES
        last = speech_end(waveform) - MIN_CUT_SAMPLES
        return [int(end) for end in ends if MIN_KEPT_SAMPLES <= end <= last]
