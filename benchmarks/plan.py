"""What planning batches takes and saves: seconds and memory for 10 million rows, resuming, and the share of padding.

    python benchmarks/plan.py                     # everything, about five minutes on one core
    python benchmarks/plan.py --rows 100000       # smaller, for a look

Each measurement of time and memory is a fresh process. Lengths are those of asterisk-en, and 10 million of a
LibriSpeech-like distribution, which is made from published facts:

- durations: the quantiles of train-other-500 that k2-fsa/icefall prints in
  egs/librispeech/ASR/local/display_manifest_statistics.py (with speeds 0.9, 1 and 1.1), linear in between;
- text: 9.4 million words in 960.9 hours (Panayotov et al., "LibriSpeech", ICASSP 2015), 2.7 words a second; taken as
  4/3 tokens for a word, varying by 15 % from clip to clip (an assumption), and a prompt of 25 tokens.

Fixed-size batches without sorting stand beside each plan: as many rows as its batches have on average. The figures are
kept in `benchmarks/results/plan.json`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE, num_audio_tokens, num_encoder_frames, num_mel_frames
from ultravox.data.mixture import Mixture
from ultravox.data.order import DataOrder
from ultravox.data.plan import Limits, Mode
from ultravox.files import atomic_write

RESULTS = Path(__file__).resolve().parent / "results" / "plan.json"
STACK_FACTOR = 5  # five encoder frames of 20 ms in one position of the language model: 100 ms
SHARES = [0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1]
SECONDS = [0.8, 1.7, 2.1, 2.3, 3.5, 5.0, 9.8, 13.4, 15.1, 16.5, 17.2, 18.1, 18.4, 18.9, 31.0]
TOKENS_PER_SECOND = 9.4e6 / (960.9 * 3600) * 4 / 3
PROMPT_TOKENS = 25
ROWS, EPOCHS, REPEATS, BUDGET = 10_000_000, 5, 3, 8192
PADDING_ROWS = 281_241  # utterances of the training splits
MODES: tuple[Mode, ...] = ("padded", "packed", "best_fit")
MOST_BATCHES = 2000  # looked at in a window, where there are more


def librispeech_like(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio and text tokens of read speech, each int32 [row]."""
    random = np.random.default_rng(0)
    audio, text = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
    for start in range(0, count, 1 << 18):
        part = slice(start, start + (1 << 18))
        seconds = np.interp(random.random(len(audio[part])), SHARES, SECONDS)
        rate = TOKENS_PER_SECOND * random.normal(1, 0.15, len(seconds)).clip(0.4, 2)
        audio[part] = np.ceil(seconds * SAMPLE_RATE / (320 * STACK_FACTOR))
        text[part] = PROMPT_TOKENS + np.round(rate * seconds)
    return audio, text


def asterisk() -> tuple[np.ndarray, np.ndarray]:
    """Audio and text tokens of asterisk-en's training split, in SmolLM2's tokens."""
    from transformers import AutoTokenizer

    from ultravox.data.prompts import messages_for, render
    from ultravox.data.sources import load_clips
    from ultravox.model.pretrained import fetch_model

    tokenizer = AutoTokenizer.from_pretrained(fetch_model("smollm2-135m-instruct"))
    clips = load_clips("asterisk-en", "train")
    frames = [num_encoder_frames(num_mel_frames(round(clip.duration * SAMPLE_RATE))) for clip in clips]
    text = [len(render(tokenizer, messages_for(clip, "transcription"))[0]) - 1 for clip in clips]
    return np.array([num_audio_tokens(n, STACK_FACTOR) for n in frames], np.int32), np.array(text, np.int32)


def order_of(audio: np.ndarray, text: np.ndarray, mode: Mode, budget: int) -> DataOrder:
    """Two sources, so that mixing is paid for too."""
    half = len(audio) // 2
    mixture = Mixture({"a": half, "b": len(audio) - half}, seed=0)
    return DataOrder(audio[:, None], text[:, None], mixture, Limits(budget, mode), seed=0)


def plan_all(mode: Mode, rows: int) -> dict[str, float]:
    """Seconds and peak memory for one whole epoch."""
    audio, text = librispeech_like(rows)
    start = time.perf_counter()
    order = order_of(audio, text, mode, BUDGET)
    num_batches = sum(order.num_batches(0, window) for window in range(order.num_windows(0)))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(seconds, 2), "peak_memory_bytes": peak, "num_batches": num_batches}


