"""Why the defaults are what they are: each main hyperparameter at three points, three seeds each, in short runs.

    python benchmarks/defaults.py                     # everything: 72 runs, about two hours on two cores
    python benchmarks/defaults.py --jobs 2            # two at a time, a core each: less time in all, more for each
    python benchmarks/defaults.py stack_factor        # one of them
    python benchmarks/defaults.py encoder             # frozen, LoRA or full encoder

The value that the files use is one and the same run in every sweep of a stage, so it is trained once for each seed.

A run is `configs/benchmark-align.yaml` (CTC through the embedding rows) or `configs/benchmark-tune.yaml` (the same,
then the language model), with one key changed. The score is the word error rate on training-split clips that were kept
out of training; these sweeps do not touch the held-out split. Results are added to
`benchmarks/results/defaults.json` as they come, so that a second call goes on where the first one stopped, and the
tables in `docs/defaults.md` are written from it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ultravox.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "defaults.json"
PAGE = ROOT / "docs" / "defaults.md"
SEEDS = (0, 1, 2)
STUDENT_T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # two-sided, by degrees of freedom
MAX_SEEDS = max(STUDENT_T_95) + 1


@dataclass(frozen=True)
class Sweep:
    """One hyperparameter: where it stands in the config, the points, and the stage whose result is read."""

    title: str
    stage: str
    points: dict[str, list[str]]
    used: str


def _encoder_rate(rate: str) -> list[str]:
    return ["--stages.align.optim.lr.audio_encoder", rate]


def _blocks(window: str, ahead: str = "0", before: str = "0") -> list[str]:
    words = ["--model.encoder_window_seconds", window, "--model.encoder_look_ahead_seconds", ahead]
    return [*words, "--model.encoder_context_seconds", before]


SWEEPS = {
    "align_lr": Sweep(
        "Projector's learning rate while aligning",
        "align",
        {rate: ["--stages.align.optim.lr.projector", rate] for rate in ("1e-3", "2e-3", "4e-3")},
        "2e-3",
    ),
    "match_weight": Sweep(
        "Weight of the embedding-matching term",
        "align",
        {weight: ["--stages.align.align.match_weight", weight] for weight in ("0", "0.5", "2")},
        "0.5",
    ),
    "warmup": Sweep(
        "Warm-up steps while aligning",
        "align",
        {steps: ["--stages.align.optim.warmup_steps", steps] for steps in ("0", "25", "100")},
        "25",
    ),
    "stack_factor": Sweep(
        "Encoder frames (20 ms) in one position",
        "align",
        {factor: ["--model.stack_factor", factor] for factor in ("5", "6", "10")},
        "5",
    ),
    "lora_rank": Sweep(
        "Rank of the language model's LoRA",
        "tune",
        {rank: ["--model.language_model_lora.rank", rank] for rank in ("4", "16", "64")},
        "16",
    ),
    "lora_lr": Sweep(
        "LoRA's learning rate while tuning",
        "tune",
        {rate: ["--stages.tune.optim.lr.language_model", rate] for rate in ("1.5e-3", "3e-3", "6e-3")},
        "3e-3",
    ),
    "encoder": Sweep(
        "What trains in the audio encoder while aligning",
        "align",
        {
            "frozen": [],
            "LoRA, rank 16, rate 1e-4": ["--model.audio_encoder_lora.rank", "16", *_encoder_rate("1e-4")],
            "full, rate 2e-5": ["--model.train_audio_encoder", "true", *_encoder_rate("2e-5")],
            "full, rate 1e-4": ["--model.train_audio_encoder", "true", *_encoder_rate("1e-4")],
        },
        "frozen",
    ),
    "encoder_form": Sweep(
        "How Whisper runs: whole clips, blocks as audio comes, on 30 s, all layers",
        "align",
        {
            "whole clips": [],
            "blocks of 5 s": _blocks("5"),
            "blocks of 2 s": _blocks("2"),
            "blocks of 1 s": _blocks("1"),
            "blocks of 1 s, 0.2 s ahead": _blocks("1", ahead="0.2"),
            "blocks of 1 s, 0.2 s ahead, 2 s before": _blocks("1", ahead="0.2", before="2"),
            "a mix of all layers": ["--model.audio_encoder_layer_mix", "true"],
            "padded to 30 s": ["--model.audio_padding", "padded"],
        },
        "whole clips",
    ),
}


def run(sweep: Sweep, point: str, seed: int, jobs: int) -> dict[str, float]:
    """Train once in a process of its own; word error rate and seconds of the stage in question."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ultravox", "train", str(ROOT / "configs" / f"benchmark-{sweep.stage}.yaml")]
        command += ["--run_dir", f"{folder}/run", "--seed", str(seed), *sweep.points[point]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}")
        summary = json.loads(Path(folder, "run", "train.json").read_text())
    stage = next(stage for stage in summary["stages"] if stage["name"] == sweep.stage)
    return {
        "wer": stage["final_wer"],
        "core_seconds": stage["seconds"] * summary["num_threads"],
        "trained": summary["num_trainable_parameters"],
        "threads": summary["num_threads"],
        "jobs": jobs,
    }


