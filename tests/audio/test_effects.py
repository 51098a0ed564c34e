"""Every effect is measured: its level, its length, its place in time, and that the same numbers give the same sound."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from ultravox.audio.codecs import CODECS, MP3_BIT_RATES, OPUS_BIT_RATES, mp3, mulaw, opus, telephone
from ultravox.audio.effects import EffectSettings, WaveformAugmenter, generator_for_sample, length_bounds
from ultravox.audio.noise import COLOURS, NoiseRecordings, add_noise, coloured_noise
from ultravox.audio.rooms import impulse_response, reverberate
from ultravox.audio.signal import fast_length
from ultravox.audio.waveform import SAMPLE_RATE, change_speed, load_waveform, write_waveform
from ultravox.config.data import Codec, WaveformAugmentConfig
from ultravox.errors import AudioError, DataError

ROOT = Path(__file__).parents[2]
EVERYTHING = EffectSettings(gain_db=12, speed=0.1, noise_share=1, reverb_share=1, codec_share=1)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_waveform(ROOT / "examples" / "question.wav")


def augment(waveform, number=0, **settings):
    return WaveformAugmenter(EffectSettings(**settings))(waveform, generator_for_sample(0, number, "a clip"))


def decibels(ratio: float) -> float:
    return 10 * float(np.log10(ratio))


def band_power(waveform, low, high):
    """Power between two frequencies in hertz."""
    spectrum = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    return spectrum[(hertz >= low) & (hertz < high)].sum()


def shift_seconds(before, after) -> float:
    """How much later `after` is than `before`, by their cross-correlation on a grid of 1/128 ms."""
    length, fine = 2 * len(before), 8
    cross = np.fft.rfft(after, length) * np.conj(np.fft.rfft(before, length))
    correlation = np.fft.irfft(cross, length * fine)
    place = int(correlation.argmax())
    return (place if place < length * fine / 2 else place - length * fine) / (SAMPLE_RATE * fine)


# Settings and randomness


def test_the_settings_are_those_of_the_configuration():
    config = WaveformAugmentConfig(noise_share=0.5, codecs=["opus"])
    settings = EffectSettings(**config.model_dump())
    assert dataclasses.asdict(settings) == config.model_dump()
    assert dataclasses.asdict(EffectSettings()) == {**WaveformAugmentConfig().model_dump(), "codecs": tuple(CODECS)}
    assert set(CODECS) == set(get_args(Codec))


def test_a_generator_is_a_pure_function_of_its_arguments():
    first = generator_for_sample(1, 2, "clip", 3)
    assert first.random() == generator_for_sample(1, 2, "clip", 3).random()
    # as it was when this was written: another number would change every run
    assert generator_for_sample(1, 2, "clip", 3).bit_generator.random_raw() == 135297857037006057
    others = [(0, 2, "clip", 3), (1, 0, "clip", 3), (1, 2, "clap", 3), (1, 2, "clip", 0), (12, 2, "clip", 3)]
    values = {generator_for_sample(*arguments).random() for arguments in [*others, (1, 2, "clip", 3)]}
    assert len(values) == len(others) + 1


def test_the_same_generator_gives_the_same_samples_in_another_process(speech):
    augmenter = WaveformAugmenter(EVERYTHING)
    numbers = range(12)  # so that every codec has its turn
    digests = [
        hashlib.sha256(augmenter(speech, generator_for_sample(7, n, "a")).tobytes()).hexdigest() for n in numbers
    ]
    assert len(set(digests)) == len(digests)
    assert {augmenter.draw(generator_for_sample(7, n, "a")).codec for n in numbers} == set(CODECS)
    code = f"""
