"""What the feature cache costs and saves: the start of a run, reading batches beside a training step, decoding.

    python benchmarks/cache.py [--entries 100000] [--no-step]

Everything happens in a temporary folder. The audio files of the first part are sparse, 5 s each, all different; their
names are all that matters there. The last part trains a few align steps of the quickstart, which needs its models and
data (`ultravox models fetch`, `ultravox data fetch`). Figures go to `benchmarks/results/cache.json`; rates depend on
the machine, shares less so.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultravox.data import cache as feature_cache
from ultravox.data.audio_hashes import AudioHashes
from ultravox.data.cache import CacheKey, FeatureCache, FeatureRequest
from ultravox.data.cache_folder import HASHES_FILE, features_bytes, features_folder
from ultravox.data.cache_shards import ShardWriter
from ultravox.data.collate import pad_frames
from ultravox.files import atomic_write, ultravox_home

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cache.json"
CLIP_SECONDS = 5.0
FRAMES_PER_SECOND, CHANNELS = 50, 384  # Whisper tiny's frames
BATCH_CLIPS = 20


@contextmanager
def own_home(folder: Path) -> Iterator[None]:
    """Cache under `folder`, with the models and data that are fetched already."""
    home = ultravox_home()
    for name in ("models", "data", "wheels"):
        if (home / name).is_dir() and not (folder / name).exists():
            (folder / name).symlink_to(home / name)
    before, os.environ["ULTRAVOX_HOME"] = os.environ.get("ULTRAVOX_HOME"), str(folder)
    try:
        yield
    finally:
        os.environ.pop("ULTRAVOX_HOME")
        if before is not None:
            os.environ["ULTRAVOX_HOME"] = before


def fill(key: CacheKey, names: list[str], num_frames: int) -> None:
    """Features of these names, as a builder would have left them."""
    FeatureCache(key).build([], lambda waveforms: [])
    key.folder().mkdir(parents=True)
    rows = np.random.default_rng(0).standard_normal((num_frames, key.num_channels)).astype(key.dtype)
    with ShardWriter(key.folder(), key.id, 256 << 20, None, 1, lambda *_: None) as writer:
        for name in names:
            writer.append(name, rows, int(CLIP_SECONDS * 16000))


def refuse(waveforms: list[np.ndarray]) -> list[np.ndarray]:
    """An encoder that must not be called: everything is cached."""
    sys.exit("the encoder was called, though everything is cached")


def start_up(folder: Path, num_entries: int) -> dict[str, float]:
    """Seconds until a run knows that all its features are cached: with each file read, and with remembered hashes."""
    audio = folder / "audio"
    audio.mkdir()
    requests = []
    for index in range(num_entries):
        path = audio / f"{index}.wav"
        with path.open("wb") as file:
            file.write(b"%d" % index)
            file.truncate(int(CLIP_SECONDS * 32000))
        requests.append(FeatureRequest(path, CLIP_SECONDS))
    time.sleep(3)  # what is younger is not remembered
    begin = time.perf_counter()
    digests = AudioHashes(features_folder() / HASHES_FILE).find(request.audio for request in requests)
    hashing = time.perf_counter() - begin
    key = CacheKey("benchmark", "start-up", 8)
    fill(key, [f"{digests[request.audio]}@1" for request in requests], 10)
    seconds, lookups = [], 0.0
    for _ in range(4):
        cache = FeatureCache(key)
        begin = time.perf_counter()
        report = cache.build(requests, refuse)
        seconds.append(time.perf_counter() - begin)
        some = [name for name in report.names[:: max(1, num_entries // 5000)] if name]
        begin = time.perf_counter()
        for name in some:
            cache.frames(name)
        lookups = (time.perf_counter() - begin) / len(some)
    begin = time.perf_counter()
    assert "absent" not in FeatureCache(key)
    opening = time.perf_counter() - begin
    opened = FeatureCache(key)
    tracemalloc.start()
    assert "absent" not in opened
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "entries": num_entries,
        "audio_gb": num_entries * CLIP_SECONDS * 32000 / 1e9,
        "seconds_with_every_file_read": hashing + min(seconds[1:]),
        "seconds": min(seconds[1:]),
        "seconds_to_open_the_index": opening,
        "memory_bytes_per_entry": memory / num_entries,
        "index_bytes_per_entry": sum(p.stat().st_size for p in key.folder().glob("*.idx")) / num_entries,
        "microseconds_of_a_first_read": lookups * 1e6,
    }


def reading(num_clips: int) -> dict[str, float]:
    """Audio-seconds a second of padded batches from cached frames: the first time, with the check; the best of five."""
    key = CacheKey("benchmark", "reading", CHANNELS)
    names = [f"{index}@1" for index in range(num_clips)]
    fill(key, names, int(CLIP_SECONDS * FRAMES_PER_SECOND))
    cache = FeatureCache(key)
    random = np.random.default_rng(0)
    rates = []
    for _ in range(6):
        order = random.permutation(num_clips)
        begin = time.perf_counter()
        for start in range(0, num_clips, BATCH_CLIPS):
            pad_frames([cache.frames(names[index]) for index in order[start : start + BATCH_CLIPS]])
        rates.append(num_clips * CLIP_SECONDS / (time.perf_counter() - begin))
    frames = features_bytes()
    return {
        "clips": num_clips,
        "gb": frames / 1e9,
        "audio_seconds_per_second_first": rates[0],
        "audio_seconds_per_second": max(rates[1:]),
    }


def decoding(folder: Path, num_clips: int) -> dict[str, float]:
    """Audio-seconds a second that decoding alone gives, in one thread and in as many as a build uses."""
    from ultravox.audio.waveform import write_waveform

    random = np.random.default_rng(0)
    paths = [folder / f"speech-{index}.flac" for index in range(num_clips)]
    for path in paths:
        write_waveform(path, random.standard_normal(int(CLIP_SECONDS * 16000)).astype(np.float32) * 0.05)
    threads = feature_cache.NUM_DECODERS
    rates: dict[str, float] = {"threads": threads}
    for count, name in ((1, "audio_seconds_per_second_one_thread"), (threads, "audio_seconds_per_second")):
        feature_cache.NUM_DECODERS = count
        key = CacheKey(name, "decoding", 1)
        requests = [FeatureRequest(path, CLIP_SECONDS, speed) for path in paths for speed in (1.0, 1.1)]
        report = FeatureCache(key).build(requests, lambda waveforms: [np.zeros((1, 1), np.float32)] * len(waveforms))
        rates[name] = len(requests) * CLIP_SECONDS / report.seconds
    feature_cache.NUM_DECODERS = threads
    return rates


def step(folder: Path, num_clips: int) -> dict[str, float]:
    """Align steps of the quickstart on cached features: the share of time that batches take; and that of decoding."""
    from ultravox.config.load import load_config
    from ultravox.model.factory import build_model, build_processor
    from ultravox.training.align import AlignTask
    from ultravox.training.speech import prepare_speech
    from ultravox.training.task import Position

    overrides = ["--run_dir", str(folder / "run"), "--data.sources", "[{name: asterisk-en}]"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    config.data.sources[0].max_clips = num_clips
    model, processor = build_model(config.model), build_processor(config.model)
    first = prepare_speech(config, model, processor)
    data = prepare_speech(config, model, processor)
    assert data.report.num_encoder_calls == 0
    task: Any = AlignTask(model, processor, data, config.stages[0], config.seed)
    task.train_mode()
    loading, steps, audio = [], [], 0.0
    for index in range(1 + min(20, task.num_batches(0) - 1)):
        begin = time.perf_counter()
        batch = task.batch(Position(0, index))
        middle = time.perf_counter()
        output = task.loss(batch)
        (output.sum / output.count).backward()
        if index:  # the first warms up
            loading.append(middle - begin)
            steps.append(time.perf_counter() - middle)
            audio += output.audio_seconds
    return {
        "clips": num_clips,
        "encoding_audio_seconds_per_second": first.seconds / first.report.seconds,
        "share_of_a_build_waiting_for_decoding": first.report.wait_seconds / first.report.seconds,
        "start_seconds_when_cached": data.report.seconds,
        "batch_milliseconds": statistics.median(loading) * 1e3,
        "align_step_milliseconds": statistics.median(steps) * 1e3,
        "share_of_batches_in_a_step": statistics.median(loading) / statistics.median(steps),
        "training_audio_seconds_per_second": audio / (sum(loading) + sum(steps)),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--entries", type=int, default=100_000, help="clips of the start (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=2000, help="clips that are read (default: %(default)s)")
    parser.add_argument("--no-step", action="store_true", help="leave the training steps out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go (default: the kept ones)")
    args = parser.parse_args()
    figures: dict[str, Any] = {"version": 1, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as name, own_home(Path(name)):
        folder = Path(name)
        figures["start"] = start_up(folder, args.entries)
        figures["reading"] = reading(args.clips)
        figures["decoding"] = decoding(folder, max(20, args.clips // 10))
        if not args.no_step:
            figures["step"] = step(folder, 100)
    rounded = {
        part: {k: float(f"{v:.4g}") for k, v in values.items()} if isinstance(values, dict) else values
        for part, values in figures.items()
    }
    atomic_write(args.results, json.dumps(rounded, indent=2) + "\n")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
