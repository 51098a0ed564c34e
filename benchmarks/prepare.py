"""How fast `ultravox data prepare` is on one core, and that its memory does not grow with the corpus.

    python benchmarks/prepare.py [--source asterisk-en] [--repeat 8] [--rounds 3]

The recordings of a source (several times, under new ids) are prepared by one process, in three forms: FLAC at 16 kHz,
which is checked and stored as it is; the same as WAV, which is encoded; and as 44.1 kHz stereo WAV, which is resampled
too. Each round is a fresh process. The rate is seconds of audio by second of processor time, so that a busy machine
changes little; Python's start and imports are not counted. Peak memory is measured of the corpus and of four times of
it, and of rows that are text alone, 100 thousand and four times as many. Random rows are read from what came out.

Prints JSON, and writes it to `benchmarks/results/prepare.json`.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "prepare.json"
FORMS = {
    "flac 16 kHz": (16_000, 1, "flac"),
    "wav 16 kHz": (16_000, 1, "wav"),
    "wav 44.1 kHz stereo": (44_100, 2, "wav"),
}
TEXT_ROWS = 100_000
SHARD_MB = 64
READS = 2000


def write_form(source: str, form: str, folder: Path) -> None:
    """A manifest of the source's recordings in one form."""
    import numpy as np
    import soundfile
    import soxr

    from ultravox.audio.waveform import load_waveform
    from ultravox.data.sources import load_clips, split_names

    rate, channels, suffix = FORMS[form]
    folder.mkdir()
    lines = []
    for index, clip in enumerate(load_clips(source, split_names(source)[0])):
        waveform = load_waveform(clip.audio)
        played = waveform if rate == 16_000 else soxr.resample(waveform, 16_000, rate)
        soundfile.write(folder / f"{index}.{suffix}", np.stack([played] * channels, axis=1), rate)
        row = {"id": str(index), "audio": f"{index}.{suffix}", "text": clip.text, "duration": clip.duration}
        lines.append(json.dumps(row) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))


def measure(manifest: str, repeat: int, output: str) -> dict[str, float]:
    """Prepare a manifest's rows `repeat` times in this process; with "" as the manifest, so many rows of text."""
    from ultravox.audio.content import NO_AUDIO
    from ultravox.data.clip import Clip
    from ultravox.data.prepare import prepare_dataset
    from ultravox.data.sharding import PrepareOptions
    from ultravox.data.sources import load_clips

    rows = load_clips(manifest) if manifest else []

    def clips() -> Iterator[Clip]:
        for turn in range(repeat):
            yield from (replace(clip, id=f"{turn}/{clip.id}") for clip in rows)
            if not rows:
                yield Clip(str(turn), NO_AUDIO, f"the text of row {turn}", 0.0)

    wall, processor = time.perf_counter(), time.process_time()
    info = prepare_dataset(output, {"train": clips}, PrepareOptions(max_shard_mb=SHARD_MB)).info
    return {
        "rows": info["splits"]["train"]["num_rows"],
        "audio_seconds": info["splits"]["train"]["seconds"],
        "wall_seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_reads(output: str) -> dict[str, float]:
    """Microseconds of reading one random recording, its shard already open: the median and the slowest of 100."""
    from ultravox.data.prepared import iter_prepared

    clips = list(iter_prepared(output, "train"))
    generator, seconds = random.Random(0), []
    for clip in clips:
        clip.audio.read()  # opens the shards, and brings them into memory
    for _ in range(READS):
        begin = time.perf_counter()
        generator.choice(clips).audio.read()
        seconds.append(time.perf_counter() - begin)
    cuts = statistics.quantiles(seconds, n=100)
    return {"median": round(statistics.median(seconds) * 1e6), "slowest_of_100": round(cuts[98] * 1e6)}


def fresh(*words: object) -> dict[str, Any]:
    """What a fresh process of this program measures."""
    command = [sys.executable, __file__, "--measure", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement failed with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def spread(values: list[float], digits: int = 0) -> dict[str, Any]:
    """Mean, standard deviation and number of the values."""
    deviation = round(statistics.stdev(values), digits) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), digits), "sd": deviation, "n": len(values)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from ultravox.data.shard import made_with

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version(), **made_with()}


def benchmark(source: str, repeat: int, rounds: int, text_rows: int, folder: Path) -> dict[str, Any]:
    """All measurements; `folder` is empty."""
    speed, memory, output = {}, {}, folder / "output"

    def measured(manifest: Path | str, times: int) -> list[dict[str, Any]]:
        runs = []
        for _ in range(rounds):
            shutil.rmtree(output, ignore_errors=True)
            runs.append(fresh(manifest, times, output))
        return runs

    for number, form in enumerate(FORMS):
        data = folder / str(number)
        write_form(source, form, data)
        runs = measured(data / "train.jsonl", repeat)
        rates = [run["audio_seconds"] / run["processor_seconds"] for run in runs]
        speed[form] = {"audio_seconds": runs[0]["audio_seconds"], "times_real_time_per_core": spread(rates)}
        if number == 0:
            reads = fresh("reads", 0, output)
            memory["audio"] = compare(runs, measured(data / "train.jsonl", 4 * repeat))
    memory["text"] = compare(measured("", text_rows), measured("", 4 * text_rows))
    return {"version": 1, "machine": machine(), "speed": speed, "memory": memory, "random_read_microseconds": reads}


def compare(runs: list[dict[str, Any]], longer: list[dict[str, Any]]) -> dict[str, Any]:
    """Peak memory of a corpus and of four times of it."""
    peaks = [[run["peak_mb"] for run in group] for group in (runs, longer)]
    return {
        "rows": [group[0]["rows"] for group in (runs, longer)],
        "peak_mb": [spread(group, 1) for group in peaks],
        "ratio": round(statistics.mean(peaks[1]) / statistics.mean(peaks[0]), 3),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="asterisk-en", help="where the recordings come from (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=8, help="how often each comes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each (default %(default)s)")
    parser.add_argument("--text-rows", type=int, default=TEXT_ROWS, help="rows without audio (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the numbers are kept")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        manifest, repeat, output = args.measure
        print(json.dumps(measure_reads(output) if manifest == "reads" else measure(manifest, int(repeat), output)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = benchmark(args.source, args.repeat, args.rounds, args.text_rows, Path(folder))
    text = json.dumps({"source": args.source, "repeat": args.repeat, **found}, indent=1)
    args.results.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