def resume(mode: Mode, rows: int, epoch: int, late: bool) -> dict[str, float]:
    """Seconds from an order that has planned nothing to a batch at some position."""
    order = order_of(*librispeech_like(rows), mode, BUDGET)
    start = time.perf_counter()
    order.batch(epoch, order.num_windows(epoch) - 1 if late else 0, 100 if late else 0)
    return {"seconds": round(time.perf_counter() - start, 2)}


def padding(audio: np.ndarray, text: np.ndarray, mode: Mode, budget: int) -> dict[str, Any]:
    """Mean and standard deviation over epochs of the shares of padding, of a plan and of unsorted batches."""
    order, total = order_of(audio, text, mode, budget), (audio + text).astype(np.int64)
    found: dict[str, list[float]] = {}
    for epoch in range(EPOCHS):
        batches = [
            order.batch(epoch, window, index).rows
            for window in range(order.num_windows(epoch))
            for index in range(min(MOST_BATCHES, order.num_batches(epoch, window)))
        ]
        size = round(sum(map(len, batches)) / len(batches))
        shuffled = np.random.default_rng([epoch, 7]).permutation(np.concatenate(batches))
        fixed = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        for name, cut in (("plan", batches), ("fixed_size", fixed)):
            found.setdefault(f"{name}_frame_padding", []).append(padded_share(audio, cut))
            if mode != "best_fit":
                found.setdefault(f"{name}_token_padding", []).append(padded_share(total, cut))
        if mode != "padded":
            found.setdefault("fill", []).append(float(total[np.concatenate(batches)].sum() / (budget * len(batches))))
        found.setdefault("num_batches", []).append(order.num_batches(epoch, 0))
    spread = {
        name: {"mean": round(float(np.mean(v)), 5), "std": round(float(np.std(v, ddof=1)), 5)}
        for name, v in found.items()
    }
    return {"num_rows": len(audio), "num_epochs": EPOCHS, "max_batch_tokens": budget} | spread


def padded_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of what is computed that is padding, where each batch is padded to its longest row."""
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(lengths[np.concatenate(batches)].sum()) / padded


def fresh(*words: str) -> dict[str, float]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed with code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(words: list[str]) -> dict[str, float]:
    """What `fresh` asked for."""
    what, mode, rows, *rest = words
    assert mode in MODES
    return plan_all(mode, int(rows)) if what == "plan" else resume(mode, int(rows), int(rest[0]), rest[1] == "late")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="rows whose planning is timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures are kept")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = str(args.rows)
    results: dict[str, Any] = {
        "version": 1,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used; NumPy {np.__version__}",
        "num_rows": args.rows,
        "planning": {mode: [fresh("plan", mode, rows) for _ in range(REPEATS)] for mode in MODES},
        "resuming": {"early": [], "late": []},
        "padding": {},
    }
    for _ in range(REPEATS):  # in turn, so that a busy machine slows both
        results["resuming"]["early"].append(fresh("resume", "padded", rows, "0", "early"))
        results["resuming"]["late"].append(fresh("resume", "padded", rows, "7", "late"))
    data = {"asterisk-en": (asterisk(), 1450), "librispeech-like": (librispeech_like(PADDING_ROWS), BUDGET)}
    for name, ((audio, text), budget) in data.items():
        results["padding"][name] = {mode: padding(audio, text, mode, budget) for mode in MODES}
    atomic_write(args.results, json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict[str, Any]) -> None:
    """The figures as lines."""
    for mode, runs in results["planning"].items():
        seconds = [run["seconds"] for run in runs]
        peak = max(run["peak_memory_bytes"] for run in runs)
        print(f"{mode}: {results['num_rows']} rows in {min(seconds)} to {max(seconds)} s, {peak / 1e9:.2f} GB")
    for place, runs in results["resuming"].items():
        print(f"resuming {place}: {', '.join(str(run['seconds']) for run in runs)} s")
    for name, modes in results["padding"].items():
        for mode, found in modes.items():
            shares = {k: v for k, v in found.items() if isinstance(v, dict) and k != "num_batches"}
            print(f"{name}, {mode}: " + ", ".join(f"{k} {v['mean']:.2%} ± {v['std']:.2%}" for k, v in shares.items()))


if __name__ == "__main__":
    main()
