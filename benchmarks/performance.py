"""What each key of `performance` and `optim.optimizer` buys: time of a step and peak memory beside a run without it.

    python benchmarks/performance.py [--rounds 2] [--output benchmarks/results/performance.json]

Each is the quickstart's `tune` stage, shortened and on smaller batches, as `ultravox train` runs it, in a process of
its own; rounds go through all variants in turn, so that a machine that grows slow is slow for all. A step's time is the
median of a run's steps but for the first three, and is given by that of the same round's variant without the key. Peak
memory is the whole process's. Fills the table of docs/performance.md.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1
FIRST_STEPS = 3
COMMON = ["--stages.align.max_steps", "0", "--stages.tune.evaluate_every", "0", "--stages.tune.log_every", "1"]
COMMON += ["--evaluation.num_progress_clips", "1", "--logging.tensorboard", "false", "--stages.tune.packing", "off"]
ENCODER = ["--model.audio_encoder_lora.rank", "8"]
CONSTANT = ["--stages.tune.optim.schedule", "constant"]

#: Variant → what it is held against, and its overrides.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "nothing": ("nothing", []),
    "packing: on": ("nothing", ["--stages.tune.packing", "on"]),
    "attention: sdpa": ("nothing", ["--performance.attention", "sdpa"]),
    "attention: eager": ("nothing", ["--performance.attention", "eager"]),
    "compile: true": ("nothing", ["--performance.compile", "true"]),
    "checkpoint_language_model: true": ("nothing", ["--performance.checkpoint_language_model", "true"]),
    "empty_cache_every: 1": ("nothing", ["--performance.empty_cache_every", "1"]),
    "optimizer: adamw, fused: false": ("nothing", ["--stages.tune.optim.fused", "false"]),
    "optimizer: adamw_8bit": ("nothing", ["--stages.tune.optim.optimizer", "adamw_8bit"]),
    "optimizer: adamw_schedule_free": ("nothing", ["--stages.tune.optim.optimizer", "adamw_schedule_free", *CONSTANT]),
    "dtype: bfloat16": ("nothing", ["--model.dtype", "bfloat16"]),
    "dtype: float16": ("nothing", ["--model.dtype", "float16"]),
    "a quarter of the batch, four times": ("nothing", ["accumulate"]),
    "encoder trains": ("encoder trains", ENCODER),
    "checkpoint_audio_encoder: true": ("encoder trains", [*ENCODER, "--performance.checkpoint_audio_encoder", "true"]),
}


def run(overrides: list[str], tokens: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, and peak memory of the process."""
    if overrides == ["accumulate"]:
        overrides, tokens = ["--stages.tune.accumulation_steps", "4"], tokens // 4
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ultravox", "train", str(ROOT / "configs" / "quickstart.yaml")]
        command += ["--run_dir", f"{folder}/run", *COMMON, "--stages.tune.max_batch_tokens", str(tokens)]
        command += ["--stages.tune.max_steps", str(steps), "--stages.tune.optim.warmup_steps", "2", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        clock = [row["elapsed_seconds"] for row in rows if "grad_norm" in row]
        memory = json.loads((Path(folder) / "run" / "train.json").read_text())["peak_memory_bytes"]
    between = [after - before for before, after in itertools.pairwise(clock)]
    return {"step_seconds": statistics.median(between[FIRST_STEPS - 1 :]), "peak_bytes": memory}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over the rounds, least and most in brackets."""
    lines = ["| Key | Time of a step | Peak memory |", "|---|---|---|"]
    for variant, (base, _) in VARIANTS.items():
        pairs = list(zip(results.get(variant, []), results.get(base, []), strict=False))
        if variant == base or not pairs:
            continue
        cells = []
        for key in ("step_seconds", "peak_bytes"):
            ratios = [mine[key] / plain[key] for mine, plain in pairs]
            cells.append(f"{statistics.mean(ratios):.2f} × [{min(ratios):.2f}, {max(ratios):.2f}]")
        lines.append(f"| `{variant}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rounds, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=720, help="positions of a batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=9, help="of a run (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these variants, and what they are held against")
    parser.add_argument("--output", type=Path, help="also write the figures there, as JSON")
    args = parser.parse_args()
    chosen = list(args.only or VARIANTS)
    wanted = [v for v in VARIANTS if v in chosen or any(VARIANTS[c][0] == v for c in chosen)]
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in wanted}
    for variant in track(wanted * args.rounds, description="runs"):
        results[variant].append(run(VARIANTS[variant][1], args.tokens, args.steps))
    print(table(results))
    if args.output:
        content: dict[str, Any] = {"version": VERSION, "tokens": args.tokens, "steps": args.steps, "variants": results}
        args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
