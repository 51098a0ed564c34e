"""What a run needs of memory and time for each row of a prepared corpus, before its first step and in it.

    python benchmarks/rows.py [--rows 25000] [--source asterisk-en] [--rounds 2]

The shortest clips of a source are prepared again and again under new ids and with a number in each text, until there
are so many rows, and four times as many, in small shards: of both, more than a process keeps open. A fresh process then
opens each as the quickstart's stage `tune` does (transcription, with one phrasing and with all; features not cached),
plans, and makes batches of it, decoding and all. What a row takes is the difference of the two divided by the rows
between them, so that the model and the libraries fall out of it. Seconds are the processor's, of all cores, so that a
busy machine changes little. Memory is what the process itself has written: pages of files that are mapped can be given
back at any time.

Prints JSON, and writes it to `benchmarks/results/rows.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rows.json"
FACTOR = 4
BATCHES = 20
NUM_CLIPS = 100
SHARD_MB = 4
GROWING = ("open_seconds", "plan_seconds", "held_bytes")


def prepare(source: str, num_rows: int, output: str) -> None:
    """A prepared corpus of so many rows."""
    from ultravox.data.clip import Clip
    from ultravox.data.prepare import prepare_dataset
    from ultravox.data.sharding import PrepareOptions
    from ultravox.data.sources import load_clips

    clips = sorted(load_clips(source), key=lambda clip: clip.duration)[:NUM_CLIPS]

    def rows() -> Iterator[Clip]:
        for number in range(num_rows):
            clip = clips[number % len(clips)]
            yield replace(clip, id=str(number), text=f"{clip.text} {number}")

    prepare_dataset(output, {"train": rows}, PrepareOptions(max_shard_mb=SHARD_MB), workers=os.cpu_count() or 1)


def measure(folder: str, prompts: str) -> dict[str, float]:
    """Open a prepared corpus as a run does, plan it, and make batches."""
    from ultravox.config.data import SourceConfig
    from ultravox.config.load import load_config
    from ultravox.data.order import Position
    from ultravox.model.factory import build_model, build_processor
    from ultravox.training.speech import prepare_speech
    from ultravox.training.tune import TuneTask

    config = load_config(ROOT / "configs" / "quickstart.yaml")
    config.data.sources = [SourceConfig(name=folder, task="transcription", prompts=prompts)]  # type: ignore[arg-type]
    config.data.cache = "none"
    config.stages = config.stages[1:]
    processor, model = build_processor(config.model), build_model(config.model)
    before, begin = own_bytes(), time.process_time()
    task = TuneTask(model, processor, prepare_speech(config, model, processor), config.stages[0], config.seed)
    opened = time.process_time()
    task.order.num_batches(0, 0)
    planned = time.process_time()
    held = own_bytes()
    for index in range(BATCHES):
        task.batch(Position(0, 0, index))
    made = time.process_time()
    return {
        "rows": len(task.examples),
        "open_seconds": opened - begin,
        "plan_seconds": planned - opened,
        "batch_seconds": (made - planned) / BATCHES,
        "held_bytes": held - before,
        "held_after_batches_bytes": own_bytes() - before,
    }


def own_bytes() -> int:
    """Resident memory of this process that is not of a file."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def fresh(*words: object) -> Any:
    """What a fresh process of this program prints."""
    done = subprocess.run([sys.executable, __file__, "--do", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a measurement failed with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout or "null")


def benchmark(source: str, num_rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All measurements; `folder` is empty."""
    sizes = (num_rows, FACTOR * num_rows)
    for size in sizes:
        fresh("prepare", source, size, folder / str(size))
    found: dict[str, Any] = {}
    for prompts in ("first", "all"):
        runs = [[fresh("measure", folder / str(size), prompts) for _ in range(rounds)] for size in sizes]
        small, large = ([min(run[key] for run in of) for key in GROWING] for of in runs)
        between = runs[1][0]["rows"] - runs[0][0]["rows"]
        each = {key: (b - a) / between for key, a, b in zip(GROWING, small, large, strict=True)}
        found[prompts] = {
            "runs": runs,
            "open_microseconds_per_row": round(1e6 * each["open_seconds"], 1),
            "plan_microseconds_per_row": round(1e6 * each["plan_seconds"], 2),
            "held_bytes_per_row": round(each["held_bytes"], 1),
            "batch_milliseconds": [round(1e3 * min(run["batch_seconds"] for run in of), 1) for of in runs],
        }
    return {"version": 1, "source": source, "rounds": rounds, "cores": os.cpu_count(), "prompts": found}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=25_000, help="of the smaller corpus (default: %(default)s)")
    parser.add_argument("--source", default="asterisk-en", help="whose clips are repeated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes for each size (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (default: %(default)s)")
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.do and args.do[0] == "prepare":
        prepare(args.do[1], int(args.do[2]), args.do[3])
        return 0
    if args.do:
        print(json.dumps(measure(*args.do[1:])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark(args.source, args.rows, args.rounds, Path(folder))
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
