"""How fast each augmentation of waveforms is: seconds of audio per second, on one core.

    OMP_NUM_THREADS=1 python benchmarks/effects.py

Each effect works on ten clips between 2 and 20 s, made of the example question; the best of five rounds counts. The
numbers go to `benchmarks/results/effects.json`.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ultravox.audio.codecs import MP3_BIT_RATES, OPUS_BIT_RATES, mp3, mulaw, opus, telephone
from ultravox.audio.effects import EffectSettings, WaveformAugmenter, generator_for_sample
from ultravox.audio.noise import COLOURS, add_noise, coloured_noise
from ultravox.audio.rooms import impulse_response, reverberate
from ultravox.audio.waveform import SAMPLE_RATE, change_speed, load_waveform

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "effects.json"
ROUNDS = 5
Effect = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def effects() -> dict[str, Effect]:
    """Each by its name; the last one is all of them together, as a demanding run would have them."""
    found: dict[str, Effect] = {
        "speed": lambda waveform, _: change_speed(waveform, 1.07),
        "reverberation, 0.8 s": lambda waveform, random: reverberate(waveform, impulse_response(0.8, 6.0, random)),
        "mulaw": lambda waveform, _: mulaw(waveform),
        "telephone": lambda waveform, _: telephone(waveform),
    }
    for colour in COLOURS:
        found[f"{colour} noise"] = lambda waveform, random, colour=colour: add_noise(
            waveform, coloured_noise(len(waveform), colour, random), 10.0
        )
    for rate in OPUS_BIT_RATES:
        found[f"opus, {rate // 1000} kbit/s"] = lambda waveform, _, rate=rate: opus(waveform, rate)
    for rate in MP3_BIT_RATES:
        found[f"mp3, {rate // 1000} kbit/s"] = lambda waveform, _, rate=rate: mp3(waveform, rate)
    half = EffectSettings(gain_db=6, speed=0.1, noise_share=0.5, reverb_share=0.5, codec_share=0.5)
    found["all, each for half of the clips"] = WaveformAugmenter(half)
    found["all, for every clip"] = WaveformAugmenter(
        dataclasses.replace(half, noise_share=1, reverb_share=1, codec_share=1)
    )
    return found


def main() -> None:
    """Measure, print and keep."""
    question = np.tile(load_waveform(ROOT / "examples" / "question.wav"), 10)
    clips = [question[: round(seconds * SAMPLE_RATE)] for seconds in np.linspace(2, 20, 10)]
    audio_seconds = sum(map(len, clips)) / SAMPLE_RATE
    rates = {}
    for name, effect in effects().items():
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for number, clip in enumerate(clips):
                effect(clip, generator_for_sample(0, 0, str(number)))
            best = min(best, time.perf_counter() - start)
        rates[name] = round(audio_seconds / best)
        print(f"{name:34} {rates[name]:7,} s of audio per second", flush=True)
    RESULTS.write_text(json.dumps({"version": 1, "audio_seconds_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
