"""What the ways of training are worth, on the quickstart's data: short runs, a table for each question.

    python benchmarks/recipes.py cells                # stack 5, stack 10, stride 5, mean 5, with and without `align`
    python benchmarks/recipes.py objectives           # each objective of `tune` once
    python benchmarks/recipes.py cells --seeds 3      # more seeds; what has been run stays

A cell is about five minutes of training on two cores: a number of steps, chosen so that all take about as long, since
a run of so many seconds could not be repeated. Scores are on clips of the training split that were kept out of
training; the held-out split is not touched. Results are added to `benchmarks/results/recipes.json` as they come, and
the tables in `docs/recipes.md` are written from it.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from defaults import MAX_SEEDS, ROOT, mean_and_half_width

from ultravox.config.load import load_config
from ultravox.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"
PAGE = ROOT / "docs" / "recipes.md"
CONFIG = ROOT / "configs" / "quickstart.yaml"
CLIPS = 44
Results = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Question → run → seed → figure."""
LAST_ROWS = 5  # of the log, over which a loss is averaged


@dataclass(frozen=True)
class Question:
    """Some runs to compare."""

    title: str
    about: str
    runs: dict[str, list[str]]
    """Name → overrides of `configs/quickstart.yaml`."""
    columns: dict[str, str]
    """Heading → key of the log: of the last evaluation, or of the last lines of training."""
    findings: tuple[str, ...] = ()
    """What the kept results show, and what they do not; to be read again whenever they change."""


WAYS = {"stack 5": ("stack", 5), "stack 10": ("stack", 10), "stride 5": ("stride", 5), "mean 5": ("mean", 5)}
ALIGNS = {"align": (1000, 80), "no align": (0, 120)}
USE = {
    "WER": "wer",
    "token accuracy": "kept_out_token_accuracy",
    "with swapped audio": "swapped_token_accuracy",
    "audio-use margin, nats": "audio_use_margin",
}


def _steps(align: int, tune: int) -> list[str]:
    return ["--stages.align.max_steps", str(align), "--stages.tune.max_steps", str(tune)]


def _tune(*options: str) -> list[str]:
    named = [(f"--stages.tune.tune.{option.split('=')[0]}", option.split("=")[1]) for option in options]
    return [*_steps(*ALIGNS["align"]), *(part for pair in named for part in pair)]


QUESTIONS = {
    "cells": Question(
        "How frames become positions, and whether to align first",
        "1,000 steps of `align` and 80 of `tune`, or 120 of `tune` alone.",
        {
            f"{way}, {first}": [
                "--model.downsampling",
                kind,
                "--model.stack_factor",
                str(factor),
                *_steps(*steps),
            ]
            for way, (kind, factor) in WAYS.items()
            for first, steps in ALIGNS.items()
        },
        USE,
        (
            "- Aligning first decides everything here. The four runs without it have heard nothing after 120 steps: as",
            "  many tokens are told with another clip's audio as with the own one, and the transcripts are made up.",
            "- With it, `stride`, which throws four frames of five away, is clearly worst. `stack 5`, `mean 5` and",
            "  `stack 10` lie within 6 points, about what the quickstart's error rate moves between seeds: one seed",
            "  does not order them. `stack 10` has half as many positions to read.",
            "- What longer tuning would make of the four without alignment, this does not show.",
        ),
    ),
    "objectives": Question(
        "Each objective of `tune`, once",
        "1,000 steps of `align`, then 80 of `tune` with one thing added to the cross-entropy, or in its place.",
        {
            "cross-entropy": _steps(*ALIGNS["align"]),
            "label smoothing 0.05": _tune("label_smoothing=0.05"),
            "z-loss 1e-4": _tune("z_loss_weight=1e-4"),
            "distillation alone": _tune("cross_entropy_weight=0", "distillation.weight=1"),
            "cross-entropy + distillation": _tune("distillation.weight=1"),
            "end of audio, early": _tune("end_of_audio.variant=early", "end_of_audio.weight=0.3"),
            "end of audio, late": _tune("end_of_audio.variant=late"),
            "end of audio, head": _tune("end_of_audio.variant=head", "end_of_audio.weight=0.3"),
            "next frame, regression": _tune("next_frame.weight=0.1", "next_frame.mask_share=0.2"),
            "next frame, contrastive": _tune(
                "next_frame.weight=0.1", "next_frame.mask_share=0.2", "next_frame.form=contrastive"
            ),
            "tokens around the audio": [*_steps(*ALIGNS["align"]), "--model.audio_boundaries", "true"],
        },
        USE
        | {
            "end-of-audio accuracy": "end_of_audio_accuracy",
            "by length alone": "end_of_audio_length_only_accuracy",
            "next-frame skill": "next_frame_skill",
        },
        (
            "- Nothing that is added here makes 80 steps better at transcribing. z-loss, label smoothing and the",
            "  tokens around the audio cost 2 to 5 points of error rate, which one seed cannot tell from nothing.",
            "- Distillation alone uses the audio (tokens are lost with another clip's), and forgets to transcribe,",
            "  presumably since the teacher, a small chat model without adapters, answers what it reads instead of",
            "  writing it down. Mixed with the cross-entropy it pulls the same way.",
            "- End of audio leaves less to learn from: half of the clips are cut, and nothing is learnt of their",
            "  words, which costs 20 to 31 points. `head` tells whole from cut clips far better than their length",
            "  does, within 80 steps; `early` and `late` do not beat the length: they have not learnt where a speaker",
            "  ends. configs/objectives/end-of-audio.yaml puts it last, after a stage of transcription.",
            "- Next frames are predicted better than by repeating the frame that is heard (skill above 0), at the",
            "  price of transcription, from which a fifth of each clip is hidden.",
        ),
    ),
}


