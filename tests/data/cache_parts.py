"""What the tests of the feature cache share; run as a program, another process that uses the cache.

    python cache_parts.py AUDIO_FOLDER LOG [--commit] [--block-after N] [--hold] [--speed X]

It builds the features of all wav files, writes a line to LOG for each waveform that it encodes, and prints a JSON
object. `--commit` writes the index after each entry, `--block-after` stops inside the encoder's call N until it is
killed, `--hold` waits, with the features open, until standard input closes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ultravox.audio.waveform import write_waveform
from ultravox.data import cache_shards
from ultravox.data.cache import CacheKey, FeatureCache, FeatureRequest

KEY = CacheKey(encoder_hash="abc", preprocessing="log-mel-1", num_channels=3)


class Encoder:
    """Frames of 10 ms: mean, peak and a ramp. Counts its calls."""

    def __init__(self):
        self.calls, self.num_waveforms = 0, 0

    def __call__(self, waveforms):
        self.calls += 1
        self.num_waveforms += len(waveforms)
        return [self.one(waveform) for waveform in waveforms]

    @staticmethod
    def one(waveform):
        blocks = np.array_split(waveform, max(1, len(waveform) // 160))
        return np.array([[b.mean(), np.abs(b).max(), i / 100] for i, b in enumerate(blocks)], dtype=np.float32)


def write_tones(folder: Path, count: int = 8, seconds: float = 0.2) -> list[FeatureRequest]:
    """Some tones, each longer than the one before, at two speeds."""
    found = []
    for index in range(count):
        length = seconds + 0.1 * index
        time = np.arange(int(16000 * length)) / 16000
        path = folder / f"tone-{index}.wav"
        write_waveform(path, (0.3 * np.sin(2 * np.pi * (200 + 50 * index) * time)).astype(np.float32))
        found += [FeatureRequest(path, length, speed) for speed in (1.0, 1.1)]
    return found


def assert_right(cache: FeatureCache, requests: list[FeatureRequest], names: list[str | None]) -> None:
    """Each entry holds the frames of its own clip."""
    from ultravox.audio.waveform import change_speed, load_waveform

    assert None not in names
    for request, name in zip(requests, names, strict=True):
        expected = Encoder.one(change_speed(load_waveform(request.audio), request.speed))
        assert cache.num_frames(name) == len(expected)
        np.testing.assert_allclose(cache.frames(name), expected, atol=1e-3)


def start(folder: Path, log: Path, *options: str) -> subprocess.Popen:
    """Another process, in the environment of this one."""
    command = [sys.executable, __file__, str(folder), str(log), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    """What another process has printed, once it has ended well."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def wait_for(condition, seconds: float = 30.0) -> None:
    """Until something is true; fails when it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--commit", action="store_true")
    parser.add_argument("--block-after", type=int)
    parser.add_argument("--hold", action="store_true")
    args = parser.parse_args()
    if args.commit:
        cache_shards.SECONDS_BETWEEN_COMMITS = -1.0
    encoder = Encoder()

    def encode(waveforms):
        with args.log.open("a") as log:
            log.write("waveform\n" * len(waveforms))
        frames = encoder(waveforms)
        if encoder.calls == args.block_after:
            args.log.with_suffix(".blocked").touch()
            time.sleep(600)
        time.sleep(0.02)
        return frames

    paths = sorted(args.folder.glob("*.wav"))
    requests = [FeatureRequest(p, p.stat().st_size / 32000, speed) for p in paths for speed in (1.0, 1.1)]
    cache = FeatureCache(KEY)
    report = cache.build(requests, encode, max_batch_seconds=0.5)
    assert_right(cache, requests, report.names)
    print(json.dumps({"encoded": report.num_encoded, "names": report.names}), flush=True)
    if args.hold:
        sys.stdin.read()


if __name__ == "__main__":
    main()
