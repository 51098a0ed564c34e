"""How well the memory of a batch is predicted, and that a process with no more than that runs it.

    python benchmarks/memory.py [--batches 50] [--steps predict in_order ascending over]

The quickstart's stage `tune` (SmolLM2-135M with LoRA on a frozen Whisper tiny.en), with made examples through
the real task. The batches are those that the planner cuts out of random datasets with random budgets. Each step is
a process of its own; all but the first take the calibration from the results of the first.

predict: calibrates, then predicts and measures each batch. Two peaks are compared, both of resident memory: what the
    batch takes beside what the process holds before it, and the process's total.
in_order: sets RLIMIT_AS to the process's size at its start, when all freed memory has been given back, + the largest
    prediction + SLACK_BYTES, and runs all batches one after the other, keeping freed memory as training does.
ascending: the same from the smallest to the largest, the limit following what is predicted for each.
over: sets RLIMIT_AS so that half of the largest batch fits. The whole must fail in a way that is recognised, its halves
    must give the loss and the gradients that the whole gives without a limit, and the next batch must run.

The numbers go to `benchmarks/results/memory.json`.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ultravox.config.data import AugmentConfig, SourceConfig
from ultravox.config.load import load_config
from ultravox.data.plan import plan_batches
from ultravox.model.factory import build_model, build_processor
from ultravox.model.fast import use_fast_kernels
from ultravox.training.batches import SpeechBatch
from ultravox.training.measure import memory_bytes
from ultravox.training.memory import keep_freed_memory, release_freed_memory
from ultravox.training.memory_model import MemoryModel, calibrate
from ultravox.training.memory_probe import make_probe, measure_task, peak_on_cpu, run_probe
from ultravox.training.speech import prepare_speech
from ultravox.training.splitting import is_out_of_memory, run_with_splitting
from ultravox.training.tune import TuneTask

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
MAX_AUDIO_TOKENS, MAX_TEXT_TOKENS = 300, 80
NUM_CLIPS = 20
#: What a process needs beyond the prediction when batches of many shapes come one after the other: oneDNN's compiled
#: products (half a megabyte for each shape), and holes between what is kept.
SLACK_BYTES = 256 << 20


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


def max_batch_tokens() -> int:
    """Of the quickstart."""
    return load_config(ROOT / "configs" / "quickstart.yaml").stages[-1].max_batch_tokens


def predict(count: int) -> dict[str, Any]:
    """See above."""
    task = build_task()
    keep_freed_memory()
    start = time.perf_counter()
    model = calibrate(
        measure_task(task),
        max_batch_tokens=max_batch_tokens(),
        max_audio_tokens=MAX_AUDIO_TOKENS,
        max_text_tokens=MAX_TEXT_TOKENS,
    )
    seconds = time.perf_counter() - start
    print(json.dumps(model.to_json()), file=sys.stderr, flush=True)
    rows = []
    for batch in random_batches(count, max_batch_tokens()):
        probe = make_probe(task, batch)
        gc.collect()
        release_freed_memory()
        base = memory_bytes()
        measured = peak_on_cpu(lambda probe=probe: run_probe(task, probe))
        audio, text = np.array(batch).T
        row = {"rows": len(batch), "audio_tokens": int(audio.sum()), "text_tokens": int(text.sum())}
        row |= {"longest": int((audio + text).max()), "base": base, "measured": measured}
        rows.append(row | {"predicted": predicted(model, batch)})
        share = rows[-1]["predicted"] / measured - 1
        print(f"{rows[-1]} {share:+.1%}", file=sys.stderr, flush=True)
    return {"calibration_seconds": round(seconds, 1), "model": model.to_json(), "batches": rows}


def virtual_bytes() -> int:
    """What RLIMIT_AS counts of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def set_limit(num_bytes: int) -> None:
    """Bound the process's size; -1 = not at all."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def prepared(count: int) -> tuple[TuneTask, list[SpeechBatch], list[int], int]:
    """A task that has run once, batches, what is predicted for each, and the process's size."""
    model = MemoryModel.from_json(json.loads(RESULTS.read_text())["predict"]["model"])
    task = build_task()
    batches = random_batches(count, max_batch_tokens())
    probes = [make_probe(task, batch) for batch in batches]
    keep_freed_memory()  # only now: what the encoder has freed would leave holes between the batches
    run_probe(task, make_probe(task, [(4, 12)]))  # threads and kernels are there once
    print(virtual_bytes(), file=sys.stderr)
    gc.collect()
    release_freed_memory()
    print(virtual_bytes(), file=sys.stderr)
    return task, probes, [predicted(model, batch) for batch in batches], virtual_bytes()


