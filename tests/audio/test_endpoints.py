"""Where speech ends and pauses, and where clips are cut."""

import numpy as np
import pytest

from ultravox.audio.endpoints import MIN_KEPT_SAMPLES, ClipCutter, loud_frames, pauses, speech_end

RATE = 16000


def speech(*parts):
    """(seconds, amplitude) of noise, one after the other."""
    generator = np.random.default_rng(0)
    return np.concatenate([a * generator.standard_normal(round(s * RATE)) for s, a in parts]).astype(np.float32)


TWO_WORDS = speech((0.1, 1e-4), (0.6, 0.2), (0.3, 1e-4), (0.5, 0.1), (0.4, 1e-4))


def test_speech_and_pauses_are_found():
    assert speech_end(TWO_WORDS) == 1.5 * RATE
    assert pauses(TWO_WORDS) == [(round(0.7 * RATE), round(1.0 * RATE))]
    assert pauses(speech((0.3, 0.2), (0.08, 1e-4), (0.3, 0.2))) == []  # a stop of a consonant
    assert speech_end(np.zeros(RATE, dtype=np.float32)) == 0
    assert loud_frames(speech((0.11, 0.2))).all()


def test_cuts_fall_where_they_are_asked_to():
    generator = np.random.default_rng(1)
    in_pause = [ClipCutter(1.0, 1.0)(TWO_WORDS, generator) for _ in range(20)]
    assert {(len(clip), whole) for clip, whole in in_pause} == {(round(0.85 * RATE), False)}
    cut = [ClipCutter(1.0, 0.0)(TWO_WORDS, generator) for _ in range(200)]
    lengths = np.array([len(clip) for clip, _ in cut])
    assert not any(whole for _, whole in cut)
    assert lengths.min() >= MIN_KEPT_SAMPLES
    assert lengths.max() <= 1.4 * RATE  # a tenth of a second of speech is missing at least
    in_word = (lengths <= 0.7 * RATE) | (lengths > 1.0 * RATE)
    assert in_word.all()
    assert all(np.array_equal(clip, TWO_WORDS[: len(clip)]) for clip, _ in cut)


def test_a_share_is_cut_and_each_clip_draws_alike():
    whole = [ClipCutter(0.3, 0.5)(TWO_WORDS, np.random.default_rng(seed))[1] for seed in range(500)]
    assert np.mean(whole) == pytest.approx(0.7, abs=0.06)
    more = [ClipCutter(0.6, 0.5)(TWO_WORDS, np.random.default_rng(seed))[1] for seed in range(500)]
    assert all(first or not second for first, second in zip(whole, more, strict=True))  # the same clips, and others


def test_what_is_too_short_stays_whole():
    short = speech((0.25, 0.2))
    assert ClipCutter(1.0, 1.0)(short, np.random.default_rng(0))[1]
    without_pause = speech((1.0, 0.2))
    clip, whole = ClipCutter(1.0, 1.0)(without_pause, np.random.default_rng(0))
    assert not whole
    assert len(clip) < len(without_pause)