import hashlib, sys
from ultravox.audio.effects import EffectSettings, WaveformAugmenter, generator_for_sample
from ultravox.audio.waveform import load_waveform
speech = load_waveform({str(ROOT / "examples" / "question.wav")!r})
augmenter = WaveformAugmenter(EffectSettings(gain_db=12, speed=0.1, noise_share=1, reverb_share=1, codec_share=1))
for n in {list(reversed(numbers))}:
    print(hashlib.sha256(augmenter(speech, generator_for_sample(7, n, "a")).tobytes()).hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == digests[::-1]


def test_one_effect_more_does_not_change_the_others_choices():
    few, many = WaveformAugmenter(EffectSettings(speed=0.1, noise_share=0.5)), WaveformAugmenter(EVERYTHING)
    for number in range(50):
        one, other = (each.draw(generator_for_sample(0, number, "a")) for each in (few, many))
        assert (one.speed, one.colour, one.noise_seed) == (other.speed, other.colour, other.noise_seed)
        assert one.snr_db is None or one.snr_db == other.snr_db


def test_effects_come_as_often_as_they_should_and_within_their_limits():
    settings = EffectSettings(gain_db=6, speed=0.1, noise_share=0.3, reverb_share=0.6, codec_share=0.2)
    augmenter = WaveformAugmenter(settings)
    drawn = [augmenter.draw(generator_for_sample(3, 0, f"clip {number}")) for number in range(4000)]
    for name, share in [("snr_db", 0.3), ("reverb_seconds", 0.6), ("codec", 0.2)]:
        assert np.mean([getattr(each, name) is not None for each in drawn]) == pytest.approx(share, abs=0.03), name
    limits = {"snr_db": (5, 25), "reverb_seconds": (0.1, 0.8), "gain_db": (-6, 6), "speed": (0.9, 1.1)}
    for name, (low, high) in limits.items():
        values = [value for each in drawn if (value := getattr(each, name)) is not None]
        assert low <= min(values) < low + 0.05 * (high - low), name
        assert high >= max(values) > high - 0.05 * (high - low), name
    codecs = [each.codec for each in drawn if each.codec]
    assert all(0.15 < codecs.count(name) / len(codecs) < 0.35 for name in CODECS)


def test_nothing_is_changed_where_nothing_is_wanted(speech):
    loud = speech * 9
    np.testing.assert_array_equal(augment(loud), loud)


def test_a_waveform_that_is_given_is_left_as_it_is(speech):
    copy = speech.copy()
    for number in range(4):
        WaveformAugmenter(EVERYTHING)(speech, generator_for_sample(0, number, ""))
    np.testing.assert_array_equal(speech, copy)


# Hard cases


@pytest.mark.parametrize("length", [0, 1, 2, 159, 319, 321, 5000])
def test_short_and_silent_clips_come_out_whole(length):
    for waveform in (np.zeros(length, np.float32), np.full(length, 1e-30, np.float32), np.ones(length, np.float32)):
        for number in range(8):
            settings = dataclasses.replace(EVERYTHING, speed=0.0)
            changed = WaveformAugmenter(settings)(waveform, generator_for_sample(0, number, ""))
            assert changed.dtype == np.float32
            assert len(changed) == length
            assert np.isfinite(changed).all()


def test_silence_stays_silent_but_for_a_codecs_own_hiss():
    silence = np.zeros(SAMPLE_RATE, np.float32)
    assert not augment(silence, noise_share=1, reverb_share=1, gain_db=12, speed=0.1).any()
    assert all(np.abs(codec(silence, 0.5)).max() < 1e-3 for codec in CODECS.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(speech, bad):
    broken = speech.copy()
    broken[100] = bad
    with pytest.raises(AudioError, match="not numbers"):
        augment(broken)


def test_a_codec_that_is_not_known_is_refused():
    with pytest.raises(DataError, match="codec 'gsm' is not known: choose from mulaw"):
        WaveformAugmenter(EffectSettings(codecs=("opus", "gsm")))


def test_nothing_clips(speech):
    """Loud speech, made louder: the peak comes down to full scale, and the form of the wave is kept."""
    loud = speech / np.abs(speech).max()
    augmenter = WaveformAugmenter(EffectSettings(gain_db=40))
    drawn = dataclasses.replace(augmenter.draw(generator_for_sample(0, 0, "")), gain_db=20.0)
    np.testing.assert_allclose(augmenter.apply(loud, drawn), loud, atol=1e-6)
    quiet = dataclasses.replace(drawn, gain_db=-20.0)
    np.testing.assert_allclose(augmenter.apply(loud, quiet), loud / 10, atol=1e-6)
    coded = augmenter.apply(loud, dataclasses.replace(drawn, codec="mulaw"))  # which would clip 20 dB
    np.testing.assert_allclose(coded, mulaw(loud), atol=0.05)
    everything = WaveformAugmenter(EVERYTHING)
    peaks = [np.abs(everything(loud, generator_for_sample(0, number, ""))).max() for number in range(16)]
    assert max(peaks) <= 1


# Speed


@pytest.mark.parametrize("speed", [0.05, 0.5])
def test_lengths_stay_within_what_a_planner_counts_with(speed):
    random = np.random.default_rng(0)
    for length in [1, 2, 3, *random.integers(4, 9000, 60)]:
        least, most = length_bounds(int(length), speed)
        for factor in (1 - speed, 1 + speed, random.uniform(1 - speed, 1 + speed)):
            assert least <= len(change_speed(np.zeros(length, np.float32), factor)) <= most
    assert length_bounds(1000, 0.0) == (1000, 1000)
    assert length_bounds(16000, 0.5) == (10666, 32001)


def test_speed_alone_is_change_speed(speech):
    augmenter = WaveformAugmenter(EffectSettings(speed=0.2))
    factor = augmenter.draw(generator_for_sample(0, 0, "a clip")).speed
    np.testing.assert_array_equal(augment(speech, speed=0.2), change_speed(speech, factor))
    assert factor != 1


# Rooms


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8])
def test_a_response_decays_by_60_db_in_its_time(seconds):
    """By Schroeder's backward integration, from -5 to -25 dB (ISO 3382's T20)."""
    response = impulse_response(seconds, 6.0, np.random.default_rng(0))
    assert response[0] == 1
    assert decibels(1 / np.square(response[1:], dtype=np.float64).sum()) == pytest.approx(6.0, abs=0.01)
    left = np.square(response[1:], dtype=np.float64)[::-1].cumsum()[::-1]
    level = 10 * np.log10(left / left[0])
    start, stop = int((level < -5).argmax()), int((level < -25).argmax())
    assert 3 * (stop - start) / SAMPLE_RATE == pytest.approx(seconds, rel=0.15)