def in_order(count: int) -> dict[str, Any]:
    """See above."""
    task, probes, needs, start = prepared(count)
    set_limit(start + max(needs) + SLACK_BYTES)
    for probe in probes:
        run_probe(task, probe)
    grown = virtual_bytes() - start
    return {"start": start, "largest_prediction": max(needs), "slack": SLACK_BYTES, "ran": count, "grown_by": grown}


def ascending(count: int) -> dict[str, Any]:
    """See above."""
    task, probes, needs, start = prepared(count)
    beyond = []
    for need, probe in sorted(zip(needs, probes, strict=True), key=lambda pair: pair[0]):
        set_limit(start + need + SLACK_BYTES)
        run_probe(task, probe)
        beyond.append(virtual_bytes() - start - need)
    return {"start": start, "slack": SLACK_BYTES, "ran": count, "most_beyond_prediction": max(beyond)}


def over(count: int) -> dict[str, Any]:
    """See above."""
    task, probes, needs, start = prepared(count)
    task.stage.augment = AugmentConfig()  # which is drawn anew for each half
    order = np.argsort(needs)
    parameters = list(task.trainable.values())
    batch = probes[order[-1]]
    model = MemoryModel.from_json(json.loads(RESULTS.read_text())["predict"]["model"])

    def loss_and_backward(part: SpeechBatch) -> tuple[float, float]:
        output = task.loss(part)
        output.sum.backward()
        return output.sum.item(), output.count

    def gradients() -> list[Tensor]:
        found = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return [gradient for gradient in found if gradient is not None]

    half = batch.halves()[1]  # the planner sorts by length
    need = int(model.predict(len(half.ids), *_counts(half)))
    bound = start + need + SLACK_BYTES
    assert bound < start + needs[order[-1]]
    set_limit(bound)
    error: BaseException | None = None
    try:
        loss_and_backward(batch)
    except Exception as caught:
        error = caught.with_traceback(None)
    assert is_out_of_memory(error or ValueError("it fitted")), error
    gradients()
    splits: list[int] = []
    parts = run_with_splitting(
        loss_and_backward, batch, task.halves, lambda whole, _: splits.append(len(whole.ids)), parameters=parameters
    )
    of_parts = gradients()
    run_probe(task, probes[order[0]])

    set_limit(resource.RLIM_INFINITY)
    loss, num_tokens = loss_and_backward(batch)
    of_whole = gradients()
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(of_parts, of_whole, strict=True))
    return {
        "predicted": needs[order[-1]],
        "limit_beside_start": bound - start,
        "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}",
        "split": splits,
        "loss_difference": abs(sum(part[0] for part in parts) - loss) / loss,
        "same_count": sum(part[1] for part in parts) == num_tokens,
        "largest_relative_gradient_difference": worst,
    }


def _counts(batch: SpeechBatch) -> tuple[int, int, int]:
    """Audio tokens, text tokens and the longest row of a batch."""
    audio = np.array([sum(counts) for counts in batch.audio_tokens])
    text = np.array([len(ids) - len(counts) for ids, counts in zip(batch.input_ids, batch.audio_tokens, strict=True)])
    return int(audio.sum()), int(text.sum()), int((audio + text).max())


def summary(batches: list[dict[str, int]]) -> dict[str, float]:
    """How far predictions are above what was measured."""
    beside = np.array([row["predicted"] / row["measured"] for row in batches]) - 1
    total = np.array([(row["base"] + row["predicted"]) / (row["base"] + row["measured"]) for row in batches]) - 1
    shares = {"beside_base": beside, "process_total": total}
    return {
        f"{name}_{what}": float(getattr(np, what)(v)) for name, v in shares.items() for what in ("min", "max", "mean")
    }


STEPS = {"predict": predict, "in_order": in_order, "ascending": ascending, "over": over}


def main() -> None:
    """Run the steps, each in its process, and keep what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50, help="how many (default %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which (default all)")
    parser.add_argument("--here", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(STEPS[arguments.here](arguments.batches)))
        return
    for step in arguments.steps:
        command = [sys.executable, __file__, "--here", step, "--batches", str(arguments.batches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"the step {step} failed")
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"version": 1}
        results[step] = json.loads(done.stdout.splitlines()[-1])
        if step == "predict":
            results[step]["above_measured"] = summary(results[step]["batches"])
            print(json.dumps(results[step]["above_measured"], indent=1))
        else:
            print(json.dumps(results[step], indent=1))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