def already_run(results: dict, name: str, point: str, seed: int) -> dict[str, float] | None:
    """The same run under another sweep's name: every used value of a stage is that stage's file as it stands."""
    sweep = SWEEPS[name]
    if point != sweep.used:
        return None
    same = (results.get(other, {}).get(s.used, {}) for other, s in SWEEPS.items() if s.stage == sweep.stage)
    return next((runs[str(seed)] for runs in same if str(seed) in runs), None)


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of its 95% interval (Student's t); not a number from one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT_T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def made_with(counts: Counter[int]) -> str:
    """Threads of a sweep's runs; with more of them a run takes more core seconds, so these are not mixed."""
    texts = {f"{threads} thread{'s' * (threads != 1)}": runs for threads, runs in counts.most_common()}
    usual = next(iter(texts))
    if len(texts) == 1:
        return f"with {usual}"
    found = ", ".join(f"{text} ({runs})" for text, runs in texts.items())
    return f"with these numbers of threads (runs): {found}; core seconds are of those with {usual}"


def page(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """The tables, from what has been measured so far."""
    lines = [
        "# Why the defaults are what they are",
        "",
        "Written by `python benchmarks/defaults.py`; do not edit. Short runs on two cores, the other keys as in",
        "`configs/benchmark-align.yaml` and `configs/benchmark-tune.yaml`. WER is on clips of the training split that",
        "were kept out of training, mean over the seeds with its 95% interval (Student's t). With three seeds the",
        "intervals are wide: a value stays where no other is clearly better. (used) marks those two files' value.",
        "Core seconds: –, where other work ran beside it. Taken while the matching term of `align` was a mean over a",
        "batch's positions, not over each clip's.",
        "",
        "The defaults of a key that no file sets (`docs/configuration.md`) are more careful than these rates: they are",
        "for runs of any length and for language models of any size, where a rate that is too low costs time and one",
        "that is too high the run: 1e-3 for the projector and 5e-4 for LoRA. They go without warm-up; whoever raises",
        "them wants one, as the sweep below shows. The audio encoder's is 2e-5, since with 1e-4 a whole encoder that",
        "trains is soon destroyed; LoRA on it bears 1e-4.",
    ]
    for name, sweep in SWEEPS.items():
        if name not in results:
            continue
        counts = Counter(run["threads"] for runs in results[name].values() for run in runs.values())
        usual = counts.most_common(1)[0][0]
        lines += ["", f"## {sweep.title}", "", f"`{name}`, after the stage `{sweep.stage}`, {made_with(counts)}", ""]
        lines += ["| value | WER | n seeds | core seconds | trainable parameters |", "|---|---|---|---|---|"]
        for point in sweep.points:
            runs = list(results[name].get(point, {}).values())
            if not runs:
                continue
            mean, half = mean_and_half_width([run["wer"] for run in runs])
            timed = [run["core_seconds"] for run in runs if run["threads"] == usual and run["core_seconds"] is not None]
            seconds = f"{statistics.fmean(timed):.0f}" if timed else "–"
            mark = " (used)" if point == sweep.used else ""
            interval = "" if math.isnan(half) else f" ± {100 * half:.1f}"
            trained = f"{runs[0]['trained'] / 1e6:.1f} M"
            lines.append(f"| {point}{mark} | {100 * mean:.1f}%{interval} | {len(runs)} | {seconds} | {trained} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what has not been run yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"one or more of {', '.join(SWEEPS)}; none = all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    arguments = parser.parse_args()
    if unknown := set(arguments.sweeps) - set(SWEEPS):
        parser.error(f"unknown sweep {', '.join(unknown)}; expected some of {', '.join(SWEEPS)}")
    if not 1 <= arguments.seeds <= MAX_SEEDS:
        parser.error(f"--seeds {arguments.seeds}: expected 1 to {MAX_SEEDS}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: expected 1 or more")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = arguments.sweeps or list(SWEEPS)
    make(missing(results, names, arguments.seeds), arguments.jobs, results)
    for name in names:
        for seed in range(arguments.seeds):
            found = already_run(results, name, SWEEPS[name].used, seed)
            if found is not None:
                results.setdefault(name, {}).setdefault(SWEEPS[name].used, {})[str(seed)] = found
    write(results)


def make(todo: list[tuple[str, str, int]], jobs: int, results: dict) -> None:
    """Make runs, `jobs` at a time, and keep each result as it comes.

    After one that fails, or Ctrl-C, no other starts; those under way end, and theirs are kept too.
    """

    def keep(done: Future) -> None:
        name, point, seed = runs[done]
        results.setdefault(name, {}).setdefault(point, {})[str(seed)] = done.result()
        write(results)
        print(f"{name} = {point}, seed {seed}: WER {100 * done.result()['wer']:.1f}%", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(run, SWEEPS[name], point, seed, jobs): (name, point, seed) for name, point, seed in todo}
        waiting = set(runs)
        try:
            for done in as_completed(runs):
                waiting.remove(done)
                keep(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            for done in waiting:
                if not done.cancelled() and done.exception() is None:
                    keep(done)
            raise


def missing(results: dict, names: list[str], num_seeds: int) -> list[tuple[str, str, int]]:
    """Sweep, point and seed of each run that is still to be made, the used value of a stage only once."""
    todo: dict[tuple[str, ...], tuple[str, str, int]] = {}
    for seed in range(num_seeds):
        for name in names:
            sweep = SWEEPS[name]
            for point in sweep.points:
                is_used = point == sweep.used
                if str(seed) in results.get(name, {}).get(point, {}) or already_run(results, name, point, seed):
                    continue
                key = (sweep.stage, str(seed)) if is_used else (name, point, str(seed))
                todo.setdefault(key, (name, point, seed))
    return list(todo.values())


def write(results: dict) -> None:
    """Keep the results, and the page that is made from them."""
    atomic_write(RESULTS, json.dumps(results, indent=1) + "\n")
    atomic_write(PAGE, page(results))


if __name__ == "__main__":
    main()