def test_reverberation_keeps_length_energy_and_time(speech):
    for number, seconds in enumerate((0.1, 0.8)):
        response = impulse_response(seconds, 3.0, np.random.default_rng(number))
        played = reverberate(speech, response)
        assert len(played) == len(speech)
        assert np.square(played).sum() == pytest.approx(np.square(speech).sum(), rel=1e-4)
        direct = np.convolve(speech, response)[: len(speech)]
        np.testing.assert_allclose(played / np.abs(played).max(), direct / np.abs(direct).max(), atol=1e-5)
        assert abs(shift_seconds(speech, played)) < 0.001


def test_each_clip_has_a_room_of_its_own(speech):
    augmenter = WaveformAugmenter(EffectSettings(reverb_share=1))
    drawn = augmenter.draw(generator_for_sample(0, 0, "a"))
    other = augmenter.draw(generator_for_sample(0, 0, "b"))
    elsewhere = dataclasses.replace(drawn, echo_seed=other.echo_seed)
    assert not np.allclose(augmenter.apply(speech, drawn), augmenter.apply(speech, elsewhere), atol=1e-3)


# Noise


def test_the_signal_to_noise_ratio_is_exact_over_the_speech(speech):
    """The pause that is put in the middle makes neither the speech nor the noise softer."""
    clip = np.concatenate([speech, np.zeros(3 * SAMPLE_RATE, np.float32), speech]).astype(np.float32)
    frames = clip[: len(clip) // 320 * 320].reshape(-1, 320)
    power = np.array([float(np.mean(frame.astype(np.float64) ** 2)) for frame in frames])
    loud = power[power > 0.001 * power.max()].mean()
    for number in range(12):
        settings = EffectSettings(noise_share=1, noise_snr_db=(-5.0, 30.0))
        wanted = WaveformAugmenter(settings).draw(generator_for_sample(0, number, "a clip")).snr_db
        noise = (augment(clip * 0.1, number, noise_share=1, noise_snr_db=(-5.0, 30.0)) - clip * 0.1).astype(np.float64)
        assert decibels(loud * 0.01 / np.mean(noise**2)) == pytest.approx(wanted, abs=0.02)


def test_colours_of_noise_fall_as_they_should():
    """White keeps its power from octave to octave of equal width, pink loses 3 dB an octave, brown 6."""
    for colour, falls in zip(COLOURS, (0.0, 3.01, 6.02), strict=True):
        noise = coloured_noise(20 * SAMPLE_RATE, colour, np.random.default_rng(1))
        assert np.square(noise).mean() == pytest.approx(1, rel=1e-4)
        density = [band_power(noise, low, 2 * low) / low for low in (125, 250, 500, 1000, 2000)]
        assert np.diff([decibels(value) for value in density]) == pytest.approx(-falls, abs=0.5), colour


@pytest.fixture
def noise_folder(tmp_path) -> Path:
    """A low tone of 10 s, and a high one of 0.1 s in a subfolder."""
    time = np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE
    (tmp_path / "noise" / "high").mkdir(parents=True)
    write_waveform(tmp_path / "noise" / "low.wav", 0.01 * np.sin(2 * np.pi * 200 * time))
    write_waveform(tmp_path / "noise" / "high" / "short.flac", np.sin(2 * np.pi * 5000 * time[:1600]))
    (tmp_path / "noise" / "README.txt").write_text("not a recording")
    return tmp_path / "noise"


def test_recordings_are_drawn_from_any_place_and_looped(noise_folder, speech):
    recordings = NoiseRecordings(noise_folder)
    stretches = [recordings.draw(SAMPLE_RATE, np.random.default_rng(number)) for number in range(20)]
    tones = [int(np.abs(np.fft.rfft(stretch)).argmax()) for stretch in stretches]
    assert set(tones) == {200, 5000}
    assert len({stretch.tobytes() for stretch in stretches}) > 15
    for stretch, tone in zip(stretches, tones, strict=True):
        assert band_power(stretch, tone - 1, tone + 2) > 0.98 * band_power(stretch, 0, 8000), "no gap where it loops"
    noise = augment(speech, noise_share=1, noise_folder=str(noise_folder), noise_snr_db=(10.0, 10.0)) - speech
    assert np.abs(noise).max() > 0


def test_recordings_are_decoded_once_and_not_sent_to_other_processes(noise_folder, monkeypatch):
    recordings = NoiseRecordings(noise_folder)
    decoded = []
    monkeypatch.setattr(
        "ultravox.audio.noise.load_waveform", lambda path, **kw: (decoded.append(path), load_waveform(path, **kw))[1]
    )
    before = [recordings.draw(100, np.random.default_rng(number)) for number in range(20)]
    assert len(decoded) == 2
    pickled = pickle.dumps(recordings)
    assert len(pickled) < 2000
    again = [pickle.loads(pickled).draw(100, np.random.default_rng(number)) for number in range(20)]
    np.testing.assert_array_equal(before, again)


def test_a_silent_stretch_of_a_recording_gives_way_to_where_it_is_loud(tmp_path):
    mostly = np.zeros(30 * SAMPLE_RATE, np.float32)
    mostly[200_000:200_500] = 0.5
    write_waveform(tmp_path / "click.wav", mostly)
    recordings = NoiseRecordings(tmp_path)
    assert all(recordings.draw(1000, np.random.default_rng(number)).any() for number in range(20))


def test_a_folder_of_noise_that_cannot_be_used_is_said_in_one_line(tmp_path, noise_folder):
    (tmp_path / "empty").mkdir()
    for folder, message in [("missing", "is not a folder"), ("empty", "holds no recordings")]:
        with pytest.raises(DataError, match=f"noise_folder .*{folder} {message}"):
            WaveformAugmenter(EffectSettings(noise_folder=str(tmp_path / folder)))
    for name, content, message in [("a.wav", b"RIFF no", "a.wav"), ("b.wav", None, "b.wav is silent")]:
        (tmp_path / "empty" / "a.wav").unlink(missing_ok=True)
        path = tmp_path / "empty" / name
        path.write_bytes(content) if content else write_waveform(path, np.zeros(100))
        with pytest.raises(DataError, match=message):
            WaveformAugmenter(EffectSettings(noise_folder=str(tmp_path / "empty"), noise_share=1))(
                np.ones(100, np.float32), np.random.default_rng(0)
            )


def test_the_fingerprint_follows_settings_and_recordings(noise_folder):
    def fingerprint(**settings):
        return WaveformAugmenter(EffectSettings(**settings)).fingerprint()

    assert fingerprint(gain_db=1.0) == fingerprint(gain_db=1.0) != fingerprint(gain_db=2.0)
    before = fingerprint(noise_folder=str(noise_folder))
    assert before != fingerprint()
    write_waveform(noise_folder / "low.wav", np.ones(100))
    assert fingerprint(noise_folder=str(noise_folder)) != before
    noise_folder.rename(noise_folder.with_name("elsewhere"))
    assert fingerprint(noise_folder=str(noise_folder.with_name("elsewhere"))) not in (before, fingerprint())


def test_noise_that_is_silent_changes_nothing():
    np.testing.assert_array_equal(add_noise(np.ones(10, np.float32), np.zeros(10, np.float32), 5.0), np.ones(10))


# Codecs


ROUND_TRIPS = {
    "mulaw": mulaw,
    "telephone": telephone,
    **{f"opus {rate}": lambda waveform, rate=rate: opus(waveform, rate) for rate in OPUS_BIT_RATES},
    **{f"mp3 {rate}": lambda waveform, rate=rate: mp3(waveform, rate) for rate in MP3_BIT_RATES},
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_codec_keeps_length_time_and_most_of_the_voice(name, speech):
    for clip in (speech, speech[:-137], speech[5000:21001]):
        coded = ROUND_TRIPS[name](clip)
        assert len(coded) == len(clip)
        assert coded.dtype == np.float32
        assert abs(shift_seconds(clip, coded)) < 0.001
        voice, heard = (band_power(each, 400, 3000) for each in (clip, coded))
        assert abs(decibels(heard / voice)) < 2
        assert not np.allclose(coded, clip, atol=1e-4)


def test_the_telephone_leaves_its_band_alone():
    noise = coloured_noise(5 * SAMPLE_RATE, "white", np.random.default_rng(0)) * 0.1
    heard = telephone(noise)
    for low, high, change in [(0, 200, -40), (320, 3380, 0), (3500, 8000, -40)]:
        measured = decibels(band_power(heard, low, high) / band_power(noise, low, high))
        assert measured == pytest.approx(0, abs=0.1) if change == 0 else measured < change
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[-1] = 1.0
    assert np.abs(telephone(click)[:8000]).max() < 1e-4, "the end is not heard at the beginning"
    assert decibels(band_power(mulaw(noise), 4100, 8000) / band_power(noise, 4100, 8000)) < -40


def test_mulaw_is_finer_where_it_is_quiet():
    """Signal over noise, as μ = 255 gives it: 54 dB less of level cost 16 dB of ratio (with μ = 100, 25 dB)."""
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for level, ratio in [(0.5, 38.7), (0.05, 37.8), (0.001, 22.7)]:
        tone = (level * np.sin(2 * np.pi * 997 * time)).astype(np.float32)
        error = (mulaw(tone) - tone)[2000:-2000]
        assert decibels(level**2 / 2 / np.mean(error**2)) == pytest.approx(ratio, abs=1)


def test_lower_bit_rates_leave_less():
    speech = load_waveform(ROOT / "examples" / "question.wav")
    for codec, rates in [(opus, OPUS_BIT_RATES), (mp3, MP3_BIT_RATES)]:
        errors = [np.square(codec(speech, rate) - speech).mean() for rate in (rates[0], rates[-1])]
        assert errors[0] > errors[1]


def test_fast_lengths_are_the_least_of_their_kind():
    def is_fast(number):
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    fast = [number for number in range(1, 20000) if is_fast(number)]
    for length in [1, 2, 7, 31, 1023, 1025, 4097, 16001]:
        assert fast_length(length) == next(number for number in fast if number >= length)