def run(question: Question, name: str, seed: int) -> dict[str, float]:
    """Train once in a process of its own; what the log says at the end, and the seconds of CPU that it took."""
    before = _cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ultravox", "train", str(CONFIG), "--run_dir", f"{folder}/run"]
        command += ["--seed", str(seed), "--evaluation.num_progress_clips", str(CLIPS)]
        command += ["--logging.tensorboard", "false", *question.runs[name]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nfailed with code {done.returncode}:\n{done.stderr[-2000:]}")
        return read(Path(folder, "run")) | {"cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    """Of the processes that have been waited for: what they took, whatever ran beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(run_dir: Path) -> dict[str, float]:
    """What the columns of any question show of a run."""
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "tune"]
    evaluation = next(row for row in reversed(rows) if "wer" in row)
    trained = [row for row in rows if "loss" in row][-LAST_ROWS:]
    found = {}
    for key in dict.fromkeys(key for question in QUESTIONS.values() for key in question.columns.values()):
        values = [row[key] for row in trained if key in row]
        if key in evaluation:
            found[key] = evaluation[key]
        elif values:
            found[key] = sum(values) / len(values)
    return found


def known_twin(results: Results, overrides: list[str], seed: int) -> dict[str, float] | None:
    """What a run of the same configuration and seed gave, under whichever question; None = there was none."""
    config = load_config(CONFIG, overrides)
    for name, runs in results.items():
        for run_name, seeds in runs.items():
            if str(seed) in seeds and load_config(CONFIG, QUESTIONS[name].runs[run_name]) == config:
                return seeds[str(seed)]
    return None


def page(results: Results) -> str:
    """The tables, from what has been measured so far."""
    lines = [
        "# What the ways of training are worth",
        "",
        "Written by `python benchmarks/recipes.py`; do not edit. Runs of some minutes on two cores, all else as in",
        "`configs/quickstart.yaml`; CPU minutes count both cores and loading. Scores are on 44 clips of",
        "the training split that were kept out of training, the mean over seeds with its 95% interval (Student's t)",
        "where there are several. One seed says little: between seeds, the quickstart's error rate moves by several",
        "points. Taken while the matching term of `align` was a mean over a batch's positions, not over each clip's.",
    ]
    for name, question in QUESTIONS.items():
        if name not in results:
            continue
        lines += ["", f"## {question.title}", "", question.about, ""]
        lines += [
            f"| run | {' | '.join(question.columns)} | n seeds | CPU minutes |",
            "|---" * (len(question.columns) + 3) + "|",
        ]
        for run_name in question.runs:
            runs = list(results[name].get(run_name, {}).values())
            if not runs:
                continue
            cells = [_cell(key, [found[key] for found in runs if key in found]) for key in question.columns.values()]
            minutes = mean_and_half_width([found["cpu_seconds"] / 60 for found in runs])[0]
            lines.append(f"| {run_name} | {' | '.join(cells)} | {len(runs)} | {minutes:.1f} |")
        if missing := [run_name for run_name in question.runs if not results[name].get(run_name)]:
            lines += ["", f"Not run yet: {'; '.join(missing)}."]
        lines += ["", *question.findings] if question.findings else []
    return "\n".join(lines) + "\n"


def _cell(key: str, values: list[float]) -> str:
    if not values:
        return "–"
    mean, half = mean_and_half_width(values)
    scale, unit, digits = (1, "", 2) if key in ("audio_use_margin", "next_frame_skill") else (100, "%", 1)
    interval = "" if math.isnan(half) else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{unit}{interval}"


def main() -> None:
    """Run what has not been run yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)}; none = all")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default %(default)s)")
    parser.add_argument("--runs", nargs="*", help="only these, by their names in the table")
    arguments = parser.parse_args()
    if unknown := set(arguments.questions) - set(QUESTIONS):
        parser.error(f"unknown question {', '.join(unknown)}; expected some of {', '.join(QUESTIONS)}")
    if not 1 <= arguments.seeds <= MAX_SEEDS:
        parser.error(f"--seeds {arguments.seeds}: expected 1 to {MAX_SEEDS}")
    known = [run_name for question in QUESTIONS.values() for run_name in question.runs]
    if odd := set(arguments.runs or ()) - set(known):
        parser.error(f"unknown run {', '.join(sorted(odd))}; expected some of {', '.join(known)}")
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(arguments.seeds):
        for name in arguments.questions or QUESTIONS:
            for run_name in QUESTIONS[name].runs:
                of_run = results.setdefault(name, {}).setdefault(run_name, {})
                if str(seed) in of_run or (arguments.runs and run_name not in arguments.runs):
                    continue
                same = known_twin(results, QUESTIONS[name].runs[run_name], seed)
                of_run[str(seed)] = run(QUESTIONS[name], run_name, seed) if same is None else same
                atomic_write(RESULTS, json.dumps(results, indent=1) + "\n")
                atomic_write(PAGE, page(results))
                print(f"{name}: {run_name}, seed {seed}: WER {100 * of_run[str(seed)]['wer']:.1f}%", flush=True)
    atomic_write(PAGE, page(results))


if __name__ == "__main__":
    main()
