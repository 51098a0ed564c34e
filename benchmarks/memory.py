"""How well the memory of a batch is predicted, in a process that may have no more than the prediction.

    python benchmarks/memory.py [--batches 50]

The quickstart's stage `tune` (SmolLM2-135M with LoRA on a frozen Whisper tiny.en), with made examples through the real
task, all in one process:

1. The process's size (its addresses, which RLIMIT_AS counts) is noted when the task stands, a batch of a single row has
   run and all freed memory has been given back.
2. The memory model is calibrated, as at the start of a stage.
3. RLIMIT_AS is set to that size + the largest prediction + SLACK_BYTES. What calibrating has left is not allowed for.
4. Batches that the planner cuts out of random datasets with random budgets run in random order, forwards and backwards.
   Of each, the peak of resident memory beside what is resident before it is held against the prediction, and against
   what a plan takes it for.

The numbers go to `benchmarks/results/memory.json`.
"""

import argparse
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultravox.config.data import SourceConfig
from ultravox.config.load import load_config
from ultravox.data.plan import plan_batches
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.training.measure import memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import MemoryModel, OfLongest, calibrate
from ultravox.training.memory_probe import make_probe, measure_task, peak_on_cpu, run_probe
from ultravox.training.speech import prepare_speech
from ultravox.training.splitting import is_out_of_memory
from ultravox.training.tune import TuneTask

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
MAX_AUDIO_TOKENS, MAX_TEXT_TOKENS = 300, 80
NUM_CLIPS = 20
#: What a process may need beyond the largest prediction when batches of many shapes come one after the other: oneDNN's
#: compiled products (128 of half a megabyte), which predictions leave out, and as much for holes between what is kept.
SLACK_BYTES = 128 << 20


def build_task() -> TuneTask:
    """The stage `tune` of the quickstart, on a few clips, which lend their words."""
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    config.data.sources = [SourceConfig(name="spoken-requests-en", task="answer", max_clips=NUM_CLIPS)]
    config.evaluation.num_progress_clips = 0
    processor, model = build_processor(config.model), build_model(config.model)
    use_fast_kernels(model)
    data = prepare_speech(config, model, processor)
    task = TuneTask(model, processor, data, config.stages[-1], config.seed)
    task.parameter_groups()
    task.train_mode()
    return task


def random_batches(count: int, max_batch_tokens: int) -> list[list[tuple[int, int]]]:
    """Audio and text tokens of each row: batches that the planner cuts out of random datasets, with random budgets."""
    random = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        audio = np.exp(random.uniform(np.log(4), np.log(MAX_AUDIO_TOKENS), 200)).astype(int)
        text = np.minimum(MAX_TEXT_TOKENS, 12 + (audio * random.uniform(0.1, 0.6, 200)).astype(int))
        budget = int(random.uniform(400, max_batch_tokens))
        chosen = plan_batches(audio + text, budget, int(random.integers(1 << 30)), 0, count_padding=False)[0]
        batches.append([(int(audio[index]), int(text[index])) for index in chosen])
    return batches


def predicted(model: MemoryModel, rows: list[tuple[int, int]]) -> int:
    """Bytes beside the base, of a batch of these rows."""
    audio, text = np.array(rows).T
    return int(model.predict(len(rows), audio.sum(), text.sum(), (audio + text).max()))


def planned(model: MemoryModel, rows: list[tuple[int, int]]) -> int:
    """The same as a plan counts, which takes all rows to be as long as the longest."""
    audio, text = np.array(rows).T
    return int(OfLongest(model).predict(np.array([len(rows)]), audio.max(keepdims=True), text.max(keepdims=True))[0])


def max_batch_tokens() -> int:
    """Of the quickstart."""
    return load_config(ROOT / "configs" / "quickstart.yaml").stages[-1].max_batch_tokens


def measure(count: int) -> dict[str, Any]:
    """See above."""
    task = build_task()
    keep_freed_memory()
    run_probe(task, make_probe(task, [(4, 12)]))  # threads and kernels are there once
    gc.collect()
    release_freed_memory()
    size = virtual_bytes()
    start = time.perf_counter()
    model = calibrate(
        measure_task(task),
        max_batch_tokens=max_batch_tokens(),
        max_audio_tokens=MAX_AUDIO_TOKENS,
        max_text_tokens=MAX_TEXT_TOKENS,
    )
    seconds = time.perf_counter() - start
    print(json.dumps(model.to_json()), file=sys.stderr, flush=True)
    batches = random_batches(count, max_batch_tokens())
    largest = max(predicted(model, batch) for batch in batches)
    gc.collect()
    release_freed_memory()
    after, limit = virtual_bytes(), size + largest + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rows = []
    for index in np.random.default_rng(1).permutation(count):
        rows.append(run_batch(task, model, batches[index]))
        print(rows[-1], f"{limit - virtual_bytes():,} left", file=sys.stderr, flush=True)
    return {
        "threads": torch.get_num_threads(),
        "calibration_seconds": round(seconds, 1),
        "model": model.to_json(),
        "address_space": {
            "before_calibration": size,
            "after_calibration": after,
            "largest_prediction": largest,
            "slack": SLACK_BYTES,
            "limit": limit,
            "most_beyond_prediction": largest_virtual_bytes() - size - largest,
        },
        "batches": rows,
    }


def run_batch(task: TuneTask, model: MemoryModel, batch: list[tuple[int, int]]) -> dict[str, int | None]:
    """A batch's shape, what it took and what is predicted; `measured` is None where memory ran out."""
    probe = make_probe(task, batch)
    gc.collect()
    release_freed_memory()
    base, measured = memory_bytes(), None
    try:
        measured = peak_on_cpu(lambda: run_probe(task, probe))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}"[:200], file=sys.stderr)
    audio, text = np.array(batch).T
    row = {"rows": len(batch), "audio_tokens": int(audio.sum()), "text_tokens": int(text.sum())}
    row |= {"longest": int((audio + text).max()), "base": base, "measured": measured}
    return row | {"predicted": predicted(model, batch), "planned": planned(model, batch)}


def virtual_bytes() -> int:
    """What RLIMIT_AS counts of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def largest_virtual_bytes() -> int:
    """The most that it was so far."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmPeak:"))
    return int(line.split()[1]) * 1024


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How many ran, and how far predictions are above what was measured."""
    rows = [row for row in found if row["measured"] is not None]
    base, measured, told, plan = (
        np.array([row[name] for row in rows]) for name in ("base", "measured", "predicted", "planned")
    )
    shares = {
        "beside_base": told / measured - 1,
        "process_total": (base + told) / (base + measured) - 1,
        "planned": plan / measured - 1,
    }
    beside = shares["beside_base"]
    counts = {"batches": len(found), "ran": len(rows), "below_measured": int((beside < 0).sum())}
    counts |= {"over_15_percent": int((beside > 0.15).sum())}
    return counts | {
        f"{name}_{what}": float(getattr(np, what)(v)) for name, v in shares.items() for what in ("min", "max", "mean")
    }


def main() -> None:
    """Measure, print the summary and keep all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50, help="how many (default %(default)s)")
    measured = measure(parser.parse_args().batches)
    found = {"version": 2, "summary": summary(measured["batches"]), **measured}
    print(json.dumps({name: found[name] for name in ("summary", "address_space")}, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
